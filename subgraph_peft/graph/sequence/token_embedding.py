"""Where a sequence of token ids becomes activations: the lookup of the main input, its length, its table."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from ...base.borrowed import size_formula
from ...base.errors import MethodError
from ..layout import TRANSPOSED
from ..nodes import aten, backward_slice, evaluate_node, fixed_size, operator_name, sizes
from ..operators import VIEWS, Kind, is_a, operand
from ..site import Call, Site
from .padding import MASK

TYPES, POSITIONS = "token_type_ids", "position_ids"
EXTENDS = "extends"  # meta of a node that is a padding mask with virtual positions: the name of the input
# operators through which a value per position stays that value, up to its shape and dtype
CARRIES = VIEWS & ~Kind.TRANSPOSE | Kind.SLICE | Kind.PAD
SCALES = Kind.MULTIPLY | Kind.DIVIDE | Kind.CAST


@dataclass(frozen=True)
class EmbeddingEntry:
    """Where token ids become activations.

    ids:      the placeholder [batch, length]        lookup:   the embedding of the ids
    embedded: the result of the module that holds the table, [batch, length, d]
    length:   the symbol of the sequence length
    """

    ids: fx.Node
    lookup: fx.Node
    embedded: fx.Node
    length: str

    def dims(self, node: fx.Node) -> list[int]:
        """The dimensions of a node's value that are the sequence."""
        return [d for d, size in enumerate(sizes(node)) if str(size) == self.length]

    def hangs_on_length(self, node: fx.Node) -> bool:
        """Whether a size of a node's value is computed from the length without being it: 3·T, T − 1."""
        return any(str(s) != self.length and self.length in symbols(s) for s in sizes(node))


def sequence_sites(graph: fx.Graph) -> Iterator[Site]:
    """The table of the token embedding of the model's main input. Raises MethodError where there is not one."""
    found = embedding_entry(graph)
    table = table_of(found.lookup)
    yield Site(
        name=str(table.target),
        kind="sequence",
        shape=tuple(table.meta["val"].shape),
        dtype=table.meta["val"].dtype,
        calls=(Call(found.lookup.name, "embedding", operator_name(found.lookup)),),
        layout=TRANSPOSED,
    )


def embedding_entry(graph: fx.Graph) -> EmbeddingEntry:
    """The lookup of the main input's token ids. Raises MethodError where it is not one, or its length is fixed."""
    lookups: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.find_nodes(op="call_function", target=aten.embedding.default):
        source = origin(node.args[1])
        if source is not None and source.name not in (TYPES, POSITIONS, MASK) and table_of(node) is not None:
            lookups.setdefault(source, []).append(node)
    if not lookups:
        names = ", ".join(node.name for node in graph.find_nodes(op="placeholder"))
        raise MethodError(
            f"No input is a sequence of token ids that an embedding looks up (inputs: {names}). Virtual positions need "
            "one: capture the model with input_ids, not with inputs_embeds."
        )
    order = sorted(lookups, key=lambda node: node.name != "input_ids")
    ids, calls = order[0], lookups[order[0]]
    if len(calls) > 1:
        tables = ", ".join(str(table_of(call).target) for call in calls)
        raise MethodError(
            f"{ids.name} is looked up {len(calls)} times ({tables}): virtual positions have a row in one table only."
        )
    if len(sizes(ids)) != 2:
        raise MethodError(f"{ids.name} has {len(sizes(ids))} dimensions; virtual positions need [batch, length].")
    length = sizes(ids)[1]
    if (fixed := fixed_size(length)) is not None:
        raise MethodError(
            f"The sequence length is fixed to {fixed} in this graph, which cannot take virtual positions. Capture it "
            "with a length that varies."
        )
    embedded = scaled(calls[0])
    found = EmbeddingEntry(ids, calls[0], embedded, str(length))
    if len(sizes(embedded)) != 3 or found.dims(embedded) != [1]:
        raise MethodError(f"{embedded.name} is {list(sizes(embedded))}, not [batch, length, width].")
    return found


def origin(node: Any) -> fx.Node | None:
    """The placeholder whose values these are, up to shape and dtype."""
    while is_a(node, CARRIES):
        node = operand(node)
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None


def table_of(lookup: fx.Node) -> fx.Node | None:
    """The parameter that an embedding reads."""
    table = lookup.args[0]
    while is_a(table, SCALES):
        table = table.args[0]
    return table if table.op == "get_attr" else None


def scaled(lookup: fx.Node) -> fx.Node:
    """The lookup with the constant factors that its own module puts on it."""
    node = lookup
    while len(node.users) == 1 and innermost(user := next(iter(node.users))) == innermost(lookup) != "":
        others = [source for source in user.all_input_nodes if source is not node]
        if (
            not is_a(user, SCALES)
            or user.args[0] is not node
            or any(leaf.op == "placeholder" for n in others for leaf in leaves(n))
        ):
            break
        node = user
    return node


def innermost(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def leaves(node: fx.Node) -> set[fx.Node]:
    """Inputs and tensors whose values (not sizes) a node depends on."""
    sources = backward_slice(node, lambda current: not is_a(current, Kind.SIZE))
    return {source for source in sources if source.op in ("placeholder", "get_attr")}


def rows(graph: fx.Graph, tensors: Mapping[str, torch.Tensor], W: torch.Tensor) -> torch.Tensor:
    """What the module that holds the table W [vocabulary, d] gives for every id: its rows, scaled where it scales."""
    found = embedding_entry(graph)
    given = evaluate_node(found.embedded, lambda leaf: tensors[str(leaf.target)].detach(), {found.lookup: W})
    return given.to(W.dtype)


def symbols(size: int | torch.SymInt) -> set[str]:
    return {str(s) for s in size_formula(size).free_symbols} if isinstance(size, torch.SymInt) else set()
