from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from subgraph_peft.graph.addends import addends, keeps_shape
from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.operators import Kind, arguments, is_a
from subgraph_peft.graph.passes import EquationOwner, EquationPass
from subgraph_peft.graph.rewriter import Rewriter

TINY = torch.finfo(torch.float32).tiny


class Gram(EquationPass):
    """‖C + s B A‖² = ‖C‖² + Σ B ⊙ (2s C Aᵀ + s² B (A Aᵀ)), row by row

    for the Euclidean row norms of a constant matrix C [out, in] and any number of products B [out, r], A [r, in]: ‖C‖²
    is computed once, as are products of constants, and no matrix of the weight's size is formed. DoRA's norm is one
    (Liu et al. 2024, Eq. 5). A norm much smaller than ‖C‖ loses ‖C‖/‖C + s B A‖ times as many digits as it would in the
    sum of squares.
    """

    name: ClassVar[str] = "gram"

    def apply(self, rewrite: Rewriter, owner: EquationOwner) -> None:
        for node in list(rewrite.graph.nodes):
            if is_row_norm(node) and (found := terms(owner, node.args[0])):
                rewrite.replace(node, norm(partial(rewrite.add, like=node), *found))


@dataclass(frozen=True)
class Product:
    """scale · left [out, r] right [r, in]"""

    scale: float
    left: fx.Node
    right: fx.Node


def is_row_norm(node: fx.Node) -> bool:
    """‖V‖ of every row of a matrix V."""
    if node.target is not aten.linalg_vector_norm.default:
        return False
    V, order, dims, keeps, dtype = arguments(node)
    return V.meta["val"].ndim == 2 and order == 2 and dims in ([1], [-1]) and not keeps and dtype is None


def terms(equation: EquationOwner, V: fx.Node) -> tuple[fx.Node, list[Product]] | None:
    """(C, products) of V = C + Σ products, or None where V is no such sum."""
    constants: list[fx.Node] = []
    products: list[Product] = []

    def opens(node: fx.Node) -> bool:
        """A constant that is kept as one matrix stays whole."""
        return keeps_shape(node) and (node in equation.trainable or equation.distributes(node))

    for scale, term, _ in addends(V, opens):
        narrow = is_a(term, Kind.MATMUL) and term.args[0].meta["val"].shape[1] < min(term.meta["val"].shape)
        if term not in equation.trainable and scale == 1.0 and not (narrow and equation.distributes(term)):
            constants.append(term)
        elif narrow:
            products.append(Product(scale, *term.args))
        else:
            return None
    return (constants[0], products) if len(constants) == 1 and products else None


def norm(add: Callable[..., fx.Node], C: fx.Node, products: list[Product]) -> fx.Node:
    """‖C + Σ products‖ [out], from the inner products of all pairs of terms; `add(target, args)` adds a node."""

    def times(node: fx.Node, scale: float) -> fx.Node:
        return node if scale == 1.0 else add(aten.mul.Tensor, (node, scale))

    def dot(left: fx.Node, right: fx.Node) -> fx.Node:
        return add(aten.sum.dim_IntList, (add(aten.mul.Tensor, (left, right)), [1]))

    total = dot(C, C)
    for index, p in enumerate(products):
        turned = add(aten.t.default, (p.right,))
        across = times(add(aten.matmul.default, (C, turned)), 2 * p.scale)
        for other in products[: index + 1]:
            gram = add(aten.matmul.default, (other.right, turned))
            twice = 1 if other is p else 2
            inner = times(add(aten.matmul.default, (other.left, gram)), twice * p.scale * other.scale)
            across = add(aten.add.Tensor, (across, inner))
        total = add(aten.add.Tensor, (total, dot(across, p.left)))
    return add(aten.sqrt.default, (add(aten.clamp_min.default, (total, TINY)),))
