"""What passes over products with small factors have in common."""

from torch import fx

from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.rewriter import META

NARROW = 4  # a factor is small if it has at most a quarter as many rows as columns


def is_added(node: fx.Node) -> bool:
    """Whether a rewrite added a node."""
    return META in node.meta.get("custom", {})


def factor(node: fx.Node) -> fx.Node | None:
    """A of a product x Aᵀ that a rewrite added, with A [r, in] small; else None."""
    if node.target is not aten.linear.default or len(node.args) != 2 or not is_added(node):
        return None
    matrix = node.args[1]
    shape = matrix.meta.get("shape", ())
    small = len(shape) == 2 and not matrix.meta.get("stacked") and NARROW * shape[0] <= shape[1]
    return matrix if small else None


def held_like(node: fx.Node, other: fx.Node) -> fx.Node:
    """The node, said to hold a value of the shape and dtype that another holds."""
    node.meta |= {key: other.meta[key] for key in ("shape", "stacked", "dtype") if key in other.meta}
    return node
