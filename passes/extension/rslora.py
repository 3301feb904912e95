from typing import ClassVar

import torch

from .lora import LoRA


class RsLoRA(LoRA):
    """φ(W) = W + (α/√r) B A

    LoRA with a scale that keeps the update's size as r grows. Source: Kalajdzievski 2023, "rsLoRA".
    """

    name: ClassVar[str] = "rslora"
    paper: ClassVar[str] = "arXiv 2312.03732"

    def weight(self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        return W + (self.alpha / self.r**0.5) * (B @ A)
