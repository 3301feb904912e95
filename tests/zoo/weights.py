"""Zoo models whose weights are written by hand: functional calls, einsum, slices, weights that are computed first."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from tests.zoo.layers import BATCH, CLASSES, LENGTH, ids, images, labels, plain


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape) / shape[-1] ** 0.5)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.shift = weight(6, 3, 3, 3), weight(6)
        self.w, self.b = weight(CLASSES, 6), weight(CLASSES)

    def forward(self, x: torch.Tensor):
        pooled = F.conv2d(x, self.kernel, self.shift, padding=1).relu().mean((2, 3))
        return F.linear(F.dropout(pooled, 0.2, self.training), self.w, self.b)


class EinsumAttention(nn.Module):
    """Projections to heads and back by einsum, and a feed-forward layer by einsum."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = weight(10, 2, 4), weight(10, 2, 4), weight(10, 2, 6)
        self.o, self.up, self.down = weight(2, 6, 10), weight(10, 14), weight(14, 10)

    def forward(self, x: torch.Tensor):
        q, k = torch.einsum("bsd,dnh->bsnh", x, self.q), torch.einsum("bsd,dnh->bsnh", x, self.k)
        scores = torch.einsum("bqnh,bknh->bnqk", q, k).softmax(-1)
        mixed = torch.einsum("bnqk,bknh->bqnh", scores, torch.einsum("bsd,dnh->bsnh", x, self.v))
        x = x + torch.einsum("bsnh,nhd->bsd", mixed, self.o)
        hidden = torch.einsum("bsd,df->bsf", x, self.up).relu()
        return x + torch.einsum("bsf,fd->bsd", hidden, self.down)


class Slices(nn.Module):
    """Layers that are rows and columns of one weight."""

    def __init__(self):
        super().__init__()
        self.w, self.b = weight(14, 10), weight(14)
        self.table = weight(10, 6)

    def forward(self, x: torch.Tensor):
        first = F.linear(x, self.w[:8], self.b[:8])
        rest = F.linear(x, self.w[8:], self.b[8:])
        narrow = F.linear(x[..., :6], self.table[:4]) + x[..., 6:] @ self.table[4:8, :4]
        return first.relu(), rest.sigmoid(), narrow


class Matmuls(nn.Module):
    """One product in each way there is to write it."""

    def __init__(self):
        super().__init__()
        self.right, self.transposed, self.left = weight(10, 8), weight(6, 8), weight(5, LENGTH)
        self.swapped, self.expanded, self.out = weight(4, 6), weight(4, 7), weight(3, 7)

    def forward(self, x: torch.Tensor):
        x = torch.tanh(x @ self.right)
        x = torch.tanh(x @ self.transposed.T)
        mixed = torch.matmul(self.left, x)
        x = torch.tanh(mixed @ self.swapped.mT)
        x = torch.bmm(x, self.expanded.expand(x.shape[0], -1, -1))
        return (self.out @ x.transpose(1, 2)).transpose(1, 2)


class Products(nn.Module):
    """A weight that is the product of two, and a low-rank update beside a frozen layer."""

    def __init__(self):
        super().__init__()
        self.u, self.v = weight(10, 3), weight(3, 8)
        self.base = nn.Linear(8, 6)
        self.down, self.up, self.drop = weight(2, 8), weight(6, 2), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor):
        x = torch.tanh(x @ (self.u @ self.v))
        return self.base(x) + 2.0 * F.linear(F.linear(self.drop(x), self.down), self.up)


class Standardised(nn.Conv2d):
    """A convolution whose kernel has zero mean and unit variance."""

    def forward(self, x: torch.Tensor):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Standardisation(nn.Module):
    """Standardised kernels and a classifier by cosine."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = Standardised(3, 8, 3, padding=1), nn.GroupNorm(2, 8)
        self.prototypes, self.scale = weight(CLASSES, 8), nn.Parameter(torch.tensor(4.0))

    def forward(self, x: torch.Tensor, labels: torch.Tensor):
        x = self.norm(self.conv(x)).relu().mean((2, 3))
        logits = self.scale * F.linear(F.normalize(x), F.normalize(self.prototypes))
        return F.cross_entropy(logits, labels), logits


class Lower(nn.Module):
    def forward(self, w: torch.Tensor):
        return w.tril()


def normed() -> nn.Module:
    body, head = (parametrizations.weight_norm(layer) for layer in (nn.Conv1d(3, 8, 3, padding=1), nn.Linear(8, 5)))
    return nn.Sequential(body, nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), head)


def spectral() -> nn.Module:
    """Power iteration updates buffers in training."""
    critic = nn.Sequential(nn.Linear(6, 10), nn.LeakyReLU(0.2), nn.Linear(10, 4))
    for layer in (critic[0], critic[2]):
        parametrizations.spectral_norm(layer)
    return critic


def triangular() -> nn.Module:
    layer = nn.Linear(8, 6)
    parametrize.register_parametrization(layer, "weight", Lower())
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), layer)


class Masked(nn.Module):
    """An autoregressive density network: each weight times its mask."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(5, 8), nn.Linear(8, 10)
        degree = torch.arange(8) % 4
        self.register_buffer("enter", (degree[:, None] >= torch.arange(5)).float())
        self.register_buffer("leave", (torch.arange(10)[:, None] % 5 > degree).float())

    def forward(self, x: torch.Tensor):
        hidden = F.linear(x, self.inner.weight * self.enter, self.inner.bias).relu()
        mean, scale = F.linear(hidden, self.outer.weight * self.leave, self.outer.bias).chunk(2, -1)
        return (0.5 * ((x - mean) * torch.exp(-scale)).square() + scale).sum(-1).mean(), mean, scale


class Mixture(nn.Module):
    """Experts stacked in one tensor, mixed softly."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4)
        self.up, self.shift, self.down = weight(4, 6, 10), weight(4, 1, 10), weight(4, 10, 5)

    def forward(self, x: torch.Tensor):
        each = x.flatten(0, 1).expand(4, -1, -1)
        hidden = F.gelu(torch.bmm(each, self.up) + self.shift)
        results = torch.bmm(hidden, self.down)
        gates = self.gate(x).flatten(0, 1).softmax(-1)
        return torch.einsum("te,eto->to", gates, results).unflatten(0, x.shape[:2])


class TiedAutoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.w, self.into, self.out = weight(4, 9), weight(4), weight(9)

    def forward(self, x: torch.Tensor):
        code = torch.sigmoid(F.linear(x, self.w, self.into))
        return code, F.linear(code, self.w.t(), self.out)


class TiedHead(nn.Module):
    """The table of embeddings is the output layer too: once by its name, once through a transpose."""

    def __init__(self):
        super().__init__()
        self.tokens, self.body = nn.Embedding(31, 8), nn.GRU(8, 8, batch_first=True)
        self.head = nn.Linear(8, 31)
        self.head.weight = self.tokens.weight

    def forward(self, ids: torch.Tensor):
        hidden, _ = self.body(self.tokens(ids))
        return self.head(hidden), hidden @ self.tokens.weight.T


class Gated(nn.Module):
    """Gates from one fused weight, from two, and by F.glu."""

    def __init__(self):
        super().__init__()
        self.fused, self.down = nn.Linear(8, 24, bias=False), nn.Linear(12, 10)
        self.gate, self.up, self.glu = nn.Linear(10, 6), nn.Linear(10, 6), nn.Linear(6, 8)

    def forward(self, x: torch.Tensor):
        gate, up = self.fused(x).chunk(2, dim=-1)
        x = self.down(F.silu(gate) * up)
        return F.glu(self.glu(F.gelu(self.gate(x)) * self.up(x)))


class Hyper(nn.Module):
    """The weights of a small network are the results of another: every row has its own."""

    def __init__(self):
        super().__init__()
        self.hyper, self.out = nn.Linear(4, 6 * 5), nn.Linear(6, CLASSES)

    def forward(self, x: torch.Tensor, task: torch.Tensor):
        w = self.hyper(task).unflatten(-1, (6, 5))
        return self.out(torch.tanh(torch.bmm(w, x.unsqueeze(-1)).squeeze(-1)))


class Listed(nn.Module):
    """Weights in a ParameterList and a ParameterDict, used in a loop."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ParameterList([weight(10, 6), weight(8, 10), weight(4, 8)])
        self.heads = nn.ParameterDict({"mean": weight(4, 3), "scale": weight(4, 2)})

    def forward(self, x: torch.Tensor):
        for w in self.layers:
            x = F.selu(F.linear(x, w))
        return {name: x @ w for name, w in self.heads.items()}


class Conditioned(nn.Module):
    """A kernel for every row of the batch, chosen among four: one grouped convolution."""

    def __init__(self):
        super().__init__()
        self.kernels, self.router = weight(4, 6, 3, 3, 3), nn.Linear(3, 4)

    def forward(self, x: torch.Tensor):
        routes = self.router(x.mean((2, 3))).softmax(-1)
        kernels = torch.einsum("bk,koihw->boihw", routes, self.kernels)
        out = F.conv2d(x.flatten(0, 1)[None], kernels.flatten(0, 1), padding=1, groups=x.shape[0])
        return out.squeeze(0).unflatten(0, (x.shape[0], 6))


def sequence(width: int = 10) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, width)}


ENTRIES = [
    plain("functional weights", Functional, lambda: {"x": images()}),
    plain("einsum attention", EinsumAttention, sequence, fast=True),
    plain("slices of weights", Slices, sequence, fast=True),
    plain("matmul, in every way", Matmuls, sequence, fast=True, capture={"dynamic": {"x": [0]}}),
    plain("products of weights", Products, sequence),
    plain("standardised weights", Standardisation, lambda: {"x": images(), "labels": labels()}),
    plain("weight_norm", normed, lambda: {"input": torch.randn(BATCH, 3, 12)}, capture={
        "dynamic": {"input": [0, 2]},
    }),
    plain("spectral_norm", spectral, lambda: {"input": torch.randn(BATCH, 6)}),
    plain("parametrize", triangular, lambda: {"input": torch.randn(BATCH, 5)}),
    plain("masked weights", Masked, lambda: {"x": torch.randn(BATCH, 5)}),
    plain("stacked experts", Mixture, lambda: sequence(6), fast=True),
    plain("tied autoencoder", TiedAutoencoder, lambda: {"x": torch.randn(BATCH, 9)}),
    plain("tied head", TiedHead, lambda: {"ids": ids()}),
    plain("gated linear units", Gated, lambda: sequence(8)),
    plain("hypernetwork", Hyper, lambda: {"x": torch.randn(BATCH, 5), "task": torch.randn(BATCH, 4)}),
    plain("lists of parameters", Listed, lambda: {"x": torch.randn(BATCH, 6)}),
    plain("conditional convolution", Conditioned, lambda: {"x": images()}, limits={
        "onnx": "ONNX: the number of groups of a Conv is an attribute, here it is the batch",
    }),
]  # fmt: skip
