"""What nodes of aten graphs are and hold: their effects, what they write to and alias, their text."""

import itertools
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn

from ..base.borrowed import HigherOrderOperator, OpOverload, schema_of
from .legal import FUNCTIONS
from .operators import argument, schema

aten = torch.ops.aten
PURE = frozenset(FUNCTIONS.values())
NUMBERS = itertools.count()  # of the files that tracebacks name
# arguments by which operators tell training from evaluation, and what they are in evaluation
EVALUATION = {"train": False, "training": False, "use_input_stats": False, "dropout_p": 0.0}


def written_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The arguments that an operator writes to."""
    for name in schema(node.target) if isinstance(node.target, OpOverload) else ():
        info = schema_of(node.target).arguments[schema(node.target)[name][0]].alias_info
        if info is not None and info.is_write:
            value = argument(node, name)
            yield from (v for v in (value if isinstance(value, (list, tuple)) else [value]) if isinstance(v, fx.Node))


def viewed(node: fx.Node) -> fx.Node:
    """What a chain of views, and of operators that return what they wrote to, is a part of."""
    while source := aliased(node):
        node = source
    return node


def aliased(node: fx.Node) -> fx.Node | None:
    """The argument whose memory a node's value is in, if it is in one's."""
    if node.target is operator.getitem:
        source = node.args[0]
    elif isinstance(node.target, OpOverload):
        name = next((a.name for a in schema_of(node.target).arguments if a.alias_info), None)
        source = argument(node, name) if name else None
    else:
        return None
    return source if isinstance(source, fx.Node) else None


def bodies(graph: fx.Graph, root: nn.Module) -> list[tuple[str, fx.Node]]:
    """(name, node) of every body of a higher-order operator that the graph reads."""
    return [(path, node) for path, node in attributes(graph) if isinstance(getattr(root, path, None), fx.GraphModule)]


def every_node(body: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a body and of the bodies within."""
    return (node for part in body.modules() if isinstance(part, fx.GraphModule) for node in part.graph.nodes)


def mode_argument(node: fx.Node) -> str | None:
    """The argument of a node that differs between training and evaluation. A norm without statistics has none."""
    if not isinstance(node.target, OpOverload):
        return None
    positions = schema(node.target)
    if "running_mean" in positions:
        if argument(node, "running_mean") is None:
            return None
    elif "momentum" in positions:
        return None
    return next((name for name in EVALUATION if name in positions), None)


def is_batch_count(node: fx.Node) -> bool:
    """`num_batches_tracked += 1`, which batch norm does in training only."""
    count = node.args[0] if node.args else None
    return (
        node.op == "call_function"
        and getattr(node.target, "__name__", "").startswith(("add_", "copy_"))
        and isinstance(count, fx.Node)
        and (held := viewed(count)).op == "get_attr"
        and str(held.target).endswith("num_batches_tracked")
    )


def flat_outputs(graph: fx.Graph) -> tuple:
    result = graph.output_node().args[0]
    return tuple(result) if isinstance(result, (tuple, list)) else (result,)


def backward_slice(node: fx.Node, through: Callable[[fx.Node], bool] = lambda node: True) -> set[fx.Node]:
    """Everything that a node is computed from, itself included; nodes that are not gone `through` are left out."""
    found, stack = set(), [node]
    while stack:
        current = stack.pop()
        if current not in found and through(current):
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def evaluate_node(node: fx.Node, read: Callable[[fx.Node], Any], known: Mapping[fx.Node, Any] | None = None) -> Any:
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

    result = of(node)
    memo.clear()  # `of` holds itself and the memo, which would live on until Python's garbage collector runs
    return result


def is_effect(node: fx.Node, root: nn.Module | None = None) -> bool:
    """Whether a node may do more than give a value: an operator that writes, one that says nothing about itself, or
    one with bodies, unless `root` holds them and they have no effect."""
    if node.op != "call_function":
        return node.op in ("call_method", "call_module")
    if isinstance(node.target, OpOverload):
        return schema_of(node.target).is_mutable
    if isinstance(node.target, HigherOrderOperator) and root is not None:
        held = [getattr(root, str(part.target), None) for part in node.all_input_nodes if part.op == "get_attr"]
        parts = [part for part in held if isinstance(part, fx.GraphModule)]
        return not parts or any(is_effect(inner, part) for part in parts for inner in part.graph.nodes)
    return node.target not in PURE


def is_random(node: fx.Node) -> bool:
    """Whether a node draws random numbers."""
    return torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())


def attribute(root: nn.Module, path: str) -> Any:
    """What a module holds under a qualified name."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value


def attributes(graph: fx.Graph) -> Iterator[tuple[str, fx.Node]]:
    """(qualified name, node) of every tensor or submodule that the graph reads."""
    return ((str(node.target), node) for node in graph.find_nodes(op="get_attr"))


def sizes(node: fx.Node) -> tuple[Any, ...]:
    """The shape of a node's value; () where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def fixed_size(size: int | torch.SymInt) -> int | None:
    """The number that a dimension is fixed to, or None where it varies. A SymInt may be a constant too."""
    return int(str(size)) if str(size).isdigit() else None


def operator_name(node: fx.Node) -> str:
    """`linear` for aten.linear.default, `getitem` for operator.getitem."""
    return target_name(node.target)


def target_name(target: Any) -> str:
    if isinstance(target, OpOverload):
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
