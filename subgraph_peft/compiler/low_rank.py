"""Any weight update in factors: ΔW = φ(W) − W = B A, exactly or truncated."""

import math
from collections.abc import Mapping

import torch

from ..base.errors import MethodError
from ..method.adapter import Target


def low_rank(
    target: Target, held: Mapping[str, torch.Tensor], rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A [r, in] and B [out, r] in the dtype of the adapter, a stack of them for a stack, and ‖ΔW − B A‖ / ‖ΔW‖."""
    adapter, site = target.chain[0]
    dtype = held[next(iter(adapter.paths(site).values()))].dtype
    W = Target("weight", target.name, site, ()).evaluate(held, torch.float64)
    update = target.evaluate(held, torch.float64) - W
    A, B = (factor.to(dtype) for factor in factors(update, W, target.name, rank))
    return A, B, relative(update - B.double() @ A.double(), update)


def check_errors(errors: Mapping[str, float], rank: int | None, tolerance: float) -> None:
    """Raises MethodError for an error above the tolerance."""
    worst = max(errors, key=errors.get, default=None)
    if worst is not None and errors[worst] > tolerance:
        raise MethodError(
            f"At rank {rank} the LoRA loses {errors[worst]:.1%} of the update of {worst}, more than {tolerance:.1%}. "
            f"Give a larger rank, or accept it with tolerance={math.ceil(errors[worst] * 1000) / 1000:g}."
        )


def factors(update: torch.Tensor, W: torch.Tensor, where: str, rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of rank at most `rank`, with B A the closest to the update; a zero row and column where it is zero. In a
    stack the largest rank is that of all."""
    U, S, Vh = torch.linalg.svd(update, full_matrices=False)
    rows, columns = update.shape[-2:]
    noise = max(rows, columns) * torch.finfo(S.dtype).eps * (torch.linalg.matrix_norm(W)[..., None] + S[..., :1])
    full = int((noise < S).sum(-1).max())
    r = max(1, full if rank is None else min(rank, full))
    if rank is None and r * (rows + columns) >= rows * columns:
        raise MethodError(
            f"The update of {where} {list(update.shape)} has rank {full}: it is not low. Give rank= for a truncated "
            "one with its error stated, or fold it into plain weights."
        )
    root = torch.where(noise < S, S, 0)[..., :r].sqrt()
    return root[..., None] * Vh[..., :r, :], U[..., :r] * root[..., None, :]


def relative(lost: torch.Tensor, update: torch.Tensor) -> float:
    size = torch.linalg.vector_norm(update).item()
    return torch.linalg.vector_norm(lost).item() / size if size else 0.0
