from typing import ClassVar

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, trainable, zeros


class BitFit(Method):
    """φ(b) = b + δ

    δ [out] = 0, at every bias that the selector names: of linear layers, convolutions and layer norms alike.
    Source: Ben Zaken et al. 2021, "BitFit".
    """

    name: ClassVar[str] = "bitfit"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2106.10199"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {"delta": trainable(*site.shape, init=zeros)}

    def bias(self, b: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
        return b + delta
