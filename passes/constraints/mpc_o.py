from typing import ClassVar

import torch
from pydantic import Field, NonNegativeFloat

from subgraph_peft.method.method import Method

from ..extension.lora import LoRA
from .factors import FactorWrapper
from .gram import Form, orthonormality, size


class MPCo(FactorWrapper):
    """φ(W) = φ_of(W);  loss + λ (‖A Aᵀ − I‖² + ‖Bᵀ B − I‖²)

    Matrix Pattern Constraint "orthogonal" on any method with trained factors A [r, in] and B [out, r].
    `form`: "squared_sum" over sites, as in the paper, or "unsquared_mean" of the norms over all matrices, as in its
    code; their sizes differ by orders of magnitude, and so do sensible λ. No λ is published for the paper's form.
    Source: Si et al. 2024, "See Further for Parameter Efficient Fine-tuning", Eq. 25.
    """

    name: ClassVar[str] = "mpc_o"
    family: ClassVar[str] = "framework"
    paper: ClassVar[str] = "arXiv 2407.05417"

    of: Method = LoRA()
    coefficient: NonNegativeFloat = Field(1e-3, description="λ: weight of the penalty")
    form: Form = Field("squared_sum", description="squared norms, summed over sites, or the mean of plain norms")

    def penalty(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return self.coefficient * size(self.form, orthonormality(A), orthonormality(B.T))

    @property
    def penalty_mean(self) -> bool:
        return self.form == "unsquared_mean"
