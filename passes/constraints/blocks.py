from typing import ClassVar

from subgraph_peft.method.method import Method
from subgraph_peft.method.row_block_method import RowBlocks

from ..extension.lora import LoRA


class Blocks(RowBlocks):
    """φ(W) = [φ_of(W_q); W_k; φ_of(W_v)] for a packed W = [W_q; W_k; W_v]

    Any weight method at chosen row blocks of a packed weight, each with tensors of its own. `names` are the blocks in
    order, `sizes` their rows (default: all equal), `only` those to rewrite. Where the graph itself takes the result
    apart, a selector does the same: `where="*.qkv[q,v]"`. Fused projections that interleave heads are not row blocks.
    Source: Hu et al. 2021, "LoRA", MergedLinear of its code; here for any method.
    """

    paper: ClassVar[str] = "arXiv 2106.09685"

    of: Method = LoRA()
