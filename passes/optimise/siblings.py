import operator
from collections.abc import Collection
from typing import ClassVar

from torch import fx

from subgraph_peft.graphs import aten, is_effect, is_random
from subgraph_peft.module import GraphModel
from subgraph_peft.optimise import Optimisation

from .factors import derived, factor


class Siblings(Optimisation):
    """[x A₁ᵀ, x A₂ᵀ, …] = x [A₁; A₂; …]ᵀ

    Small factors that meet the same activation (those of query, key and value; of gate and up) share one product: x is
    read once, and so is its gradient written. The factors stay tensors of their own.
    """

    name: ClassVar[str] = "siblings"

    def apply(self, graph: fx.Graph, owner: GraphModel) -> int:
        families: dict[tuple, list[fx.Node]] = {}
        blocks = {*owner.block_paths, *(owner.checkpointing.paths if owner.checkpointing else ())}
        for node in graph.nodes:
            small = factor(node)
            if small is not None and movable(small):
                families.setdefault((node.args[0], small.meta["dtype"], call(node, blocks)), []).append(node)
        families = {key: nodes for key, nodes in families.items() if len(nodes) > 1}
        for nodes in families.values():
            join(graph, nodes)
        return len(families)


def join(graph: fx.Graph, nodes: list[fx.Node]) -> None:
    first, *_ = nodes
    x, matrices = first.args[0], [node.args[1] for node in nodes]
    for matrix in matrices:
        for source in held(matrix):
            if first < source:  # what stands before may have readers before too, such as an earlier call
                first.prepend(source)
    with graph.inserting_before(first):
        stacked = derived(graph, first, aten.cat.default, (matrices,))
        product = derived(graph, first, aten.linear.default, (x, stacked))
        sizes = [matrix.meta["shape"][0] for matrix in matrices]
        parts = derived(graph, first, aten.split_with_sizes.default, (product, sizes, -1))
        for index, node in enumerate(nodes):
            part = graph.create_node("call_function", operator.getitem, (parts, index), name=f"{node.name}_part")
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
    for node in nodes:
        graph.erase_node(node)


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
