"""Example inputs: by name, copied apart, and which of their dimensions vary."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..base.borrowed import pytree
from ..base.errors import CaptureError
from ..graph.signature import export_arguments, named_inputs


def example_of(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """Example inputs by name. Every tensor is a copy: torch.export takes two arguments that are one tensor
    (`labels=input_ids`) for one input, and would leave the other unread."""
    if isinstance(example_inputs, torch.Tensor):
        example_inputs = (example_inputs,)
    if isinstance(example_inputs, Mapping):
        inputs = named_inputs(model.forward, *export_arguments(model.forward, example_inputs))
    elif isinstance(example_inputs, (tuple, list)):
        inputs = named_inputs(model.forward, tuple(example_inputs), {})
    else:
        raise CaptureError(f"Example inputs are a tensor, a tuple or a dict, not {type(example_inputs).__name__}.")
    device = next((p.device for p in model.parameters()), None)
    for name, leaf in ((n, leaf) for n, value in inputs.items() for leaf in pytree.tree_leaves(value)):
        if isinstance(leaf, torch.Tensor) and device is not None and leaf.device != device:
            raise CaptureError(f"Input {name!r} is on {leaf.device}, the model on {device}. Move one of them first.")
    return pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), inputs)


def dynamic_dimensions(inputs: Mapping[str, Any], chosen: Mapping[str, Iterable[int]] | None) -> dict[str, Any]:
    """Argument name -> for each tensor leaf the set of dimensions asked to vary."""
    if chosen is not None:
        if unknown := set(chosen) - set(inputs):
            raise CaptureError(f"dynamic names {', '.join(sorted(unknown))}; the inputs are {', '.join(inputs)}.")

        def wanted(name: str) -> Any:
            dims = frozenset(chosen.get(name, ()))
            return pytree.tree_map(lambda _: dims, inputs[name])

        return {name: wanted(name) for name in inputs}

    def usual(leaf: Any) -> frozenset[int]:
        if not isinstance(leaf, torch.Tensor) or leaf.ndim == 0:
            return frozenset()
        sequence = (leaf.ndim == 2 and not leaf.is_floating_point()) or leaf.ndim == 3
        return frozenset({0, 1} if sequence else {0})

    return {name: pytree.tree_map(usual, value) for name, value in inputs.items()}


def widen(inputs: dict[str, Any], ranges: dict[str, Any]) -> dict[str, Any]:
    """Repeat a batch of one to a batch of two: torch.export fixes a dimension that it sees as 1."""
    leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    if not leaves or any(leaf.shape[0] != 1 for leaf in leaves):
        return inputs

    def repeat(leaf: Any, dims: frozenset[int]) -> Any:
        return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and 0 in dims else leaf

    return {name: pytree.tree_map(repeat, value, ranges[name]) for name, value in inputs.items()}
