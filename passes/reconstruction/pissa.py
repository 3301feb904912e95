from typing import ClassVar

import torch
from pydantic import NonNegativeInt, PositiveInt

from subgraph_peft.errors import MethodError
from subgraph_peft.linalg import svd
from subgraph_peft.method import Method, Tensor, frozen, trainable
from subgraph_peft.sites import Site


class PiSSA(Method):
    """φ(W) = (W − s B₀A₀) + s B A,  s = α/r

    A₀ = diag(√(σ/s)) Vh [r, in] and B₀ = U diag(√(σ/s)) [out, r] from the r largest singular triplets; A and B start
    there. The residual W − s B₀A₀ is computed once. α defaults to r, hence s = 1; `niter` power iterations of a fast
    SVD, exact by default. A₀ and B₀ are kept: the update is the plain LoRA s (BA − B₀A₀) of rank 2r.
    Source: Meng et al. 2024, "PiSSA", Eq. 2 to 4.
    """

    name: ClassVar[str] = "pissa"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2404.02948"

    r: PositiveInt = 8
    alpha: float | None = None
    niter: NonNegativeInt | None = None

    @property
    def s(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    def tensors(self, site: Site) -> dict[str, Tensor]:
        A, B = (self.r, site.in_features), (site.out_features, self.r)
        return {"A": trainable(*A), "B": trainable(*B), "A0": frozen(*A), "B0": frozen(*B)}

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        if self.r > min(W.shape):
            raise MethodError(
                f"{self.name} at {site.name}: r = {self.r} exceeds min(in, out) = {min(W.shape)} of {list(W.shape)}."
            )
        U, sigma, Vh = self.triplets(W)
        q = (sigma / self.s).sqrt()
        A, B = q[:, None] * Vh, U * q
        return {"A": A, "B": B, "A0": A, "B0": B}

    def triplets(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return svd(W, self.r, self.niter)

    def weight(
        self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor
    ) -> torch.Tensor:
        return (W - self.s * (B0 @ A0)) + self.s * (B @ A)
