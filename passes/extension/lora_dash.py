from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.svd import svd
from subgraph_peft.method.tensors import Tensor, frozen, trainable

from .lora import LoRA

if TYPE_CHECKING:
    from subgraph_peft.method.steps import Step


class LoRADash(LoRA):
    """φ(W) = W + (α/r) B A + U diag(g) V

    Plain LoRA for `switch` optimiser steps. Then the `directions` singular directions (uᵢ, vᵢ) of W that the update
    changed most for their size, |uᵢᵀ ΔW vᵢ| / (σᵢ + ε), become U [out, k] and V [k, in], frozen, and g [k], which was
    zero, begins to train; the output does not jump. ε = `epsilon` · σ₁, this package's.
    Source: Si et al. 2024, "Unleashing the Power of Task-Specific Directions in Parameter Efficient Fine-tuning"
    (LoRA-Dash), Sec. 4.
    """

    name: ClassVar[str] = "lora_dash"
    paper: ClassVar[str] = "arXiv 2409.01035"

    directions: PositiveInt = Field(8, description="singular directions of W that train of their own")
    switch: PositiveInt = Field(100, description="steps of plain LoRA before they are chosen")
    epsilon: float = Field(1e-6, description="added to singular values, relative to the largest")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            **super().tensors(site),
            "g": trainable(self.directions),
            "U": frozen(site.out_features, self.directions),
            "V": frozen(self.directions, site.in_features),
        }

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.directions > min(W.shape):
            raise MethodError(
                f"lora_dash at {site.name}: {self.directions} directions exceed min(in, out) = {min(W.shape)}."
            )
        return {}

    def weight(
        self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, g: torch.Tensor, U: torch.Tensor, V: torch.Tensor
    ) -> torch.Tensor:
        return W + (self.alpha / self.r) * (B @ A) + U @ torch.diag(g) @ V

    def check_schedule(self, total: int) -> None:
        if self.switch >= total:
            raise MethodError(
                f"lora_dash: the switch at step {self.switch} is not before the end of the run's {total} steps."
            )

    def schedule(self, step: "Step") -> None:
        if step.number != self.switch:
            return
        for site in step.sites:
            U, sigma, Vh = svd(site.weight())
            A, B = (site.tensors[name].to(U.dtype) for name in ("A", "B"))
            change = (self.alpha / self.r) * ((U.T @ B) * (Vh @ A.T)).sum(1)
            chosen = (change.abs() / (sigma + self.epsilon * sigma[0])).topk(self.directions).indices
            site.tensors["U"].copy_(U[:, chosen])
            site.tensors["V"].copy_(Vh[chosen])
