from typing import ClassVar

from torch import fx

from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.passes import ProgramOwner, ProgramPass
from subgraph_peft.graph.rewriter import Rewriter

from .factors import factor, held_like


class Scalars(ProgramPass):
    """s (x Aᵀ) = x (s A)ᵀ

    A number that multiplies the result of a small factor multiplies the factor, before it is cast: the factor is read
    and cast in any case, the result has a row for every token.
    """

    name: ClassVar[str] = "scalars"
    after: ClassVar[tuple[str, ...]] = ("tidy",)

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        for node in rewrite.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
            product, number = node.args
            if not isinstance(number, float) or not isinstance(product, fx.Node) or len(product.users) > 1:
                continue
            if (small := factor(product)) is not None:
                product.args = (product.args[0], multiplied(rewrite, node, small, product))
                rewrite.replace(node, product)


def multiplied(rewrite: Rewriter, node: fx.Node, small: fx.Node, before: fx.Node) -> fx.Node:
    """The factor times the number of `node`, cast as the factor is."""
    cast = small.target is aten.to.dtype and len(small.args) == 2
    held = small.args[0] if cast else small
    scaled = rewrite.add(aten.mul.Tensor, (held, node.args[1]), like=node, before=before)
    held_like(scaled, held)
    if not cast:
        return scaled
    return held_like(rewrite.add(aten.to.dtype, (scaled, small.args[1]), like=node, before=before), small)
