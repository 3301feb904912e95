"""Passes and pipelines: what changes a program says what it needs, what it did, and what holds afterwards."""

import difflib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn

from .errors import ConfigError, SubgraphPeftError, suggestion
from .graphs import show
from .lower import META
from .program import Program


@dataclass(frozen=True)
class State:
    """What flows through a pipeline.

    program:  as the passes so far left it           model, tokenizer:  the eager model and its tokenizer, if loaded
    data:     prepared data for training             folder:            where results are written, if anywhere
    records:  what passes report, by pass (training curves, accuracies, export checks)
    """

    program: Program | None = None
    model: nn.Module | None = None
    tokenizer: Any = None
    data: Any = None
    folder: Path | None = None
    seed: int = 0
    records: dict[str, Any] = field(default_factory=dict)

    def with_record(self, name: str, value: Any, **changes: Any) -> "State":
        return replace(self, records={**self.records, name: value}, **changes)

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
            raise ConfigError(f"{self.name}: {explain(error, list(type(self).model_fields))}") from error

    def requires(self, state: State) -> None:
        """Raises ConfigError when the pass cannot run on this state."""

    def apply(self, state: State) -> tuple[State, str]:
        """The new state and a sentence that says what changed."""
        raise NotImplementedError

    def ensures(self, before: State, after: State) -> None:
        """Every graph is well-formed, and every node that a rewrite added says which."""
        if after.program is None or after.program is before.program:
            return
        known = {node.name for graph in after.program.captured.module.graphs() for node in graph.nodes}
        for graph in after.program.module.graphs():
            graph.lint()
            for node in graph.nodes:
                unknown = node.op == "call_function" and node.name not in known
                if unknown and META not in node.meta.get("custom", {}):
                    raise SubgraphPeftError(f"{self.spelled()}: the node {node.name} does not say which pass made it.")

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
        from .oneline import spell

        return spell(self.option_name(), self.options())

    def option_name(self) -> str:
        return self.name

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude_defaults=True)


def explain(error: ValidationError, known: Sequence[str]) -> str:
    parts = []
    for item in error.errors():
        name = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown option {name!r}.{suggestion(name, known)} Options: {', '.join(known) or 'none'}")
        else:
            parts.append(f"option {name!r}: {item['msg']}" if name else item["msg"])
    return "; ".join(parts) + "."


def difference(before: Program | None, after: Program | None) -> tuple[str, ...]:
    """Lines added (+) and removed (-) between two programs' training graphs."""
    if before is None or after is None or before is after:
        return ()
    lines = difflib.unified_diff(
        show(before.graph).splitlines(), show(after.graph).splitlines(), "before", "after", "", "", 2, ""
    )
    return tuple(lines)


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: tuple[Pass, ...]

    @staticmethod
    def read(text: str | Sequence[Any]) -> "Pipeline":
        """From the one-line form `capture,lora{r=8},fold`, or from a list as in YAML: names and {name: options}."""
        from .steps import make

        if isinstance(text, str):
            from .oneline import parse

            return Pipeline(tuple(make(name, options) for name, options in parse(text)))
        passes = []
        for item in text:
            if isinstance(item, str):
                passes.append(make(item, {}))
            elif isinstance(item, dict) and len(item) == 1:
                name, options = next(iter(item.items()))
                passes.append(make(name, options or {}))
            else:
                raise ConfigError(f"A pass is a name or {{name: {{options}}}}, not {item!r}.")
        return Pipeline(tuple(passes))

    def __str__(self) -> str:
        return ",".join(item.spelled() for item in self.passes)

    def run(self, state: State) -> Iterator[Result]:
        """Each pass's result as it comes; the last one's state is the outcome."""
        for item in self.passes:
            result = item(state)
            state = result.state
            yield result

    def apply(self, program: Program) -> Program:
        """The program after the passes; for pipelines that need neither data nor files."""
        state = State(program=program, model=None)
        for result in self.run(state):
            state = result.state
        return state.program
