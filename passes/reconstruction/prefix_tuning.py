import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, normal, trainable, zeros

from .p_tuning import linear, uniform


class PrefixTuning(Method):
    """K ← [P_k; K],  V ← [P_v; V]

    P_k, P_v [n, heads, width] at every attention, seen by every query; they start at N(0, 1), or at 0, which is no
    identity: the softmax spreads over n more keys. With `projection` they are W_k tanh(W P) and W_v tanh(W P), where P
    [n, d] and W [hidden, d] are shared by all attentions. Positions of the tokens start at n, as behind a cache
    (positions: shifted), or stay (kept). Source: Li and Liang 2021, "Prefix-Tuning", Eq. 3; projection and starting
    values as in huggingface/peft.
    """

    name: ClassVar[str] = "prefix_tuning"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2101.00190"

    n: PositiveInt = Field(30, description="virtual tokens")
    init: Literal["normal", "zeros"] = Field("normal", description="what the keys and values start at")
    projection: bool = Field(False, description="compute them by a layer that all attentions share")
    hidden: PositiveInt = Field(512, description="features of that layer")
    positions: Literal["shifted", "kept"] = Field(
        "shifted", description="whether the tokens' positions start at n or stay"
    )

    @property
    def moves_positions(self) -> bool:
        return self.positions == "shifted"

    def tensors(self, site: Site) -> dict[str, Tensor]:
        if not self.projection:
            draw = zeros if self.init == "zeros" else normal(1.0)
            return {name: trainable(self.n, *site.shape, init=draw) for name in ("keys", "values")}
        draw = zeros if self.init == "zeros" else uniform(self.hidden, "hidden")
        shapes = {"W_k": (*site.shape, self.hidden), "b_k": site.shape}
        shapes |= {"W_v": shapes["W_k"], "b_v": site.shape}
        return {name: trainable(*shape, init=draw) for name, shape in shapes.items()}

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        if not self.projection:
            return {}
        d = math.prod(sites[0].shape)
        return {"P": trainable(self.n, d, init=normal(1.0)), **linear("", self.hidden, d)}

    def keys_values(self, **tensors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.projection:
            return tensors["keys"], tensors["values"]
        hidden = torch.tanh(F.linear(tensors["P"], tensors["W"], tensors["b"]))
        return self.layer(hidden, tensors["W_k"], tensors["b_k"]), self.layer(hidden, tensors["W_v"], tensors["b_v"])

    def layer(self, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """x [n, hidden] under W [heads, width, hidden], b [heads, width]: [n, heads, width]."""
        return F.linear(x, W.flatten(0, 1), b.flatten()).unflatten(1, b.shape)
