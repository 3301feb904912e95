"""Tiny random models, each with inputs and labels: `model, inputs = bert()`; `model(**inputs)` gives a loss.

Weights are drawn from a fixed seed, biases and norm scales too, so that nothing a test compares is zero by default.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AlbertConfig,
    AlbertForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import subgraph_peft as sp

Made = tuple[nn.Module, dict[str, torch.Tensor]]

VOCABULARY, BATCH, LENGTH = 61, 3, 7
ENCODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 32, "initializer_range": 0.2, "num_labels": 3,
}  # fmt: skip


def bert(dropout: float = 0.0) -> Made:
    config = BertConfig(**ENCODER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    return made(lambda: BertForSequenceClassification(config), classification)


def albert(dropout: float = 0.0) -> Made:
    """Two layers that share one set of weights."""
    options = {"embedding_size": 16, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    config = AlbertConfig(**ENCODER, **options, classifier_dropout_prob=dropout)
    return made(lambda: AlbertForSequenceClassification(config), classification)


def deberta(dropout: float = 0.0) -> Made:
    """query_proj and key_proj are called twice a layer: on hidden states and on relative positions."""
    config = DebertaV2Config(
        **ENCODER, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, relative_attention=True,
        share_att_key=True, pos_att_type=["p2c", "c2p"], position_buckets=4, max_relative_positions=8,
        problem_type="single_label_classification",
    )  # fmt: skip
    return made(lambda: DebertaV2ForSequenceClassification(config), classification)


def gpt2(dropout: float = 0.0) -> Made:
    """Conv1D weights, stored [in, out]; tied head."""
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=32, n_embd=24, n_layer=2, n_head=4, n_inner=40, initializer_range=0.2,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return made(lambda: GPT2LMHeadModel(config), generation)


def llama(tied: bool = False, head_dim: int = 6) -> Made:
    """No biases, grouped-query attention."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=40, max_position_embeddings=32, initializer_range=0.2, tie_word_embeddings=tied,
        head_dim=head_dim,
    )  # fmt: skip
    return made(lambda: LlamaForCausalLM(config), generation)


def tied_llama() -> Made:
    return llama(tied=True)


def wide_llama(tied: bool = False) -> Made:
    """Of a head size that onnxruntime's fused attention takes on CUDA."""
    return llama(tied, head_dim=8)


def wide_tied_llama() -> Made:
    return wide_llama(tied=True)


class MLP(nn.Module):
    """Three linear layers of different widths; the middle one is called twice."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.first, self.shared, self.head = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
        hidden = torch.tanh(self.first(x))
        hidden = self.shared(self.dropout(torch.tanh(self.shared(hidden))))
        logits = self.head(hidden)
        return None if labels is None else F.cross_entropy(logits, labels), logits


class ConvNet(nn.Module):
    """A strided convolution, a grouped one, batch norm and a linear head."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 12, 1, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(12, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> tuple[torch.Tensor | None, torch.Tensor]:
        hidden = torch.relu(self.norm(self.grouped(torch.relu(self.stem(x)))))
        logits = self.head(self.dropout(torch.relu(self.point(hidden)).mean((2, 3))))
        return None if labels is None else F.cross_entropy(logits, labels), logits


def mlp(dropout: float = 0.0) -> Made:
    return made(lambda: MLP(dropout), lambda: {"x": torch.randn(BATCH, 6), "labels": torch.arange(BATCH) % 3})


def conv(dropout: float = 0.0) -> Made:
    return made(lambda: ConvNet(dropout), lambda: {"x": torch.randn(BATCH, 3, 8, 8), "labels": torch.arange(BATCH) % 3})


def classification() -> dict[str, torch.Tensor]:
    return {**sequences(), "labels": torch.arange(BATCH) % 3}


def generation() -> dict[str, torch.Tensor]:
    inputs = sequences()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def sequences() -> dict[str, torch.Tensor]:
    """Token ids, the last row padded on the right."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, -2:] = 0
    return {"input_ids": torch.randint(1, VOCABULARY, (BATCH, LENGTH)), "attention_mask": mask}


def made(build: Callable[[], nn.Module], inputs: Callable[[], dict[str, torch.Tensor]]) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        for parameter in model.parameters():
            if parameter.ndim == 1 or parameter.unique().numel() == 1:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
        return model, inputs()


MODELS: dict[str, Callable[[], Made]] = {
    "bert": bert, "gpt2": gpt2, "llama": llama, "tied_llama": tied_llama, "wide_llama": wide_llama,
    "wide_tied_llama": wide_tied_llama, "albert": albert, "deberta": deberta, "mlp": mlp, "conv": conv,
}  # fmt: skip


@cache
def captured(name: str, dropout: float = 0.0) -> sp.Program:
    """Captured once a process: for tests that write to neither its weights nor its modes."""
    return sp.capture(*(MODELS[name](dropout) if dropout else MODELS[name]()))
