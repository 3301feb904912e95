import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.method.tensors import Init, Tensor, normal, trainable

LAYERS = 2


def uniform(width: int, name: str = "in") -> Init:
    """U(±1/√width), where `name` is what the width is called"""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).uniform_(-1 / math.sqrt(width), 1 / math.sqrt(width), generator=generator)

    init.__doc__ = f"U(±1/√{name})"
    return init


def linear(name: str, out: int, width: int) -> dict[str, Tensor]:
    """W [out, in] and b [out] of a layer, started as torch does."""
    draw = uniform(width)
    return {f"W{name}": trainable(out, width, init=draw), f"b{name}": trainable(out, init=draw)}


class PTuning(Method):
    """X ← [g(P); X]

    P [n, d] ~ N(0, 1). g is W₃ ReLU(W₂ ReLU(W₁ P)) (encoder: mlp), or W₂ ReLU(W₁ LSTM(P)) with a bidirectional LSTM of
    two layers (encoder: lstm), with biases and `hidden` features, d by default; it starts as torch does. g(P) is
    evaluated once when the program is exported. Source: Liu et al. 2021, "GPT Understands, Too", Sec. 3; layers as in
    huggingface/peft.
    """

    name: ClassVar[str] = "p_tuning"
    family: ClassVar[str] = "reconstruction"
    paper: ClassVar[str] = "arXiv 2103.10385"

    n: PositiveInt = Field(30, description="virtual tokens")
    encoder: Literal["mlp", "lstm"] = Field("mlp", description="g: layers over P, with an LSTM below them or not")
    hidden: PositiveInt | None = Field(None, description="features of the encoder; those of the model by default")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        d = site.out_features
        h = self.hidden or d
        P = {"P": trainable(self.n, d, init=normal(1.0))}
        if self.encoder == "mlp":
            return {**P, **linear("1", h, d), **linear("2", h, h), **linear("3", d, h)}
        return {**P, **self.lstm(d, h), **linear("1", 2 * h, 2 * h), **linear("2", d, 2 * h)}

    def lstm(self, d: int, h: int) -> dict[str, Tensor]:
        """Weights of the LSTM in torch's order, gates stacked as [4·hidden, in]."""
        shapes = {"weight_ih": (4 * h, d), "weight_hh": (4 * h, h), "bias_ih": (4 * h,), "bias_hh": (4 * h,)}
        found = {}
        for layer in range(LAYERS):
            for side in ("", "_reverse"):
                for name, shape in shapes.items():
                    shape = (4 * h, 2 * h) if name == "weight_ih" and layer else shape
                    found[f"{name}_l{layer}{side}"] = trainable(*shape, init=uniform(h, "hidden"))
        return found

    def embeddings(self, P: torch.Tensor, **layers: torch.Tensor) -> torch.Tensor:
        x = P
        if self.encoder == "lstm":
            weights = [layers.pop(name) for name in list(layers) if name.startswith(("weight", "bias"))]
            state = P.new_zeros(2 * LAYERS, 1, weights[1].shape[1])
            x = torch.lstm(P[None], (state, state), weights, True, LAYERS, 0.0, False, True, True)[0][0]
        last = len(layers) // 2
        for i in range(1, last + 1):
            x = F.linear(x, layers[f"W{i}"], layers[f"b{i}"])
            x = F.relu(x) if i < last else x
        return x
