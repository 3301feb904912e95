import sys
from typing import ClassVar

import torch
from torch import fx

from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.operators import arguments
from subgraph_peft.graph.passes import ProgramOwner, ProgramPass
from subgraph_peft.graph.rewriter import Rewriter


class Rotary(ProgramPass):
    """[−x₂, x₁] = (n − 1) x₂ + n x₁  with n = [0, 1]

    The half turn of rotary embeddings, for compiled code. A compiler keeps what a concatenation gave, and computes
    products again: where a method needs the projections before the turn (DoRA and SSB, for the gradients of their
    scales), queries and keys need not be kept after it as well.
    """

    name: ClassVar[str] = "rotary"
    stage: ClassVar[str] = "compiled"

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        for node in rewrite.graph.find_nodes(op="call_function", target=aten.cat.default):
            if (x := turned(node)) is not None:
                rewrite.replace(node, products(rewrite, node, x))


def turned(node: fx.Node) -> fx.Node | None:
    """x of [−x₂, x₁] along the last dimension, whose halves x₁ and x₂ are."""
    parts, along = arguments(node)
    if len(parts) != 2 or parts[0].target is not aten.neg.default:
        return None
    second, first = parts[0].args[0], parts[1]
    x = first.args[0] if first.args else None
    if any(part.target is not aten.slice.Tensor or part.args[0] != x for part in (first, second)):
        return None
    value = x.meta.get("val")
    if not isinstance(value, torch.Tensor) or not isinstance(value.shape[-1], int):
        return None
    last, width = value.ndim - 1, value.shape[-1]
    (dim, *front), (other, start, stop) = (first.args[1:4], second.args[1:4])
    along_last = {dim % value.ndim, other % value.ndim, along % value.ndim} == {last}
    split = front == [0, width // 2] and start == width // 2 and stop in (width, sys.maxsize)
    return x if along_last and split and width % 2 == 0 else None


def products(rewrite: Rewriter, node: fx.Node, x: fx.Node) -> fx.Node:
    """[−x₂, x₁], which `node` is"""
    value = x.meta["val"]
    half, rank = value.shape[-1] // 2, value.ndim

    def add(target: object, *args: object, **kwargs: object) -> fx.Node:
        return rewrite.add(target, args, kwargs, like=node)

    n = add(aten.arange.default, 2, dtype=value.dtype, device=value.device)
    n = add(aten.unsqueeze.default, n, -1)
    pair = add(aten.unflatten.int, x, rank - 1, [2, half])
    first, second = (add(aten.slice.Tensor, pair, rank - 1, i, i + 1) for i in (0, 1))
    taken = add(aten.mul.Tensor, second, add(aten.sub.Tensor, n, 1)), add(aten.mul.Tensor, first, n)
    return add(aten.flatten.using_ints, add(aten.add.Tensor, *taken), rank - 1, rank)
