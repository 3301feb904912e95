"""Keys and values put before those of attention: K' = [P_k; K], V' = [P_v; V] at scaled_dot_product_attention."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from ...base.errors import MethodError
from ...graph.nodes import aten, sizes
from ...graph.operators import Kind, argument, is_a, operand
from ...graph.sequence.attention import CAUSAL, KEEPS, MOVED, attentions, bound, heads
from ...graph.sequence.padding import MASK
from ...graph.sequence.token_embedding import POSITIONS
from .virtual_positions import Emit, first_real


class Prefix:
    """Puts keys and values before those of one attention, in place.

    emitter: (node, like=None) -> emit(target, args, term, kwargs=None), which adds nodes before `node`, of the module
             of `like`
    device:  of the graph's constants
    """

    def __init__(self, graph: fx.Graph, name: str, emitter: Callable[..., Emit], device: torch.device):
        self.graph, self.name, self.emitter, self.device = graph, name, emitter, device
        self.node = attentions(graph)[name]
        self.arguments = bound(self.node)

    def run(self, keys: fx.Node, values: fx.Node, n: int, moved: int) -> None:
        """keys, values: [n, heads, width], in the dtype of the attention's;  moved: by how much the positions of the
        tokens move on"""
        queries, key, value = self.node.args[:3]
        emit = self.emitter(self.node)
        if moved and str(sizes(queries)[2]) == str(sizes(key)[2]):
            self.move_positions(str(sizes(key)[2]), moved)
        mask = self.mask(n)
        batch = emit(aten.sym_size.int, (key, 0), "batch")
        joined = [
            emit(aten.cat.default, ([self.spread(prefix, old, batch, n, term, emit), old], 2), term)
            for prefix, old, term in ((keys, key, "keys"), (values, value, "values"))
        ]
        self.node.args = (queries, *joined, mask, self.arguments["dropout_p"], False)
        self.node.kwargs = {name: self.arguments[name] for name in ("scale", "enable_gqa") if name in self.arguments}

    def spread(self, prefix: fx.Node, old: fx.Node, batch: fx.Node, n: int, term: str, emit: Emit) -> fx.Node:
        """[n, heads, width] as [batch, heads of the attention, n, width]."""
        (grouped, width), repeats = heads(old)
        term = f"{term}_prefix"
        node = emit(aten.permute.default, (prefix, [1, 0, 2]), term)
        if repeats > 1:
            node = emit(aten.unsqueeze.default, (node, 1), term)
            node = emit(aten.expand.default, (node, [grouped, repeats, n, width]), term)
            node = emit(aten.reshape.default, (node, [grouped * repeats, n, width]), term)
        return emit(aten.expand.default, (node, [batch, grouped * repeats, n, width]), term)

    def mask(self, n: int) -> fx.Node | None:
        """The mask with n columns in front that every query sees; one for all attentions that share it."""
        mask = self.arguments["attn_mask"]
        if mask is None and not self.arguments["is_causal"]:
            return None
        mask = self.causal() if mask is None else mask
        if str(sizes(mask)[-1]) == "1":
            raise MethodError(f"The mask {mask.name} {list(sizes(mask))} of {self.name} does not tell keys apart.")
        arguments = (mask, [n, 0], True if mask.meta["val"].dtype == torch.bool else 0.0)
        known = [u for u in mask.users if u.target is aten.constant_pad_nd.default and u.args == arguments]
        if known:
            return known[0]
        return put(self.emitter(mask.next, mask), aten.constant_pad_nd.default, arguments, "mask", mask)

    def causal(self) -> fx.Node:
        """The mask of is_causal, one for all attentions over this length."""
        length = str(sizes(self.node.args[0])[2])
        if length != str(sizes(self.node.args[1])[2]):
            raise MethodError(f"{self.name} is causal over other queries than keys; a prefix has no place in its mask.")
        same = [node for node in attentions(self.graph).values() if str(sizes(node.args[0])[2]) == length]
        first = same[0].args[0]
        for node in self.graph.nodes:
            if node.meta.get(CAUSAL) == length:
                return node
        emit = self.emitter(first.next, first)
        size = emit(aten.sym_size.int, (first, 2), "length")
        options = {"dtype": torch.bool, "device": self.device}
        mask = emit(aten.tril.default, (emit(aten.ones.default, ([size, size],), "visible", options),), "causal")
        mask.meta |= {CAUSAL: length, "val": first.meta["val"].new_ones(sizes(first)[2:3] * 2, dtype=torch.bool)}
        return mask

    def move_positions(self, length: str, moved: int) -> None:
        """Move on the positions of the tokens: once in a graph, by the longest prefix."""
        found = position_reads(self.graph, length)
        if not found:
            raise MethodError(
                f"{self.name}: where the positions of the tokens come from cannot be seen, so they cannot start behind "
                'the prefix. positions="kept" leaves them as they are.'
            )
        for reader, source in found:
            if MOVED in source.meta:
                source.args = (source.args[0], max(moved, source.args[1]))
                continue
            from_table = is_a(reader, Kind.LOOKUP | Kind.PICK | Kind.INDEX)
            known = [user for user in source.users if user.meta.get(MOVED) == from_table]
            if known:
                reader.replace_input_with(source, known[0])
                continue
            emit = self.emitter(source.next, source)
            start = None if from_table else self.start(source, length, emit)
            counted = source if start is None else put(emit, aten.sub.Tensor, (source, start), "from_first", source)
            added = put(emit, aten.add.Tensor, (counted, moved), "positions", source)
            added.meta[MOVED] = from_table
            reader.replace_input_with(source, added)

    def start(self, source: fx.Node, length: str, emit: Emit) -> fx.Node | None:
        """The first real token of each row, shaped to be taken from positions that count padding as well."""
        masks = [node for node in self.graph.find_nodes(op="placeholder") if node.name == MASK]
        counts_padding = is_a(root(source), Kind.RANGE) and str(sizes(source)[0]) == "1" and len(sizes(source)) > 1
        if not masks or not counts_padding or list(map(str, sizes(masks[0])))[1:] != [length]:
            return None
        return emit(aten.view.default, (first_real(masks[0], emit), [-1] + [1] * (len(sizes(source)) - 1)), "start")


def put(emit: Emit, target: Any, args: tuple, term: str, like: fx.Node) -> fx.Node:
    """A node with the shape and dtype of another."""
    node = emit(target, args, term)
    node.meta["val"] = like.meta["val"]
    return node


def position_reads(graph: fx.Graph, length: str) -> list[tuple[fx.Node, fx.Node]]:
    """(reader, positions) where positions of tokens become activations: as rows of a table, or as angles."""
    found: dict[tuple[fx.Node, fx.Node], None] = {}
    for node in graph.nodes:
        if node.target in (aten.embedding.default, aten.index_select.default):
            index = argument(node, "indices" if is_a(node, Kind.LOOKUP) else "index")
            found |= {(node, index): None} if is_position(index, length) else {}
        elif is_a(node, Kind.INDEX) and operand(node).op == "get_attr":
            indices = argument(node, "indices")
            found |= {(node, i): None for i in indices if i is not None and is_position(i, length)}
        elif is_a(node, Kind.WAVE):
            found |= {(reader, i): None for reader, i in angles(node) if is_position(i, length)}
    return list(found)


def root(node: fx.Node) -> fx.Node:
    """Where positions are counted."""
    return root(operand(node)) if is_a(node, KEEPS) else node


def angles(node: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """(reader, integers) where the argument of a wave is made from integers."""
    for source in node.all_input_nodes:
        value = source.meta.get("val")
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            yield from angles(source)
        elif isinstance(value, torch.Tensor):
            yield node, source


def is_position(node: Any, length: str) -> bool:
    """Whether a node's values count the tokens of the sequence of this length."""
    if not isinstance(node, fx.Node):
        return False
    along = length in map(str, sizes(node))
    if node.op == "placeholder":
        return along and node.name == POSITIONS
    if is_a(node, Kind.RANGE) or node.target is aten.cumsum.default:
        return along
    if is_a(node, Kind.SLICE) and operand(node).op == "get_attr":
        return along and str(operand(node).target).endswith(POSITIONS)
    others = [arg for arg in node.args[1:] if is_position(arg, length)]
    return is_a(node, KEEPS) and not others and is_position(operand(node), length)
