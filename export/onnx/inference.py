"""The part of a program that inference needs: its eval graph, cut to some outputs and to the inputs they read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from subgraph_peft.base.errors import ExportError, suggestion
from subgraph_peft.graph.edit import eliminate_dead_code
from subgraph_peft.graph.nodes import aten, attribute, fixed_size, flat_outputs
from subgraph_peft.program.program import Program
from subgraph_peft.program.runners import specialise
from subgraph_peft.program.tree import attach, named_tensors

from .axes import Axes, axis_names
from .constant_folding import fold_constants
from .legalise import legalise

STAMP = "fx_node"


class Runner(nn.Module):
    """Interprets a graph, so that a second trace of it keeps the metadata of its nodes."""

    def __init__(self, graph: fx.Graph):
        super().__init__()
        self._subgraph = graph  # under no name that a tensor of the model could have

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        with fx.traceback.preserve_node_meta():
            return fx.Interpreter(self, graph=self._subgraph).run(*inputs)


@dataclass(frozen=True)
class Inference:
    """module: takes tensors in the order of `inputs`, returns them in the order of `outputs`
    inputs:    input name -> shape, an int for each fixed dimension
    axes:      the dynamic dimensions of every input of the program, also of those that are left out here
    left_out:  inputs of the program that no output needs
    samples:   values of inputs that are none of the program's: its slots
    """

    module: Runner
    inputs: Mapping[str, Sequence[Any]]
    outputs: tuple[str, ...]
    axes: Axes
    left_out: tuple[str, ...]
    samples: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module._subgraph

    @property
    def own(self) -> list[str]:
        """The inputs that are the program's."""
        return [name for name in self.inputs if name not in self.samples]

    @property
    def fixed(self) -> dict[str, int]:
        """`x[1]` -> size, for every dimension of an input that does not vary."""
        own = {name: self.inputs[name] for name in self.own}
        dims = ((f"{n}[{d}]", fixed_size(size)) for n, shape in own.items() for d, size in enumerate(shape))
        return {dimension: size for dimension, size in dims if size is not None}


def inference(program: Program, outputs: Sequence[str] | None = None) -> Inference:
    """Cut the eval graph of `program` to `outputs` (all but the loss by default), with what adapters compute from
    tensors alone computed.

    Tensors keep their qualified names; tied ones are there once, under the first. Every node carries its name in
    `meta["custom"]`. Raises ExportError for an unknown output, or one with the name of an input.
    """
    source = program.module
    graph, signature = specialise(source, training=False), program.signature
    placeholders = dict(zip(signature.input_names(), graph.find_nodes(op="placeholder"), strict=True))
    shapes = shapes_of(placeholders)
    leaves = dict(zip(signature.output_names(), flat_outputs(graph), strict=True))
    chosen = choose(leaves, outputs, program.source)
    graph.output_node().args = (tuple(computed(graph, leaves[name]) for name in chosen),)
    baked = fold_constants(graph, dict(named_tensors(source)))
    eliminate_dead_code(graph, source)
    legalise(graph)
    inputs = {name: shape for name, shape in shapes.items() if placeholders[name].users}
    if clash := sorted(set(inputs).intersection(chosen)):
        raise ExportError(f"{clash[0]!r} is an input and an output of {program.source}; choose others: outputs=[…].")
    for node in placeholders.values():
        if not node.users:
            graph.erase_node(node)
    for node in graph.nodes:
        if node.op == "call_function":
            node.meta["custom"] = {**node.meta.get("custom", {}), STAMP: node.name}
    return Inference(
        module=runner(graph, source, baked, {*inputs, *chosen}),
        inputs=inputs,
        outputs=chosen,
        axes=axes_of(program),
        left_out=tuple(name for name in placeholders if name not in inputs),
    )


def shapes_of(placeholders: Mapping[str, fx.Node]) -> dict[str, Sequence[Any]]:
    """Input name -> shape as captured, ints and symbols, of the inputs that are tensors."""
    return {n: p.meta["val"].shape for n, p in placeholders.items() if isinstance(p.meta.get("val"), torch.Tensor)}


def axes_of(program: Program) -> Axes:
    """The dynamic dimensions of every input of the program."""
    graph = program.graphs()[-1]
    placeholders = dict(zip(program.signature.input_names(), graph.find_nodes(op="placeholder"), strict=True))
    return axis_names(shapes_of(placeholders), flat_example(program, program.example))


def choose(leaves: Mapping[str, Any], wanted: Sequence[str] | None, source: str) -> tuple[str, ...]:
    tensors = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, fx.Node) and not is_number(leaf)}
    if wanted is None:
        named = tuple(name for name, leaf in tensors.items() if name != "loss" and not is_scalar(leaf))
        return named or tuple(tensors)
    if not wanted:
        raise ExportError(f"No outputs were asked for. {source} gives {', '.join(tensors)}.")
    for name in wanted:
        if name not in tensors:
            raise ExportError(
                f"{source} has no output {name!r}.{suggestion(name, tensors)} Outputs: {', '.join(tensors)}."
            )
    return tuple(dict.fromkeys(wanted))


def computed(graph: fx.Graph, leaf: fx.Node) -> fx.Node:
    """An input or a tensor of the model that is also an output, by a node of its own."""
    if leaf.op == "call_function":
        return leaf
    with graph.inserting_before(graph.output_node()):
        return graph.call_function(aten.clone.default, (leaf,))


def is_number(node: fx.Node) -> bool:
    return "val" in node.meta and not isinstance(node.meta["val"], torch.Tensor)


def is_scalar(node: fx.Node) -> bool:
    """A mean over the whole batch, as a loss is."""
    return "val" in node.meta and node.meta["val"].ndim == 0


def runner(graph: fx.Graph, source: nn.Module, baked: Mapping[str, torch.Tensor], taken: set[str]) -> Runner:
    """taken: names of inputs and outputs; a tensor `x` of one's name is `x.tensor`"""
    first: dict[int, str] = {}
    for name, tensor in named_tensors(source):
        first.setdefault(id(tensor), name)
    module = Runner(graph)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        value = baked[name] if name in baked else attribute(source, name)
        node.target = first.get(id(value), node.target)
        node.target = f"{node.target}.tensor" if node.target in taken else node.target
        attach(module, node.target, value)
    return module.eval()


def flat_example(program: Program, example: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors by placeholder name. Raises CaptureError where `example` does not fit the signature."""
    signature = program.signature
    pairs = zip(signature.input_names(), signature.flatten(example), strict=True)
    return {name: leaf.to(program.home.device) for name, leaf in pairs if isinstance(leaf, torch.Tensor)}
