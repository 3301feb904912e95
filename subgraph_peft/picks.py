"""Positions that a graph picks by their number, which virtual ones in front of them move."""

from collections.abc import Iterable

from torch import fx

from .entry import CARRIES, MASK, POSITIONS, Entry, leaves, sizes, symbols
from .errors import MethodError
from .graphs import flat_outputs, operator_name
from .operators import Kind, argument, dimensions, extent, is_a, operand, schema

COUNTS = Kind.REORDER | Kind.SPLIT | Kind.UNBIND  # single out or reorder positions
END = 2**62


def carriers(graph: fx.Graph, found: Entry, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that hold values of tokens: activations that depend on the embedding, and ids, types and labels."""
    held = {found.embedded}
    carried = {node for node in inputs if node.name not in (MASK, POSITIONS)}
    for node in graph.nodes:
        if held.intersection(node.all_input_nodes):
            held.add(node)
        elif is_a(node, CARRIES) and operand(node) in carried:
            carried.add(node)
    return held | carried


def check(graph: fx.Graph, found: Entry, held: set[fx.Node]) -> None:
    """Raises MethodError where the graph counts positions in a way that virtual ones would change."""
    for node in graph.nodes:
        if node.op == "output":
            for leaf in (leaf for leaf in flat_outputs(graph) if isinstance(leaf, fx.Node)):
                if found.hangs_on_length(leaf):
                    raise MethodError(
                        f"The output {leaf.name} {list(sizes(leaf))} cannot be cut back to the real positions."
                    )
        source = node.args[0] if node.args else None
        if node.op != "call_function" or source not in held:
            continue
        if is_a(node, COUNTS) and touches(node, found):
            raise MethodError(
                f"{operator_name(node)} at {node.name} counts positions, which virtual ones would change."
            )
        index = indices(node, found)
        for chosen in index:
            if outside := sorted(n.name for n in leaves(chosen) if n.op == "get_attr" or not found.dims(n)):
                raise MethodError(
                    f"{node.name} picks positions of the sequence by {outside[0]}, which does not know of virtual ones."
                )


def touches(node: fx.Node, found: Entry) -> bool:
    """Whether an operator of COUNTS acts along the sequence."""
    return not set(dimensions(node)).isdisjoint(found.dims(operand(node)))


def indices(node: fx.Node, found: Entry) -> list[fx.Node]:
    """Tensors that pick positions of an activation."""
    if is_a(node, Kind.INDEX):
        along = found.dims(operand(node))
        return [index for d, index in enumerate(argument(node, "indices")) if index is not None and d in along]
    if is_a(node, Kind.PICK) and touches(node, found):
        return [argument(node, name) for name in ("index", "indices", "mask") if name in schema(node.target)]
    return []


def picks(node: fx.Node, found: Entry) -> tuple[int, int, int] | None:
    """(dimension, first, last + 1) of the positions that a node picks by number from the start, None if it picks none.
    Raises MethodError where the number cannot be moved."""
    if not is_a(node, Kind.SELECT | Kind.SLICE) or not sizes(operand(node)):
        return None
    source, (dim,) = operand(node), dimensions(node)
    is_sequence = dim in found.dims(source)
    if not is_sequence and found.length not in symbols(sizes(source)[dim]):
        return None
    if is_a(node, Kind.SELECT):
        first = argument(node, "index")
        if isinstance(first, fx.Node) or first < 0:
            return None
        if is_sequence:
            return dim, first, first + 1
    else:
        _, first, last, step = extent(node)
        first, last = first or 0, END if last is None else last
        fixed_end = isinstance(last, int) and 0 <= last < END
        if step == 1 and (isinstance(first, fx.Node) or first < 0 or (first == 0 and not fixed_end)):
            return None
        if is_sequence and step == 1 and fixed_end:
            return dim, first, last
    shown = ", ".join(map(str, node.args))
    raise MethodError(
        f"{node.name} = {operator_name(node)}({shown}) counts positions from the start of the "
        "sequence in a way that virtual positions would change."
    )
