from typing import ClassVar

import torch
from pydantic import Field

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.svd import svd
from subgraph_peft.method.tensors import Tensor, frozen, trainable, zeros


class SVDiff(Method):
    """φ(W) = U diag(ReLU(σ + s δ)) Vh

    U [out, k], σ [k] and Vh [k, in], k = min(in, out), are the singular triplets of W, kept and frozen; δ [k] = 0. A
    singular value that reaches 0 stays there. Source: Han et al. 2023, "SVDiff"; Si et al. 2024, "See Further for
    Parameter Efficient Fine-tuning", Eq. 39.
    """

    name: ClassVar[str] = "svdiff"
    family: ClassVar[str] = "combination"
    paper: ClassVar[str] = "arXiv 2303.11305"

    s: float = Field(1.0, description="scale of the update")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        k = min(site.out_features, site.in_features)
        return {
            "delta": trainable(k, init=zeros),
            "U": frozen(site.out_features, k),
            "sigma": frozen(k),
            "Vh": frozen(k, site.in_features),
        }

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        U, sigma, Vh = svd(W)
        return {"U": U, "sigma": sigma, "Vh": Vh}

    def weight(
        self, W: torch.Tensor, delta: torch.Tensor, U: torch.Tensor, sigma: torch.Tensor, Vh: torch.Tensor
    ) -> torch.Tensor:
        return (U * torch.relu(sigma + self.s * delta)) @ Vh
