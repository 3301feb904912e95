"""A sum of multiples as its terms: a + 2 (b − c) is a, 2 b and −2 c."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import fx

from .operators import SUMS, Kind, is_a


class Addend(NamedTuple):
    """scale · term; `within` is the sum whose second operand it is, if it is one's."""

    scale: float
    term: fx.Node
    within: fx.Node | None = None


def addends(
    node: fx.Node, opens: Callable[[fx.Node], bool], scale: float = 1.0, within: fx.Node | None = None
) -> Iterator[Addend]:
    """The terms of scale · node. `opens` says of a sum or a multiple whether it is taken apart."""
    parts = operands(node)
    if not parts or not opens(node):
        yield Addend(scale, node, within)
        return
    for index, (factor, operand) in enumerate(parts):
        yield from addends(operand, opens, scale * factor, within if len(parts) == 1 else node if index else None)


def operands(node: fx.Node) -> list[tuple[float, fx.Node]]:
    """(number, operand) of each operand of a sum, or of a multiple; empty for other nodes."""
    left, right = (*node.args, None, None)[:2]
    if node.op != "call_function" or node.kwargs or not isinstance(left, fx.Node):
        return []
    if is_a(node, SUMS) and isinstance(right, fx.Node):
        return [(1.0, left), (sign(node), right)]
    if is_a(node, Kind.MULTIPLY) and isinstance(right, (int, float)):
        return [(right, left)]
    if is_a(node, Kind.DIVIDE) and isinstance(right, (int, float)):
        return [(1 / right, left)]
    return [(-1.0, left)] if is_a(node, Kind.NEGATE) else []


def sign(node: fx.Node) -> float:
    """Of the second operand of a sum."""
    return -1.0 if is_a(node, Kind.SUBTRACT) else 1.0


def keeps_shape(node: fx.Node) -> bool:
    """Whether every operand that is a node has the shape of the result: nothing is broadcast."""
    return all(same_shape(node, operand) for operand in node.args if isinstance(operand, fx.Node))


def same_shape(node: fx.Node, operand: Any) -> bool:
    return isinstance(operand, fx.Node) and operand.meta["val"].shape == node.meta["val"].shape
