"""Virtual positions in the input sequence: X' = [X_left; P; X], P before the first real token."""

import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from ...base.errors import MethodError
from ...graph.nodes import aten, flat_outputs, operator_name, sizes
from ...graph.operators import Kind, argument, dimensions, extent, is_a, operand, schema
from ...graph.sequence.padding import MASK
from ...graph.sequence.token_embedding import (
    CARRIES,
    EXTENDS,
    POSITIONS,
    EmbeddingEntry,
    embedding_entry,
    leaves,
    symbols,
)
from .virtual_inputs import fills

COUNTS = Kind.REORDER | Kind.SPLIT | Kind.UNBIND  # single out or reorder positions
END = 2**62


def carriers(graph: fx.Graph, found: EmbeddingEntry, inputs: Iterable[fx.Node]) -> set[fx.Node]:
    """Nodes that hold values of tokens: activations that depend on the embedding, and ids, types and labels."""
    held = {found.embedded}
    carried = {node for node in inputs if node.name not in (MASK, POSITIONS)}
    for node in graph.nodes:
        if held.intersection(node.all_input_nodes):
            held.add(node)
        elif is_a(node, CARRIES) and operand(node) in carried:
            carried.add(node)
    return held | carried


def check_picks(graph: fx.Graph, found: EmbeddingEntry, held: set[fx.Node]) -> None:
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


def touches(node: fx.Node, found: EmbeddingEntry) -> bool:
    """Whether an operator of COUNTS acts along the sequence."""
    return not set(dimensions(node)).isdisjoint(found.dims(operand(node)))


def indices(node: fx.Node, found: EmbeddingEntry) -> list[fx.Node]:
    """Tensors that pick positions of an activation."""
    if is_a(node, Kind.INDEX):
        along = found.dims(operand(node))
        return [index for d, index in enumerate(argument(node, "indices")) if index is not None and d in along]
    if is_a(node, Kind.PICK) and touches(node, found):
        return [argument(node, name) for name in ("index", "indices", "mask") if name in schema(node.target)]
    return []


def picks(node: fx.Node, found: EmbeddingEntry) -> tuple[int, int, int] | None:
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


Emit = Callable[..., fx.Node]


class Extension:
    """Puts n virtual positions into one graph, in place.

    The whole graph then computes with T + n positions: token ids, masks, types, labels and positions are extended where
    they enter it, virtual rows of the embedding are set to P, and outputs are cut back to the T real positions. A
    position that the model picks by its number, as a pooled first token, is counted from the first real token.

    emitter: (node, like=None) -> emit(target, args, term, kwargs=None), which adds nodes before `node`, of the module
             of `like`
    device:  of the graph's constants
    """

    def __init__(self, graph: fx.Graph, n: int, emitter: Callable[..., Emit], device: torch.device):
        self.graph, self.n, self.emitter, self.device = graph, n, emitter, device
        self.entry = embedding_entry(graph)
        self.fills = fills(graph, self.entry)
        self.mask = next((node for node in self.fills if node.name == MASK), None)
        self.carriers = carriers(graph, self.entry, self.fills)
        check_picks(graph, self.entry, self.carriers)
        self.emit = emitter(list(graph.find_nodes(op="placeholder"))[-1].next)
        self.batch = self.put(aten.sym_size.int, (self.entry.ids, 0), "batch")
        self.length = self.put(aten.sym_size.int, (self.entry.ids, 1), "length")

    def put(
        self, target: Any, args: tuple, term: str, like: fx.Node | None = None, emit: Emit | None = None
    ) -> fx.Node:
        node = (emit or self.emit)(target, args, term)
        if like is not None:
            node.meta["val"] = like.meta["val"]
        return node

    def run(self, virtual: fx.Node) -> None:
        """virtual: P [n, d], in the dtype of the embedding, before every call of the graph"""
        own = {self.entry.ids: {self.batch, self.length}}
        reads = {node: [u for u in node.users if u not in own.get(node, ())] for node in self.fills}
        self.make_window()
        extended = {node: self.extended(node, fill) for node, fill in self.fills.items()}
        if self.mask is not None:
            extended[self.mask].meta[EXTENDS] = self.mask.name
        for node, users in reads.items():
            for user in users:
                user.replace_input_with(node, extended[node])
        for node in [node for node in self.graph.nodes if node in self.carriers]:
            self.recount(node)
        self.place(virtual)
        self.trim_outputs()

    def make_window(self) -> None:
        """`start` [batch, 1], the first real token of each row, and `index` [batch, T + n], where the extended
        positions come from: 0 for a virtual one, else 1 + its position. None where no mask tells padding apart."""
        self.start = self.index = self.steps = None
        if self.mask is None:
            return
        put, n = self.put, self.n
        self.start = first_real(self.mask, self.emit)
        self.steps = self.arange(put(operator.add, (self.length, n), "extended_length"), "steps")
        shifted = put(aten.sub.Tensor, (self.steps, n - 1), "shifted")
        end = put(aten.add.Tensor, (self.start, n), "end")
        behind = put(
            aten.where.ScalarOther, (put(aten.ge.Tensor, (self.steps, end), "is_behind"), shifted, 0), "behind"
        )
        ahead = put(aten.lt.Tensor, (self.steps, self.start), "is_ahead")
        self.index = put(aten.where.self, (ahead, put(aten.add.Tensor, (self.steps, 1), "same"), behind), "index")

    def arange(self, size: Any, term: str, emit: Emit | None = None) -> fx.Node:
        return (emit or self.emit)(aten.arange.default, (size,), term, {"dtype": torch.int64, "device": self.device})

    def extended(self, node: fx.Node, fill: Any) -> fx.Node:
        """An input [batch, T] with n more positions, which hold `fill` or continue the positions."""
        put, n = self.put, self.n
        term = f"{node.name}_extended"
        if node.name == POSITIONS:
            return self.extended_positions(node)
        if self.index is None:
            return put(aten.constant_pad_nd.default, (node, [n, 0], fill), term, node)
        padded = put(aten.constant_pad_nd.default, (node, [1, 0], fill), f"{node.name}_filled")
        return put(aten.gather.default, (padded, 1, self.index), term, node)

    def extended_positions(self, node: fx.Node) -> fx.Node:
        """Virtual positions stand where the first real token stood; real ones move on by n."""
        put, n = self.put, self.n
        moved = put(aten.add.Tensor, (node, n), f"{node.name}_moved")
        term = f"{node.name}_extended"
        if self.index is None:
            first = put(aten.slice.Tensor, (node, 1, 0, 1), "first")
            virtual = put(aten.add.Tensor, (first, self.arange(n, "steps")), "virtual_positions")
            return put(aten.cat.default, ([virtual, moved], 1), term, node)
        padded = put(aten.constant_pad_nd.default, (moved, [1, 0], 0), f"{node.name}_filled")
        real = put(aten.gather.default, (padded, 1, self.index), "real_positions")
        first = put(aten.gather.default, (node, 1, self.start), "first")
        virtual = put(aten.add.Tensor, (put(aten.sub.Tensor, (self.steps, self.start), "offset"), first), "virtual")
        is_virtual = put(aten.eq.Scalar, (self.index, 0), "is_virtual")
        return put(aten.where.self, (is_virtual, virtual, real), term, node)

    def place(self, virtual: fx.Node) -> None:
        """P into the virtual rows of the embedding."""
        embedded = self.entry.embedded
        users, emit = list(embedded.users), self.emitter(embedded.next, embedded)
        width = sizes(embedded)[2]
        at = self.arange(self.n, "virtual_steps", emit)
        at = at if self.start is None else emit(aten.add.Tensor, (self.start, at), "virtual_at")
        at = emit(aten.unsqueeze.default, (at, -1), "virtual_at")
        at = emit(aten.expand.default, (at, [self.batch, self.n, width]), "virtual_at")
        spread = emit(aten.expand.default, (virtual, [self.batch, self.n, width]), "virtual")
        result = self.put(aten.scatter.src, (embedded, 1, at, spread), "embeddings", embedded, emit)
        for user in users:
            user.replace_input_with(embedded, result)

    def recount(self, node: fx.Node) -> None:
        """A position picked by its number, counted from the first real token."""
        picked = picks(node, self.entry)
        if picked is None:
            return
        dim, first, last = picked
        emit = self.emitter(node)
        if self.start is None:
            bounds = (first + self.n,) if is_a(node, Kind.SELECT) else (first + self.n, last + self.n)
            node.target = aten.select.int if is_a(node, Kind.SELECT) else aten.slice.Tensor
            node.args, node.kwargs = (operand(node), dim, *bounds), {}
            return
        where = f"{node.name} = {operator_name(node)}(…, {', '.join(map(str, node.args[1:]))})"
        if dim != 1 or (first, last) != (0, 1):
            raise MethodError(
                f"{where} reads fixed positions of the sequence, which padding on the left would move. Virtual "
                "positions are supported with a first token at [:, 0] only; capture without attention_mask if no input "
                "is padded on the left."
            )
        rows = self.arange(self.batch, "rows", emit)
        at = emit(aten.squeeze.dim, (emit(aten.add.Tensor, (self.start, self.n), "first_real"), 1), "first_real")
        first_token = self.put(aten.index.Tensor, (operand(node), [rows, at]), "first_token", node, emit)
        if is_a(node, Kind.SLICE):
            first_token = self.put(aten.unsqueeze.default, (first_token, 1), "first_token", node, emit)
        node.replace_all_uses_with(first_token)
        self.graph.erase_node(node)

    def trim_outputs(self) -> None:
        output = self.graph.output_node()
        emit = self.emitter(output)
        ahead = None
        leaves = []
        for leaf in flat_outputs(self.graph):
            trimmed = leaf
            for dim in self.entry.dims(leaf) if isinstance(leaf, fx.Node) else ():
                if self.start is None:
                    trimmed = self.put(aten.slice.Tensor, (trimmed, dim, self.n, END), f"{leaf.name}_real", leaf, emit)
                    continue
                if not dim or str(sizes(leaf)[0]) != str(sizes(self.entry.ids)[0]):
                    raise MethodError(f"The output {leaf.name} {list(sizes(leaf))} does not begin with the batch.")
                if ahead is None:
                    ahead = emit(aten.lt.Tensor, (self.arange(self.length, "real_steps", emit), self.start), "is_ahead")
                shape = [self.batch, *(self.length if d == dim else 1 for d in range(1, len(sizes(leaf))))]
                which = emit(aten.view.default, (ahead, shape), f"{leaf.name}_is_ahead")
                before = emit(aten.slice.Tensor, (trimmed, dim, 0, -self.n), f"{leaf.name}_ahead")
                after = emit(aten.slice.Tensor, (trimmed, dim, self.n, END), f"{leaf.name}_behind")
                trimmed = self.put(aten.where.self, (which, before, after), f"{leaf.name}_real", leaf, emit)
            leaves.append(trimmed)
        output.args = (tuple(leaves),)


def first_real(mask: fx.Node, emit: Emit) -> fx.Node:
    """[batch, 1]: the position of the first real token of each row, 0 where there is none."""
    real = emit(aten.ne.Scalar, (mask, 0), "is_real")
    return emit(aten.argmax.default, (emit(aten.to.dtype, (real, torch.int32), "is_real"), 1, True), "start")
