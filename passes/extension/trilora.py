from typing import ClassVar

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.tensors import Tensor, kaiming_uniform, trainable, zeros

from .lora import LoRA


class TriLoRA(LoRA):
    """φ(W) = W + (α/r) B diag(e) A

    A [r, in] and B [out, r] random, e [r] zero: only e moves at first. AdaLoRA without its budget.
    Source: Feng et al. 2024, "TriLoRA", as in Si et al. 2024, "See Further for Parameter Efficient Fine-tuning".
    """

    name: ClassVar[str] = "trilora"
    paper: ClassVar[str] = "arXiv 2405.11236"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            "A": trainable(self.r, site.in_features, init=kaiming_uniform),
            "B": trainable(site.out_features, self.r, init=kaiming_uniform),
            "e": trainable(self.r, init=zeros),
        }

    def weight(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
        return W + (self.alpha / self.r) * ((B * e) @ A)
