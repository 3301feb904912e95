from collections.abc import Iterator
from typing import ClassVar

from torch import fx

from subgraph_peft.graph.addends import Addend, addends, keeps_shape
from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.operators import SUMS, Kind, is_a
from subgraph_peft.graph.passes import EquationOwner, EquationPass
from subgraph_peft.graph.rewriter import Rewriter
from subgraph_peft.method.equation import is_elementwise


class Changes(EquationPass):
    """s B A − s B₀ A₀ = s ((B − B₀) A + B₀ (A − A₀))

    for trained factors B [out, r], A [r, in] and constant ones, at which they start. What training adds is computed
    from what it changed: products in bfloat16 would round B A and B₀ A₀ each for itself, by more than they differ at
    first, and B and A to the digits of B₀ and A₀.
    """

    name: ClassVar[str] = "changes"
    after: ClassVar[tuple[str, ...]] = ("gram",)

    def apply(self, rewrite: Rewriter, owner: EquationOwner) -> None:
        for node in reversed([node for node in rewrite.graph.nodes if is_a(node, SUMS)]):
            for trained, start in pairs(owner, terms(node)):
                whole, rest = start.within, start.within.args[0]
                rewrite.replace_all({whole: rest, trained.term: change(rewrite, trained.term, start.term)})


def terms(node: fx.Node) -> list[Addend]:
    """The terms of a sum. What others read too stays whole."""
    return list(addends(node, lambda part: keeps_shape(part) and (part is node or len(part.users) == 1)))


def change(rewrite: Rewriter, trained: fx.Node, start: fx.Node) -> fx.Node:
    """(B − B₀) A + B₀ (A − A₀) [out, in], for B A and B₀ A₀"""
    (B, A), (B0, A0) = trained.args, start.args
    dB, dA = (rewrite.add(aten.sub.Tensor, pair, like=trained) for pair in ((B, B0), (A, A0)))
    products = (rewrite.add(aten.matmul.default, factors, like=trained) for factors in ((dB, A), (B0, dA)))
    return rewrite.add(aten.add.Tensor, tuple(products), like=trained)


def pairs(equation: EquationOwner, found: list[Addend]) -> Iterator[tuple[Addend, Addend]]:
    """(s B A, −s B₀ A₀) of one adapter, with factors that are read as they are or computed entry by entry."""
    products = [each for each in found if is_narrow(each.term)]
    starts = [each for each in products if each.within is not None and not equation.varies(each.term)]
    for each in (each for each in products if equation.varies(each.term)):
        alike = (s for s in starts if s.scale == -each.scale and signature(equation, s) == signature(equation, each))
        if start := next(alike, None):
            starts.remove(start)
            yield each, start


def is_narrow(term: fx.Node) -> bool:
    if not is_a(term, Kind.MATMUL) or term.meta["val"].ndim != 2 or len(term.users) > 1:
        return False
    return term.args[0].meta["val"].shape[1] < min(term.meta["val"].shape) and all(map(is_elementwise, term.args))


def signature(equation: EquationOwner, addend: Addend) -> tuple:
    return equation.adapter(addend.term), *(factor.meta["val"].shape for factor in addend.term.args)
