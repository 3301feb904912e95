from typing import ClassVar, Literal

import torch
from pydantic import Field

from subgraph_peft.graph.site import Site
from subgraph_peft.method.tensors import Tensor, kaiming_uniform, trainable

from .bottleneck import Bottleneck


class ParallelAdapter(Bottleneck):
    """y ← y + s U h(D x + b_d) + s b_u

    Beside the op or module that the selector names, with its input x: a whole feed-forward block as published (s = 4),
    or single linear layers without biases as in the subspace-tuning code, where it is MPC_n over LoRA. D [r, in]
    uniform in ±1/√in, U [out, r] zero. Source: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer
    Learning", Table 1 and Sec. 4.6.
    """

    name: ClassVar[str] = "parallel_adapter"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 2110.04366"

    scale: float = Field(4.0, description="s: factor of the adapter's result")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("relu", description="h between the two projections")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        declared = self.factors(site.in_features, site.out_features)
        return {**declared, "D": trainable(self.r, site.in_features, init=kaiming_uniform)}

    def output(self, x: torch.Tensor, y: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        return y + self.scale * self.through(x, **tensors)
