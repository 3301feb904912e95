"""What the zoo knows of an architecture: how to build it small, what to feed it, and which limits it meets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

STAGES = ("capture", "sites", "train", "eval", "shapes", "lora", "ssb", "dora", "onnx")

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """One architecture of the zoo.

    build:    a small model with random weights, and inputs for it; the same ones at every call
    loss:     a scalar of the outputs, differentiable; by default their `loss`, or their first element
    other:    inputs with another batch and length, for this model; by default those of `build` with every dimension
              that the captured program lets vary made longer
    capture:  keyword arguments of `sp.capture`
    limits:   stage -> the documented limit, not of this project, for which its cell is a "no"
    fast:     whether the default tests run it
    """

    name: str
    group: str
    build: Callable[[], tuple[nn.Module, Inputs]]
    fast: bool = False
    loss: Callable[[Any], torch.Tensor] | None = None
    other: Callable[[], Inputs] | None = None
    capture: Mapping[str, Any] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if unknown := set(self.limits) - set(STAGES):
            raise ValueError(f"{self.name}: {sorted(unknown)} is no stage; there are {', '.join(STAGES)}.")
