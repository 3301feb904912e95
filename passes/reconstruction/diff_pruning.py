import math
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, PositiveFloat

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Init, Tensor, frozen, trainable

if TYPE_CHECKING:
    from subgraph_peft.method.steps import Step

FIXED = 1e4  # a gate's noise once it is decided: σ(±1e4) is 1 or 0


class DiffPruning(Method):
    """φ(P) = P + z ⊙ z_g · w,  z = clamp(3 σ(u + a) − 1.5, 0, 1);  loss + λ Σ σ(a)

    For every parameter P: a difference w = 0 like P, hard-concrete gates with locations a = 5 like P and a_g = 5 for
    the whole of P, and their noise u = logit(U(0, 1)), drawn anew after every optimiser step. At `fix_at` of the run,
    the `target` share of the differences of largest size |z z_g w| stays, over all parameters, and the mask is
    fixed: u is then ±∞ in effect, and the rest of the run trains w under it. σ(a) is the chance that a gate is not zero
    (γ = −1.5, ζ = 1.5). Source: Guo et al. 2020, "Parameter-Efficient Transfer Learning with Diff Pruning", Sec. 3.
    """

    name: ClassVar[str] = "diff_pruning"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2012.07463"
    every_parameter: ClassVar[bool] = True

    target: float = Field(0.005, gt=0, le=1, description="share of all parameters that may differ in the end")
    fix_at: float = Field(0.75, gt=0, lt=1, description="share of the run after which the mask is fixed")
    l0: NonNegativeFloat = Field(1.25e-7, description="λ: weight of the penalty on open gates")
    gate_lr: PositiveFloat = Field(100.0, description="factor on the learning rate of the gates")
    start: float = Field(5.0, description="value that the gates' locations start at")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        shape = site.shape if len(site.shape) == 1 else (site.out_features, site.in_features)
        location = {"init": constant(self.start), "decay": False, "lr": self.gate_lr}
        return {
            "w": trainable(*shape),
            "a": trainable(*shape, **location),
            "a_g": trainable(1, **location),
            "u": frozen(*shape),
            "u_g": frozen(1),
        }

    def gated(
        self, P: torch.Tensor, w: torch.Tensor, a: torch.Tensor, a_g: torch.Tensor, u: torch.Tensor, u_g: torch.Tensor
    ) -> torch.Tensor:
        return P + gate(u + a) * gate(u_g + a_g) * w

    def weight(self, W: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        return self.gated(W, **tensors)

    def bias(self, b: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        return self.gated(b, **tensors)

    def penalty(self, a: torch.Tensor, a_g: torch.Tensor, u: torch.Tensor, u_g: torch.Tensor) -> torch.Tensor:
        undecided = ((u.abs() < FIXED) * torch.sigmoid(a)).sum() + ((u_g.abs() < FIXED) * torch.sigmoid(a_g)).sum()
        return self.l0 * undecided

    def check_schedule(self, total: int) -> None:
        if not 0 < round(self.fix_at * total) < total:
            raise MethodError(
                f"diff_pruning: fix_at = {self.fix_at} leaves one of the two phases without a step ({total})."
            )

    def schedule(self, step: "Step") -> None:
        fixed = round(self.fix_at * step.total)
        if step.number < fixed:
            for site in step.sites:
                for name in ("u", "u_g"):
                    site.tensors[name].uniform_(1e-4, 1 - 1e-4).logit_()
        elif step.number == fixed:
            self.prune(step)

    def prune(self, step: "Step") -> None:
        """Keep the `target` share of the expected differences with the largest size."""
        sizes = []
        for site in step.sites:
            w, a, a_g = (site.tensors[name] for name in ("w", "a", "a_g"))
            sizes.append((gate(a) * gate(a_g) * w).abs().flatten())
        every = torch.cat(sizes)
        mask = torch.zeros_like(every, dtype=torch.bool)
        mask[every.topk(max(1, math.floor(self.target * len(every)))).indices] = True
        for site, kept in zip(step.sites, mask.split([len(size) for size in sizes]), strict=True):
            z = (gate(site.tensors["a"]) * gate(site.tensors["a_g"])).to(site.tensors["w"].dtype)
            site.tensors["w"].mul_(z)
            site.tensors["u"].copy_(torch.where(kept.view_as(z), FIXED, -FIXED))
            site.tensors["u_g"].fill_(FIXED)


def gate(location: torch.Tensor) -> torch.Tensor:
    """The hard-concrete gate, stretched to (−1.5, 1.5) and clamped to [0, 1]."""
    return (3 * torch.sigmoid(location) - 1.5).clamp(0, 1)


def constant(value: float) -> Init:
    def init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.full(shape, value)

    init.__doc__ = f"{value:g}"
    return init
