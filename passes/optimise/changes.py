from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from torch import fx

from subgraph_peft.equation import MATMULS, SUMS, Equation, is_elementwise, made
from subgraph_peft.graphs import aten, sweep
from subgraph_peft.optimise import Optimisation

from .gram import same_shape


class Changes(Optimisation):
    """s B A − s B₀ A₀ = s ((B − B₀) A + B₀ (A − A₀))

    for trained factors B [out, r], A [r, in] and constant ones, at which they start. What training adds is computed
    from what it changed: products in bfloat16 would round B A and B₀ A₀ each for itself, by more than they differ at
    first, and B and A to the digits of B₀ and A₀.
    """

    name: ClassVar[str] = "changes"
    stage: ClassVar[str] = "equation"

    def apply(self, graph: fx.Graph, owner: Equation) -> int:
        changed = 0
        for node in reversed(list(graph.nodes)):
            for trained, start in pairs(owner, list(addends(node))):
                (B, A), (B0, A0), like = trained.term.args, start.term.args, trained.term
                with graph.inserting_before(trained.term):
                    dB, dA = made(graph, aten.sub.Tensor, (B, B0), like), made(graph, aten.sub.Tensor, (A, A0), like)
                    products = (made(graph, aten.matmul.default, factors, like) for factors in ((dB, A), (B0, dA)))
                    total = made(graph, aten.add.Tensor, tuple(products), like)
                trained.term.replace_all_uses_with(total)
                start.within.replace_all_uses_with(start.within.args[0])
                changed += 1
        sweep(graph)
        return changed


class Addend(NamedTuple):
    """scale · term; `within` is the sum whose second operand it is."""

    scale: float
    term: fx.Node
    within: fx.Node | None


def addends(node: fx.Node, scale: float = 1.0, within: fx.Node | None = None, root: bool = True) -> Iterator[Addend]:
    """The terms of a sum. What others read too stays whole."""
    left, right = (*node.args, None, None)[:2]
    if node.op != "call_function" or node.kwargs or not (root or len(node.users) == 1):
        yield Addend(scale, node, within)
    elif node.target in SUMS and same_shape(node, left) and same_shape(node, right):
        yield from addends(left, scale, None, False)
        yield from addends(right, scale * SUMS[node.target], node, False)
    elif node.target is aten.mul.Tensor and isinstance(right, (int, float)):
        yield from addends(left, scale * right, within, False)
    elif node.target is aten.neg.default:
        yield from addends(left, -scale, within, False)
    else:
        yield Addend(scale, node, within)


def pairs(equation: Equation, terms: list[Addend]) -> Iterator[tuple[Addend, Addend]]:
    """(s B A, −s B₀ A₀) of one adapter, with factors that are read as they are or computed entry by entry."""
    products = [each for each in terms if is_narrow(each.term)]
    starts = [each for each in products if each.within is not None and not equation.varies(each.term)]
    for each in (each for each in products if equation.varies(each.term)):
        alike = (s for s in starts if s.scale == -each.scale and signature(equation, s) == signature(equation, each))
        if start := next(alike, None):
            starts.remove(start)
            yield each, start


def is_narrow(term: fx.Node) -> bool:
    if term.target not in MATMULS or term.meta["val"].ndim != 2 or len(term.users) > 1:
        return False
    return term.args[0].meta["val"].shape[1] < min(term.meta["val"].shape) and all(map(is_elementwise, term.args))


def signature(equation: Equation, addend: Addend) -> tuple:
    return equation.adapter(addend.term), *(factor.meta["val"].shape for factor in addend.term.args)
