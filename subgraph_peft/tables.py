"""Tables for people: sites, what a rewrite costs, what a fold kept."""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .adapter import Adapter
from .at_rows import RowBlocks
from .fold import FoldReport
from .program import Program
from .sites import Site, layered

REWRITE_COLUMNS = (
    "module",
    ">sites",
    "adapters",
    "form",
    ">trainable",
    ">FLOPs/token",
    ">FLOPs/step",
    ">bytes",
    "why dense",
)
BYTES_PER_STATE = 8  # two float32 moments of AdamW for every trainable number


def render(table: Table, width: int = 160) -> str:
    """A table as plain text."""
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip("\n")


def new_table(title: str, columns: Iterable[str]) -> Table:
    """Columns starting with '>' are right-aligned numbers."""
    table = Table(title=title, title_justify="left", show_edge=False, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(
            column.removeprefix(">"), justify="right" if column.startswith(">") else "left", overflow="fold"
        )
    return table


def grouped(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that differ only in the layer number of their first cell become one, with their count as second cell."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        groups.setdefault((layered(name), *cells), []).append(name)
    return [
        (pattern if len(names) > 1 else names[0].removesuffix(".weight"), str(len(names)), *cells)
        for (pattern, *cells), names in groups.items()
    ]


def fill(table: Table, rows: Iterable[Sequence[str]]) -> None:
    for row in rows:
        table.add_row(*map(escape, row))


def without_empty(table: Table) -> Table:
    """The table without columns that hold nothing."""
    table.columns = [column for column in table.columns if any(cell not in ("", "0") for cell in column.cells)]
    return table


def site_table(sites: Iterable[Site]) -> Table:
    table = new_table("Sites", ["module", ">sites", "form", "layout", "shape", ">out", ">in", ">calls", "bias", "note"])

    def cells(site: Site) -> tuple[str, ...]:
        notes = [f"tied to {', '.join(site.ties)}"] if site.ties else []
        notes += ["output head"] if site.head else []
        notes += [", ".join(sorted({call.operator for call in site.calls}))] if site.kind == "other" else []
        notes += [f"{site.groups} groups"] if site.groups > 1 else []
        notes += [f"{site.stack} experts"] if site.stack else []
        notes += [f"blocks {', '.join(name for name, _, _ in site.blocks)}"] if site.blocks else []
        return (
            site.name, site.kind, site.layout_text, "×".join(map(str, site.shape)), str(site.out_features),
            str(site.in_features), str(len(site.calls)), "yes" if site.bias else "", "; ".join(notes),
        )  # fmt: skip

    fill(table, grouped(map(cells, sites)))
    return without_empty(table)


def rewrite_rows(program: Program) -> list[dict[str, object]]:
    """One row a rewritten site: form, why it is dense where it is, numbers trained, FLOPs and bytes added."""
    rows = []
    own = dict(program.module.named_parameters())
    for name, lowered in program.lowered.items():
        adapters = [a for a in program.adapters if a.on(name)]
        site = next(s for s in adapters[0].sites if s.name == name)
        values = [own[path] for a in adapters for path in a.paths(site).values()]
        training = sum(value.numel() for value in values if value.requires_grad)
        held = sum(value.numel() * value.element_size() for value in values)
        constants = [
            dict(program.module.named_buffers())[p] for p, c in program.constants.items() if c.target.name == name
        ]
        rows.append(
            {
                "site": name,
                "shape": list(site.shape),
                "adapters": " over ".join(a.name + blocks_text(a, site) for a in reversed(adapters)),
                "form": lowered.form,
                "dense": list(lowered.dense),
                "trainable": training,
                "flops_per_token": lowered.per_token,
                "flops_per_step": lowered.per_step,
                "bytes": held + training * BYTES_PER_STATE + sum(c.numel() * c.element_size() for c in constants),
                "nodes": list(lowered.nodes),
            }
        )
    return rows


def blocks_text(adapter: Adapter, site: Site) -> str:
    """`[q, v]` where an adapter takes only these row blocks."""
    method = adapter.at(site)
    return f"[{', '.join(method.only)}]" if isinstance(method, RowBlocks) else ""


def rewrite_table(program: Program) -> Table:
    title = f"Rewritten sites of {program.source}, numbers per site"
    table = new_table(title, REWRITE_COLUMNS)
    fill(table, rewrite_cells(rewrite_rows(program)))
    return without_empty(table)


def rewrite_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    """The rows of a rewrite as text, alike layers together, and their total."""
    numbers = ("trainable", "flops_per_token", "flops_per_step", "bytes")
    cells = grouped(
        (row["site"], row["adapters"], row["form"], *(f"{row[key]:,}" for key in numbers), "; ".join(row["dense"]))
        for row in rows
    )
    total = (f"{sum(row[key] for row in rows):,}" for key in numbers)
    return [*cells, ("total", str(len(rows)), "", "", *total, "")]


def fold_rows(program: Program) -> list[dict[str, object]]:
    """One row a folded weight."""
    return [
        {"weight": name, "relative_delta": site.relative_delta, "retained": site.retained}
        for name, site in program.folded.sites.items()
    ]


def fold_table(program: Program) -> Table:
    report = program.folded
    title = f"Folded into {report.dtype}; {difference_text(report)}"
    table = new_table(title, ["module", ">‖ΔW‖ / ‖W‖", ">delta retained"])
    fill(table, fold_cells(fold_rows(program)))
    return table


def difference_text(report: FoldReport) -> str:
    error = report.output_error
    return "outputs not compared" if error is None else f"outputs differ by {error:.1e} of the largest"


def fold_cells(rows: Sequence[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    return [(r["weight"].removesuffix(".weight"), f"{r['relative_delta']:.3%}", f"{r['retained']:.4%}") for r in rows]
