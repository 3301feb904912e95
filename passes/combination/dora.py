from typing import ClassVar

import torch
from pydantic import Field

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method, Wrapper
from subgraph_peft.method.tensors import Tensor, trainable

from ..extension.lora import LoRA


class DoRA(Wrapper):
    """φ(W) = diag(m / ‖V‖) V,  V = φ_of(W)

    m [out] starts as the row norms of W; the norm is detached unless `norm_gradient`. A zero row stays zero.
    Wraps any weight method: DoRA(of=LoRA(r=8)) is the published one. Source: Liu et al. 2024, "DoRA", Eq. 5 and 11.
    """

    name: ClassVar[str] = "dora"
    family: ClassVar[str] = "combination"
    paper: ClassVar[str] = "arXiv 2402.09353"

    of: Method = LoRA()
    norm_gradient: bool = Field(False, description="gradients also flow through the norm ‖V‖")

    def added(self, site: Site) -> dict[str, Tensor]:
        return {"m": trainable(site.out_features, decay=False)}

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**self.of.prepare(site, W), "m": torch.linalg.vector_norm(W, dim=1)}

    def weight(self, W: torch.Tensor, m: torch.Tensor, **inner: torch.Tensor) -> torch.Tensor:
        V = self.of.evaluate("weight", W, tensors=inner)
        norm = torch.linalg.vector_norm(V, dim=1).clamp_min(1e-12)
        norm = norm if self.norm_gradient else norm.detach()
        return (m / norm)[:, None] * V
