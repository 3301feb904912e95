"""Edits of flat aten graphs: train and eval mode, missing inputs, device and dtype moves, printing."""

import copy
import linecache
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

# operator -> position of its `training` flag
TRAINING_FLAG = {
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.rrelu.default: 3,
    aten.lstm.input: 6,
    aten.gru.input: 6,
}
BATCH_NORM = {aten.batch_norm.default: 5, aten.cudnn_batch_norm.default: 5}


def clone(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy that keeps node names, and the map from old nodes to new."""
    copied, old_to_new = fx.Graph(), {}
    result = copied.graph_copy(graph, old_to_new, return_output_node=True)
    output, old_output = result
    copied.output(output).meta = copy.copy(old_output.meta)
    return copied, old_to_new


def set_mode(graph: fx.Graph, training: bool) -> None:
    """Switch dropout, batch norm and attention dropout of a graph that holds its training form."""
    for node in list(graph.nodes):
        if node.target in TRAINING_FLAG:
            set_argument(node, TRAINING_FLAG[node.target], training)
        elif node.target in BATCH_NORM and node.args[3] is not None:
            set_argument(node, BATCH_NORM[node.target], training)
        elif node.target is aten.scaled_dot_product_attention.default and not training:
            if len(node.args) > 4:
                set_argument(node, 4, 0.0)
            if "dropout_p" in node.kwargs:
                node.kwargs = {**node.kwargs, "dropout_p": 0.0}
        elif not training and is_batch_count(node):
            graph.erase_node(node)


def is_batch_count(node: fx.Node) -> bool:
    """`num_batches_tracked += 1`, which batch norm does in training only."""
    written = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "").startswith(("add_", "copy_"))
        and isinstance(written, fx.Node)
        and written.op == "get_attr"
        and str(written.target).endswith("num_batches_tracked")
    )


def set_argument(node: fx.Node, index: int, value: object) -> None:
    args = list(node.args)
    args[index] = value
    node.args = tuple(args)


def without_inputs(graph: fx.Graph, missing: set[str]) -> list[bool]:
    """Replace outputs that need a missing placeholder by None, in place. Returns which outputs remain."""
    tainted: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "output":
            break
        if node.name in missing or tainted.intersection(node.all_input_nodes):
            tainted.add(node)
    output = graph.output_node()
    leaves = tuple(None if leaf in tainted else leaf for leaf in flat_outputs(graph))
    output.args = (leaves,)
    for node in reversed(list(graph.nodes)):
        if node in tainted and node.op != "placeholder" and not node.users:
            graph.erase_node(node)
    sweep(graph)
    return [leaf is not None for leaf in leaves]


def flat_outputs(graph: fx.Graph) -> tuple:
    result = graph.output_node().args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def cone(node: fx.Node, through: Callable[[fx.Node], bool] = lambda node: True) -> set[fx.Node]:
    """Everything that a node is computed from, itself included; nodes that are not gone `through` are left out."""
    found, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in found and through(current):
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def evaluate(node: fx.Node, read: Callable[[fx.Node], Any], known: Mapping[fx.Node, Any] | None = None) -> Any:
    """The value of a node; `read` gives those of placeholders and tensors, `known` those of other nodes."""
    memo = dict(known or {})

    def of(current: fx.Node) -> Any:
        if current not in memo:
            if current.op == "call_function":
                args, kwargs = (fx.node.map_arg(part, of) for part in (current.args, current.kwargs))
                memo[current] = current.target(*args, **kwargs)
            else:
                memo[current] = read(current)
        return memo[current]

    return of(node)


def sweep(graph: fx.Graph) -> int:
    """Remove nodes that nothing reads and that change nothing. Returns how many went."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "call_method", "get_attr") and not is_effect(node):
            graph.erase_node(node)
            removed += 1
    return removed


def is_effect(node: fx.Node) -> bool:
    """Whether a node may do more than give a value: a mutating operator, or one that says nothing about itself."""
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return schema.is_mutable
    return node.op == "call_function" and getattr(node.target, "__module__", "") not in ("_operator", "math")


def move(graph: fx.Graph, mapping: dict[object, object]) -> None:
    """Replace devices and dtypes that appear as literals in the arguments of nodes, and as dtypes of their values."""

    def swap(value: object) -> object:
        return mapping.get(value, value) if isinstance(value, (torch.device, torch.dtype)) else value

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, swap)
        node.kwargs = fx.node.map_aggregate(node.kwargs, swap)
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and mapping.get(value.dtype, value.dtype) != value.dtype:
            node.meta["val"] = value.to(mapping[value.dtype])


def compile_graph(graph: fx.Graph, name: str) -> Callable:
    """The graph as a function `(self, *placeholders) -> tuple`, reading tensors as attributes of `self`."""
    graph.lint()
    code = graph.python_code("self")
    namespace = dict(code.globals)
    file = f"<{name}:{id(graph):x}>"
    exec(compile(code.src, file, "exec"), namespace)
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    return namespace["forward"]


def attributes(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """(qualified name, node) of every tensor or submodule that the graph reads."""
    return ((str(node.target), node) for node in graph.find_nodes(op="get_attr"))


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The number that a dimension is fixed to, or None where it varies. A SymInt may be a constant too."""
    return int(str(size)) if str(size).isdigit() else None


def operator_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default, `getitem` for operator.getitem."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__
    return getattr(target, "__name__", str(target))


def show(graph: fx.Graph, nodes: Iterable[fx.Node] | None = None) -> str:
    """One line a node: `name = op(arguments)`, tensors by their qualified names. For snapshots and diffs."""

    def text(value: object) -> str:
        if isinstance(value, fx.Node):
            return str(value.target) if value.op == "get_attr" else value.name
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(map(text, value)) + "]"
        return repr(value)

    lines = []
    for node in graph.nodes if nodes is None else nodes:
        if node.op == "call_function":
            arguments = [*map(text, node.args), *(f"{k}={text(v)}" for k, v in node.kwargs.items())]
            lines.append(f"{node.name} = {operator_name(node)}({', '.join(arguments)})")
        elif node.op == "output":
            lines.append(f"return {text(flat_outputs(graph))}")
        elif node.op == "placeholder":
            lines.append(f"{node.name} = input")
    return "\n".join(lines)
