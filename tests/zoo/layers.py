"""Zoo models of torch's own layers: attention, recurrence, convolutions, norms, embeddings."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

from tests.models import made
from tests.zoo.entry import Entry

BATCH, LENGTH, CLASSES = 3, 7, 3


def to_one(outputs: Any) -> torch.Tensor:
    """A loss for outputs that have none: the mean squared distance of every floating-point one from 1."""
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    return sum((leaf - 1).square().mean() for leaf in leaves if leaf.is_floating_point())


def plain(name: str, model: Callable[[], nn.Module], inputs: Callable[[], dict[str, Any]], **options: Any) -> Entry:
    return Entry(name, "torch", lambda: made(model, inputs), **{"loss": to_one, **options})


class SelfAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(12)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor, padding: torch.Tensor, labels: torch.Tensor):
        attended, _ = self.attention(x, x, x, key_padding_mask=padding, need_weights=False)
        logits = self.head(self.norm(x + attended).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class CrossAttention(nn.Module):
    """Keys and values of other widths: three projections of their own."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, dropout=0.2, kdim=10, vdim=8, batch_first=True, add_bias_kv=True)
        self.head = nn.Linear(12, 5)

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor):
        attended, weights = self.attention(query, key, value)
        return self.head(attended), weights


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(31, 12, padding_idx=0)
        self.positions = nn.Parameter(0.1 * torch.randn(1, 32, 12))
        layer = nn.TransformerEncoderLayer(12, 3, 20, dropout=0.1, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(12), enable_nested_tensor=False)
        self.head = nn.Linear(12, CLASSES)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor | None = None):
        x = self.tokens(ids) + self.positions[:, : ids.shape[1]]
        hidden = self.encoder(x, src_key_padding_mask=ids == 0)
        logits = self.head(hidden[:, 0])
        return (None if labels is None else F.cross_entropy(logits, labels)), logits


class Translator(nn.Module):
    def __init__(self):
        super().__init__()
        self.source, self.target = nn.Embedding(31, 12), nn.Embedding(29, 12)
        self.transformer = nn.Transformer(12, 3, 1, 1, 20, dropout=0.1, batch_first=True)
        self.head = nn.Linear(12, 29)

    def forward(self, source: torch.Tensor, target: torch.Tensor, labels: torch.Tensor):
        mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1], device=target.device)
        hidden = self.transformer(self.source(source), self.target(target), tgt_mask=mask, tgt_is_causal=True)
        logits = self.head(hidden)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


class Recurrent(nn.Module):
    """An embedding, a recurrent layer, a head on its last state."""

    def __init__(self, layer: nn.Module, width: int):
        super().__init__()
        self.tokens = nn.Embedding(31, 6)
        self.recurrent = layer
        self.head = nn.Linear(width, CLASSES)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor):
        hidden, _ = self.recurrent(self.tokens(ids))
        logits = self.head(hidden[:, -1])
        return F.cross_entropy(logits, labels), logits


class Stateful(nn.Module):
    """A GRU that takes and returns its state, length first."""

    def __init__(self):
        super().__init__()
        self.gru = nn.GRU(6, 8, num_layers=2, dropout=0.2)

    def forward(self, x: torch.Tensor, state: torch.Tensor):
        return self.gru(x, state)


class Cells(nn.Module):
    """Four steps of an LSTM cell by hand, each fed with the last output."""

    def __init__(self):
        super().__init__()
        self.cell, self.out = nn.LSTMCell(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor):
        h = c = x.new_zeros(x.shape[0], 10)
        steps = []
        for _ in range(4):
            h, c = self.cell(x, (h, c))
            steps.append(x := self.out(h))
        return torch.stack(steps, 1)


class Convolutions(nn.Module):
    """Two convolutions with batch norm and a linear head, in one, two or three dimensions."""

    def __init__(self, dimensions: int):
        super().__init__()
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dimensions - 1]
        pool = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)[dimensions - 1]
        drop = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)[dimensions - 1]
        self.body = nn.Sequential(
            conv(3, 8, 3, padding=1), norm(8), nn.ReLU(), pool(2),
            conv(8, 12, 3, stride=2, padding=1, dilation=1, bias=False), norm(12), nn.GELU(), drop(0.2),
        )  # fmt: skip
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: torch.Tensor, labels: torch.Tensor):
        logits = self.head(self.body(x).flatten(2).mean(2))
        return F.cross_entropy(logits, labels), logits


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with a squeeze-and-excitation gate."""

    def __init__(self):
        super().__init__()
        self.depthwise = nn.Conv2d(6, 12, 3, padding="same", groups=6)
        self.squeeze, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.pointwise = nn.Conv2d(12, 10, 1)
        self.head = nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor):
        x = F.hardswish(self.depthwise(x))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))
        return self.head(self.pointwise(x * gate).amax((2, 3)))


class UNet(nn.Module):
    """Down, up by a transposed convolution, and across by concatenation."""

    def __init__(self):
        super().__init__()
        self.enter = self.block(3, 6)
        self.bottom = self.block(6, 12)
        self.up = nn.ConvTranspose2d(12, 6, 2, stride=2)
        self.leave = self.block(12, 8)
        self.head = nn.Conv2d(8, 2, 1)

    @staticmethod
    def block(width: int, out: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(width, out, 3, padding=1), nn.GroupNorm(2, out), nn.SiLU(), nn.Dropout2d(0.1))

    def forward(self, image: torch.Tensor, mask: torch.Tensor | None = None):
        across = self.enter(image)
        deep = self.bottom(F.max_pool2d(across, 2))
        logits = self.head(self.leave(torch.cat([self.up(deep), across], 1)))
        return (None if mask is None else F.cross_entropy(logits, mask)), logits


class Autoencoder(nn.Module):
    """Strided convolutions and their transposes, one of them grouped, in one or three dimensions."""

    def __init__(self, dimensions: int):
        super().__init__()
        conv, up = {1: (nn.Conv1d, nn.ConvTranspose1d), 3: (nn.Conv3d, nn.ConvTranspose3d)}[dimensions]
        self.encoder = nn.Sequential(conv(2, 6, 3, stride=2, padding=1), nn.LeakyReLU(0.1), conv(6, 8, 3, padding=1))
        self.decoder = nn.Sequential(
            up(8, 6, 4, stride=2, padding=1, groups=2), nn.Tanh(), up(6, 2, 3, padding=1, bias=False)
        )

    def forward(self, x: torch.Tensor):
        code = self.encoder(x)
        restored = self.decoder(code)
        return F.mse_loss(restored, x), restored, code


class SuperResolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 8, 5, padding=2)
        self.expand = nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect")
        self.activation, self.shuffle = nn.PReLU(8), nn.PixelShuffle(2)

    def forward(self, x: torch.Tensor):
        return self.shuffle(self.expand(self.activation(self.features(x)))) + F.interpolate(x, scale_factor=2.0)


class Norms(nn.Module):
    """Every norm there is, between linear layers and convolutions."""

    def __init__(self):
        super().__init__()
        self.lift = nn.Conv1d(4, 8, 1)
        self.instance, self.group, self.batch = nn.InstanceNorm1d(8, affine=True), nn.GroupNorm(4, 8), nn.BatchNorm1d(8)
        self.layer, self.rms = nn.LayerNorm(10), nn.RMSNorm(10)
        self.widen, self.head = nn.Linear(8, 10), nn.Linear(10, CLASSES)

    def forward(self, x: torch.Tensor):
        x = self.batch(self.group(self.instance(self.lift(x)))).transpose(1, 2)
        return self.head(self.rms(self.layer(self.widen(x))).relu())


class Similarity(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Linear(5, 6), nn.Linear(4, 7)
        self.bilinear = nn.Bilinear(6, 7, 3)

    def forward(self, left: torch.Tensor, right: torch.Tensor):
        return self.bilinear(torch.tanh(self.left(left)), torch.tanh(self.right(right)))


class Bags(nn.Module):
    """Bags of words of equal length, a weight for each word, and ragged ones by offsets."""

    def __init__(self):
        super().__init__()
        self.words = nn.EmbeddingBag(31, 8, mode="sum", padding_idx=0)
        self.tags = nn.EmbeddingBag(17, 6, mode="mean")
        self.head = nn.Linear(14, CLASSES)

    def forward(self, words: torch.Tensor, weights: torch.Tensor, tags: torch.Tensor, offsets: torch.Tensor):
        return self.head(torch.cat([self.words(words, per_sample_weights=weights), self.tags(tags, offsets)], -1))


class Text(nn.Module):
    """A convolutional text classifier with several kernel sizes and a padding row that stays."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(31, 8, padding_idx=0, max_norm=None)
        self.convolutions = nn.ModuleList(nn.Conv1d(8, 5, k, padding=k // 2) for k in (1, 3, 5))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(15, CLASSES)

    def forward(self, ids: torch.Tensor, labels: torch.Tensor):
        x = self.tokens(ids).transpose(1, 2)
        pooled = torch.cat([F.relu(conv(x)).amax(2) for conv in self.convolutions], 1)
        logits = self.head(self.drop(pooled))
        return F.cross_entropy(logits, labels), logits


def lazy() -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(10), nn.ELU(), nn.Dropout(0.1), nn.LazyLinear(6), nn.LazyBatchNorm1d())
    model(torch.randn(2, 4))
    return model


def labels() -> torch.Tensor:
    return torch.arange(BATCH) % CLASSES


def ids(vocabulary: int = 31, length: int = LENGTH) -> torch.Tensor:
    tokens = torch.randint(1, vocabulary, (BATCH, length))
    tokens[-1, -2:] = 0
    return tokens


def padded() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(BATCH, LENGTH, 12), "padding": ids() == 0, "labels": labels()}


def lstm() -> nn.Module:
    layer = nn.LSTM(6, 10, num_layers=2, batch_first=True, dropout=0.2, bidirectional=True)
    return Recurrent(layer, 20)


def bags() -> dict[str, torch.Tensor]:
    words = {"words": ids(), "weights": torch.rand(BATCH, LENGTH)}
    return words | {"tags": torch.randint(0, 17, (11,)), "offsets": torch.tensor([0, 4, 7])}


def images(size: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.randn(BATCH, channels, size, size)


BATCHES = {"dynamic": {"x": [0]}}

ENTRIES = [
    plain("multihead attention", SelfAttention, padded, fast=True),
    plain("cross attention (kdim, vdim)", CrossAttention, lambda: {
        "query": torch.randn(BATCH, 5, 12),
        "key": torch.randn(BATCH, LENGTH, 10),
        "value": torch.randn(BATCH, LENGTH, 8),
    }),
    plain("TransformerEncoder", Encoder, lambda: {"ids": ids(), "labels": labels()}),
    plain("Transformer", Translator, lambda: {
        "source": ids(), "target": ids(29, 5), "labels": torch.randint(0, 29, (BATCH, 5)),
    }),
    plain("LSTM", lstm, lambda: {"ids": ids(), "labels": labels()}, fast=True),
    plain("LSTM with projection", lambda: Recurrent(nn.LSTM(6, 10, batch_first=True, proj_size=4), 4), lambda: {
        "ids": ids(), "labels": labels(),
    }, limits={"onnx": "ONNX: its LSTM has no projection"}),
    plain("RNN", lambda: Recurrent(nn.RNN(6, 8, batch_first=True, nonlinearity="relu"), 8), lambda: {
        "ids": ids(), "labels": labels(),
    }),
    plain("GRU with state", Stateful, lambda: {
        "x": torch.randn(LENGTH, BATCH, 6), "state": torch.randn(2, BATCH, 8),
    }, capture={"dynamic": {"x": [0, 1], "state": [1]}}),
    plain("LSTMCell", Cells, lambda: {"x": torch.randn(BATCH, 6)}),
    plain("conv1d", lambda: Convolutions(1), lambda: {
        "x": torch.randn(BATCH, 3, 12), "labels": labels(),
    }, capture={"dynamic": {"x": [0], "labels": [0]}}),
    plain("conv2d", lambda: Convolutions(2), lambda: {"x": images(), "labels": labels()}),
    plain("conv3d", lambda: Convolutions(3), lambda: {"x": torch.randn(BATCH, 3, 4, 6, 6), "labels": labels()}),
    plain("depthwise convolutions", Separable, lambda: {"x": images(channels=6)}),
    plain("U-Net", UNet, lambda: {"image": images(), "mask": torch.randint(0, 2, (BATCH, 8, 8))}, fast=True,
          capture={"dynamic": {"image": [0], "mask": [0]}}),
    plain("autoencoder 1d", lambda: Autoencoder(1), lambda: {"x": torch.randn(BATCH, 2, 12)}, capture=BATCHES),
    plain("autoencoder 3d", lambda: Autoencoder(3), lambda: {"x": torch.randn(BATCH, 2, 4, 6, 6)}),
    plain("PixelShuffle", SuperResolution, lambda: {"x": images()}),
    plain("norms", Norms, lambda: {"x": torch.randn(BATCH, 4, LENGTH)}, capture={"dynamic": {"x": [0, 2]}}),
    plain("Bilinear", Similarity, lambda: {"left": torch.randn(BATCH, 5), "right": torch.randn(BATCH, 4)}),
    plain("EmbeddingBag", Bags, bags, capture={
        "dynamic": {"words": [0, 1], "weights": [0, 1], "tags": [0], "offsets": [0]},
    }),
    plain("Embedding with padding", Text, lambda: {"ids": ids(), "labels": labels()}),
    plain("LazyLinear", lazy, lambda: {"input": torch.randn(BATCH, 4)}),
]  # fmt: skip
