"""How far a factor's rows or columns are from orthonormal, and from orthogonal."""

from typing import Literal

import torch

Form = Literal["squared_sum", "unsquared_mean"]


def orthonormality(rows: torch.Tensor) -> torch.Tensor:
    """R Rᵀ − I of rows R [r, n]"""
    return rows @ rows.T - torch.eye(rows.shape[0], device=rows.device, dtype=rows.dtype)


def orthogonality(rows: torch.Tensor) -> torch.Tensor:
    """R Rᵀ − diag(R Rᵀ) of rows R [r, n]"""
    gram = rows @ rows.T
    return gram - torch.diag(torch.diagonal(gram))


def size(form: Form, *deviations: torch.Tensor) -> torch.Tensor:
    """Σ ‖·‖²_F ("squared_sum"), or the mean of ‖·‖_F ("unsquared_mean"), whose gradient at 0 is taken as 0."""
    squares = [deviation.square().sum() for deviation in deviations]
    if form == "squared_sum":
        return torch.stack(squares).sum()
    return torch.stack([torch.where(s > 0, torch.where(s > 0, s, 1).sqrt(), 0) for s in squares]).mean()
