import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, frozen, trainable, zeros


class VeRA(Method):
    """φ(W) = W + diag(b) B diag(d) A

    A [r, max in] and B [max out, r] are frozen, random and shared by all sites, which read A[:, :in] and B[:out]; only
    b [out] = 0 and d [r] = `d_initial` train. The projections come from `projection_seed` (Kaiming-uniform, drawn on
    the CPU); checkpoints hold them unless `save_projections` is off. Source: Kopiczko et al. 2023, "VeRA", Eq. 2; drawn
    as in huggingface/peft.
    """

    name: ClassVar[str] = "vera"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 2310.11454"

    r: PositiveInt = Field(256, description="rank of the frozen, shared projections")
    d_initial: float = Field(0.1, description="value that d starts at")
    projection_seed: int = Field(0, description="of the projections")
    save_projections: bool = Field(True, description="keep the projections in checkpoints; else they are drawn again")
    dropout: float = Field(0.0, ge=0, lt=1, description="on the input of A, in training")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        def started(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            """d_initial"""
            return torch.full(shape, self.d_initial)

        return {
            "b": trainable(site.out_features, init=zeros, decay=False),
            "d": trainable(self.r, init=started, decay=False),
        }

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        A = (self.r, max(site.in_features for site in sites))
        B = (max(site.out_features for site in sites), self.r)
        return {
            "A": frozen(*A, init=Projection(self.projection_seed), saved=self.save_projections),
            "B": frozen(*B, init=Projection(self.projection_seed, after=A), saved=self.save_projections),
        }

    def weight(
        self, W: torch.Tensor, b: torch.Tensor, d: torch.Tensor, A: torch.Tensor, B: torch.Tensor
    ) -> torch.Tensor:
        return W + b[:, None] * (B[: W.shape[0]] @ (d[:, None] * A[:, : W.shape[1]]))


@dataclass(frozen=True)
class Projection:
    """U(±√(6/fan in)), from the projection seed

    after: the shape that is drawn before this one
    """

    seed: int
    after: tuple[int, ...] | None = None

    def __call__(self, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        own = torch.Generator().manual_seed(self.seed)
        for size in (self.after, shape) if self.after else (shape,):
            bound = math.sqrt(2.0) * math.sqrt(3.0) / math.sqrt(size[1])
            drawn = torch.empty(size).uniform_(-bound, bound, generator=own)
        return drawn
