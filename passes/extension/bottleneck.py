"""What the adapters with a bottleneck share: W_u h(W_d x + b_d) + b_u."""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, normal, trainable, zeros

NONLINEAR = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Bottleneck(Method):
    """W_u h(W_d x + b_d) + b_u  with D = W_d [r, in], U = W_u [out, r]

    dropout after h; D normal with deviation `std`, U and the biases zero, so that it starts as nothing.
    """

    r: PositiveInt = Field(64, description="features of the bottleneck")
    activation: Literal["relu", "gelu", "silu", "tanh"] = Field("gelu", description="h between the two projections")
    std: float = Field(1e-2, gt=0, description="standard deviation of the normal values that D starts at")
    biases: bool = Field(True, description="whether both projections have a bias")
    hidden_dropout: float = Field(0.0, ge=0, lt=1, description="on the activations of the bottleneck, in training")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return self.factors(site.out_features, site.out_features)

    def factors(self, size_in: int, size_out: int) -> dict[str, Tensor]:
        matrices = {
            "D": trainable(self.r, size_in, init=normal(self.std)),
            "U": trainable(size_out, self.r, init=zeros),
        }
        vectors = {"bd": trainable(self.r), "bu": trainable(size_out)}
        return {**matrices, **(vectors if self.biases else {})}

    def through(
        self, x: torch.Tensor, D: torch.Tensor, U: torch.Tensor, bd: torch.Tensor | None = None,
        bu: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        hidden = NONLINEAR[self.activation](F.linear(x, D, bd))
        if self.hidden_dropout:
            hidden = F.dropout(hidden, self.hidden_dropout, training=True)
        return F.linear(hidden, U, bu)
