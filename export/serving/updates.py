"""What a program's adapters add to its base, as the values of slots."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from subgraph_peft.compiler.fold import check_finite
from subgraph_peft.compiler.low_rank import check_errors, low_rank
from subgraph_peft.method.adapter import Target, targets
from subgraph_peft.passes import LoRA, RsLoRA
from subgraph_peft.program.program import Program

from ..onnx.slots import A, B, replaced
from ..pieces import plain


@dataclass(frozen=True)
class Updates:
    """values: slot name -> tensor: A [in, r], B [r, out] with φ(W) − W = (A B)ᵀ, and tensors that replace the base's
    ranks:  r by weight
    errors: ‖φ(W) − W − (A B)ᵀ‖ / ‖φ(W) − W‖ by weight
    """

    values: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int]
    errors: Mapping[str, float]


@torch.no_grad()
def updates(program: Program, rank: int | None = None, tolerance: float = 0.01) -> Updates:
    """The factors of LoRA and PiSSA are the method's own; those of other methods are the singular vectors of the
    update, of its own rank, or of `rank` at most.

    Raises MethodError for an update of full rank and for an error above `tolerance`, FoldError for values that are not
    finite.
    """
    check_finite(program)
    held = dict(program.tensors())
    values = {name: held[name].detach() for name in replaced(program)}
    ranks: dict[str, int] = {}
    errors: dict[str, float] = {}
    for target in targets(program.adapters):
        if target.part == "bias":
            values[target.name] = target.evaluate(held)
            continue
        down, up, errors[target.name] = own_factors(target, held, rank) or low_rank(target, held, rank)
        ranks[target.name] = down.shape[-2]
        values |= {target.name + A: down.mT.contiguous(), target.name + B: up.mT.contiguous()}
    check_errors(errors, rank, tolerance)
    return Updates(values, ranks, errors)


def own_factors(
    target: Target, held: Mapping[str, torch.Tensor], rank: int | None
) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A and s B of a LoRA of at most `rank`, or None."""
    if len(target.chain) > 1:
        return None
    ((adapter, site),) = target.chain
    own = {name: held[path].detach() for name, path in adapter.paths(site).items()}
    method, tensors = plain(adapter.at(site), own)
    if type(method) not in (LoRA, RsLoRA) or (rank is not None and method.r > rank):
        return None
    down, up = tensors["A"], tensors["B"]
    unit = torch.eye(down.shape[-2], dtype=down.dtype, device=down.device)
    return down, method.weight(torch.zeros_like(up), unit, up), 0.0
