import operator
from collections.abc import Collection
from functools import partial
from typing import ClassVar

from torch import fx

from subgraph_peft.graph.nodes import aten, is_effect, is_random
from subgraph_peft.graph.passes import ProgramOwner, ProgramPass
from subgraph_peft.graph.rewriter import Rewriter

from .factors import factor


class Siblings(ProgramPass):
    """[x A₁ᵀ, x A₂ᵀ, …] = x [A₁; A₂; …]ᵀ

    Small factors that meet the same activation (those of query, key and value; of gate and up) share one product: x is
    read once, and so is its gradient written. The factors stay tensors of their own.
    """

    name: ClassVar[str] = "siblings"
    after: ClassVar[tuple[str, ...]] = ("sums",)

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        families: dict[tuple, list[fx.Node]] = {}
        blocks = {*owner.block_paths, *(owner.checkpointing.paths if owner.checkpointing else ())}
        for node in rewrite.graph.nodes:
            small = factor(node)
            if small is not None and movable(small):
                families.setdefault((node.args[0], small.meta["dtype"], call(node, blocks)), []).append(node)
        for nodes in families.values():
            if len(nodes) > 1:
                join(rewrite, nodes)


def join(rewrite: Rewriter, nodes: list[fx.Node]) -> None:
    """One product in the place of all, each of which is a part of it."""
    first, *_ = nodes
    x, matrices = first.args[0], [node.args[1] for node in nodes]
    for matrix in matrices:
        for source in held(matrix):
            if first < source:  # what stands before may have readers before too, such as an earlier call
                first.prepend(source)
    stacked = rewrite.add(aten.cat.default, (matrices,), like=first)
    product = rewrite.add(aten.linear.default, (x, stacked), like=first)
    sizes = [matrix.meta["shape"][0] for matrix in matrices]
    parts = rewrite.add(aten.split_with_sizes.default, (product, sizes, -1), like=first)
    part = partial(rewrite.add, operator.getitem, before=first)
    rewrite.replace_all({n: part((parts, i), like=n, name=f"{n.name}_part") for i, n in enumerate(nodes)})


def held(matrix: fx.Node) -> list[fx.Node]:
    """What a matrix is computed from, sources first, itself last."""
    found: dict[fx.Node, None] = {}

    def visit(node: fx.Node) -> None:
        for source in node.all_input_nodes:
            if source not in found:
                visit(source)
        found[node] = None

    visit(matrix)
    return list(found)


def movable(matrix: fx.Node) -> bool:
    """Whether a matrix is computed from tensors of the module alone, and is the same wherever it is computed."""
    return all(
        node.op == "get_attr" or (node.op == "call_function" and not is_random(node) and not is_effect(node))
        for node in held(matrix)
    )


def call(node: fx.Node, blocks: Collection[str]) -> tuple:
    """The calls of modules around a node's own, and its own where that is a block: no family reaches over blocks."""
    stack = node.meta.get("nn_module_stack", {})
    *around, own = stack or [None]
    is_block = own is not None and str(stack[own][0]).partition("@")[0] in blocks
    return (*around, own) if is_block else tuple(around)
