from typing import ClassVar, NamedTuple

from torch import fx

from subgraph_peft.graph.addends import Addend, addends
from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.operators import SUMS, is_a
from subgraph_peft.graph.passes import ProgramOwner, ProgramPass
from subgraph_peft.graph.rewriter import Rewriter

from .factors import NARROW, factor, held_like, is_added


class Sums(ProgramPass):
    """y ± x(B₁A₁)ᵀ ± x(B₂A₂)ᵀ = y + x([±B₁, ±B₂] [A₁; A₂])ᵀ

    Products of small factors of one activation that are added up (PiSSA's with the one it starts from; those of several
    adapters) are one product of their joined rank: y is read and written once, and in bfloat16 they cancel before they
    are rounded.
    """

    name: ClassVar[str] = "sums"
    after: ClassVar[tuple[str, ...]] = ("scalars",)

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        for node in reversed([node for node in rewrite.graph.nodes if is_sum(node) and not is_within(node)]):
            terms = list(addends(node, lambda part, root=node: is_sum(part) and (part is root or is_within(part))))
            products = {each: found for each in terms if (found := factors(each.term))}
            kind = next((found.kind for found in products.values()), None)
            small = {each: found for each, found in products.items() if found.kind == kind}
            others = [each for each in terms if each not in small]
            if len(small) > 1 and others and others[0].scale > 0:
                join(rewrite, node, others, small)


def is_sum(node: fx.Node) -> bool:
    own = is_added(node) and is_a(node, SUMS) and not node.kwargs
    return own and all(isinstance(term, fx.Node) for term in node.args)


def is_within(node: fx.Node) -> bool:
    """Whether a sum alone reads this one."""
    return len(node.users) == 1 and is_sum(next(iter(node.users)))


class Factors(NamedTuple):
    """x(BA)ᵀ, computed as (xAᵀ)Bᵀ, with x […, in], A [r, in], B [out, r]"""

    x: fx.Node
    A: fx.Node
    B: fx.Node

    @property
    def kind(self) -> tuple:
        """What products that are joined have in common."""
        return self.x, self.A.meta["dtype"], self.B.meta["dtype"]


def factors(product: fx.Node) -> Factors | None:
    """Those of a product with small A and B, which nothing else reads."""
    if product.target is not aten.linear.default or len(product.args) != 2 or len(product.users) > 1:
        return None
    inner, B = product.args
    A, shape = factor(inner), B.meta.get("shape", ())
    if A is None or len(inner.users) > 1 or B.meta.get("stacked") or len(shape) != 2 or NARROW * shape[1] > shape[0]:
        return None
    return Factors(inner.args[0], A, B)


def join(rewrite: Rewriter, last: fx.Node, others: list[Addend], small: dict[Addend, Factors]) -> None:
    """`last` becomes the sum of the others and of one product."""

    def add(target: object, *args: object, like: fx.Node) -> fx.Node:
        return rewrite.add(target, args, like=like, before=last)

    outer, (x, like, _) = next((each.term, found) for each, found in small.items())
    inner, right = outer.args[0], [found.A for found in small.values()]
    left = [f.B if each.scale > 0 else add(aten.neg.default, f.B, like=each.term) for each, f in small.items()]
    A = held_like(add(aten.cat.default, right, like=inner), like)
    A.meta["shape"] = (sum(each.meta["shape"][0] for each in right), like.meta["shape"][1])
    B = add(aten.cat.default, left, 1, like=outer)
    z = add(aten.linear.default, x, A, like=inner)
    product = add(aten.linear.default, z, B, like=outer)
    y = others[0].term
    for scale, term, _ in others[1:]:
        y = add(aten.add.Tensor if scale > 0 else aten.sub.Tensor, y, term, like=last)
    rewrite.change(last, aten.add.Tensor, (y, product))
