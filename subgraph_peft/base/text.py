"""Tables of text: one record, printed for a terminal or as markdown."""

import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """A title, the heads of the columns and rows of cells. Columns starting with '>' are right-aligned numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def __str__(self) -> str:
        """For a terminal of 160 characters."""
        from rich.console import Console

        console = Console(file=io.StringIO(), width=160, color_system=None)
        console.print(rich_table(self))
        return console.file.getvalue().rstrip("\n")

    def markdown(self) -> list[str]:
        """Lines of markdown, without the title, and an empty one."""
        heads = [column.removeprefix(">") for column in self.columns]
        lines = [heads, ["---"] * len(heads), *self.rows]
        return [*("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines), ""]

    def without_empty(self) -> "Table":
        """Without columns that hold nothing."""
        kept = [i for i in range(len(self.columns)) if any(row[i] not in ("", "0") for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return replace(self, columns=[self.columns[i] for i in kept], rows=rows)


def rich_table(table: Table) -> "rich.table.Table":
    from rich.markup import escape
    from rich.table import Table as RichTable

    made = RichTable(title=table.title, title_justify="left", show_edge=False, header_style="bold", pad_edge=False)
    for column in table.columns:
        justify = "right" if column.startswith(">") else "left"
        made.add_column(column.removeprefix(">"), justify=justify, overflow="fold")
    for row in table.rows:
        made.add_row(*map(escape, row))
    return made


def layered(name: str) -> str:
    """A weight's path with its layer numbers as `*`: a selector that matches the same place in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))


def grouped(rows: Iterable[Sequence[str]]) -> list[tuple[str, ...]]:
    """Rows that differ only in the layer number of their first cell become one, with their count as second cell."""
    groups: dict[tuple[str, ...], list[str]] = {}
    for name, *cells in rows:
        groups.setdefault((layered(name), *cells), []).append(name)
    return [
        (pattern if len(names) > 1 else names[0].removesuffix(".weight"), str(len(names)), *cells)
        for (pattern, *cells), names in groups.items()
    ]
