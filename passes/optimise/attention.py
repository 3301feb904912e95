from typing import ClassVar

from subgraph_peft.graph.passes import ProgramOwner, ProgramPass
from subgraph_peft.graph.rewriter import Rewriter
from subgraph_peft.program.kernels import accelerate


class Attention(ProgramPass):
    """attention(q, repeat(k), repeat(v), mask) = attention(q, k, v, is_causal), or without a mask

    where the mask is proven to be the causal one or to show every key, or where right padding is promised and checked.
    """

    name: ClassVar[str] = "attention"

    def apply(self, rewrite: Rewriter, owner: ProgramOwner) -> None:
        rewrite.changes += accelerate(rewrite.graph, owner.home, owner.padding)
