from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from subgraph_peft.equation import MATMULS, Equation
from subgraph_peft.graphs import aten, sweep
from subgraph_peft.optimise import Optimisation

TINY = torch.finfo(torch.float32).tiny


class Gram(Optimisation):
    """‖C + s B A‖² = ‖C‖² + Σ B ⊙ (2s C Aᵀ + s² B (A Aᵀ)), row by row

    for the Euclidean row norms of a constant matrix C [out, in] and any number of products B [out, r], A [r, in]: ‖C‖²
    is computed once, as are products of constants, and no matrix of the weight's size is formed. DoRA's norm is one
    (Liu et al. 2024, Eq. 5). A norm much smaller than ‖C‖ loses ‖C‖/‖C + s B A‖ times as many digits as it would in the
    sum of squares.
    """

    name: ClassVar[str] = "gram"
    stage: ClassVar[str] = "equation"

    def apply(self, graph: fx.Graph, owner: Equation) -> int:
        changed = 0
        for node in list(graph.nodes):
            if not is_row_norm(node) or (found := terms(owner, node.args[0])) is None:
                continue
            with graph.inserting_before(node):
                squared = Rows(graph, node).squared(*found)
            node.replace_all_uses_with(squared)
            graph.erase_node(node)
            changed += 1
        sweep(graph)
        return changed


@dataclass(frozen=True)
class Product:
    """scale · left [out, r] right [r, in]"""

    scale: float
    left: fx.Node
    right: fx.Node


def is_row_norm(node: fx.Node) -> bool:
    """‖V‖ of every row of a matrix V."""
    if node.target is not aten.linalg_vector_norm.default or node.args[0].meta["val"].ndim != 2 or node.kwargs:
        return False
    order, dims, *rest = (*node.args[1:], *(2, None, False)[len(node.args) - 1 :])
    return order == 2 and dims in ([1], [-1]) and rest in ([], [False])


def terms(equation: Equation, V: fx.Node) -> tuple[fx.Node, list[Product]] | None:
    """(C, products) of V = C + Σ products, or None where V is no such sum."""
    constants: list[fx.Node] = []
    products: list[Product] = []
    for scale, term in addends(equation, V, 1.0):
        narrow = term.target in MATMULS and term.args[0].meta["val"].shape[1] < min(term.meta["val"].shape)
        if term not in equation.trainable and scale == 1.0 and not (narrow and equation.distributes(term)):
            constants.append(term)
        elif narrow:
            products.append(Product(scale, *term.args))
        else:
            return None
    return (constants[0], products) if len(constants) == 1 and products else None


def addends(equation: Equation, node: fx.Node, scale: float) -> Iterator[tuple[float, fx.Node]]:
    """(number, term) of a sum; a constant that is kept as one matrix stays whole."""
    left, *others = node.args or (None,)
    if node.kwargs or (node not in equation.trainable and not equation.distributes(node)):
        yield scale, node
    elif node.target in (aten.add.Tensor, aten.sub.Tensor) and all(same_shape(node, term) for term in node.args):
        yield from addends(equation, left, scale)
        yield from addends(equation, others[0], scale if node.target is aten.add.Tensor else -scale)
    elif node.target is aten.mul.Tensor and isinstance(others[0], (int, float)):
        yield from addends(equation, left, scale * others[0])
    elif node.target is aten.div.Tensor and isinstance(others[0], (int, float)):
        yield from addends(equation, left, scale / others[0])
    elif node.target is aten.neg.default:
        yield from addends(equation, left, -scale)
    else:
        yield scale, node


def same_shape(node: fx.Node, term: Any) -> bool:
    return isinstance(term, fx.Node) and term.meta["val"].shape == node.meta["val"].shape


class Rows:
    """Adds nodes to an equation, of the same adapter as `like`."""

    def __init__(self, graph: fx.Graph, like: fx.Node):
        self.graph, self.like = graph, like

    def add(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        node.meta = {**self.like.meta, "val": target(*fx.node.map_arg(args, lambda n: n.meta["val"]))}
        return node

    def times(self, node: fx.Node, scale: float) -> fx.Node:
        return node if scale == 1.0 else self.add(aten.mul.Tensor, node, scale)

    def dot(self, left: fx.Node, right: fx.Node) -> fx.Node:
        """Σ over columns of left ⊙ right"""
        return self.add(aten.sum.dim_IntList, self.add(aten.mul.Tensor, left, right), [1])

    def turned(self, node: fx.Node) -> fx.Node:
        return self.add(aten.t.default, node)

    def squared(self, C: fx.Node, products: list[Product]) -> fx.Node:
        """The norm, from the inner products of all pairs of terms."""
        total = self.dot(C, C)
        for index, p in enumerate(products):
            turned = self.turned(p.right)
            across = self.times(self.add(aten.matmul.default, C, turned), 2 * p.scale)
            for other in products[: index + 1]:
                gram = self.add(aten.matmul.default, other.right, turned)
                twice = 1 if other is p else 2
                inner = self.times(self.add(aten.matmul.default, other.left, gram), twice * p.scale * other.scale)
                across = self.add(aten.add.Tensor, across, inner)
            total = self.add(aten.add.Tensor, total, self.dot(across, p.left))
        return self.add(aten.sqrt.default, self.add(aten.clamp_min.default, total, TINY))
