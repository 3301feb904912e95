import sys
from typing import Any, ClassVar

import torch
from torch import fx

from subgraph_peft.base.borrowed import OpOverload
from subgraph_peft.graph.nodes import aten, is_effect, is_random, mode_argument, written_arguments
from subgraph_peft.graph.operators import Kind, extent, is_a
from subgraph_peft.graph.passes import ProgramOwner, ProgramPass
from subgraph_peft.graph.rewriter import Rewriter


class Tidy(ProgramPass):
    """x[:] = x, to(to(x, d), d) = to(x, d), n + 0 = n for whole numbers n; and what a module computes twice, once

    The latter in graphs that write to no tensor. Casts of floating-point values stay, even where the captured dtype is
    the wanted one already: under autocast it need not be.
    """

    name: ClassVar[str] = "tidy"
    after: ClassVar[tuple[str, ...]] = ("attention",)

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        pure = not any(list(written_arguments(node)) for node in rewrite.graph.nodes)
        known: dict[Any, fx.Node] = {}
        for node in list(rewrite.graph.nodes):
            if node.op != "call_function":
                continue
            same = source(node)
            if pure and same is None and (key := recipe(node)) is not None:
                same = known.setdefault(key, node)
            if same is not None and same is not node:
                rewrite.replace(node, same)


def source(node: fx.Node) -> fx.Node | None:
    """The argument that a node gives back unchanged, if it does."""
    value = node.args[0] if node.args else None
    if not isinstance(value, fx.Node) or node.kwargs:
        return None
    if is_a(node, Kind.SLICE):
        _, start, stop, step = extent(node)
        return value if (start or 0, step) == (0, 1) and stop in (None, sys.maxsize) else None
    if node.target is aten.to.dtype and len(node.args) == 2:
        dtype, held = node.args[1], value.meta.get("val")
        whole = isinstance(held, torch.Tensor) and not held.is_floating_point() and held.dtype == dtype
        return value if whole or (value.target is aten.to.dtype and value.args[1:] == (dtype,)) else None
    if node.target is aten.add.Tensor and node.args[1:] == (0,):
        held, result = value.meta.get("val"), node.meta.get("val")
        if not isinstance(held, torch.Tensor) or not isinstance(result, torch.Tensor):
            return None
        return value if held.dtype == result.dtype and not held.is_floating_point() else None
    return None


def recipe(node: fx.Node) -> Any:
    """What two nodes with the same value have in common, within one module; None for what may not be shared."""
    if not isinstance(node.target, OpOverload) or is_effect(node) or is_random(node) or mode_argument(node):
        return None

    def frozen(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return tuple(map(frozen, value))
        return (type(value), value) if isinstance(value, (int, float)) else value

    arguments = frozen(node.args), tuple((name, frozen(value)) for name, value in node.kwargs.items())
    return node.target, arguments, tuple(node.meta.get("nn_module_stack", {}))
