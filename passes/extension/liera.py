from typing import ClassVar

import torch
from pydantic import Field

from .lora import LoRA


class LieRA(LoRA):
    """φ(W) = W ⊙ exp((α/r) B A), or W ⊙ (1 + (α/r) B A) to first order

    A [r, in] uniform in ±1/√in, B [out, r] zero. What is zero in W stays zero; under `exponential` no sign changes. The
    published code has the first-order form. No law distributes over ⊙: the matrix is evaluated each step.
    Dropout acts on the input of the update alone. Source: Si et al. 2025, "Generalized Tensor-based Parameter-Efficient
    Fine-Tuning via Lie Group Transformations".
    """

    name: ClassVar[str] = "liera"
    paper: ClassVar[str] = "arXiv 2504.00851"

    exponential: bool = Field(False, description="exp((α/r) B A) itself, not its first order")

    def weight(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        update = (self.alpha / self.r) * (B @ A)
        if self.dropout:
            return W + W * (torch.expm1(update) if self.exponential else update)
        return W * (torch.exp(update) if self.exponential else 1 + update)
