"""The attention calls of a graph, their heads, and keys that are repeated for groups of queries."""

from collections.abc import Iterator
from typing import Any

from torch import fx

from ...base.errors import MethodError
from ..nodes import aten, operator_name, sizes
from ..operators import SUMS, Kind, argument, is_a, operand, schema
from ..site import Call, Site
from .token_embedding import CARRIES, innermost

ATTENTION = aten.scaled_dot_product_attention.default
# operators through which positions stay positions: constants are added, padding is multiplied away
KEEPS = CARRIES | SUMS | Kind.MULTIPLY | Kind.MASKED | Kind.REPEAT
CAUSAL, MOVED = "causal_length", "moved_positions"


def attention_sites(graph: fx.Graph, source: str) -> Iterator[Site]:
    """Every scaled_dot_product_attention, named after its module; its shape is that of one key, [heads, width].

    Raises MethodError where the graph of `source` has none.
    """
    found = attentions(graph)
    if not found:
        raise MethodError(
            f"{source} computes its attention without scaled_dot_product_attention. Load the model with "
            'attn_implementation="sdpa" and capture it again; models that add their own biases to the scores (DeBERTa, '
            "Bloom) have no such form."
        )
    for name, node in found.items():
        key, value = node.args[1:3]
        shape, _ = heads(key)
        if len(sizes(key)) != 4 or shape != heads(value)[0] or not all(isinstance(size, int) for size in shape):
            raise MethodError(
                f"{name} has keys {list(sizes(key))} and values {list(sizes(value))}; a prefix needs both as [batch, "
                "heads, length, width] of one width."
            )
        yield Site(
            name, "attention", shape, key.meta["val"].dtype, (Call(node.name, "attention", operator_name(node)),)
        )


def attentions(graph: fx.Graph) -> dict[str, fx.Node]:
    """Module path -> attention; `@1`, `@2` … for the further calls of one module."""
    found: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=ATTENTION):
        path = innermost(node).partition("@")[0] or "attention"
        count = sum(name.partition("@")[0] == path for name in found)
        found[f"{path}@{count}" if count else path] = node
    return found


def heads(node: fx.Node) -> tuple[tuple[Any, ...], int]:
    """([heads, width], repeats) of keys or values, looked at before grouped heads are repeated for the queries."""
    source, repeats = repeated(node)
    return (sizes(source)[1], sizes(node)[3]) if repeats > 1 else sizes(node)[1::2], repeats


def repeated(node: fx.Node) -> tuple[fx.Node, int]:
    """(keys or values before grouped heads are repeated for the queries, how often they are)"""
    inner = node
    while is_a(inner, Kind.SAME | Kind.RESHAPE):
        inner = operand(inner)
    if is_a(inner, Kind.BROADCAST) and len(sizes(inner)) == 5 and list(sizes(operand(inner)))[2:3] == [1]:
        source, (batch, grouped, repeats, length, width) = operand(inner), sizes(inner)
        while len(sizes(source)) > 4 and is_a(source, Kind.SLICE | Kind.RESHAPE):
            source = operand(source)
        if list(map(str, sizes(source))) == list(map(str, (batch, grouped, length, width))):
            return source, repeats
    if inner.target is aten.repeat_interleave.self_int and argument(inner, "dim") == 1:
        return operand(inner), argument(inner, "repeats")
    return node, 1


def bound(node: fx.Node) -> dict[str, Any]:
    """Arguments of an attention by name, with the defaults of those that may be left out."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return {name: argument(node, name) for name in schema(node.target) if name in names or name in node.kwargs}
