from typing import ClassVar

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, ones, trainable


class SSB(Method):
    """φ(W) = diag(ρ) W diag(c)

    ρ [out] = 1 scales the output features, c [in] = 1 the input features; the bias stays as it is.
    Source: Si et al. 2024, "See Further for Parameter Efficient Fine-tuning", Eq. 10.
    """

    name: ClassVar[str] = "ssb"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2407.05417"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            "rho": trainable(site.out_features, init=ones, decay=False),
            "c": trainable(site.in_features, init=ones, decay=False),
        }

    def weight(self, W: torch.Tensor, rho: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return rho[:, None] * W * c
