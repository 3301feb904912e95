"""The names under which a transformers model's tensors are stored, where loading renames, splits or joins them."""

import re
from collections.abc import Collection, Mapping

import torch
from torch import nn

from ..base.borrowed import get, unsaved_names

Tensors = Mapping[str, torch.Tensor]


class StoredNames:
    """The state of a transformers model under the names of its files.

    Tensors that loading converted are converted back when they are asked for, those of one layer at a time.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.state = model, model.state_dict()
        self.groups = grouped(self.state)
        self.group_of = {name: key for key, group in self.groups.items() for name in self.reverted(on_meta(group))}
        if self.group_of.keys() != self.reverted(on_meta(self.state)).keys():
            self.groups = {"": self.state}
            self.group_of = dict.fromkeys(self.reverted(on_meta(self.state)), "")
        self.current: tuple[str | None, Tensors] = None, {}

    def reverted(self, tensors: Tensors) -> Tensors:
        revert = get("transformers.core_model_loading:revert_weight_conversion")
        return revert(self.model, dict(tensors))

    def tensor(self, name: str) -> torch.Tensor | None:
        """The tensor stored under a name; None where the model has none of that name."""
        if (key := self.group_of.get(name)) is None:
            return None
        if self.current[0] != key:
            self.current = key, self.reverted(self.groups[key])
        return self.current[1][name]

    def lacking(self, stored: Collection[str]) -> list[str]:
        """Names that are not among those stored, though the model needs them: ties and what is never saved aside."""
        unsaved = unsaved_names(self.model)
        held = {place(tensor) for name, tensor in self.state.items() if name in stored}
        tied = {name for name, tensor in self.state.items() if place(tensor) in held}
        return [name for name in self.group_of if name not in unsaved | tied | set(stored)]


def grouped(state: Tensors) -> dict[str, Tensors]:
    """By layer, "model.layers.0" and so on; what is in none of them together."""
    groups: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in state.items():
        layer = re.match(r".*?\.\d+(?=\.)", name)
        groups.setdefault(layer[0] if layer else "", {})[name] = tensor
    return groups


def on_meta(tensors: Tensors) -> Tensors:
    return {name: tensor.to("meta") for name, tensor in tensors.items()}


def place(tensor: torch.Tensor) -> tuple[object, ...]:
    """What tied tensors have in common."""
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride()
