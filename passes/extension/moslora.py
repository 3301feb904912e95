from typing import ClassVar

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.tensors import Tensor, kaiming_uniform, trainable

from .lora import LoRA


class MoSLoRA(LoRA):
    """φ(W) = W + (α/r) B M A

    LoRA with a trained mixer M [r, r] of its subspaces, random as A is; B zero. A' = M A makes it a plain LoRA.
    Source: Wu et al. 2024, "Mixture-of-Subspaces in Low-Rank Adaptation".
    """

    name: ClassVar[str] = "moslora"
    paper: ClassVar[str] = "arXiv 2406.11909"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {**super().tensors(site), "M": trainable(self.r, self.r, init=kaiming_uniform)}

    def weight(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
        return W + (self.alpha / self.r) * (B @ M @ A)
