"""What lowering one target into one graph reads and adds, whichever part of the model it rewrites."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from ...graph.passes import running
from ...graph.rewriter import Rewriter
from ...method.adapter import Target, identifier
from ...method.equation import Equation, trace
from ...program.records import Lowered


def equation_of(
    target: Target, operands: Mapping[str, tuple[int, ...]], views: tuple[tuple, ...] = (),
    without: frozenset[str] = frozenset(),
) -> Equation:  # fmt: skip
    """The traced chain of a target, `without` some optimising passes; of one matrix, where the weight is a stack."""
    chain = tuple((adapter.name, adapter.at(site)) for adapter, site in target.chain)
    tensors = tuple(
        (adapter.name, tuple((name, t.shape, t.trainable) for name, t in adapter.entry_tensors(site).items()))
        for adapter, site in target.chain
    )
    return trace(chain, target.part, tuple(operands.items()), tensors, views, running("equation", without))


class Lowering:
    """One target and one graph, which is rewritten in place: its tensors, its equations, and what is added to it.

    readers: the get_attr nodes of the graph by tensor, to which it adds
    dtype:   of the adapters' tensors            device:  of constants in the graph
    hoist:   (target, equation, node) -> name of the buffer that holds a constant of the equation
    lowered: is told the nodes, the cost, and why something is dense
    without: optimising passes that are switched off
    """

    def __init__(
        self,
        graph: fx.Graph,
        readers: dict[str, fx.Node],
        target: Target,
        dtype: torch.dtype,
        device: torch.device,
        hoist: Callable[[Target, Equation, fx.Node], str],
        lowered: Lowered,
        without: frozenset[str] = frozenset(),
    ):
        self.without = without
        self.graph, self.readers, self.target, self.site = graph, readers, target, (site := target.site)
        held = readers.get(target.name)
        self.base_dtype = held.meta["val"].dtype if held is not None else site.dtype
        self.adapter_dtype, self.device = dtype, device
        self.hoist, self.lowered = hoist, lowered
        self.prefix = identifier(site.owner if site.name.endswith((".weight", ".bias")) else site.name)
        self.dropout = {a.name: a.at(s).activation_dropout for a, s in target.chain}
        self.nonlinear = {(a.name, name): h for a, s in target.chain for name, h in a.at(s).nonlinear.items()}

    def emitter_of_chain(self, before: fx.Node, like: fx.Node | None = None) -> Callable[..., fx.Node]:
        """An emitter of nodes that belong to the chain as a whole."""
        emit, last = self.emitter(before, like), self.target.chain[-1][0].name
        return lambda target, args, term, kwargs=None: emit(target, args, term, last, kwargs)

    def emitter(self, before: fx.Node, like: fx.Node | None = None) -> Callable[..., fx.Node]:
        """Adds nodes before `before`, named after site, adapter and term, with metadata that says so."""
        rewrite = Rewriter(self.graph)

        def emit(target: Any, args: tuple, term: str, adapter: str, kwargs: Mapping | None = None) -> fx.Node:
            name = "_".join(part for part in (self.prefix, adapter, identifier(term)) if part)
            says = {"site": self.target.name, "adapter": adapter or "base", "term": term}
            node = rewrite.add(target, args, kwargs, like=like or before, before=before, name=name, says=says)
            self.lowered.nodes.append(node.name)
            return node

        return emit

    def reader(self, path: str) -> fx.Node:
        """The get_attr node of a tensor, at the top of the graph."""
        if path not in self.readers:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.readers[path] = self.graph.create_node("get_attr", path, name=identifier(path))
        return self.readers[path]
