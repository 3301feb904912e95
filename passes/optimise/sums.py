from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from torch import fx

from subgraph_peft.equation import SUMS
from subgraph_peft.graphs import aten, sweep
from subgraph_peft.lower import META
from subgraph_peft.module import GraphModel
from subgraph_peft.optimise import Optimisation

from .factors import NARROW, derived, factor


class Sums(Optimisation):
    """y ± x(B₁A₁)ᵀ ± x(B₂A₂)ᵀ = y + x([±B₁, ±B₂] [A₁; A₂])ᵀ

    Products of small factors of one activation that are added up (PiSSA's with the one it starts from; those of several
    adapters) are one product of their joined rank: y is read and written once, and in bfloat16 they cancel before they
    are rounded.
    """

    name: ClassVar[str] = "sums"

    def apply(self, graph: fx.Graph, owner: GraphModel) -> int:
        changed = 0
        inside: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            if is_sum(node) and node not in inside:
                terms = list(addends(node, 1, inside))
                kind = next((term.kind for term in terms if term.factors), None)
                small = [term for term in terms if term.factors and term.kind == kind]
                others = [term for term in terms if term not in small]
                if len(small) > 1 and others and others[0].sign > 0:
                    join(graph, node, others, small)
                    changed += 1
        sweep(graph)
        return changed


class Addend(NamedTuple):
    """± node, which is x(BA)ᵀ where it has factors (x, A, B)."""

    sign: int
    node: fx.Node
    factors: tuple[fx.Node, fx.Node, fx.Node] | None

    @property
    def kind(self) -> tuple:
        """What products that are joined have in common."""
        x, A, B = self.factors
        return x, A.meta["dtype"], B.meta["dtype"]


def is_sum(node: fx.Node) -> bool:
    own = META in node.meta.get("custom", {}) and node.target in SUMS and not node.kwargs
    return own and all(isinstance(term, fx.Node) for term in node.args)


def addends(node: fx.Node, sign: int, inside: set[fx.Node]) -> Iterator[Addend]:
    """The terms of a sum and of the sums that it alone reads, which are then `inside`."""
    for side, term in zip((1, SUMS[node.target]), node.args, strict=True):
        if is_sum(term) and len(term.users) == 1:
            inside.add(term)
            yield from addends(term, sign * side, inside)
        else:
            yield Addend(sign * side, term, factors(term))


def factors(product: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """(x, A, B) of x(BA)ᵀ with small A and B, which nothing else reads."""
    if product.target is not aten.linear.default or len(product.args) != 2 or len(product.users) > 1:
        return None
    inner, B = product.args
    A, shape = factor(inner), B.meta.get("shape", ())
    if A is None or len(inner.users) > 1 or B.meta.get("stacked") or len(shape) != 2 or NARROW * shape[1] > shape[0]:
        return None
    return inner.args[0], A, B


def join(graph: fx.Graph, last: fx.Node, others: list[Addend], small: list[Addend]) -> None:
    """`last` becomes the sum of the others and of one product."""
    outer, (x, like, _) = small[0].node, small[0].factors
    inner, right = outer.args[0], [A for _, _, (_, A, _) in small]
    with graph.inserting_before(last):
        left = [B if sign > 0 else derived(graph, node, aten.neg.default, (B,)) for sign, node, (_, _, B) in small]
        A = derived(graph, inner, aten.cat.default, (right,), like=like)
        A.meta["shape"] = (sum(each.meta["shape"][0] for each in right), like.meta["shape"][1])
        B = derived(graph, outer, aten.cat.default, (left, 1))
        z = derived(graph, inner, aten.linear.default, (x, A))
        product = derived(graph, outer, aten.linear.default, (z, B))
        y = others[0].node
        for sign, node, _ in others[1:]:
            y = derived(graph, last, aten.add.Tensor if sign > 0 else aten.sub.Tensor, (y, node))
    last.target, last.args = aten.add.Tensor, (y, product)
