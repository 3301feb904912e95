"""What the inputs that are a sequence hold at virtual positions."""

from typing import Any

from torch import fx

from ...base.errors import MethodError
from ...graph.nodes import operator_name, sizes
from ...graph.operators import Kind, argument, is_a
from ...graph.sequence.padding import MASK
from ...graph.sequence.token_embedding import CARRIES, POSITIONS, TYPES, EmbeddingEntry, origin, symbols

# operators that read the shape of ids only, or where the largest is
HARMLESS = Kind.SIZE | Kind.FILL | Kind.ARGMAX | Kind.LOSS


def fills(graph: fx.Graph, found: EmbeddingEntry) -> dict[fx.Node, Any]:
    """What each input that is a sequence holds at virtual positions. Raises MethodError for inputs without such a
    value."""
    known: dict[fx.Node, Any] = {found.ids: dummy(found)}
    labels = label_inputs(graph, found)
    for node in graph.find_nodes(op="placeholder"):
        dims = found.dims(node)
        if node is found.ids:
            continue
        if node in labels:
            known[node] = labels[node]
        elif found.hangs_on_length(node) or (dims and dims != [1]) or (dims and len(sizes(node)) != 2):
            raise MethodError(
                f"The input {node.name} {list(sizes(node))} is shaped by the sequence; virtual positions can be put "
                f"into inputs [batch, length] only."
                + (f" Pass {MASK} as [batch, length], without heads and queries." if "mask" in node.name else "")
            )
        elif dims and node.name not in (MASK, TYPES, POSITIONS):
            raise MethodError(
                f"What the input {node.name} {list(sizes(node))} holds at virtual positions is unknown; known are "
                f"{MASK}, {TYPES}, {POSITIONS} and the labels of a cross entropy. Capture the model without it."
            )
        elif dims:
            known[node] = {MASK: 1, TYPES: 0}.get(node.name)
            if str(sizes(node)[0]) == "1":
                raise MethodError(f"The input {node.name} has a batch of 1; expand it to that of {found.ids.name}.")
    return known


def dummy(found: EmbeddingEntry) -> int:
    """A token id that the graph takes for an ordinary one: none that it compares ids with, such as padding.

    Raises MethodError where the graph does something else with ids, such as giving them to a decoder.
    """
    taken: set[Any] = {argument(found.lookup, "padding_idx")}
    stack = [found.ids]
    while stack:
        for user in stack.pop().users:
            if is_a(user, CARRIES):
                stack.append(user)
            elif is_a(user, Kind.EQUALITY):
                taken.add(argument(user, "other"))
            elif user not in (found.lookup, found.lookup.graph.output_node()) and not is_a(user, HARMLESS):
                raise MethodError(
                    f"{operator_name(user)} at {user.name} reads token ids as numbers; virtual positions have none."
                )
    return next(i for i in range(len(taken) + 1) if i not in taken)


def label_inputs(graph: fx.Graph, found: EmbeddingEntry) -> dict[fx.Node, int]:
    """Inputs that hold one label a position -> the label that the loss ignores."""
    labels: dict[fx.Node, int] = {}
    for loss in (node for node in graph.nodes if is_a(node, Kind.LOSS)):
        scores, target = argument(loss, "self"), argument(loss, "target")
        if found.length not in {s for size in sizes(scores) for s in symbols(size)}:
            continue
        if 1 in found.dims(scores) and len(sizes(scores)) > 1:
            raise MethodError(
                f"{loss.name} chooses among positions, as the loss of a span does; virtual positions would be among "
                "them. Capture the model without labels."
            )
        source = origin(target)
        if source is None or source is found.ids or len(sizes(source)) != 2:
            what = source.name if source is not None else "a computed value"
            raise MethodError(
                f"The targets of {loss.name} are {what}; virtual positions need labels [batch, length] of their own, "
                "which the loss can ignore. Capture the model with labels, or without the loss."
            )
        labels[source] = argument(loss, "ignore_index")
    return labels
