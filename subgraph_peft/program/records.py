"""What a program knows about itself: how each site was rewritten, what is constant, what a fold kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from ..method.adapter import Target
from ..method.equation import Equation


@dataclass
class Lowered:
    """How one site was rewritten.

    dense:      why a full-size matrix is evaluated each step, if one is
    nodes:      names of the nodes that the rewrite added
    per_token:  FLOPs added per row of the input, a multiply-add being two    per_step: those independent of the input
    """

    dense: list[str] = field(default_factory=list)
    nodes: list[str] = field(default_factory=list)
    per_token: int = 0
    per_step: int = 0

    @property
    def form(self) -> str:
        return "dense" if self.dense else "factored"


@dataclass(frozen=True)
class Constant:
    """A value that no trainable tensor changes: computed when the rewrite is made."""

    target: Target
    equation: Equation
    node: fx.Node


@dataclass(frozen=True)
class SiteFold:
    """One folded weight.

    relative_delta: ‖ΔW‖ / ‖W‖          retained: 1 − ‖stored − φ(W)‖ / ‖ΔW‖, the part of the update the dtype kept
    """

    relative_delta: float
    retained: float


@dataclass(frozen=True)
class FoldReport:
    """dtype of the folded weights, what each site kept, the largest output difference on the example inputs (relative
    to the largest output), the adapters that were folded ({name: method}), and those that do not fold."""

    dtype: torch.dtype
    sites: Mapping[str, SiteFold]
    output_error: float | None
    merged: Mapping[str, Any]
    remaining: tuple[str, ...]

    @property
    def retained(self) -> float:
        """The smallest share of any site's update that was kept."""
        return min((site.retained for site in self.sites.values()), default=1.0)
