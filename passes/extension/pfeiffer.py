from typing import ClassVar

import torch

from .bottleneck import Bottleneck


class Pfeiffer(Bottleneck):
    """y ← f(x + U h(D y + b_d) + b_u),  y = f(x)

    One serial adapter a layer, around the layer norm f that closes the feed-forward block: it reads the normed sum, and
    its result joins the sum, which is normed again by the same f. The selector names that norm, in BERT
    "*.layer.*.output.LayerNorm" without the attention's. Source: Pfeiffer et al. 2020, "AdapterFusion", Sec. 3.2.
    """

    name: ClassVar[str] = "pfeiffer"
    family: ClassVar[str] = "extension"
    paper: ClassVar[str] = "arXiv 2005.00247"

    def output(
        self, x: torch.Tensor, y: torch.Tensor, D: torch.Tensor, U: torch.Tensor, f, bd: torch.Tensor = None,
        bu: torch.Tensor = None,
    ) -> torch.Tensor:  # fmt: skip
        return f(x + self.through(y, D, U, bd, bu))
