from typing import ClassVar

import torch

from .gram import orthogonality, orthonormality, size
from .mpc_o import MPCo


class MPCd(MPCo):
    """φ(W) = φ_of(W);  loss + λ (‖A Aᵀ − I‖² + ‖Bᵀ B − diag(Bᵀ B)‖²)

    Matrix Pattern Constraint "diagonal": as MPC_o, but B's columns may have any length.
    Source: Si et al. 2024, "See Further for Parameter Efficient Fine-tuning", Eq. 26.
    """

    name: ClassVar[str] = "mpc_d"

    def penalty(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return self.coefficient * size(self.form, orthonormality(A), orthogonality(B.T))
