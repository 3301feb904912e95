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
from .edit import fixed_size, move
from .legal import check_node, is_path, operator_of, operator_text

NAMED = (torch.dtype, torch.layout, torch.memory_format)
META = ("nn_module_stack", "stack_trace", "custom")


def graph_json(graph: fx.Graph, held: Collection[str]) -> dict[str, Any]:
    """{"nodes": [[op, name, target, args, kwargs, meta]], "texts": [what several nodes share], "sizes": {expression:
    number in the capture}}

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


def graph_of(written: Mapping[str, Any], held: Collection[str], devices: Mapping[str, torch.device]) -> fx.Graph:
    """The graph, with what was on the devices that `devices` names on others. Nothing of it has run.

    Raises CheckpointError for a node that is more than operators on tensors, inputs and what is `held`.
    """
    graph, known = fx.Graph(), {}
    texts = [json.loads(text) for text in written["texts"]]
    sizes, mode = symbolic(written["sizes"])
    for op, name, target, args, kwargs, meta in written["nodes"]:
        args, kwargs = decoded(args, known), decoded(kwargs, known)
        check_node(op, name, target, args, kwargs, held)
        if op == "output":
            node = graph.output(*args)
        else:
            function = operator_of(name, target) if op == "call_function" else target
            node = graph.create_node(op, function, args, kwargs, name=name)
        if node.name != name:
            raise CheckpointError(f"The node {name!r} of the graph has no valid name.")
        node.meta = {key: decoded(texts[index]) for key, index in meta.items() if key in META}
        for place, _ in node.meta.get("nn_module_stack", {}).values():
            check_path(place)
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
    ((kind, held),) = value.items()
    match kind:
        case "tuple":
            return tuple(decoded(held, nodes))
        case "dict":
            return {decoded(key, nodes): decoded(item, nodes) for key, item in held}
        case "slice":
            return slice(*decoded(held, nodes))
        case "complex":
            return complex(*held)
        case "device":
            return torch.device(held)
        case "node":
            return nodes[held]
        case "torch" if isinstance(getattr(torch, held, None), NAMED):
            return getattr(torch, held)
    raise CheckpointError(f"{value} is not what an argument is written as.")


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
    if "size" in written:
        return sizes[written["size"]]
    shape = value_of(written["shape"], sizes, devices)
    device = written["device"]
    return torch.empty(shape, dtype=decoded(written["dtype"]), device=devices.get(device, torch.device(device)))


class Sizes(nn.Module):
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tensors


def symbolic(sizes: Mapping[str, int]) -> tuple[dict[str, torch.SymInt], AbstractContextManager]:
    """(expression -> a size that varies so, the mode in which tensors of such sizes are made).

    An expression that is more than arithmetic becomes a size of its own.
    """
    names = [text for text in sizes if text.isidentifier()]
    trees = {text: ast.parse(text, mode="eval").body for text in sizes}
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
