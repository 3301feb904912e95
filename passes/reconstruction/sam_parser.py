from typing import ClassVar

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.svd import svd
from subgraph_peft.method.tensors import Tensor, frozen, trainable


class SAMParser(Method):
    """φ(W) = U diag(s) Vh

    U [out, k] and Vh [k, in], k = min(in, out), are the singular vectors of W, kept and frozen; s [k] starts at its
    singular values and may take any sign. Source: Peng et al. 2023, "SAM-PARSER".
    """

    name: ClassVar[str] = "sam_parser"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2308.14604"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        k = min(site.out_features, site.in_features)
        return {
            "s": trainable(k, decay=False),
            "U": frozen(site.out_features, k),
            "Vh": frozen(k, site.in_features),
        }

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        U, sigma, Vh = svd(W)
        return {"s": sigma, "U": U, "Vh": Vh}

    def weight(self, W: torch.Tensor, s: torch.Tensor, U: torch.Tensor, Vh: torch.Tensor) -> torch.Tensor:
        return (U * s) @ Vh
