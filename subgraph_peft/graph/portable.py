"""Graphs as JSON and back: operators by name, arguments by value, the sizes of activations as expressions."""

import ast
import json
import operator
import warnings
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim

from ..base.borrowed import size_hint
from ..base.errors import CheckpointError
from ..base.schema import Schema
from .edit import move
from .legal import check_node, is_path, operator_of, operator_text
from .nodes import fixed_size

NAMED = (torch.dtype, torch.layout, torch.memory_format)
META = ("nn_module_stack", "stack_trace", "custom")


class GraphFile(Schema):
    """nodes: (op, name, target, args, kwargs, meta)   texts: what several nodes share, by the numbers in their meta
    sizes: expression -> number in the capture"""

    nodes: tuple[tuple[str, str, str, Any, Any, dict[str, int]], ...]
    texts: tuple[str, ...]
    sizes: dict[str, int]


def graph_json(graph: fx.Graph, held: Collection[str]) -> dict[str, Any]:
    """The graph as `GraphFile` has it.

    held: names of the tensors and of the bodies of operators that the graph may read
    """
    texts: dict[str, int] = {}
    sizes: dict[str, int] = {}

    def shared(value: Any) -> int:
        return texts.setdefault(json.dumps(value), len(texts))

    nodes = []
    for node in graph.nodes:
        meta = {key: shared(encoded(node.meta[key])) for key in META if key in node.meta}
        if "val" in node.meta:
            meta["val"] = shared(value_text(node.meta["val"], sizes))
        target = node.name if node.op == "placeholder" else node.target
        check_node(node.op, node.name, target, node.args, node.kwargs, held)
        target = operator_text(node.name, target) if node.op == "call_function" else str(target)
        nodes.append([node.op, node.name, target, encoded(node.args), encoded(node.kwargs), meta])
    return {"nodes": nodes, "texts": list(texts), "sizes": sizes}


def graph_of(written: GraphFile, held: Collection[str], devices: Mapping[str, torch.device]) -> fx.Graph:
    """The graph, with what was on the devices that `devices` names on others. Nothing of it has run.

    Raises CheckpointError for a node that is more than operators on tensors, inputs and what is `held`.
    """
    graph, known = fx.Graph(), {}
    texts = [parsed(text) for text in written.texts]
    sizes, mode = symbolic(written.sizes)
    for op, name, target, args, kwargs, meta in written.nodes:
        args, kwargs = decoded(args, known), decoded(kwargs, known)
        if not isinstance(args, tuple) or any(not 0 <= index < len(texts) for index in meta.values()):
            raise CheckpointError(f"The node {name!r} of the graph has arguments or meta that are not written as such.")
        check_node(op, name, target, args, kwargs, held)
        if op == "output":
            node = graph.output(*args)
        else:
            function = operator_of(name, target) if op == "call_function" else target
            node = graph.create_node(op, function, args, kwargs, name=name)
        if node.name != name:
            raise CheckpointError(f"The node {name!r} of the graph has no valid name.")
        node.meta = {key: decoded(texts[index]) for key, index in meta.items() if key in META}
        check_stack(node.meta.get("nn_module_stack", {}))
        if "val" in meta:
            with mode:
                node.meta["val"] = value_of(texts[meta["val"]], sizes, devices)
        known[name] = node
    graph.lint()
    move(graph, {torch.device(old): new for old, new in devices.items()})
    return graph


def check_path(path: Any) -> None:
    if not is_path(path):
        raise CheckpointError(f"{path!r} is no path of a module.")


def check_stack(stack: Any) -> None:
    for entry in stack.values() if isinstance(stack, dict) else (stack,):
        check_path(entry[0] if isinstance(entry, tuple) and len(entry) == 2 else entry)


def parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{text[:80]!r} is no JSON: {error}.") from error


def encoded(value: Any) -> Any:
    """An argument as JSON: what JSON has not is a dict with its kind as the only key. Raises CheckpointError."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [encoded(item) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [encoded(item) for item in value]}
    if isinstance(value, Mapping):
        return {"dict": [[encoded(key), encoded(item)] for key, item in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encoded(item) for item in (value.start, value.stop, value.step)]}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, NAMED):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, fx.Node):
        return {"node": value.name}
    raise CheckpointError(f"{value!r} is a {type(value).__name__}, which has no written form.")


def decoded(value: Any, nodes: Mapping[str, fx.Node] | None = None) -> Any:
    if isinstance(value, list):
        return [decoded(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    match value:
        case {"tuple": list(held), **others} if not others:
            return tuple(decoded(held, nodes))
        case {"dict": list(held), **others} if not others and all(map(is_pair, held)):
            keys = decoded([key for key, _ in held], nodes)
            if all(map(is_key, keys)):
                return dict(zip(keys, decoded([item for _, item in held], nodes), strict=True))
        case {"slice": [start, stop, step], **others} if not others:
            return slice(*decoded([start, stop, step], nodes))
        case {"complex": [float() | int() as real, float() | int() as imaginary], **others} if not others:
            return complex(real, imaginary)
        case {"device": str(held), **others} if not others:
            return device_of(held)
        case {"node": str(held), **others} if not others and held in (nodes or {}):
            return nodes[held]
        case {"torch": str(held), **others} if not others and isinstance(getattr(torch, held, None), NAMED):
            return getattr(torch, held)
    raise CheckpointError(f"{value} is not what an argument is written as.")


def field(name: str, written: Any) -> Any:
    """What a field of a file holds. Raises CheckpointError that names it."""
    try:
        return decoded(written)
    except CheckpointError as error:
        raise CheckpointError(f"The field {name!r}: {error}") from error


def is_pair(item: Any) -> bool:
    return isinstance(item, list) and len(item) == 2


def is_key(key: Any) -> bool:
    """Whether it can be a key of a dict: a plain value, or a tuple of such."""
    return all(map(is_key, key)) if isinstance(key, tuple) else not isinstance(key, (list, dict, slice))


def device_of(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise CheckpointError(f"{text!r} is no device of torch.") from error


def value_text(value: Any, sizes: dict[str, int]) -> Any:
    """A node's value as JSON: a tensor by shape, dtype and device, a size by its expression. `sizes` gathers the
    expressions that vary with the number that each had in the capture."""
    if isinstance(value, torch.Tensor):
        shape = [value_text(size, sizes) for size in value.shape]
        return {"shape": shape, "dtype": encoded(value.dtype), "device": str(value.device)}
    if isinstance(value, torch.SymInt):
        if (fixed := fixed_size(value)) is not None:
            return fixed
        sizes[str(value)] = size_hint(value, 2)
        return {"size": str(value)}
    if isinstance(value, (list, tuple)):
        return [value_text(item, sizes) for item in value]
    return value if isinstance(value, (bool, int, float)) else None


def value_of(written: Any, sizes: Mapping[str, torch.SymInt], devices: Mapping[str, torch.device]) -> Any:
    if isinstance(written, list):
        return [value_of(item, sizes, devices) for item in written]
    if not isinstance(written, dict):
        return written
    match written:
        case {"size": str(text), **others} if not others and text in sizes:
            return sizes[text]
        case {"shape": list(shape), "dtype": dtype, "device": str(device), **others} if not others:
            shape, dtype = value_of(shape, sizes, devices), decoded(dtype)
            whole = all(isinstance(size, torch.SymInt) or (isinstance(size, int) and size >= 0) for size in shape)
            if whole and isinstance(dtype, torch.dtype):
                return torch.empty(shape, dtype=dtype, device=devices.get(device, device_of(device)))
    raise CheckpointError(f"{written} is not what a node's value is written as.")


class Sizes(nn.Module):
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors


def symbolic(sizes: Mapping[str, int]) -> tuple[dict[str, torch.SymInt], AbstractContextManager]:
    """(expression -> a size that varies so, the mode in which tensors of such sizes are made).

    An expression that is more than arithmetic becomes a size of its own.
    """
    names = [text for text in sizes if text.isidentifier()]
    trees = {text: size_tree(text) for text in sizes}
    opaque = [text for text in sizes if not is_arithmetic(trees[text], names)]
    own = [*names, *opaque]
    samples = tuple(torch.empty(max(2, sizes[text]), device="meta") for text in own) or (torch.empty(2, device="meta"),)
    dims = tuple({0: Dim(f"size_{index}")} for index in range(len(own))) or ({},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.export.export(Sizes(), samples, dynamic_shapes={"tensors": dims}, strict=False)
    values = [node.meta["val"] for node in exported.graph.find_nodes(op="placeholder")]
    known = {text: value.shape[0] for text, value in zip(own, values, strict=False)}
    return known | {text: arithmetic(trees[text], known) for text in sizes if text not in known}, values[0].fake_mode


def size_tree(text: str) -> ast.expr:
    try:
        return ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise CheckpointError(f"{text[:80]!r} is no expression of a size.") from error


ARITHMETIC = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod, ast.Pow: operator.pow,
}  # fmt: skip
CALLS = {"Max": torch.sym_max, "Min": torch.sym_min, "FloorDiv": operator.floordiv, "Mod": operator.mod}


def is_arithmetic(tree: ast.expr, names: Collection[str]) -> bool:
    match tree:
        case ast.Constant(value=int()):
            return True
        case ast.Name(id=name):
            return name in names
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return is_arithmetic(operand, names)
        case ast.BinOp(left=left, op=op, right=right):
            return type(op) in ARITHMETIC and is_arithmetic(left, names) and is_arithmetic(right, names)
        case ast.Call(func=ast.Name(id=name), args=[left, right], keywords=[]):
            return name in CALLS and is_arithmetic(left, names) and is_arithmetic(right, names)
    return False


def arithmetic(tree: ast.expr, known: Mapping[str, torch.SymInt]) -> torch.SymInt | int:
    match tree:
        case ast.Constant(value=value):
            return value
        case ast.Name(id=name):
            return known[name]
        case ast.UnaryOp(operand=operand):
            return -arithmetic(operand, known)
        case ast.BinOp(left=left, op=op, right=right):
            return ARITHMETIC[type(op)](arithmetic(left, known), arithmetic(right, known))
        case ast.Call(func=ast.Name(id=name), args=[left, right]):
            return CALLS[name](arithmetic(left, known), arithmetic(right, known))
