"""Optimising passes: graph to graph, in place, faster, and the same result up to rounding. One base, one order.

They register in the entry-point group `subgraph_peft.optimise`, or by `register`, and are all on; each can be switched
off by its name.
"""

from collections.abc import Collection, Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, get_args

import torch
from torch import fx

from ..base.errors import PassError, suggestion
from ..base.plugins import Plugins
from .edit import eliminate_dead_code
from .rewriter import Rewriter, check_added, failing_as

GROUP = "subgraph_peft.optimise"
Stage = Literal["equation", "graph", "compiled"]
STAGES: tuple[Stage, ...] = get_args(Stage)


class Changed(NamedTuple):
    """What a pass did: how many places of the graph it changed, and the nodes that it added and left."""

    places: int
    added: tuple[fx.Node, ...]


class GraphPass:
    """Base of passes over a graph. A subclass says in its docstring what becomes what, and gives `apply`.

    before, after: names of passes of the same stage that it runs before, and after
    """

    name: ClassVar[str] = ""
    stage: ClassVar[Stage]
    before: ClassVar[tuple[str, ...]] = ()
    after: ClassVar[tuple[str, ...]] = ()

    def apply(self, rewrite: Rewriter, owner: Any) -> None:
        """Change the graph through the rewriter."""
        raise NotImplementedError

    def __call__(self, graph: fx.Graph, owner: Any) -> Changed:
        """Run the pass, remove what nothing reads any more, and check the graph. Raises PassError, with the name of the
        pass, where it fails, leaves no well-formed graph, or adds a node that does not say where it comes from."""
        known = {node.name for node in graph.nodes}
        rewrite = Rewriter(graph, valued=self.stage == "equation")
        with failing_as(titled(type(self))):
            self.apply(rewrite, owner)
            eliminate_dead_code(graph)
            return Changed(rewrite.changes, check_added(graph, known))


class EquationOwner(Protocol):
    """What passes ask of the equation whose graph they change: see `equation.Equation`."""

    trainable: set[fx.Node]

    def varies(self, node: fx.Node) -> bool: ...
    def distributes(self, node: fx.Node) -> bool: ...
    def adapter(self, node: fx.Node) -> str: ...


class EquationPass(GraphPass):
    """Sees an equation before it is distributed over the calls of a weight. Every node has its value."""

    stage: ClassVar[Stage] = "equation"

    def apply(self, rewrite: Rewriter, owner: EquationOwner) -> None:
        raise NotImplementedError


class ProgramOwner(Protocol):
    """What passes ask of the module that is to run a graph.

    home:        device and dtype of constants
    padding:     "right" where that is promised of attention masks
    block_paths: modules at which the graph is going to be cut; those of `checkpointing` too
    """

    home: tuple[torch.device, torch.dtype]
    padding: str | None
    block_paths: tuple[str, ...]
    checkpointing: Any


class ProgramPass(GraphPass):
    """Sees the graph that a module is about to run, or, where `stage` is "compiled", after these the one that is going
    to be compiled. Rewrites, folding and export see the graph as it was."""

    stage: ClassVar[Stage] = "graph"

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        raise NotImplementedError


def ordered(passes: Mapping[str, type[GraphPass]]) -> dict[str, GraphPass]:
    """One of each, in the order in which they run: stage by stage, as `before` and `after` ask, else by name.

    Raises PassError where one is not as GraphPass asks, where they name a pass that there is none, or wait for each
    other.
    """
    for cls in passes.values():
        check_class(cls)
    waits = {
        name: {n for n, other in passes.items() if STAGES.index(other.stage) < STAGES.index(cls.stage)}
        for name, cls in passes.items()
    }
    for name, cls in passes.items():
        for other in (*cls.before, *cls.after):
            if other not in passes:
                raise PassError(
                    f"The optimising pass {name!r} is to run before or after {other!r}, which is not installed."
                    f"{suggestion(other, passes)} Passes: {', '.join(sorted(passes))}."
                )
        waits[name].update(cls.after)
        for other in cls.before:
            waits[other].add(name)
    sorter = TopologicalSorter({name: sorted(waits[name]) for name in sorted(waits)})
    try:
        sorter.prepare()
    except CycleError as error:
        raise PassError(
            f"Optimising passes wait for each other: {' before '.join(error.args[1])}. Change their `before`, `after` "
            "or `stage`."
        ) from None
    order: list[str] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        order += ready
        sorter.done(*ready)
    return {name: made(passes[name]) for name in order}


def check_class(cls: type[GraphPass]) -> None:
    with failing_as(titled(cls)):
        if getattr(cls, "stage", None) not in STAGES:
            raise PassError(f"it has no `stage` of {', '.join(STAGES)}. Derive it from EquationPass or ProgramPass.")
        for asked in ("before", "after"):
            if isinstance(getattr(cls, asked), str):
                raise PassError(f"its `{asked}` is a text and not a tuple of names: ({getattr(cls, asked)!r},).")


def made(cls: type[GraphPass]) -> GraphPass:
    with failing_as(titled(cls)):
        return cls()


def titled(cls: type[GraphPass]) -> str:
    return f"The optimising pass {cls.name!r} ({cls.__module__}.{cls.__qualname__})"


INSTALLED = Plugins(GROUP, GraphPass, "optimising passes", PassError, ordered)
register = INSTALLED.register


def optimisations() -> Mapping[str, GraphPass]:
    """Every pass by its name, in the order in which they run."""
    return INSTALLED.all()


def running(stage: Stage, without: Collection[str] = ()) -> tuple[GraphPass, ...]:
    """The passes of a stage that are not switched off."""
    return tuple(each for each in optimisations().values() if each.stage == stage and each.name not in without)


def optimised(graph: fx.Graph, owner: Any, passes: Iterable[GraphPass]) -> dict[str, int]:
    """Run passes over a graph, in place. Returns how many places each has changed."""
    return {each.name: each(graph, owner).places for each in passes}
