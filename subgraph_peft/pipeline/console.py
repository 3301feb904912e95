"""What the command line prints: messages, tables, refusals without a traceback."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import typer
from rich.console import Console
from rich.markup import escape

from ..base.errors import SubgraphPeftError
from ..base.text import Table, rich_table


@cache
def console(stderr: bool = False) -> Console:
    """As wide as the terminal, or 140 characters where it is none."""
    return Console(stderr=stderr, width=None if sys.stdout.isatty() else 140)


@contextmanager
def refusals() -> Iterator[None]:
    """Errors of this package as one message without a traceback."""
    try:
        yield
    except SubgraphPeftError as error:
        console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False)
        raise typer.Exit(1) from error
    except KeyboardInterrupt as error:
        console(stderr=True).print(
            f"Interrupted{escape(f': {error}' if str(error) else '')}. Nothing half-written is left; run the same"
            "\ncommand again to go on from the last checkpoint."
        )
        raise typer.Exit(130) from error


@contextmanager
def together() -> Iterator[None]:
    """One of the processes of torchrun or accelerate launch, of which the first prints."""
    from ..base.processes import processes

    with refusals(), processes() as speaks:
        console().quiet = not speaks
        yield


def announce(text: str) -> None:
    console().print(escape(text), highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    console().print(rich_table(table))


def print_rows(title: str, rows: Iterable[Sequence[str]], columns: Sequence[str] = ("", "")) -> None:
    print_table(Table(title, columns, rows))
