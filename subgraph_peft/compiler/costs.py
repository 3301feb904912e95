"""What a rewrite costs at each site: form, numbers trained, FLOPs and bytes added."""

from ..base.text import Table, grouped
from ..graph.site import Site
from ..method.adapter import Adapter
from ..method.row_block_method import RowBlocks
from ..program.program import Program

COLUMNS = (
    "module", ">sites", "adapters", "form", ">trainable", ">FLOPs/token", ">FLOPs/step", ">bytes", "why dense",
)  # fmt: skip
NUMBERS = ("trainable", "flops_per_token", "flops_per_step", "bytes")
BYTES_PER_STATE = 8  # two float32 moments of AdamW for every trainable number


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
    """One row a rewritten site, alike layers together, and their total."""
    rows = rewrite_rows(program)
    cells = grouped(
        (row["site"], row["adapters"], row["form"], *(f"{row[key]:,}" for key in NUMBERS), "; ".join(row["dense"]))
        for row in rows
    )
    total = (f"{sum(row[key] for row in rows):,}" for key in NUMBERS)
    title = f"Rewritten sites of {program.source}, numbers per site"
    return Table(title, COLUMNS, [*cells, ("total", str(len(rows)), "", "", *total, "")]).without_empty()
