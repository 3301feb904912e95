"""Virtual positions in the input sequence: X' = [X_left; P; X], P before the first real token of every row."""

import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from .errors import MethodError
from .graphs import aten, fixed_size, flat_outputs, operator_name
from .sites import Call, Site, calls_of

if TYPE_CHECKING:
    from .program import Program

MASK, TYPES, POSITIONS = "attention_mask", "token_type_ids", "position_ids"
# operators through which a value per position stays that value, up to its shape and dtype
CARRIES = {
    aten.view.default, aten.reshape.default, aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.clone.default,
    aten.contiguous.default, aten.slice.Tensor, aten.unsqueeze.default, aten.squeeze.dim, aten.alias.default,
    aten.flatten.using_ints, aten._to_copy.default, aten.type_as.default, aten.expand.default,
    aten.pad.default, aten.constant_pad_nd.default,
}  # fmt: skip
SCALES = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.to.dtype, aten.to.dtype_layout, aten.to.device}
LOSSES = {aten.cross_entropy_loss.default, aten.nll_loss.default, aten.nll_loss_nd.default}
EQUALITIES = {aten.eq.Scalar, aten.ne.Scalar}
# operators that read the shape of ids only, or where the largest is
HARMLESS = {
    aten.sym_size.int, aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.zeros_like.default,
    aten.ones_like.default, aten.full_like.default, aten.argmax.default, *LOSSES,
}  # fmt: skip
# operators that single out or reorder positions -> which argument is the dimension
COUNTS = {
    aten.flip.default: 1, aten.unbind.int: 1, aten.unfold.default: 1, aten.roll.default: 2, aten.split.Tensor: 2,
    aten.split.sizes: 2, aten.split_with_sizes.default: 2, aten.chunk.default: 2, aten.tensor_split.sections: 2,
}  # fmt: skip
END = 2**62

Emit = Callable[..., fx.Node]


@dataclass(frozen=True)
class Entry:
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


def sizes(node: fx.Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def symbols(size: int | torch.SymInt) -> set[str]:
    return {str(s) for s in size.node.expr.free_symbols} if isinstance(size, torch.SymInt) else set()


def sequence_sites(program: "Program") -> Iterator[Site]:
    """The table of the token embedding of the model's main input. Raises MethodError where there is not one."""
    captured = program.captured
    graph = captured.module.graphs()[0]
    found = entry(graph)
    table = table_of(found.lookup)
    yield Site(
        name=str(table.target),
        kind="sequence",
        shape=tuple(table.meta["val"].shape),
        dtype=table.meta["val"].dtype,
        calls=tuple(call for call, _ in calls_of(table) if call.node == found.lookup.name)
        or (Call(found.lookup.name, "embedding", operator_name(found.lookup)),),
    )


def entry(graph: fx.Graph) -> Entry:
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
    found = Entry(ids, calls[0], embedded, str(length))
    if len(sizes(embedded)) != 3 or found.dims(embedded) != [1]:
        raise MethodError(f"{embedded.name} is {list(sizes(embedded))}, not [batch, length, width].")
    return found


def origin(node: Any) -> fx.Node | None:
    """The placeholder whose values these are, up to shape and dtype."""
    while isinstance(node, fx.Node) and node.target in CARRIES:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and node.op == "placeholder" else None


def table_of(lookup: fx.Node) -> fx.Node | None:
    """The parameter that an embedding reads."""
    table = lookup.args[0]
    while table.op == "call_function" and table.target in SCALES:
        table = table.args[0]
    return table if table.op == "get_attr" else None


def scaled(lookup: fx.Node) -> fx.Node:
    """The lookup with the constant factors that its own module puts on it."""
    node = lookup
    while len(node.users) == 1 and innermost(user := next(iter(node.users))) == innermost(lookup) != "":
        others = [source for source in user.all_input_nodes if source is not node]
        if user.target not in SCALES or user.args[0] is not node or any(depends_on_input(n) for n in others):
            break
        node = user
    return node


def innermost(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]) if stack else ""


def depends_on_input(node: fx.Node) -> bool:
    return node.op == "placeholder" or any(map(depends_on_input, node.all_input_nodes))


def rows(program: "Program", site: Site, W: torch.Tensor) -> torch.Tensor:
    """What the module that holds the table W [vocabulary, d] gives for every id: its rows, scaled where it scales."""
    found = entry(program.captured.module.graphs()[0])
    tensors = dict(program.module.tensors())
    memo: dict[fx.Node, Any] = {found.lookup: W}

    def of(node: fx.Node) -> Any:
        if node not in memo:
            if node.op == "get_attr":
                memo[node] = tensors[str(node.target)].detach()
            else:
                memo[node] = node.target(*fx.node.map_arg(node.args, of), **fx.node.map_arg(node.kwargs, of))
        return memo[node]

    return of(found.embedded).to(W.dtype)


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
        self.entry = entry(graph)
        self.fills = fills(graph, self.entry)
        self.mask = next((node for node in self.fills if node.name == MASK), None)
        self.carriers = carriers(graph, self.entry, self.fills)
        check(graph, self.entry, self.carriers)
        self.emit = emitter(next(node for node in graph.nodes if node.op == "call_function"))
        self.batch = self.put(aten.sym_size.int, (self.entry.ids, 0), "batch")
        self.length = self.put(aten.sym_size.int, (self.entry.ids, 1), "length")

    def put(self, target: Any, args: tuple, term: str, like: fx.Node | None = None, emit: Emit | None = None) -> fx.Node:
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
        behind = put(aten.where.ScalarOther, (put(aten.ge.Tensor, (self.steps, end), "is_behind"), shifted, 0), "behind")
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
            bounds = (first + self.n,) if node.target is aten.select.int else (first + self.n, last + self.n)
            node.args = (node.args[0], dim, *bounds)
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
        first_token = self.put(aten.index.Tensor, (node.args[0], [rows, at]), "first_token", node, emit)
        if node.target is aten.slice.Tensor:
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


def fills(graph: fx.Graph, found: Entry) -> dict[fx.Node, Any]:
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
                f"What the input {node.name} {list(sizes(node))} holds at virtual positions is unknown: {MASK}, {TYPES}, "
                f"{POSITIONS} and the labels of a cross entropy are. Capture the model without it."
            )
        elif dims:
            known[node] = {MASK: 1, TYPES: 0}.get(node.name)
            if str(sizes(node)[0]) == "1":
                raise MethodError(f"The input {node.name} has a batch of 1; expand it to that of {found.ids.name}.")
    return known


def dummy(found: Entry) -> int:
    """A token id that the graph takes for an ordinary one: none that it compares ids with, such as padding.

    Raises MethodError where the graph does something else with ids, such as giving them to a decoder.
    """
    taken: set[Any] = {found.lookup.args[2]} if len(found.lookup.args) > 2 else set()
    stack = [found.ids]
    while stack:
        for user in stack.pop().users:
            if user.target in CARRIES:
                stack.append(user)
            elif user.target in EQUALITIES:
                taken.add(user.args[1])
            elif user not in (found.lookup, found.lookup.graph.output_node()) and user.target not in HARMLESS:
                raise MethodError(
                    f"{operator_name(user)} at {user.name} reads token ids as numbers; virtual positions have none."
                )
    return next(i for i in range(len(taken) + 1) if i not in taken)


def label_inputs(graph: fx.Graph, found: Entry) -> dict[fx.Node, int]:
    """Inputs that hold one label a position -> the label that the loss ignores."""
    labels: dict[fx.Node, int] = {}
    for loss in (node for node in graph.nodes if node.target in LOSSES):
        scores, target = loss.args[:2]
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
        labels[source] = loss.kwargs.get("ignore_index", loss.args[4] if len(loss.args) > 4 else -100)
    return labels


def carriers(graph: fx.Graph, found: Entry, inputs: Mapping[fx.Node, Any]) -> set[fx.Node]:
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
            raise MethodError(f"{operator_name(node)} at {node.name} counts positions, which virtual ones would change.")
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


def leaves(node: fx.Node) -> set[fx.Node]:
    """Inputs and tensors whose values (not sizes) a node depends on."""
    found, seen, stack = set(), set(), [node]
    while stack:
        current = stack.pop()
        if current in seen or current.target is aten.sym_size.int:
            continue
        seen.add(current)
        if current.op in ("placeholder", "get_attr"):
            found.add(current)
        stack.extend(current.all_input_nodes)
    return found


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
