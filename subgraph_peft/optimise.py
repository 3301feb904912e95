"""Optimising passes: graph to graph, faster, and the same result up to rounding.

They register in the entry-point group `subgraph_peft.optimise` and are all on; each can be switched off by its name.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import fx

from .errors import ConfigError, suggestion
from .internals import internals

if TYPE_CHECKING:
    from .equation import Equation
    from .module import GraphModel
    from .program import Program

GROUP = "subgraph_peft.optimise"
Stage = Literal["equation", "graph", "compiled"]


class Optimisation:
    """Base of optimising passes. A subclass says in its docstring what becomes what, and gives `apply`.

    stage: "equation" passes see an equation before it is distributed over the calls of a weight;
           "graph" passes see the graph that a module is about to run;
           "compiled" passes see it after these, where it is going to be compiled. Rewrites, folding and export see the
           graph as it was

    Nodes that a pass adds carry the metadata of those they replace.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = "graph"

    def apply(self, graph: fx.Graph, owner: "GraphModel | Equation") -> int:
        """Change the graph in place. Returns how many places changed."""
        raise NotImplementedError


@cache
def optimisations() -> Mapping[str, Optimisation]:
    """Every installed pass by its name, in the order in which they run."""
    modules = [point.load() for point in entry_points(group=GROUP)]
    found = [getattr(module, name)() for module in modules for name in module.__all__]
    return {item.name: item for item in found}


def optimised(
    graph: fx.Graph, owner: "GraphModel | Equation", stage: Stage, without: Collection[str]
) -> dict[str, int]:
    """Run the passes of a stage over a graph, in place. Returns how many places each has changed."""
    running = [p for p in optimisations().values() if p.stage == stage and p.name not in without]
    return {p.name: p.apply(graph, owner) for p in running}


def check_switches(switches: Mapping[str, object]) -> None:
    known = optimisations()
    for name, value in switches.items():
        if name not in known:
            names = ", ".join(known)
            raise ConfigError(f"optimise: unknown option {name!r}.{suggestion(name, known)} Options: {names}.")
        if not isinstance(value, bool):
            raise ConfigError(f"optimise: option {name!r} is true or false, not {value!r}.")


def optimise(program: "Program", **switches: bool) -> "Program":
    """The same program, sharing the memory of its parameters, with optimising passes switched: `siblings=False`.

    Passes that are not named stay as they are. Raises ConfigError for a name that no pass has.
    """
    from .generate import base_of, generate, rebuild

    check_switches(switches)
    on = {name for name, value in switches.items() if value}
    without = (internals(program.module).without - on) | (switches.keys() - on)
    if without == internals(program.module).without:
        return program
    captured = base_of(program)
    captured = replace(captured, module=rebuild(captured, dict(captured.tensors()), without=without))
    if not program.adapters:
        return captured
    tensors = dict(program.tensors())
    declared = [path for adapter in program.adapters for _, _, path in adapter.all_paths()]
    own = {n: tensors[n] for n in (*(n for n, _ in program.parameters(trainable=True)), *declared)}
    result = generate(captured, program.adapters, own, tensors[declared[0]].dtype)
    result.module.train(program.module.training)
    return replace(result, history=program.history, folded=program.folded)
