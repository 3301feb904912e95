from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.svd import cayley, check_rank, svd
from subgraph_peft.method.tensors import Tensor, frozen, ones, trainable, zeros


class SpectralRotational(Method):
    """φ(W) = (W − U diag(σ) Vᵀ) + U Q(X_U) diag(σ) (V Q(X_V))ᵀ

    U [out, r], σ [r], V [in, r] are the r largest singular triplets of W, kept and frozen; X_U and X_V [r, r] start at
    zero, Q(X) = (I + K)⁻¹ (I − K) with K = (X − Xᵀ)/2 is orthogonal: the singular values stay. `scale`, as in the
    authors' code, trains them too: diag(d σ), d [r] = 1. Source: Zhang and Pilanci 2024, "Spectral Adapter".
    """

    name: ClassVar[str] = "spectral_rotational"
    family: ClassVar[str] = "combination"
    paper: ClassVar[str] = "arXiv 2405.13952"

    r: PositiveInt = Field(8, description="singular triplets that are turned")
    scale: bool = Field(False, description="train the singular values too")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        X = trainable(self.r, self.r, init=zeros)
        return {
            "X_U": X,
            "X_V": X,
            **({"d": trainable(self.r, init=ones, decay=False)} if self.scale else {}),
            "U": frozen(site.out_features, self.r),
            "sigma": frozen(self.r),
            "V": frozen(site.in_features, self.r),
        }

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        check_rank(self.name, site, self.r)
        U, sigma, Vh = svd(W, self.r)
        return {"U": U, "sigma": sigma, "V": Vh.T}

    def weight(
        self, W: torch.Tensor, X_U: torch.Tensor, X_V: torch.Tensor, U: torch.Tensor, sigma: torch.Tensor,
        V: torch.Tensor, **scale: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        trained = scale["d"] * sigma if self.scale else sigma
        return (W - (U * sigma) @ V.T) + ((U @ cayley(X_U)) * trained) @ (V @ cayley(X_V)).T
