from typing import ClassVar, Literal

import torch
from pydantic import Field

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method

from ..extension.lora import LoRA
from .factors import FactorWrapper


class MPCn(FactorWrapper):
    """x φ(W)ᵀ = x φ_of(W)ᵀ with h(x Aᵀ) in place of x Aᵀ

    Matrix Pattern Constraint "nonlinear": a nonlinearity between the factors of any method that starts from A and B of
    its own (over LoRA it is the parallel adapter at single layers). It does not fold.
    Source: Si et al. 2024, "See Further for Parameter Efficient Fine-tuning", Sec. IV-B.
    """

    name: ClassVar[str] = "mpc_n"
    family: ClassVar[str] = "framework"
    paper: ClassVar[str] = "arXiv 2407.05417"

    of: Method = LoRA()
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="h between the factors")

    @property
    def nonlinear(self) -> dict[str, str]:
        return {"A": self.activation}

    @classmethod
    def foldable(cls) -> bool:
        return False

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        values = self.of.prepare(site, W)
        if {"A", "B"} & set(values):
            raise MethodError(
                f"mpc_n over {self.of.name}: its factors start from W, so that a nonlinearity between them would "
                "change the model before any training. Take a method whose B starts at zero."
            )
        return values
