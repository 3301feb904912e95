"""Dynamic dimensions by name, and example inputs of other sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from subgraph_peft.graph.nodes import fixed_size

USUAL = {4: ("batch", "channels", "height", "width")}

Axes = dict[str, dict[int, str]]
"""input -> dimension -> axis name, dynamic dimensions only"""


def axis_names(shapes: Mapping[str, Sequence[Any]], example: Mapping[str, torch.Tensor]) -> Axes:
    """Names for the symbolic sizes in `shapes`; equal symbols share a name.

    The first dimension is the batch, the second the length. Inputs whose batches are different symbols (a mask that
    broadcasts) share the name where their example sizes agree; other symbols of the same role are told apart by the
    input they belong to: `length`, `decoder_input_ids_length`. Tensors of a mapping share their argument's axes.
    """
    names: dict[str, str] = {}
    batch: int | None = None
    axes: Axes = {}
    for name, shape in shapes.items():
        for dimension, size in enumerate(shape):
            if fixed_size(size) is not None:
                continue
            symbol = str(size)
            if symbol not in names:
                argument, _, key = name.partition(".")
                role = "length" if key and dimension else role_of(dimension, len(shape))
                length = example[name].shape[dimension]
                shared = role == "batch" and batch in (None, length)
                batch = length if shared else batch
                apart = f"{argument}_{role}"
                apart = f"{name}_{role}" if apart in names.values() else apart
                names[symbol] = role if shared or role not in names.values() else apart
            axes.setdefault(name, {})[dimension] = names[symbol]
    return axes


def role_of(dimension: int, rank: int) -> str:
    usual = USUAL.get(rank, ("batch", "length"))
    return usual[dimension] if dimension < len(usual) else f"axis_{dimension}"


def sizes_of(axes: Axes, example: Mapping[str, torch.Tensor]) -> dict[str, int]:
    """Axis name -> its size in the example inputs, at least 2: torch.export takes 1 for a constant."""
    return {axis: max(2, example[name].shape[d]) for name, dims in axes.items() for d, axis in dims.items()}


def other_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Every axis one shorter, or one longer where that would leave fewer than 2."""
    return {axis: size - 1 if size > 2 else size + 1 for axis, size in sizes.items()}


def resize(example: Mapping[str, torch.Tensor], axes: Axes, sizes: Mapping[str, int]) -> dict[str, torch.Tensor]:
    """The example inputs at other sizes: cropped, or repeated from the start, so that every value stays a valid one."""
    resized = {}
    for name, tensor in example.items():
        for dimension, axis in axes.get(name, {}).items():
            index = torch.arange(sizes[axis], device=tensor.device) % tensor.shape[dimension]
            tensor = tensor.index_select(dimension, index)
        resized[name] = tensor
    return resized
