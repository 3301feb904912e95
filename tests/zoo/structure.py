"""Zoo models of every way to call and to share: nested inputs, keyword-only ones, loops, buffers, branches."""

from collections import namedtuple
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.layers import BATCH, CLASSES, LENGTH, ids, images, labels, plain


class Twice(nn.Module):
    """A module called twice, and a siamese pair."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 6))

    def forward(self, left: torch.Tensor, right: torch.Tensor, same: torch.Tensor):
        left, right = self.tower(self.tower(left)), self.tower(right)
        return F.cosine_embedding_loss(left, right, same), left, right


class Shared(nn.Module):
    """One block, three times over."""

    def __init__(self):
        super().__init__()
        self.tokens, self.project = nn.Embedding(31, 6), nn.Linear(6, 10)
        self.block = nn.TransformerEncoderLayer(10, 2, 14, dropout=0.1, batch_first=True)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor):
        x = self.project(self.tokens(ids))
        for _ in range(3):
            x = self.block(x)
        logits = self.head(x[:, 0])
        return F.cross_entropy(logits, labels), logits


@dataclass
class Scores:
    loss: torch.Tensor
    views: dict[str, list[torch.Tensor]]


torch.export.register_dataclass(Scores)
Pair = namedtuple("Pair", ["mean", "spread"])


class Nested(nn.Module):
    """A dict of lists of tensors in, a dataclass out."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(6, 8), nn.Linear(4, 8)

    def forward(self, views: Mapping[str, list[torch.Tensor]], weights: tuple[torch.Tensor, torch.Tensor]):
        images = [torch.tanh(self.image(view)) * weights[0] for view in views["images"]]
        texts = [torch.tanh(self.text(view)) * weights[1] for view in views["texts"]]
        loss = sum(F.mse_loss(a, b) for a in images for b in texts)
        return Scores(loss, {"images": images, "texts": texts})


class KeywordOnly(nn.Module):
    """Keyword-only arguments, one of them a constant; a namedtuple out."""

    def __init__(self):
        super().__init__()
        self.mean, self.spread, self.context = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(3, 6)

    def forward(self, x: torch.Tensor, *, context: torch.Tensor, scale: float = 1.0, bias: torch.Tensor | None = None):
        x = torch.tanh(x + scale * self.context(context))
        return Pair(self.mean(x) if bias is None else self.mean(x) + bias, F.softplus(self.spread(x)))


class Variadic(nn.Module):
    """As many inputs as there are."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 8) for width in (4, 5, 6))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, *parts: torch.Tensor):
        return self.head(torch.relu(sum(layer(part) for layer, part in zip(self.layers, parts, strict=True))))


class Statistics(nn.Module):
    """A running mean and a counter of its own, written in training; batch norm beside them."""

    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, CLASSES)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x: torch.Tensor):
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
            self.calls += 1
        return self.head(self.norm(self.layer(x - self.mean)).relu())


class Branches(nn.Module):
    """Weights inside the branches of torch.cond, with dropout in one of them."""

    def __init__(self):
        super().__init__()
        self.narrow, self.wide, self.out = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.lift, self.drop = nn.Linear(8, 8), nn.Dropout(0.5)

    def forward(self, x: torch.Tensor):
        def loud(x: torch.Tensor):
            return self.drop(torch.relu(self.lift(self.wide(x))))

        def quiet(x: torch.Tensor):
            return torch.tanh(self.narrow(x))

        hidden = torch.cond(x.sum() > 0, loud, quiet, (x,))
        return self.out(torch.cond(hidden.mean() > 1, lambda h: h.clone(), lambda h: h.square(), (hidden,)))


class Checkpointed(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 12), nn.Dropout(0.2), nn.Linear(12, 8)) for _ in range(2)
        )
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor):
        for block in self.blocks:
            x = x + checkpoint(block, x, use_reentrant=False)
        return self.head(x)


class Windows(nn.Module):
    """Attention in windows of four by four with a table of relative positions, gathered by an index buffer."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 36), nn.Linear(12, 12)
        self.table = nn.Parameter(0.1 * torch.randn(49, 3))
        at = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
        offset = at[:, :, None] - at[:, None, :] + 3
        self.register_buffer("index", offset[0] * 7 + offset[1], persistent=False)

    def forward(self, x: torch.Tensor):
        batch, height, width, channels = x.shape
        windows = x.unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).transpose(2, 3).reshape(-1, 16, channels)
        q, k, v = self.qkv(windows).unflatten(-1, (3, 3, 4)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / 2 + self.table[self.index].permute(2, 0, 1)
        mixed = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        grid = mixed.reshape(batch, height // 4, width // 4, 4, 4, channels)
        return grid.transpose(2, 3).reshape(batch, height, width, channels)


class Mixer(nn.Module):
    """Linear layers over patches and over channels, in turn."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 10, 4, stride=4)
        self.tokens = nn.Sequential(nn.LayerNorm(10), nn.Linear(10, 14), nn.GELU(), nn.Linear(14, 10))
        self.across, self.norm = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 4)), nn.LayerNorm(10)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, image: torch.Tensor):
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = x + self.across(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.tokens(x)).mean(1))


class Graph(nn.Module):
    """Messages along edges, added up at their ends, then attention over edges by scatter."""

    def __init__(self):
        super().__init__()
        self.message, self.update = nn.Linear(5 + 5 + 2, 8), nn.Linear(5 + 8, 6)
        self.score, self.head = nn.Linear(12, 1), nn.Linear(6, CLASSES)

    def forward(self, nodes: torch.Tensor, edges: torch.Tensor, source: torch.Tensor, target: torch.Tensor):
        sent = torch.relu(self.message(torch.cat([nodes[source], nodes[target], edges], -1)))
        received = torch.zeros(nodes.shape[0], 8).index_add(0, target, sent)
        nodes = torch.relu(self.update(torch.cat([nodes, received], -1)))
        score = self.score(torch.cat([nodes[source], nodes[target]], -1)).exp()
        total = torch.zeros(nodes.shape[0], 1).scatter_add(0, target[:, None], score)
        pulled = torch.zeros_like(nodes).index_add(0, target, score * nodes[source])
        return self.head(nodes + pulled / (total + 1e-3))


class Recommender(nn.Module):
    """Factorisation of users and items beside a deep tower, with biases kept in tables."""

    def __init__(self):
        super().__init__()
        self.users, self.items, self.genres = nn.Embedding(23, 6), nn.Embedding(19, 6), nn.Embedding(7, 4)
        self.offsets = nn.Embedding(19, 1)
        self.tower = nn.Sequential(nn.Linear(16, 10), nn.ReLU(), nn.Dropout(0.2), nn.Linear(10, 1))

    def forward(self, user: torch.Tensor, item: torch.Tensor, genres: torch.Tensor, rating: torch.Tensor):
        u, i, g = self.users(user), self.items(item), self.genres(genres).mean(1)
        score = (u * i).sum(-1) + self.offsets(item).squeeze(-1) + self.tower(torch.cat([u, i, g], -1)).squeeze(-1)
        return F.mse_loss(score, rating), score


class Variational(nn.Module):
    """Draws its code in training, takes the mean in evaluation."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(10, 8), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor):
        mean, spread = self.encoder(x).chunk(2, -1)
        code = mean + torch.randn_like(mean) * (0.5 * spread).exp() if self.training else mean
        divergence = -0.5 * (1 + spread - mean.square() - spread.exp()).mean()
        restored = self.decoder(code)
        return F.mse_loss(restored, x) + 0.1 * divergence, restored


class StochasticDepth(nn.Module):
    """Whole rows skip a block in training, by a draw in Python."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: torch.Tensor):
        for block in self.blocks:
            y = torch.relu(block(x))
            x = x + (y * (torch.rand(x.shape[0], 1) < 0.8) / 0.8 if self.training else y)
        return self.head(x)


class Fourier(nn.Module):
    """Tokens mixed by a Fourier transform in place of attention."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(8, 12), nn.Linear(12, 8), nn.LayerNorm(8)

    def forward(self, x: torch.Tensor):
        x = self.norm(x + torch.fft.fft(torch.fft.fft(x, dim=-1), dim=-2).real)
        return x + self.down(F.gelu(self.up(x)))


class LinearAttention(nn.Module):
    """Causal attention as a running sum, and rotary positions."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10), nn.Linear(10, 8)

    def rotate(self, x: torch.Tensor):
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * torch.tensor([1.0, 0.1, 0.01])
        a, b = x.chunk(2, -1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)

    def forward(self, x: torch.Tensor):
        q, k, v = self.rotate(F.elu(self.q(x)) + 1), self.rotate(F.elu(self.k(x)) + 1), self.v(x)
        state = torch.einsum("bsk,bsv->bskv", k, v).cumsum(1)
        return self.out(torch.einsum("bsk,bskv->bsv", q, state))


class Ensemble(nn.Module):
    """Members that are rows of stacked weights, run by vmap."""

    def __init__(self):
        super().__init__()
        self.w1, self.b1 = nn.Parameter(torch.randn(4, 10, 6) / 3), nn.Parameter(torch.randn(4, 10) / 3)
        self.w2 = nn.Parameter(torch.randn(4, CLASSES, 10) / 3)

    def forward(self, x: torch.Tensor):
        def member(w1: torch.Tensor, b1: torch.Tensor, w2: torch.Tensor):
            return F.linear(torch.relu(F.linear(x, w1, b1)), w2)

        return torch.vmap(member)(self.w1, self.b1, self.w2).mean(0)


class Rounded(nn.Module):
    """Weights rounded to a grid, with a straight-through gradient."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 10), nn.Linear(10, CLASSES)

    @staticmethod
    def rounded(w: torch.Tensor):
        scale = w.detach().abs().amax(1, keepdim=True) / 7
        return w + ((w / scale).round() * scale - w).detach()

    def forward(self, x: torch.Tensor):
        x = torch.relu(F.linear(x, self.rounded(self.first.weight), self.first.bias))
        return F.linear(x, self.rounded(self.second.weight), self.second.bias)


class Experts(nn.Module):
    """The two best of four experts for every token, each expert in a module of its own, all of them computed."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(6, 4, bias=False)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(6, 9), nn.SiLU(), nn.Linear(9, 6)) for _ in range(4))

    def forward(self, x: torch.Tensor):
        best, chosen = self.gate(x).topk(2, dim=-1)
        gates = torch.zeros(*x.shape[:-1], 4).scatter(-1, chosen, best.softmax(-1))
        return sum(expert(x) * gates[..., i : i + 1] for i, expert in enumerate(self.experts))


def nested() -> dict:
    views = {"images": [torch.randn(BATCH, 6) for _ in range(2)], "texts": [torch.randn(BATCH, 4)]}
    return {"views": views, "weights": (torch.rand(BATCH, 1), torch.rand(BATCH, 1))}


def edges() -> dict[str, torch.Tensor]:
    nodes = {"nodes": torch.randn(6, 5), "edges": torch.randn(9, 2)}
    return nodes | {"source": torch.randint(0, 6, (9,)), "target": torch.randint(0, 6, (9,))}


def ratings() -> dict[str, torch.Tensor]:
    pairs = {"user": torch.randint(0, 23, (BATCH,)), "item": torch.randint(0, 19, (BATCH,))}
    return pairs | {"genres": torch.randint(0, 7, (BATCH, 2)), "rating": torch.randn(BATCH)}


def rows(width: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, width)}


def tokens(width: int) -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, width)}


ENTRIES = [
    plain("module called twice", Twice, lambda: {
        "left": torch.randn(BATCH, 6), "right": torch.randn(BATCH, 6), "same": torch.tensor([1.0, -1.0, 1.0]),
    }),
    plain("block shared in a loop", Shared, lambda: {"ids": ids(), "labels": labels()}),
    plain("nested inputs, dataclass", Nested, nested, fast=True),
    plain("keyword-only arguments", KeywordOnly, lambda: {
        "x": torch.randn(BATCH, 6), "context": torch.randn(BATCH, 3), "scale": 0.5,
    }),
    plain("*args", Variadic, lambda: {"parts": tuple(torch.randn(BATCH, width) for width in (4, 5, 6))}),
    plain("buffers written in forward", Statistics, lambda: rows(6), fast=True),
    plain("torch.cond", Branches, lambda: rows(6), fast=True),
    plain("checkpoint in forward", Checkpointed, lambda: tokens(8)),
    plain("window attention", Windows, lambda: {"x": torch.randn(BATCH, 8, 8, 12)}),
    plain("MLP-Mixer", Mixer, lambda: {"image": images()}),
    plain("graph network", Graph, edges),
    plain("recommender", Recommender, ratings),
    plain("variational autoencoder", Variational, lambda: rows(10)),
    plain("stochastic depth", StochasticDepth, lambda: rows(8)),
    plain("Fourier mixing", Fourier, lambda: tokens(8)),
    plain("linear attention", LinearAttention, lambda: tokens(8)),
    plain("vmapped ensemble", Ensemble, lambda: rows(6)),
    plain("straight-through rounding", Rounded, lambda: rows(6)),
    plain("top-k experts", Experts, lambda: tokens(6)),
]  # fmt: skip
