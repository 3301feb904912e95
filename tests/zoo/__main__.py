"""python -m tests.zoo [NAME-OR-GROUP ...] [--fast] [--notes] [--json FILE]"""

import fnmatch
from pathlib import Path
from typing import Annotated

import typer

from tests.zoo import entries
from tests.zoo.road import Row, walk
from tests.zoo.table import as_json, text


def main(
    names: Annotated[list[str] | None, typer.Argument(help="names or groups of architectures, globs allowed")] = None,
    fast: Annotated[bool, typer.Option(help="only those that the default tests run")] = False,
    notes: Annotated[bool, typer.Option(help="list fixed dimensions and unread parameters")] = False,
    json: Annotated[Path | None, typer.Option(help="write the cells to this file, too")] = None,
) -> None:
    """Take every architecture from capture to ONNX and print what works. Exit code 1 if a cell is an undeclared no."""
    chosen = {
        entry.name: entry
        for entry in entries()
        if (entry.fast or not fast)
        and (not names or any(fnmatch.fnmatch(part, n) for n in names for part in (entry.name, entry.group)))
    }
    if not chosen:
        raise typer.BadParameter(f"no architecture is called {', '.join(names or [])}")
    rows: list[Row] = []
    for entry in chosen.values():
        rows.append(walk(entry))
        typer.echo(f"{entry.name}: {rows[-1].seconds:.0f} s", err=True)
        if json is not None:
            json.write_text(as_json(rows, chosen))
    typer.echo(text(rows, chosen, notes))
    raise typer.Exit(any(row.surprises(chosen[row.name]) for row in rows))


if __name__ == "__main__":
    typer.run(main)
