from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt

from subgraph_peft.method import Method, Tensor, kaiming_uniform, trainable, zeros
from subgraph_peft.sites import Site

NONLINEAR = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class ParallelAdapter(Method):
    """y ← y + s · B φ(A x)

    A [r, in] uniform in ±1/√in, B [out, r] zero, φ a nonlinearity, dropout after it. It does not fold: its nodes stay
    in the graph and in ONNX. Source: He et al. 2021, "Towards a Unified View of Parameter-Efficient Transfer
    Learning", Table 1; without biases, at single linear layers, as in the subspace-tuning code.
    """

    name: ClassVar[str] = "parallel_adapter"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 2110.04366"

    r: PositiveInt = 8
    scale: float = 1.0
    activation: Literal["relu", "gelu", "silu", "tanh"] = "relu"
    hidden_dropout: float = Field(0.0, ge=0, lt=1)

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            "A": trainable(self.r, site.in_features, init=kaiming_uniform),
            "B": trainable(site.out_features, self.r, init=zeros),
        }

    def output(self, x: torch.Tensor, y: torch.Tensor, A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
        hidden = NONLINEAR[self.activation](F.linear(x, A))
        if self.hidden_dropout:
            hidden = F.dropout(hidden, self.hidden_dropout, training=True)
        return y + self.scale * F.linear(hidden, B)
