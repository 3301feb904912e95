from typing import ClassVar

import torch

from .bottleneck import Bottleneck


class Houlsby(Bottleneck):
    """y ← y + U h(D y + b_d) + b_u

    The serial adapter, after the op or module that the selector names; published after the output projection (and its
    dropout) of both the attention and the feed-forward block, before the residual sum. U starts at zero here: the
    published N(0, 10⁻⁴) is close to, and not, the identity.
    Source: Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", Sec. 2.1.
    """

    name: ClassVar[str] = "houlsby"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 1902.00751"

    def output(self, x: torch.Tensor, y: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        return y + self.through(y, **tensors)
