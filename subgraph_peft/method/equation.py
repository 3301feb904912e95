"""An equation: φ(W), traced once for a shape, as a graph of aten operators with values and dependences."""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import fx, nn

from ..base.borrowed import HigherOrderOperator
from ..base.errors import MethodError
from ..graph.edit import eliminate_dead_code
from ..graph.nodes import aten, backward_slice, mode_argument, operator_name
from ..graph.operators import ELEMENTWISE, MULTIPLES, SEEN, SUMS, Kind, argument, is_a, permutation
from ..graph.passes import EquationPass, optimised
from ..graph.rewriter import Rewriter
from .method import Method

VIEWS = SEEN & ~Kind.CAST  # a cast computes

# (adapter, tensor); ("", "W") or ("", "b") is the weight or bias itself, ("", "x") and ("", "y") are activations
Operand = tuple[str, str]


class MethodStep(nn.Module):
    """One method of a chain; as a module so that its nodes carry the adapter's name."""

    def __init__(self, method: Method, part: str):
        super().__init__()
        self.method = [method]
        self.part = part

    def forward(self, operands: tuple[torch.Tensor, ...], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return self.method[0].evaluate(self.part, *operands, tensors=tensors)


class Chain(nn.Module):
    """φₙ(…φ₂(φ₁(W))), seen through views; of a method that reads its own tensors alone, that one"""

    def __init__(self, chain: tuple[tuple[str, Method], ...], part: str, views: tuple[tuple, ...] = ()):
        super().__init__()
        self.steps = nn.ModuleDict({name: MethodStep(method, part) for name, method in chain})
        self.part, self.views = part, views

    def forward(self, operands: tuple[torch.Tensor, ...], tensors: dict[str, dict[str, torch.Tensor]]) -> torch.Tensor:
        if not operands:
            ((name, step),) = self.steps.items()
            return step((), tensors[name])
        *inputs, value = operands
        for name, step in self.steps.items():
            value = step((*inputs, value), tensors[name])
        for kind, *arguments in self.views:
            value = value.t() if kind == "t" else aten.slice(value, *arguments)
        return value


class Equation:
    """The traced chain.

    graph:     aten operators; `result` is the node of φ, `results` are all where φ gives several
    operands:  placeholder node -> (adapter, tensor)
    trainable: nodes that depend on a trainable tensor or on an activation
    changed:   optimising pass -> how many places of the equation it changed
    """

    def __init__(
        self, graph: fx.Graph, operands: dict[fx.Node, Operand], varying: set[Operand], viewed: bool = False
    ):  # fmt: skip
        self.graph = graph
        self.operands = operands
        push_views(graph, through_sums=viewed)
        self.varying = varying
        self.changed: dict[str, int] = {}
        self.read()

    def read(self) -> None:
        """Results and dependences, from the graph as it is."""
        self.results: tuple[fx.Node, ...] = tuple(self.graph.output_node().args[0])
        self.result: fx.Node = self.results[0]
        self.trainable: set[fx.Node] = set()
        for node in self.graph.nodes:
            if self.operands.get(node) in self.varying or self.trainable.intersection(node.all_input_nodes):
                self.trainable.add(node)

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def numel(self, node: fx.Node) -> int:
        return math.prod(self.shape(node))

    def leaves(self, node: fx.Node) -> set[fx.Node]:
        """Placeholders that a node depends on."""
        return {source for source in backward_slice(node) if source.op == "placeholder"}

    def varies(self, node: fx.Node) -> bool:
        """Whether a node depends on a trainable tensor; of nodes that a pass has just added too."""
        return any(self.operands[leaf] in self.varying for leaf in self.leaves(node))

    def is_constant(self, node: fx.Node) -> bool:
        """A computed value without trainable tensors, worth keeping: not a view, and no larger than its operands."""
        if node in self.trainable or node.op != "call_function" or is_a(node, VIEWS):
            return False
        return self.numel(node) <= sum(self.numel(leaf) for leaf in self.leaves(node))

    def distributes(self, node: fx.Node) -> bool:
        """Whether an activation meets a matrix without trainable tensors at less cost in its factors: W − B₀A₀ is W and
        two small ones, and no second matrix of W's size is kept."""
        return node not in self.trainable and self.cost(node) < 2 * self.numel(node)

    def cost(self, node: fx.Node) -> int:
        """Numbers that an activation meets in a constant matrix, and numbers that are kept for it alone."""
        parts = [part for part in node.args if isinstance(part, fx.Node)]
        shapes = [self.shape(part) for part in parts]
        if node.op == "placeholder" or is_a(node, VIEWS):
            return self.numel(node)
        if is_a(node, SUMS):
            distributed = shapes == [self.shape(node)] * 2 and not node.kwargs
        elif is_a(node, Kind.MATMUL):
            distributed = all(len(shape) == 2 for shape in shapes)
        else:
            distributed = is_a(node, MULTIPLES) and len(parts) == 1 and node.args[0] is parts[0]
        kept = 2 * self.numel(node)
        return min(kept, sum(map(self.cost, parts))) if distributed else kept

    def adapter(self, node: fx.Node) -> str:
        """Name of the adapter whose equation a node is part of."""
        if node in self.operands:
            return self.operands[node][0]
        stack = list(node.meta.get("nn_module_stack", {}).values())
        name = stack[-1][0].rpartition(".")[2] if stack else ""
        return self.adapter(node.args[0]) if not name and is_a(node, VIEWS) else name

    def term(self, node: fx.Node) -> str:
        return self.operands[node][1] if node in self.operands else operator_name(node)


def push_views(graph: fx.Graph, through_sums: bool) -> None:
    """(PQ)ᵀ = QᵀPᵀ, (Pᵀ)ᵀ = P, and (P + Q)ᵀ = Pᵀ + Qᵀ where φ itself is viewed, and so for slices of rows and columns:
    a transpose or a slice stands only at a factor. In place."""
    rewrite, before = Rewriter(graph, valued=True), -1
    while rewrite.changes > before:
        before = rewrite.changes
        for node in list(graph.nodes):
            if is_transpose(node) or is_slice(node):
                replacement = pushed(partial(rewrite.add, before=node), node, through_sums)
                if replacement is not None:
                    rewrite.replace(node, replacement)
    eliminate_dead_code(graph)


def pushed(add: Callable[..., fx.Node], node: fx.Node, through_sums: bool) -> fx.Node | None:
    """A view of a sum, a product or a transpose as one of views, or None where it stands at a factor.

    add: (target, args, like) -> node
    """
    inner = node.args[0]
    turning = is_transpose(node)
    if is_transpose(inner):
        if turning:
            return inner.args[0]
        sliced = view_of(add, inner.args[0], node, dimension=1 - node.args[1])
        return view_of(add, sliced, inner)
    if is_a(inner, Kind.MATMUL) and inner.meta["val"].ndim == 2:
        left, right = inner.args
        if left.meta["val"].ndim != 2 or right.meta["val"].ndim != 2:
            return None
        if turning:
            left, right = view_of(add, right, node), view_of(add, left, node)
        elif node.args[1] == 0:
            left = view_of(add, left, node)
        else:
            right = view_of(add, right, node)
        return add(aten.matmul.default, (left, right), like=inner)
    if inner.target is aten.cat.default and not turning:
        return part_of(inner, *node.args[1:])
    if through_sums and is_a(inner, ELEMENTWISE) and not inner.kwargs:
        sides = [seen(add, side, node) if isinstance(side, fx.Node) else side for side in inner.args]
        return add(inner.target, tuple(sides), like=inner)
    return None


def part_of(joined: fx.Node, dimension: int, start: int, stop: int) -> fx.Node | None:
    """The one part of a concatenation that a slice is, if it is one."""
    along = argument(joined, "dim")
    at = 0
    for part in joined.args[0]:
        size = part.meta["val"].shape[along]
        if along == dimension and (at, at + size) == (start, stop):
            return part
        at += size
    return None


def seen(add: Callable[..., fx.Node], side: fx.Node, view: fx.Node) -> fx.Node:
    """An operand of an elementwise operator, which may broadcast to the matrix, under a view of the matrix."""
    shape = side.meta["val"].shape
    if len(shape) < 2:
        if not shape or shape[0] == 1 or (not is_transpose(view) and view.args[1] == 0):
            return side
        if is_transpose(view):
            return add(aten.unsqueeze.default, (side, 1), like=view)
        return view_of(add, side, view, dimension=0)
    if is_transpose(view) or shape[view.args[1]] > 1:
        return view_of(add, side, view)
    return side


def view_of(add: Callable[..., fx.Node], node: fx.Node, like: fx.Node, dimension: int | None = None) -> fx.Node:
    """`node` under the view that `like` is, on another dimension if given."""
    args = like.args[1:]
    if dimension is not None:
        args = (dimension, *args[1:])
    return add(like.target, (node, *args), like=like)


def is_slice(node: fx.Node) -> bool:
    """A slice of a matrix's rows or columns by whole steps."""
    return node.target is aten.slice.Tensor and node.meta["val"].ndim == 2 and len(node.args) == 4


def is_elementwise(node: fx.Node) -> bool:
    """Whether a value is an operand, seen through views, or computed from such entry by entry."""
    return all(each.op == "placeholder" or is_a(each, VIEWS | ELEMENTWISE) for each in backward_slice(node))


def is_transpose(node: fx.Node) -> bool:
    return is_a(node, Kind.TRANSPOSE) and node.meta["val"].ndim == 2 and permutation(node) == (1, 0)


@lru_cache(maxsize=512)  # graphs on the meta device, which hold no values; what they come from is in the key
def trace(
    chain: tuple[tuple[str, Method], ...],
    part: str,
    operands: tuple[tuple[str, tuple[int, ...]], ...],
    tensors: tuple[tuple[str, tuple[tuple[str, tuple[int, ...], bool], ...]], ...],
    views: tuple[tuple, ...] = (),
    passes: tuple[EquationPass, ...] = (),
) -> Equation:
    """Trace `part` of a chain of methods.

    operands: (name, shape) of W, b or (x, y); activations' leading dimensions are dynamic. None for what is computed
              from the method's own tensors, where the chain is one method
    tensors:  per adapter its (name, shape, trainable)
    views:    of the result: ("slice", dimension, start, stop), ("t",)
    passes:   that the equation is optimised by

    Raises MethodError where the equation cannot be traced or gives another shape than it was given.
    """
    operand_values = tuple(torch.empty(shape, device="meta") for _, shape in operands)
    values = {a: {n: torch.empty(shape, device="meta") for n, shape, _ in specs} for a, specs in tensors}
    varying = {(a, n) for a, specs in tensors for n, _, train in specs if train}
    dynamic = None
    if part == "output":
        varying |= {("", name) for name, _ in operands}
        leading = {d: torch.export.Dim.DYNAMIC for d in range(len(operands[0][1]) - 1)}
        dynamic = (tuple(leading for _ in operands), {a: dict.fromkeys(names) for a, names in values.items()})
    names = " over ".join(method.name for _, method in reversed(chain))
    try:
        exported = torch.export.export(
            Chain(chain, part, views), (operand_values, values), dynamic_shapes=dynamic, strict=False
        )
    except MethodError:
        raise
    except Exception as error:
        raise MethodError(
            f"The equation {part} of {names} cannot be traced for {dict(operands)}: {type(error).__name__}: {error}"
        ) from error
    graph = exported.graph
    for node in graph.nodes:
        if node.op == "call_function" and isinstance(node.target, HigherOrderOperator):
            raise MethodError(f"The equation of {names} uses {node.target}; write .detach() in place of no_grad.")
    flat: list[Operand] = [("", name) for name, _ in operands]
    flat += [(adapter, name) for adapter, specs in tensors for name, _, _ in specs]
    placeholders = dict(zip(graph.find_nodes(op="placeholder"), flat, strict=True))
    equation = Equation(graph, placeholders, varying, bool(views))
    keeps_shape = part in ("weight", "bias")
    if keeps_shape and not views and tuple(operand_values[-1].shape) != equation.shape(equation.result):
        raise MethodError(
            f"The equation {part} of {names} maps shape {list(operand_values[-1].shape)} to "
            f"{list(equation.shape(equation.result))}; it has to keep it."
        )
    leaves = {placeholders[leaf] for leaf in equation.leaves(equation.result)}
    for (adapter, specs), (_, method) in zip(tensors[:-1], chain[1:], strict=True):
        if part == "weight" and not leaves.intersection((adapter, name) for name, _, _ in specs):
            raise MethodError(
                f"The equation of {method.name} keeps nothing of the weight it is given, so that {adapter} beneath it "
                "would have no effect: fold that one first."
            )
    if keeps_shape and any(mode_argument(node) == "train" for node in graph.nodes):
        raise MethodError(f"The equation {part} of {names} draws random numbers: declare a `dropout` option instead.")
    equation.changed = optimised(graph, equation, passes)
    equation.read()
    return equation
