from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, kaiming_uniform, trainable, zeros


class LoRA(Method):
    """φ(W) = W + (α/r) B A

    A [r, in] uniform in ±1/√in, B [out, r] zero; dropout on the input of A. Source: Hu et al. 2021, "LoRA", Eq. 3.
    """

    name: ClassVar[str] = "lora"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 2106.09685"

    r: PositiveInt = Field(8, description="rank of the update")
    alpha: float = Field(16.0, description="the update is scaled by α/r")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of A, in training")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            "A": trainable(self.r, site.in_features, init=kaiming_uniform),
            "B": trainable(site.out_features, self.r, init=zeros),
        }

    def weight(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return W + (self.alpha / self.r) * (B @ A)
