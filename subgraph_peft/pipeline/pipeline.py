"""Pipelines: passes in order, read from one line or from a list. Passes of other packages register in the entry-point
group `subgraph_peft.pipeline`."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..base.errors import ConfigError, suggestion
from ..base.plugins import Plugins
from ..method import registry
from ..method.written import WRITTEN, Written
from ..program.program import Program
from . import oneline
from .builtin_passes import Capture, Fold, Optimise, Rewrite, Train
from .deploy import Decoder, Export
from .passes import Pass, Result, State

GROUP = "subgraph_peft.pipeline"
BUILT_IN = (Capture, Optimise, Train, Fold, Export, Decoder)


INSTALLED = Plugins(GROUP, Pass, "passes", ConfigError, dict)


def steps() -> dict[str, type[Pass]]:
    """The passes that are no rewrite, by name: the package's own, and installed ones.

    Raises ConfigError where two passes, or a pass and a method, have one name.
    """
    own: dict[str, type[Pass]] = {cls.name: cls for cls in BUILT_IN}
    added = INSTALLED.all()
    for name, cls in added.items():
        other = own.get(name, registry.methods().get(name))
        if other is not None or name == WRITTEN:
            raise ConfigError(
                f"Two passes are called {name!r}: {other or 'the defined method'} and {cls}. Uninstall one."
            )
    return own | added


def names() -> list[str]:
    """Steps and installed methods; beside them a pipeline has `method`, which defines one."""
    return [*steps(), *registry.methods()]


def make(name: str, options: Mapping[str, Any]) -> Pass:
    """The pass called `name`: a step, or the rewrite by the method of that name."""
    if not isinstance(options, Mapping):
        raise ConfigError(f"{name}: options are a mapping, not {options!r}.")
    known = steps()
    if name in known:
        return known[name](**options)
    every = [*known, *registry.methods(), WRITTEN]
    if name not in every:
        raise ConfigError(f"Unknown pass {name!r}.{suggestion(name, every)} Passes: {', '.join(every)}.")
    made = Rewrite.of(name, options)
    for layer in made.method.layers():
        if isinstance(layer, Written) and layer.name in every:
            what = f"{layer.name}: option 'name': a pass is called {layer.name!r} already."
            raise ConfigError(what, option=("name",))
    return made


@dataclass(frozen=True)
class Pipeline:
    """Passes in order."""

    passes: tuple[Pass, ...]

    @staticmethod
    def read(text: str | Sequence[Any]) -> "Pipeline":
        """From the one-line form `capture,lora{r=8},fold`, or from a list as in YAML: names and {name: options}."""
        items = oneline.parse(text) if isinstance(text, str) else map(item_of, text)
        return Pipeline(tuple(make(name, options) for name, options in items))

    def __str__(self) -> str:
        return ",".join(item.spelled() for item in self.passes)

    def until(self, name: str) -> "Pipeline":
        """The passes up to and with the first of that name. Raises ConfigError where there is none."""
        for index, item in enumerate(self.passes):
            if item.option_name() == name:
                return Pipeline(self.passes[: index + 1])
        present = ", ".join(item.option_name() for item in self.passes)
        raise ConfigError(f"This pipeline has no {name!r} pass; it has {present}.")

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


def item_of(item: Any) -> tuple[str, Any]:
    """(name, options) of a pass in a list."""
    if isinstance(item, str):
        return item, {}
    if isinstance(item, dict) and len(item) == 1:
        name, options = next(iter(item.items()))
        return name, options or {}
    raise ConfigError(f"A pass is a name or {{name: {{options}}}}, not {item!r}.")
