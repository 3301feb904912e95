"""Passes of a pipeline: each says what it needs, what it did, what holds afterwards and what a report shows of it."""

import difflib
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from ..base.errors import ConfigError
from ..base.schema import explained, option_of
from ..base.text import Table
from ..graph.nodes import show
from ..graph.rewriter import check_added, failing_as
from ..program.program import Program
from .oneline import spell


@dataclass(frozen=True)
class State:
    """What flows through a pipeline.

    program:  as the passes so far left it           model, tokenizer:  the eager model and its tokenizer, if loaded
    data:     prepared data for training             folder:            where results are written, if anywhere
    records:  what passes report, by pass (training curves, export checks)
    scores:   on held-out data, by the stage that has them: before and after training, folded, exported
    """

    program: Program | None = None
    model: nn.Module | None = None
    tokenizer: Any = None
    data: Any = None
    folder: Path | None = None
    seed: int = 0
    records: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    def with_record(self, name: str, value: Any, **changes: Any) -> "State":
        return replace(self, records={**self.records, name: value}, **changes)

    def without_record(self, name: str) -> "State":
        return replace(self, records={other: value for other, value in self.records.items() if other != name})

    def with_scores(self, **scores: dict[str, float]) -> "State":
        return replace(self, scores={**self.scores, **scores})

    def resolve(self, path: str) -> Path:
        """A path of an option, below the results folder unless it is absolute."""
        return Path(path) if Path(path).is_absolute() or self.folder is None else self.folder / path


@dataclass(frozen=True)
class Result:
    """What one pass did: the state after it, a sentence, seconds, the graph difference, and on CUDA the most bytes that
    torch had allocated at a time."""

    state: State
    pass_: "Pass"
    summary: str
    seconds: float
    difference: tuple[str, ...] = ()
    peak: int | None = None

    @property
    def cost(self) -> str:
        return f"{self.seconds:.1f} s" + (f", peak {self.peak / 2**20:,.0f} MiB" if self.peak is not None else "")


class Pass(BaseModel):
    """Base of passes: the fields are the options. A subclass gives `apply`, and `requires` if it has a precondition."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True, coerce_numbers_to_str=True)

    name: ClassVar[str] = ""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong = error.errors()
            what = f"{self.name}: {explained(wrong, type(self))}."
            raise ConfigError(what, option=option_of(wrong)) from error

    def requires(self, state: State) -> None:
        """Raises ConfigError when the pass cannot run on this state."""

    def apply(self, state: State) -> tuple[State, str]:
        """The new state and a sentence that says what changed."""
        raise NotImplementedError

    def tables(self, state: State) -> Sequence[Table]:
        """What a report shows of the pass, from the state after it."""
        return ()

    def ensures(self, before: State, after: State) -> None:
        """Every graph is well-formed, and every node that a rewrite added says which."""
        if after.program is None or after.program is before.program:
            return
        known = {node.name for graph in after.program.captured.graphs() for node in graph.nodes}
        for graph in after.program.graphs():
            with failing_as(f"The pass {self.spelled()}"):
                check_added(graph, known)

    def __call__(self, state: State) -> Result:
        self.requires(state)
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        after, summary = self.apply(state)
        self.ensures(state, after)
        seconds, peak = time.perf_counter() - started, torch.cuda.max_memory_allocated() if cuda else None
        return Result(after, self, summary, seconds, difference(state.program, after.program), peak)

    def spelled(self) -> str:
        """The pass in the one-line form, `name{option=value}`; options at their defaults are left out."""
        return spell(self.option_name(), self.options())

    def option_name(self) -> str:
        return self.name

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True)


def difference(before: Program | None, after: Program | None) -> tuple[str, ...]:
    """Lines added (+) and removed (-) between two programs' training graphs."""
    if before is None or after is None or before is after:
        return ()
    lines = difflib.unified_diff(
        show(before.graph).splitlines(), show(after.graph).splitlines(), "before", "after", "", "", 2, ""
    )
    return tuple(lines)
