"""Stacks of matrices (experts): one equation, and every tensor of it once for each entry."""

from collections.abc import Callable, Mapping
from functools import lru_cache

import torch
from torch import fx

from ..base.borrowed import make_fx
from ..graph.edit import eliminate_dead_code
from ..graph.operators import Kind, is_a, operand
from .equation import Equation, Operand

NO_OPS = Kind.SAME | Kind.RESHAPE | Kind.BROADCAST  # where they keep the shape


def stacked(equation: Equation, shared: frozenset[Operand]) -> set[fx.Node]:
    """Nodes of an equation that have a value for each entry: those that hang on W or on a tensor that is not shared."""
    found: set[fx.Node] = set()
    for node in equation.graph.nodes:
        own = node in equation.operands and equation.operands[node] not in shared
        if own or found.intersection(node.all_input_nodes):
            found.add(node)
    return found


@lru_cache(maxsize=512)  # of nodes of equations, which `trace` keeps too
def lift(node: fx.Node, batched: tuple[bool, ...], stack: int) -> fx.Graph:
    """The graph of one operator over a stack: its inputs are the node's, in order, with the stack in front where
    `batched`."""
    sources = list(dict.fromkeys(node.all_input_nodes))

    def operator(*values: torch.Tensor) -> torch.Tensor:
        known = dict(zip(sources, values, strict=True))
        args, kwargs = (fx.node.map_arg(part, known.__getitem__) for part in (node.args, node.kwargs))
        return node.target(*args, **kwargs)

    examples = [
        torch.empty((stack, *shape) if own else shape, device="meta")
        for own, shape in zip(batched, (tuple(s.meta["val"].shape) for s in sources), strict=True)
    ]
    over = torch.func.vmap(operator, in_dims=tuple(0 if own else None for own in batched))
    graph = make_fx(over)(*examples).graph
    for inner in list(graph.nodes):
        if is_a(inner, NO_OPS) and inner.meta["val"].shape == operand(inner).meta["val"].shape:
            inner.replace_all_uses_with(operand(inner))
    eliminate_dead_code(graph)
    return graph


def over_stack(
    evaluate: Callable[..., torch.Tensor], W: torch.Tensor, tensors: Mapping[str, torch.Tensor], shared: set[str]
) -> torch.Tensor:
    """φ of every matrix of W [stack, out, in]: `evaluate(W, tensors)` gives that of one."""
    dims = {name: None if name in shared else 0 for name in tensors}
    return torch.func.vmap(evaluate, in_dims=(0, dims))(W, dict(tensors))
