from typing import ClassVar, Literal

import torch
from pydantic import Field

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, ones, trainable


class IA3(Method):
    """φ(W) = diag(l) W, φ(b) = l ⊙ b;  or W diag(l);  or diag(l) W alone

    Three things carry this name, chosen by `scale`, with l = 1:
    "output"  the result with its bias is scaled (the authors' t-few; peft away from feed-forward modules)
    "input"   the input is scaled, l [in] (peft's feed-forward modules)
    "weight"  the rows of W are scaled, the bias is not (the subspace-tuning code)
    Source: Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning", Sec. 3.3.
    """

    name: ClassVar[str] = "ia3"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2205.05638"

    scale: Literal["output", "input", "weight"] = Field(
        "output", description="what l scales: the result with its bias, the input, or the rows of W"
    )

    def tensors(self, site: Site) -> dict[str, Tensor]:
        size = site.in_features if self.scale == "input" else site.out_features
        return {"l": trainable(size, init=ones, decay=False)}

    def weight(self, W: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
        return W * l if self.scale == "input" else l[:, None] * W

    def bias(self, b: torch.Tensor, l: torch.Tensor) -> torch.Tensor:  # noqa: E741
        return l * b if self.scale == "output" else b
