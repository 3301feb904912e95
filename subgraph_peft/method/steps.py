"""What a method's schedule is given after an optimiser step."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from ..graph.site import Site
from .method import Method


@dataclass
class SiteStep:
    """One site at a step: its tensors by name, with the gradients of the step just taken, and what the schedule keeps.

    state:  tensors that live from step to step and in training checkpoints
    weight: the matrix [out, in] that the method rewrites, float32 or wider
    """

    site: Site
    method: Method
    tensors: dict[str, torch.nn.Parameter]
    weight: Callable[[], torch.Tensor]
    state: dict[str, torch.Tensor] = field(default_factory=dict)

    def kept(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A tensor of the state, zeros like `like` at first."""
        return self.state.setdefault(name, torch.zeros_like(like))


@dataclass
class Step:
    """The optimiser step just taken, its number counted from 1, and all sites of one adapter."""

    number: int
    total: int | None
    sites: list[SiteStep]
