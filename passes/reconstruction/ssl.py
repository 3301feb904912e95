from typing import ClassVar

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, ones, trainable


class SSL(Method):
    """φ(W) = W diag(c)

    c [in] = 1 scales the input features: the "left singular vectors" of the paper, which writes y = xW.
    Source: Si et al. 2024, "See Further for Parameter Efficient Fine-tuning", Eq. 9.
    """

    name: ClassVar[str] = "ssl"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2407.05417"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {"c": trainable(site.in_features, init=ones, decay=False)}

    def weight(self, W: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        return W * c
