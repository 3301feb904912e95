from typing import ClassVar, Literal

import torch
from pydantic import Field, PositiveInt

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Tensor, normal, trainable


class PromptTuning(Method):
    """X ← [P; X]

    P [n, d] stands before the embedded sequence. It starts at N(0, 1), or at rows of the embedding: n different ones
    drawn by `seed` (init: vocabulary), or those of the token ids `tokens`, repeated or cut to n. Source: Lester et al.
    2021, "The Power of Scale for Parameter-Efficient Prompt Tuning", Sec. 2.
    """

    name: ClassVar[str] = "prompt_tuning"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2104.08691"

    n: PositiveInt = Field(30, description="virtual tokens")
    init: Literal["normal", "vocabulary"] = Field("normal", description="normal values, or rows of the embedding")
    tokens: tuple[int, ...] = Field((), description="ids whose embeddings to start at, repeated or cut to n")
    seed: int = Field(0, description="of the rows that are drawn from the embedding")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {"P": trainable(self.n, site.out_features, init=normal(1.0))}

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        rows, vocabulary = W.T, site.in_features
        if self.tokens:
            if wrong := [token for token in self.tokens if not 0 <= token < vocabulary]:
                raise MethodError(f"{self.name}: token {wrong[0]} is none of the {vocabulary} of {site.name}.")
            return {"P": rows[[self.tokens[i % len(self.tokens)] for i in range(self.n)]]}
        if self.init == "vocabulary":
            drawn = torch.randint(vocabulary, (self.n,), generator=torch.Generator().manual_seed(self.seed))
            return {"P": rows[drawn.to(W.device)]}
        return {}

    def embeddings(self, P: torch.Tensor) -> torch.Tensor:
        return P
