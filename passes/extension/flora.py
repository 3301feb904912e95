import math
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.tensors import Tensor, kaiming_uniform, trainable, zeros

from .lora import LoRA


class FLoRA(LoRA):
    """φ(W) = W + (α/r) B G A;  of a kernel K[o,i,k,l] + (α/r) Σ B[o,b] G[b,a,c,d] A[a,i] C[c,k] D[d,l]

    A [r, in] and B [out, r] random, the core G [r, r] zero: only G moves at first. At a convolution the core and the
    factors go on over the kernel's dimensions, C [p, kh], D [p, kw]: p = `kernel_r`, or min(r, size of the kernel).
    Source: Si et al. 2024, "FLoRA".
    """

    name: ClassVar[str] = "flora"
    paper: ClassVar[str] = "arXiv 2405.14739"

    kernel_r: PositiveInt | None = Field(
        None, description="rank along a kernel's sides; min(r, size of the kernel) by default"
    )

    def tensors(self, site: Site) -> dict[str, Tensor]:
        kernel = site.kernel
        inputs = site.in_features // math.prod(kernel)
        ranks = [self.kernel_r or min(self.r, size) for size in kernel]
        return {
            "A": trainable(self.r, inputs, init=kaiming_uniform),
            "B": trainable(site.out_features, self.r, init=kaiming_uniform),
            "G": trainable(self.r, self.r, *ranks, init=zeros),
            **{n: trainable(p, size, init=kaiming_uniform) for n, p, size in zip("CDE", ranks, kernel, strict=False)},
        }

    def weight(
        self, W: torch.Tensor, A: torch.Tensor, B: torch.Tensor, G: torch.Tensor, **kernel: torch.Tensor
    ) -> torch.Tensor:
        inner = contracted(G, A, *(kernel[name] for name in sorted(kernel))) if kernel else G @ A
        return W + (self.alpha / self.r) * (B @ inner)


def contracted(core: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
    """Σ G[b,a,c,…] A[a,i] C[c,k] … as a matrix [b, i·k·…]."""
    for factor in factors:
        core = torch.tensordot(core, factor, dims=([1], [0]))
    return core.reshape(len(core), -1)
