"""Any weight update as a plain LoRA: ΔW = φ(W) − W = s B A, exactly or truncated."""

import math
from collections.abc import Mapping

import torch
from subgraph_peft.passes import LoRA

from subgraph_peft.adapter import Target, targets
from subgraph_peft.errors import MethodError
from subgraph_peft.program import Program

from .pieces import Piece


@torch.no_grad()
def lora_pieces(program: Program, rank: int | None, tolerance: float) -> tuple[list[Piece], dict[str, float]]:
    """(a LoRA with s = 1 at every rewritten weight, ‖ΔW − B A‖ / ‖ΔW‖ by weight)

    A [r, in] and B [out, r] are the singular vectors of ΔW, computed in float64, each times √σ; r is the rank of ΔW, at
    most `rank`. Raises MethodError for an adapter that does not fold, an update of full rank, and an error above
    `tolerance`.
    """
    held = dict(program.tensors())
    found, errors = [], {}
    for target in targets(program.adapters):
        if target.part not in ("weight", "bias"):
            names = ", ".join(adapter.name for adapter, _ in target.chain)
            raise MethodError(
                f"{names} at {target.name} changes no weight, so that it is no LoRA. Use sp.save(program, folder)."
            )
        if target.part == "weight":
            adapter, site = target.chain[0]
            A, B, errors[target.name] = low_rank(target, held, rank)
            method = LoRA(r=A.shape[-2], alpha=A.shape[-2])
            found.append(Piece(adapter.name, site, method, {"A": A, "B": B}, {}))
    check(errors, rank, tolerance)
    return found, errors


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


def check(errors: Mapping[str, float], rank: int | None, tolerance: float) -> None:
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
