from typing import ClassVar

from torch import fx

from subgraph_peft.kernels import accelerate
from subgraph_peft.module import GraphModel
from subgraph_peft.optimise import Optimisation


class Attention(Optimisation):
    """attention(q, repeat(k), repeat(v), mask) = attention(q, k, v, is_causal), or without a mask

    where the mask is proven to be the causal one or to show every key, or where right padding is promised and checked.
    """

    name: ClassVar[str] = "attention"

    def apply(self, graph: fx.Graph, owner: GraphModel) -> int:
        return accelerate(graph, owner.home, owner.padding)
