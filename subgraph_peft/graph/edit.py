"""Edits of flat aten graphs: train and eval mode, missing inputs, device and dtype moves, dead code."""

import copy
from collections.abc import Mapping

import torch
from torch import fx, nn

from ..base.borrowed import FakeTensor, fake_mode_of, pytree
from .nodes import (
    EVALUATION,
    bodies,
    every_node,
    flat_outputs,
    is_batch_count,
    is_effect,
    mode_argument,
    viewed,
    written_arguments,
)
from .operators import set_argument

Moves = Mapping[torch.device | torch.dtype, torch.device | torch.dtype]


def clone(graph: fx.Graph) -> tuple[fx.Graph, dict[fx.Node, fx.Node]]:
    """A copy that keeps node names, and the map from old nodes to new."""
    copied, old_to_new = fx.Graph(), {}
    result = copied.graph_copy(graph, old_to_new, return_output_node=True)
    output, old_output = result
    copied.output(output).meta = copy.copy(old_output.meta)
    return copied, old_to_new


def set_eval(graph: fx.Graph, root: nn.Module) -> None:
    """Turn a graph in its training form into that of eval mode, in place: dropout, attention dropout and batch norm.

    The bodies of its operators (the branches of torch.cond) stay with `root` as they are; where the modes differ there,
    the graph reads a second body, `<name>_eval`.
    """
    for node in reversed(list(graph.nodes)):
        if mode := mode_argument(node):
            set_argument(node, mode, EVALUATION[mode])
        elif is_batch_count(node):
            graph.erase_node(node)
    for path, node in bodies(graph, root):
        if any(map(mode_argument, every_node(getattr(root, path)))):
            node.target = f"{path}_eval"
            if not hasattr(root, node.target):
                body = copy.deepcopy(getattr(root, path))
                set_eval(body.graph, body)
                body.recompile()
                root.add_module(node.target, body)


def writes(graph: fx.Graph) -> bool:
    """Whether a run of the graph changes a tensor that it reads from the module, other than by batch norm."""
    return any(source.op == "get_attr" for node in graph.nodes for source in map(viewed, written_arguments(node)))


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
    eliminate_dead_code(graph)
    return [leaf is not None for leaf in leaves]


def eliminate_dead_code(graph: fx.Graph, root: nn.Module | None = None) -> int:
    """Remove nodes that nothing reads and that change nothing. `root` holds the bodies of operators, which are looked
    into where it is given. Returns how many nodes went."""
    removed = 0
    for node in reversed(list(graph.nodes)):
        if not node.users and node.op in ("call_function", "get_attr") and not is_effect(node, root):
            graph.erase_node(node)
            removed += 1
    return removed


def move(graph: fx.Graph, mapping: Moves) -> None:
    """Replace devices and dtypes: literals in the arguments of nodes, and those of their fake values."""

    def swap(value: object) -> object:
        if isinstance(value, torch.device) and value.index is None:  # "cuda" is the "cuda:0" of the mapping
            value = next((d for d in mapping if isinstance(d, torch.device) and d.type == value.type), value)
        return mapping.get(value, value) if isinstance(value, (torch.device, torch.dtype)) else value

    def moved(value: FakeTensor) -> torch.Tensor:
        device, dtype = swap(value.device), swap(value.dtype)
        if (device, dtype) == (value.device, value.dtype):
            return value
        with fake_mode_of(value):
            return torch.empty_strided(value.shape, value.stride(), dtype=dtype, device=device)

    for node in graph.nodes:
        node.args = fx.node.map_aggregate(node.args, swap)
        node.kwargs = fx.node.map_aggregate(node.kwargs, swap)
        if "val" in node.meta:
            node.meta["val"] = pytree.tree_map_only(FakeTensor, moved, node.meta["val"])
