from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, normal, trainable

from ..constraints.gram import orthonormality, size

if TYPE_CHECKING:
    from subgraph_peft.method.steps import SiteStep, Step


class AdaLoRA(Method):
    """φ(W) = W + s B diag(e) A,  s = α/(r + 10⁻⁵);  loss + λ mean(‖A Aᵀ − I‖, ‖Bᵀ B − I‖)

    A [r, in] and B [out, r] normal, e [r] zero. Every `interval` steps the triplets (e_i, A_i, B_i) of all sites are
    ranked by smoothed importance |p·∂p| times its uncertainty, and the e_i of the least important are set to zero, so
    that b(t) stay: `r` a site until step `warmup`, then falling as a cube to `target_r` a site, `final` steps before
    the end; from there on the mask is fixed. s uses the first r throughout; no tensor changes its shape.
    Source: Zhang et al. 2023, "AdaLoRA", Eq. 3, 7 to 12 and Algorithm 1; masks and constants as in its code.
    """

    name: ClassVar[str] = "adalora"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 2303.10512"

    r: PositiveInt = Field(12, description="triplets of a site at the start")
    target_r: PositiveInt = Field(8, description="triplets of a site at the end, on average")
    alpha: float = Field(16.0, description="the update is scaled by α/r")
    warmup: NonNegativeInt = Field(0, description="steps before triplets are taken away")
    final: NonNegativeInt = Field(0, description="steps at the end in which the mask is fixed")
    interval: PositiveInt = Field(1, description="steps between two rankings")
    beta1: float = Field(0.85, ge=0, lt=1, description="smoothing of the importance")
    beta2: float = Field(0.85, ge=0, lt=1, description="smoothing of its uncertainty")
    orthogonal: NonNegativeFloat = Field(0.5, description="λ: weight of the penalty on A and B")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of A, in training")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            "A": trainable(self.r, site.in_features, init=normal(0.02)),
            "B": trainable(site.out_features, self.r, init=normal(0.02)),
            "e": trainable(self.r),
        }

    def weight(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return W + (self.alpha / (self.r + 1e-5)) * (B @ torch.diag(e) @ A)

    def penalty(self, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return self.orthogonal * size("unsquared_mean", orthonormality(A), orthonormality(B.T))

    @property
    def penalty_mean(self) -> bool:
        return True

    def check_schedule(self, total: int) -> None:
        if self.target_r > self.r:
            raise MethodError(f"adalora: target_r = {self.target_r} exceeds the first rank r = {self.r}.")
        if self.warmup + self.final >= total:
            raise MethodError(
                f"adalora: warmup ({self.warmup}) and final ({self.final}) leave no step of the run's {total} to prune "
                "in."
            )

    def budget(self, step: int, total: int, first: int, last: int) -> int:
        """b(t): triplets that stay, over all sites, of `first` down to `last`."""
        if step <= self.warmup:
            return first
        if step > total - self.final:
            return last
        left = 1 - (step - self.warmup) / (total - self.final - self.warmup)
        return int(last + (first - last) * left**3)

    def schedule(self, step: "Step") -> None:
        ending = step.number >= step.total - self.final
        if not ending:
            for site in step.sites:
                self.observe(site)
            if step.number <= self.warmup or step.number % self.interval:
                return
        scores = torch.cat([self.scores(site) for site in step.sites])
        last = self.target_r * len(step.sites)
        excess = len(scores) - self.budget(step.number, step.total, len(scores), last)
        if excess > 0:
            keep = torch.ones_like(scores, dtype=torch.bool)
            keep[scores.argsort(stable=True)[:excess]] = False
            for site, kept in zip(step.sites, keep.split([len(site.tensors["e"]) for site in step.sites]), strict=True):
                site.tensors["e"].mul_(kept)

    def observe(self, site: "SiteStep") -> None:
        """Ī ← β₁ Ī + (1 − β₁) I,  Ū ← β₂ Ū + (1 − β₂) |I − Ī|  of I = |p·∂p|"""
        for name in ("A", "B", "e"):
            p = site.tensors[name]
            if p.grad is not None:
                sensitivity = (p * p.grad).abs()
                mean = site.kept(f"{name}_mean", p).lerp_(sensitivity, 1 - self.beta1)
                site.kept(f"{name}_deviation", p).lerp_((sensitivity - mean).abs(), 1 - self.beta2)

    def scores(self, site: "SiteStep") -> torch.Tensor:
        """S_i = s(e_i) + mean_j s(A_ij) + mean_j s(B_ji)  with s = Ī Ū"""
        A, B, e = (
            site.kept(f"{n}_mean", site.tensors[n]) * site.kept(f"{n}_deviation", site.tensors[n])
            for n in ("A", "B", "e")
        )
        return e + A.mean(1) + B.mean(0)
