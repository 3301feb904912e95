from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, NonNegativeInt, PositiveInt

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.svd import check_rank, svd
from subgraph_peft.method.tensors import Tensor, frozen, trainable


class PiSSA(Method):
    """φ(W) = (W − s B₀A₀) + s B A,  s = α/r

    A₀ = diag(√(σ/s)) Vh [r, in] and B₀ = U diag(√(σ/s)) [out, r] from r singular triplets: the largest, the middle or
    the smallest (`components`); A and B start there. Here σ is at least ε‖W‖, ε of float32: where W is rank-deficient,
    factors would be zero and never train. α defaults to r, hence s = 1; `niter` power iterations of a fast SVD for the
    largest, more where they leave too large a residual (see `subspace`), exact by default. A₀ and B₀ are kept, W stays
    the base: the update is the plain LoRA s (BA − B₀A₀) of rank 2r.
    Source: Meng et al. 2024, "PiSSA", Eq. 2 to 4, Appendix F.
    """

    name: ClassVar[str] = "pissa"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2404.02948"

    r: PositiveInt = Field(8, description="singular triplets that train")
    alpha: float | None = Field(None, description="the factors are scaled by α/r; r by default")
    components: Literal["principal", "medium", "minor"] = Field(
        "principal", description="which singular triplets: the largest, the middle or the smallest"
    )
    niter: NonNegativeInt | None = Field(None, description="power iterations of a fast SVD; exact by default")

    def model_post_init(self, context: Any) -> None:
        if self.niter is not None and self.components != "principal":
            raise MethodError(
                f"{self.name}: the fast SVD (niter = {self.niter}) finds principal components, not {self.components} "
                "ones. Leave niter out for the exact one."
            )

    @property
    def s(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.r

    def tensors(self, site: Site) -> dict[str, Tensor]:
        A, B = (self.r, site.in_features), (site.out_features, self.r)
        return {"A": trainable(*A), "B": trainable(*B), "A0": frozen(*A), "B0": frozen(*B)}

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        check_rank(self.name, site, self.r)
        spare = min(W.shape) - self.r
        first = {"principal": 0, "medium": spare // 2, "minor": spare}[self.components]
        U, sigma, Vh = svd(W, first + self.r, self.niter)
        U, sigma, Vh = U[:, first:], sigma[first:], Vh[first:]
        floor = torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(W)
        q = (sigma.clamp_min(floor) / self.s).sqrt()
        A, B = q[:, None] * Vh, U * q
        return {"A": A, "B": B, "A0": A, "B0": B}

    def check_start(self, site: Site, values: Mapping[str, torch.Tensor]) -> None:
        if not values["A0"].any():
            raise MethodError(f"{self.name} at {site.name}: W is zero, and factors that start at zero never train.")

    def weight(
        self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, A0: torch.Tensor, B0: torch.Tensor
    ) -> torch.Tensor:
        return (W - self.s * (B0 @ A0)) + self.s * (B @ A)
