"""Values that rewrites compute from the model's tensors alone, computed once: constants in place of their nodes."""

from collections.abc import Mapping

import torch
from torch import fx

from subgraph_peft.graph.nodes import backward_slice, evaluate_node
from subgraph_peft.graph.operators import SEEN, is_a
from subgraph_peft.graph.rewriter import META


@torch.no_grad()
def fold_constants(graph: fx.Graph, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace such values in place, where they are no larger than the tensors they come from. Views and casts of a
    tensor stay, and so does what the captured model itself computes.

    Returns the new constants by the name under which the graph reads them: `<site>_<adapter>.<term>`.
    """
    constant: set[fx.Node] = set()
    for node in graph.nodes:
        made = META in node.meta.get("custom", {})
        if node.op == "get_attr" or (made and node.all_input_nodes and constant.issuperset(node.all_input_nodes)):
            constant.add(node)
    ends = [n for n in graph.nodes if n in constant and n.op != "get_attr" and not constant.issuperset(n.users)]
    baked: dict[str, torch.Tensor] = {}
    while ends:
        node = ends.pop()
        sources = backward_slice(node)
        if all(inner.op == "get_attr" or is_a(inner, SEEN) for inner in sources):
            continue
        value = evaluate_node(node, lambda leaf: tensors[str(leaf.target)])
        size = sum(tensors[str(leaf.target)].numel() for leaf in sources if leaf.op == "get_attr")
        if not isinstance(value, torch.Tensor) or value.numel() > size:
            ends.extend(source for source in node.all_input_nodes if source.op != "get_attr")
            continue
        name = unique(node, {*tensors, *baked})
        baked[name] = value.contiguous()
        with graph.inserting_before(node):
            held = graph.create_node("get_attr", name, name=node.name)
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
    return baked


def unique(node: fx.Node, taken: set[str]) -> str:
    made = node.meta["custom"][META]
    name, number = f"{made['site']}_{made['adapter']}.{made['term']}", 2
    while (numbered := name if number == 2 else f"{name}_{number - 1}") in taken:
        number += 1
    return numbered
