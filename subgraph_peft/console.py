"""What the command line prints: messages, tables, refusals without a traceback."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .errors import SubgraphPeftError
from .processes import processes

WIDE = None if sys.stdout.isatty() else 140
out, err = Console(width=WIDE), Console(stderr=True, width=WIDE)


@contextmanager
def refusals() -> Iterator[None]:
    """Errors of this package as one message without a traceback."""
    try:
        yield
    except SubgraphPeftError as error:
        err.print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        err.print(
            f"Interrupted{escape(f': {error}' if str(error) else '')}. Nothing half-written is left; run the same"
        )
        err.print("command again to go on from the last checkpoint.")
        raise typer.Exit(130) from error


@contextmanager
def together() -> Iterator[None]:
    """One of the processes of torchrun or accelerate launch, of which the first prints."""
    with refusals(), processes() as speaks:
        out.quiet = not speaks
        yield


def announce(text: str) -> None:
    out.print(escape(text), highlight=False, soft_wrap=True)


def new(columns: list[str], title: str) -> Table:
    from .tables import new_table

    return new_table(title, columns)


def print_rows(title: str, rows: list[tuple[str, str]]) -> None:
    table = new(["", ""], title)
    for what, value in rows:
        table.add_row(what, escape(value))
    out.print(table)
