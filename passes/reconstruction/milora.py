from typing import ClassVar

import torch
from subgraph_peft.passes.reconstruction.pissa import PiSSA

from subgraph_peft.linalg import svd


class MiLoRA(PiSSA):
    """φ(W) = (W − s B₀A₀) + s B A,  s = α/r

    PiSSA on the r smallest singular triplets: the residual keeps the principal part. The decomposition is exact.
    Source: Wang et al. 2024, "MiLoRA", Eq. 4.
    """

    name: ClassVar[str] = "milora"
    paper: ClassVar[str] = "arXiv 2406.09044"

    niter: None = None

    def triplets(self, W: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        U, sigma, Vh = svd(W)
        return U[:, -self.r :], sigma[-self.r :], Vh[-self.r :]
