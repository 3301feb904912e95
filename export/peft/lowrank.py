"""Any weight update as a plain LoRA of peft's layout."""

import torch

from subgraph_peft.base.errors import MethodError
from subgraph_peft.compiler.low_rank import check_errors, low_rank
from subgraph_peft.method.adapter import targets
from subgraph_peft.passes import LoRA
from subgraph_peft.program.program import Program

from ..pieces import Piece


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
    check_errors(errors, rank, tolerance)
    return found, errors
