"""Cut a flat graph by module path: every call of a chosen module becomes a graph of its own."""

import heapq
import operator
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import fx, nn

from ..base.errors import CaptureError, SelectorError, nearest
from ..base.patterns import patterns
from .edit import eliminate_dead_code
from .nodes import backward_slice, is_effect, is_random

Region = dict[fx.Node, None]
Unit = tuple[str, str]  # a block and the name of one call of it


class Block(nn.Module):
    """A module of the source: it holds the tensors, and computes those calls of it that runners make as a whole.

    _subgraph: call -> function (self, *inputs) -> the call's result, or tuple of results. All that it keeps for itself
    """

    def __init__(self) -> None:
        super().__init__()
        self._subgraph: dict[str, Any] = {}

    def forward(self, call: str, *inputs: Any) -> Any:
        return self._subgraph[call](self, *inputs)


class Piece(NamedTuple):
    """What one call of the module at `path` computes, reading the module's tensors by their names within it.

    The program itself has the path "". Where a piece calls a block, it has a `call_module` node with the arguments
    (call, *inputs): activations, sizes, and tensors that are not the block's own.
    """

    path: str
    call: str
    graph: fx.Graph


def regions(graph: fx.Graph) -> dict[str, dict[str, Region]]:
    """Module path -> call (a key of the module stack, "…", "…@1", …) -> its nodes in order, inner modules' included."""
    found: dict[str, dict[str, Region]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
                found.setdefault(str(path).partition("@")[0], {}).setdefault(call, {})[node] = None
    return found


def chosen(graph: fx.Graph, where: str | Sequence[str] | None) -> tuple[str, ...]:
    """The module paths that the patterns match; by default the repeated layers. Raises SelectorError."""
    paths = [path for path in regions(graph) if path]
    if where is None:
        if not (layers := repeated(graph)):
            raise SelectorError("The program has no repeated layers: name its blocks by path, where=['encoder', …].")
        return layers
    matched: dict[str, None] = {}
    for pattern in patterns(where):
        own = [path for path in paths if pattern.match([path]) != "no"]
        if not own:
            close = ", ".join(nearest(pattern.body, paths))
            raise SelectorError(f"{pattern.text!r} matches none of {len(paths)} modules. Nearest: {close}.")
        matched |= dict.fromkeys(own)
    return tuple(matched)


def repeated(graph: fx.Graph) -> tuple[str, ...]:
    """The outermost modules with a number for a name, of which there are, or are called, several in one place of the
    model (`layers.*`, `stages.*.*`) and of one class; single operators left out."""
    lists: dict[tuple[str, str], list[str]] = {}
    for path, calls in regions(graph).items():
        first = next(iter(calls.values()))
        if path.rpartition(".")[2].isdigit() and len(first) > 1:
            stack = next(iter(first)).meta["nn_module_stack"]
            kind = str(next(kind for place, kind in stack.values() if str(place).partition("@")[0] == path))
            place = ".".join("*" if part.isdigit() else part for part in path.split("."))
            lists.setdefault((place, kind), []).extend([path] * len(calls))
    return tuple(outermost(dict.fromkeys(path for paths in lists.values() if len(paths) > 1 for path in paths)))


def within(name: str, path: str) -> bool:
    """Whether a module or tensor is part of the module at `path`, or that module."""
    return not path or name == path or name.startswith(f"{path}.")


def outermost(paths: Collection[str]) -> list[str]:
    return [p for p in paths if not any(p != other and within(p, other) for other in paths)]


def cut(graph: fx.Graph, paths: Collection[str], label: str, path: str = "") -> Iterator[Piece]:
    """The graph of one call, `label`, of the module at `path` in pieces: what is left of it, with a `call_module` node
    for every call of a chosen module within, then the pieces of these. The graph itself is left as it is.

    Raises CaptureError where the call of a module is no unit of the graph.
    """
    owner = owners(graph, outermost(dict.fromkeys(p for p in paths if p != path and within(p, path))), label)
    if not owner:
        yield Piece(path, label, graph)
        return
    whole, copies = fx.Graph(), {}
    inner: list[Piece] = []
    for unit, nodes in ordered(graph, owner):
        if unit is None:
            copies[nodes[0]] = whole.node_copy(nodes[0], copies.__getitem__)
            continue
        block, call = unit
        target = block[len(path) + 1 :] if path else block
        own, inputs, outputs = extract(nodes, target)
        inner.append(Piece(block, call, own))
        result = whole.create_node("call_module", target, (call, *(copies[node] for node in inputs)))
        for index, node in enumerate(outputs):
            single = len(outputs) == 1
            copies[node] = result if single else whole.call_function(operator.getitem, (result, index))
            copies[node].meta = dict(node.meta)
    eliminate_dead_code(whole)
    yield Piece(path, label, whole)
    for piece in inner:
        yield from cut(piece.graph, paths, piece.call, piece.path)


def owners(graph: fx.Graph, blocks: Sequence[str], label: str) -> dict[fx.Node, Unit]:
    """The unit of every node that belongs to a call of a block.

    What comes from parameters alone and is no module's, such as the cast of a trained weight, goes where it is read.
    """
    owner: dict[fx.Node, Unit] = {}
    found = regions(graph)
    for block in blocks:
        for index, region in enumerate(found.get(block, {}).values()):
            for node in region:
                if other := owner.get(node):
                    raise CaptureError(
                        f"{block} is called inside of {other[0]} without being part of it, so that both cannot be "
                        "blocks: choose one of them."
                    )
                owner[node] = (block, f"{label}@{index}")
    for node in reversed(graph.nodes):
        if node.op != "call_function" or node.meta.get("nn_module_stack") or is_effect(node):
            continue
        readers = {owner.get(user) for user in node.users}
        if len(readers) == 1 and None not in readers and all(n.op != "placeholder" for n in backward_slice(node)):
            owner[node] = readers.pop()
    return owner


def ordered(graph: fx.Graph, owner: Mapping[fx.Node, Unit]) -> list[tuple[Unit | None, list[fx.Node]]]:
    """Units, and nodes of none, each after what it reads, else in the graph's order."""
    nodes: dict[Unit | fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        nodes.setdefault(owner.get(node, node), []).append(node)
    position = {unit: place for place, unit in enumerate(nodes)}
    sources = {unit: {owner.get(s, s) for n in own for s in n.all_input_nodes} - {unit} for unit, own in nodes.items()}
    readers: dict[Unit | fx.Node, list[Unit | fx.Node]] = {unit: [] for unit in nodes}
    for unit, read in sources.items():
        for source in read:
            readers[source].append(unit)
    waits = {unit: len(read) for unit, read in sources.items()}
    units = list(nodes)
    ready = [position[unit] for unit, count in waits.items() if not count]
    heapq.heapify(ready)
    result: list[tuple[Unit | None, list[fx.Node]]] = []
    while ready:
        unit = units[heapq.heappop(ready)]
        result.append((unit if isinstance(unit, tuple) else None, nodes[unit]))
        for reader in readers[unit]:
            waits[reader] -= 1
            if not waits[reader]:
                heapq.heappush(ready, position[reader])
    if len(result) < len(units):
        raise CaptureError(not_convex(graph, owner))
    fixed = [node for node in graph.nodes if is_fixed(node)]
    if fixed != [node for _, own in result for node in own if is_fixed(node)]:
        raise CaptureError(
            "Random numbers would be drawn, or tensors written, in another order with these blocks: "
            f"{', '.join(dict.fromkeys(block for block, _ in owner.values()))}. Choose modules inside of them."
        )
    return result


def not_convex(graph: fx.Graph, owner: Mapping[fx.Node, Unit]) -> str:
    """Why the units have no order: what one of them reads is computed from its own results."""
    for unit in dict.fromkeys(owner.values()):
        after: dict[fx.Node, None] = {}
        for node in graph.nodes:
            if owner.get(node) != unit and any(s in after or owner.get(s) == unit for s in node.all_input_nodes):
                after[node] = None
            elif owner.get(node) == unit and (back := [s for s in node.all_input_nodes if s in after]):
                return (
                    f"{unit[0]} is no unit of the graph: its node {node.name} reads {back[0].name}, which is computed "
                    "outside of it from its own results. Choose modules inside of it, or one around both."
                )
    return f"The blocks {', '.join(dict.fromkeys(block for block, _ in owner.values()))} read each other's results."


def is_fixed(node: fx.Node) -> bool:
    """Whether a node draws random numbers or writes, so that its place among others like it matters."""
    return node.op == "call_function" and (is_random(node) or is_effect(node))


def boundary(nodes: Sequence[fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
    """(what the nodes read from others, those of them that others read)"""
    inside = set(nodes)
    sources = dict.fromkeys(s for node in nodes for s in node.all_input_nodes if s not in inside)
    return [*sources], [node for node in nodes if any(user not in inside for user in node.users)]


def extract(nodes: Sequence[fx.Node], block: str) -> tuple[fx.Graph, list[fx.Node], list[fx.Node]]:
    """(the nodes of one unit as a graph, the nodes whose values are its inputs, those whose values are its results)."""
    own = fx.Graph()
    sources, outputs = boundary(nodes)
    held = [s for s in sources if s.op == "get_attr" and within(str(s.target), block)]
    inputs = [s for s in sources if s not in held]
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = own.create_node("placeholder", node.name, name=node.name)
        copies[node].meta = dict(node.meta)
    for node in held:
        copies[node] = own.create_node("get_attr", str(node.target)[len(block) + 1 :], name=node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = own.node_copy(node, copies.__getitem__)
    results = tuple(copies[node] for node in outputs)
    own.output(results[0] if len(results) == 1 else results)
    return own, inputs, outputs
