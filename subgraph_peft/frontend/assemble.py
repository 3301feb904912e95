"""From an exported program to a Program: a normalised graph over the model's own tensors, under the model's names."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..base.borrowed import pytree
from ..base.patches import uncollected
from ..graph.signature import Signature
from ..program.module import build
from ..program.program import Program
from ..program.tree import home_of
from .flat import Flat, flat, rename


@uncollected()
def assemble(
    exported: ExportedProgram,
    model: nn.Module | None = None,
    inputs: Mapping[str, Any] | None = None,
    names: Mapping[str, str] | None = None,
) -> Program:
    """The program of `exported`.

    model:   what was exported, where it is at hand: it gives the tensors, the signature and the config
    inputs:  the example inputs by name; by default those that the program carries
    names:   tensor of the exported program -> its name in the program, where that is another
    """
    found = flat(exported)
    signature = Signature.of(exported, model.forward if model is not None else None)
    tensors, volatile, ties = own_tensors(found, model)
    if names:
        tensors = {names.get(name, name): tensor for name, tensor in tensors.items()}
        volatile = {names.get(name, name) for name in volatile}
        ties = tuple(frozenset(names.get(name, name) for name in group) for group in ties)
        rename(found.graph, names)
    if model is None:
        split_ties(found.graph, ties)
    source = source_of(found.graph) or (type(model).__name__ if model is not None else "Model")
    config = getattr(model, "config", None)
    module = build(signature, found.graph, None, tensors, volatile, home_of(tensors), source, config=config)
    example = examples_of(exported, signature) if inputs is None else inputs
    return Program(module=module, example=example, source=source, ties=ties)


def examples_of(exported: ExportedProgram, signature: Signature) -> dict[str, Any]:
    """The example inputs that a program carries, by name."""
    leaves = iter(pytree.tree_leaves(exported.example_inputs))
    return {
        name: pytree.tree_unflatten([next(leaves) for _ in range(spec.num_leaves)], spec)
        for name, spec in signature.inputs.items()
    }


def source_of(graph: fx.Graph) -> str | None:
    """Class name of the module that was traced, where the graph says."""
    for node in graph.nodes:
        for path, cls in node.meta.get("nn_module_stack", {}).values():
            if path == "":
                return str(cls).rpartition(".")[2]
    return None


def own_tensors(found: Flat, model: nn.Module | None) -> tuple[dict, set[str], tuple[frozenset[str], ...]]:
    """(tensors by name, names outside the state dict, groups of tied names), of the model where it is at hand.

    Parameters are new, frozen objects over the same memory; buffers, which training may write to, are copies.
    """
    origin, own = (found.root, {alias: n for n, alias in found.aliases.items()}) if model is None else (model, {})
    saved = {own.get(name, name) for name in origin.state_dict(keep_vars=True)}
    names: dict[object, list[str]] = {}
    tensors: dict[str, Any] = {}
    frozen: dict[object, nn.Parameter] = {}
    for name, parameter in origin.named_parameters(remove_duplicate=False):
        key = memory(parameter)
        names.setdefault(key, []).append(own.get(name, name))
        if key not in frozen:
            frozen[key] = nn.Parameter(parameter.detach(), requires_grad=False)
        tensors[own.get(name, name)] = frozen[key]
    for name, buffer in origin.named_buffers(remove_duplicate=False):
        tensors[own.get(name, name)] = buffer.detach().clone()
    for path in {str(node.target) for node in found.graph.find_nodes(op="get_attr")} - set(tensors):
        value = found.read(path)
        tensors[path] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    volatile = {name for name in tensors if name not in saved}
    return tensors, volatile, tuple(frozenset(group) for group in names.values() if len(group) > 1)


def memory(parameter: nn.Parameter) -> object:
    """Equal for parameters that are one tensor: a file holds tied ones as two objects over one memory."""
    if parameter.is_meta or not parameter.numel():
        return id(parameter)
    return parameter.data_ptr(), parameter.dtype, tuple(parameter.shape), parameter.stride()


def split_ties(graph: fx.Graph, ties: tuple[frozenset[str], ...]) -> None:
    """torch.export reads a tied tensor under one of its names; give every use the name of the module that uses it."""
    for node in graph.find_nodes(op="get_attr"):
        group = next((g for g in ties if node.target in g), frozenset())
        for user in list(node.users):
            stack = list(user.meta.get("nn_module_stack", {}).values())
            owner = stack[-1][0].partition("@")[0] if stack else ""
            own = next((name for name in group if name.rpartition(".")[0] == owner), node.target)
            if own != node.target:
                known = next((n for n in graph.find_nodes(op="get_attr") if n.target == own), None)
                if known is None:
                    with graph.inserting_before(node):
                        known = graph.create_node("get_attr", own, name=own.replace(".", "_"))
                    known.meta = dict(node.meta)
                user.replace_input_with(node, known)
