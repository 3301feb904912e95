"""What passes over products with small factors have in common."""

from typing import Any

from torch import fx

from subgraph_peft.graphs import aten
from subgraph_peft.lower import META

NARROW = 4  # a factor is small if it has at most a quarter as many rows as columns


def factor(node: fx.Node) -> fx.Node | None:
    """A of a product x Aᵀ that a rewrite added, with A [r, in] small; else None."""
    if node.target is not aten.linear.default or len(node.args) != 2 or META not in node.meta.get("custom", {}):
        return None
    matrix = node.args[1]
    shape = matrix.meta.get("shape", ())
    small = len(shape) == 2 and not matrix.meta.get("stacked") and NARROW * shape[0] <= shape[1]
    return matrix if small else None


def derived(graph: fx.Graph, origin: fx.Node, target: Any, args: tuple, like: fx.Node | None = None) -> fx.Node:
    """A node in the name of `origin`, a value of the shape that `like` has."""
    node = graph.create_node("call_function", target, args, name=f"{origin.name}_{target.overloadpacket.__name__}")
    node.meta = {key: origin.meta[key] for key in ("custom", "nn_module_stack", "stack_trace") if key in origin.meta}
    if like is not None:
        node.meta |= {key: like.meta[key] for key in ("shape", "stacked", "dtype") if key in like.meta}
    return node
