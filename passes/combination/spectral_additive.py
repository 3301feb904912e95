from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.svd import check_rank, svd
from subgraph_peft.method.tensors import Tensor, frozen, trainable, zeros


class SpectralAdditive(Method):
    """φ(W) = (W − U diag(σ) Vᵀ) + (U + A_U) diag(σ) (V + A_V)ᵀ

    U [out, r], σ [r], V [in, r] are the r largest singular triplets of W, kept and frozen; A_U [out, r] and A_V [in, r]
    start at zero, and both move at once. No scale, as in the authors' code.
    Source: Zhang and Pilanci 2024, "Spectral Adapter"; Si et al. 2024, "See Further for Parameter Efficient
    Fine-tuning", Eq. 37.
    """

    name: ClassVar[str] = "spectral_additive"
    family: ClassVar[str] = "combination"
    paper: ClassVar[str] = "arXiv 2405.13952"

    r: PositiveInt = Field(8, description="singular triplets that train")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        U, V = (site.out_features, self.r), (site.in_features, self.r)
        return {
            "A_U": trainable(*U, init=zeros),
            "A_V": trainable(*V, init=zeros),
            "U": frozen(*U),
            "sigma": frozen(self.r),
            "V": frozen(*V),
        }

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        check_rank(self.name, site, self.r)
        U, sigma, Vh = svd(W, self.r)
        return {"U": U, "sigma": sigma, "V": Vh.T}

    def weight(
        self, W: torch.Tensor, A_U: torch.Tensor, A_V: torch.Tensor, U: torch.Tensor, sigma: torch.Tensor,
        V: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        return (W - (U * sigma) @ V.T) + ((U + A_U) * sigma) @ (V + A_V).T
