"""A training graph under torch.compile, piece by piece: repeated layers are one piece, compiled once for all."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from ..base.borrowed import recomputation
from ..base.errors import CaptureError
from ..graph import code, edit
from ..graph import nodes as graph_nodes
from ..graph.nodes import attribute
from ..graph.partition import Unit, boundary, ordered, outermost, owners, repeated
from ..graph.passes import optimised, running
from ..program.calls import checked
from ..program.internals import internals
from ..program.module import GraphModel
from ..program.runners import checkpointed, specialise


class Part(NamedTuple):
    """Some nodes of a graph as a function of what they read.

    sources: nodes whose values are its arguments       outputs: nodes whose values it returns
    """

    run: Callable
    sources: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


class Compiled:
    """run(inputs) gives the loss of a module's training graph, which is compiled for the inputs that are given.

    The loss is the output of that name, else the first.

    One graph, optimised as the module's own runners are, without the other outputs. It is cut at its repeated layers;
    parts that are the same but for their tensors share one function under torch.compile(fullgraph=True), so that the
    time of compilation does not grow with the depth. Sizes that turn out to vary become symbols.

    What is pointwise is computed again in the backward pass where that saves memory, also what a matrix product then
    reads: on a Llama an eighth of the memory of a step for 1 % of its time.

    memory_budget: share of the activations of a part that may be kept; below 1 the compiler also computes products
                   again, cheapest first (0: all but the inputs of a part)
    """

    def __init__(self, module: GraphModel, memory_budget: float = 1.0):
        self.module, self.memory_budget = module, memory_budget
        self.functions: dict[str, Callable] = {}
        self.plans: dict[frozenset[str], tuple[fx.Graph, list[Part]]] = {}

    def __call__(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        flat = checked(self.module, inputs)
        names = internals(self.module).signature.input_names()
        missing = frozenset(name for name, value in zip(names, flat, strict=True) if value is None)
        if missing not in self.plans:
            self.plans[missing] = self.plan(missing)
        graph, parts = self.plans[missing]
        values: dict[fx.Node, Any] = dict(zip(graph.find_nodes(op="placeholder"), flat, strict=True))
        for name, node in graph_nodes.attributes(graph):
            values[node] = attribute(self.module, name)
        options = {"ban_recompute_materialized_backward": False, "activation_memory_budget": self.memory_budget}
        with recomputation(**options):
            for part in parts:
                results = part.run(None, *(values[node] for node in part.sources))
                values.update(zip(part.outputs, results, strict=True))
        return values[graph_nodes.flat_outputs(graph)[0]]

    def plan(self, missing: frozenset[str]) -> tuple[fx.Graph, list[Part]]:
        module, own = self.module, internals(self.module)
        graph = specialise(module, True, missing)
        for stage in ("graph", "compiled"):
            changed = optimised(graph, own, running(stage, own.without))
            own.changes.setdefault((True, missing), {}).update(changed)
        names = own.signature.output_names()
        loss = graph_nodes.flat_outputs(graph)[names.index("loss") if "loss" in names else 0]
        graph.output_node().args = ((loss,),)
        edit.eliminate_dead_code(graph)
        return graph, [self.part(unit, nodes) for unit, nodes in units(graph, module)]

    def part(self, unit: Unit | None, nodes: Sequence[fx.Node]) -> Part:
        own, sources, outputs = function_of(nodes)
        held = [attribute(self.module, str(node.target)) for node in sources if node.op == "get_attr"]
        text = f"{own.python_code('self').src} {[(getattr(tensor, 'shape', None)) for tensor in held]}"
        if text not in self.functions:
            run = code.compile_graph(own, f"{type(self.module).__name__} {unit[0] if unit else 'around layers'}")
            cuda = internals(self.module).home.device.type == "cuda"
            self.functions[text] = torch.compile(run, fullgraph=True, options={"combo_kernels": True} if cuda else None)
        run, again = self.functions[text], internals(self.module).checkpointing
        if again and unit and unit[0] in again.paths:
            run = checkpointed(run, again.options)
        return Part(run, sources, outputs)


def units(graph: fx.Graph, module: GraphModel) -> list[tuple[Unit | None, list[fx.Node]]]:
    """The graph in order as calls of layers and what stands between them; as a whole where it cannot be cut."""
    whole = [(None, [node for node in graph.nodes if node.op == "call_function"])]
    again = internals(module).checkpointing
    paths = again.paths if again else repeated(graph)
    if graph_nodes.bodies(graph, module) or not paths:
        return whole
    try:
        pieces = ordered(graph, owners(graph, outermost(paths), "train"))
    except CaptureError:
        if again:
            raise
        return whole
    joined: list[tuple[Unit | None, list[fx.Node]]] = []
    for unit, nodes in pieces:
        if unit is None and nodes[0].op != "call_function":
            continue
        if unit is None and joined and joined[-1][0] is None:
            joined[-1][1].extend(nodes)
        else:
            joined.append((unit, list(nodes)))
    return joined


def function_of(nodes: Sequence[fx.Node]) -> tuple[fx.Graph, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """(the nodes as a graph of their own, numbered in order, what they read, those that others read)."""
    own = fx.Graph()
    sources, outputs = map(tuple, boundary(nodes))
    copies: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(sources):
        copies[node] = own.create_node("placeholder", f"x{index}", name=f"x{index}")
    for index, node in enumerate(nodes):
        args, kwargs = (fx.node.map_arg(part, copies.__getitem__) for part in (node.args, node.kwargs))
        copies[node] = own.create_node(node.op, node.target, args, kwargs, name=f"n{index}")
    own.output(tuple(copies[node] for node in outputs))
    return own, sources, outputs
