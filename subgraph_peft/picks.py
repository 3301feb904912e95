"""Positions that a graph picks by their number, which virtual ones in front of them move."""

from collections.abc import Iterable

from torch import fx

from .entry import CARRIES, MASK, POSITIONS, Entry, leaves, sizes, symbols
from .errors import MethodError
from .graphs import aten, flat_outputs, operator_name

# operators that single out or reorder positions -> which argument is the dimension
COUNTS = {
    aten.flip.default: 1, aten.unbind.int: 1, aten.unfold.default: 1, aten.roll.default: 2, aten.split.Tensor: 2,
    aten.split.sizes: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.tensor_split.sections: 2,
}  # fmt: skip
END = 2**62


def carriers(graph: fx.Graph, found: Entry, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that hold values of tokens: activations that depend on the embedding, and ids, types and labels."""
    held = {found.embedded}
    carried = {node for node in inputs if node.name not in (MASK, POSITIONS)}
    for node in graph.nodes:
        if held.intersection(node.all_input_nodes):
            held.add(node)
        elif node.target in CARRIES and node.args[0] in carried:
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
        if node.target in COUNTS and touches(node, found):
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
    position = COUNTS[node.target]
    given = node.args[position] if len(node.args) > position else 0
    dims = given if isinstance(given, (list, tuple)) else [given]
    return any(d % len(sizes(node.args[0])) in found.dims(node.args[0]) for d in dims)


def indices(node: fx.Node, found: Entry) -> list[fx.Node]:
    """Tensors that pick positions of an activation."""
    along = found.dims(node.args[0])
    if node.target is aten.index.Tensor:
        return [index for d, index in enumerate(node.args[1]) if index is not None and d in along]
    if node.target in (aten.gather.default, aten.index_select.default):
        return [node.args[2]] if node.args[1] % len(sizes(node.args[0])) in along else []
    return []


def picks(node: fx.Node, found: Entry) -> tuple[int, int, int] | None:
    """(dimension, first, last + 1) of the positions that a node picks by number from the start, None if it picks none.
    Raises MethodError where the number cannot be moved."""
    if node.target not in (aten.select.int, aten.slice.Tensor) or not sizes(node.args[0]):
        return None
    source, dim, *bounds = node.args
    dim %= len(sizes(source))
    is_sequence = dim in found.dims(source)
    if not is_sequence and found.length not in symbols(sizes(source)[dim]):
        return None
    if node.target is aten.select.int:
        first = bounds[0]
        if isinstance(first, fx.Node) or first < 0:
            return None
        if is_sequence:
            return dim, first, first + 1
    else:
        first, last, step = (*bounds, *(None, END, 1)[len(bounds) :])
        first, last = first or 0, END if last is None else last
        fixed_end = isinstance(last, int) and 0 <= last < END
        if step == 1 and (isinstance(first, fx.Node) or first < 0 or (first == 0 and not fixed_end)):
            return None
        if is_sequence and step == 1 and fixed_end:
            return dim, first, last
    shown = ", ".join(str(bound) for bound in bounds)
    raise MethodError(
        f"{node.name} = {operator_name(node)}({source.name}, {dim}, {shown}) counts positions from the start of the "
        "sequence in a way that virtual positions would change."
    )
