"""Graphs as code: what may become code is checked, and compiled to a function."""

import linecache
import weakref
from collections.abc import Callable
from keyword import iskeyword
from typing import Any

from torch import fx, nn

from ..base.errors import CaptureError
from .edit import clone
from .legal import illegal
from .nodes import NUMBERS, attribute


def check_legal(graph: fx.Graph) -> None:
    """Raises CaptureError for a node that may not become code; an error of torch.fx for a graph that is none."""
    graph.lint()
    for node in graph.nodes:
        if problem := illegal(node.op, node.name, node.target, node.args, node.kwargs):
            raise CaptureError(f"The node {node.name!r} of the graph {problem}.")


def compile_graph(graph: fx.Graph, name: str) -> Callable:
    """The graph as a function `(self, *placeholders) -> tuple`, reading tensors as attributes of `self`.

    Tracebacks show its source while it lives.
    """
    check_legal(graph)
    code = spelled_out(graph).python_code("self")
    namespace = dict(code.globals)
    file = f"<{name}:{next(NUMBERS)}>"
    exec(compile(code.src, file, "exec"), namespace)
    function = namespace.pop("forward")  # it would hold itself
    linecache.cache[file] = (len(code.src), None, code.src.splitlines(keepends=True), file)
    weakref.finalize(function, linecache.cache.pop, file, None)
    return function


def called(root: nn.Module, path: str, *args: Any) -> Any:
    """The result of a submodule."""
    return attribute(root, path)(*args)


def spelled_out(graph: fx.Graph) -> fx.Graph:
    """The graph, or one that reads what no code can name (`self.in.weight`) by a call of `attribute`."""
    reads = [
        node
        for node in graph.nodes
        if node.op in ("get_attr", "call_module")
        and (node.name == "self" or any(map(iskeyword, str(node.target).split("."))))
    ]
    if not reads:
        return graph
    graph, copies = clone(graph)
    with graph.inserting_before(next(iter(graph.nodes))):
        root = graph.create_node("placeholder", "self", name="_subgraph_self")
    for node in map(copies.__getitem__, reads):
        reader = attribute if node.op == "get_attr" else called
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(reader, (root, node.target, *node.args)))
        graph.erase_node(node)
    return graph
