"""Evaluation: the loss and the metrics of a program on a set of examples, whatever the batch size."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ..base.borrowed import pytree
from ..base.errors import TrainError, suggestion
from ..base.processes import rank, world
from ..program.internals import internals
from ..program.label_shift import IGNORED, label_shift, scored, shifted
from ..program.program import Program
from .collation import Padding

NAMED = ("accuracy", "mse", "pearson", "spearman", "perplexity")
Metrics = str | Sequence[str] | Callable[[Any], Mapping[str, float]]


def evaluate(
    program: Program,
    data: Dataset,
    *,
    metrics: Metrics | None = None,
    batch_size: int = 32,
    collate: Callable | None = None,
    each: Callable[[], None] | None = None,
) -> dict[str, float]:
    """The loss, if the graph gives one, and the metrics of `program` on `data`, in eval mode, without gradients.

    metrics:  names out of NAMED, or a function of a transformers EvalPrediction (all logits and labels as arrays).
              By default accuracy for class numbers, mse, pearson and spearman for real numbers, perplexity for tokens
    each:     called after every batch

    The loss is the mean over labels (tokens for a language model), not over batches. Under torch.distributed every
    process takes a share of the examples, and all get the result.
    """
    program.need_values("evaluate", TrainError)
    own = range(rank(), len(data), world())
    batches = [list(own[at : at + batch_size]) for at in range(0, len(own), batch_size)]
    counted, rounds = len(batches), math.ceil(math.ceil(len(data) / world()) / batch_size)
    if internals(program.module).block_paths:  # of a view that may be sharded, which computes in all processes at once
        batches += [[0]] * (rounds - counted)
    loader = DataLoader(data, batch_sampler=batches, collate_fn=collate or Padding())
    module, training = program.module, program.module.training
    tally = Tally(metrics, label_shift(program))
    try:
        module.eval()
        with torch.no_grad():
            for index, batch in enumerate(loader):
                batch = pytree.tree_map_only(torch.Tensor, lambda t: t.to(internals(module).home.device), dict(batch))
                outputs = loss_and_logits(module(**batch))
                if index < counted:
                    tally.add(*outputs, batch.get("labels"))
                if each is not None:
                    each()
    finally:
        module.train(training)
    return tally.gathered().result()


def loss_and_logits(outputs: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """By name in a ModelOutput or dict; otherwise the loss is a first scalar, the logits what follows."""
    if isinstance(outputs, Mapping):
        others = (v for k, v in outputs.items() if k != "loss" and isinstance(v, torch.Tensor))
        logits = outputs.get("logits")
        return outputs.get("loss"), next(others, None) if logits is None else logits
    leaves = [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]
    loss = leaves.pop(0) if leaves and leaves[0].ndim == 0 else None
    return loss, next(iter(leaves), None)


class Tally:
    """Sums over batches; logits are kept only where a metric needs them all. shift: as `label_shift` gives it."""

    def __init__(self, metrics: Metrics | None, shift: int | None):
        self.metrics, self.shift = metrics, shift
        self.losses: list[tuple[float, int]] = []
        self.labels, self.correct = 0, 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def add(self, loss: torch.Tensor | None, logits: torch.Tensor | None, labels: torch.Tensor | None) -> None:
        if labels is None or logits is None:
            raise TrainError("Evaluation needs `labels` in every batch and logits among the outputs of the graph.")
        if self.metrics is None:
            self.metrics = usual(labels)
        for name in self.names():
            if name not in NAMED:
                raise TrainError(f"Unknown metric {name!r}.{suggestion(name, NAMED)} Metrics: {', '.join(NAMED)}.")
        count = len(scored(labels, self.shift))
        self.labels += count
        if loss is not None and count:
            self.losses.append((loss.item(), count))
        if "accuracy" in self.names():
            compared = shifted(labels, self.shift)
            shown = logits[:, : compared.shape[1]] if self.shift and labels.ndim > 1 else logits
            if shown.shape[:-1] != compared.shape:
                shapes = f"logits {list(logits.shape)} and labels {list(labels.shape)}"
                raise TrainError(f"accuracy compares class scores with class numbers, not {shapes}.")
            self.correct += ((shown.argmax(-1) == compared) & (compared != IGNORED)).sum().item()
        if callable(self.metrics) or {"mse", "pearson", "spearman"} & set(self.names()):
            self.pairs.append((logits.float().cpu().numpy(), labels.cpu().numpy()))

    def names(self) -> Sequence[str]:
        return [self.metrics] if isinstance(self.metrics, str) else () if callable(self.metrics) else self.metrics

    def gathered(self) -> "Tally":
        """This tally and those of the other processes as one."""
        if world() == 1:
            return self
        tallies: list[Any] = [None] * world()
        names = None if callable(self.metrics) else self.metrics
        dist.all_gather_object(tallies, (names, self.labels, self.correct, self.losses, self.pairs))
        named, labels, correct, losses, pairs = zip(*tallies, strict=True)
        self.metrics = self.metrics or next(filter(None, named), ())  # a process without examples knows none
        self.labels, self.correct = sum(labels), sum(correct)
        self.losses, self.pairs = [x for part in losses for x in part], [x for part in pairs for x in part]
        return self

    def result(self) -> dict[str, float]:
        if not self.labels:
            raise TrainError("Evaluation data has no label to compare with.")
        values = {"loss": sum(loss * count for loss, count in self.losses) / self.labels} if self.losses else {}
        if callable(self.metrics):
            from transformers import EvalPrediction

            predictions, labels = (stacked([pair[i] for pair in self.pairs]) for i in (0, 1))
            return values | {k: float(v) for k, v in self.metrics(EvalPrediction(predictions, labels)).items()}
        return values | {name: self.value(name, values.get("loss")) for name in self.names()}

    def value(self, name: str, loss: float | None) -> float:
        if name == "accuracy":
            return self.correct / self.labels
        if name == "perplexity":
            if loss is None:
                raise TrainError("perplexity needs a loss: capture the model with labels among its example inputs.")
            return math.exp(loss) if loss < 700 else math.inf
        predictions, labels = (np.concatenate([pair[i].reshape(-1) for pair in self.pairs]) for i in (0, 1))
        if len(predictions) != len(labels):
            counts = f"{len(predictions)} numbers for {len(labels)} labels"
            raise TrainError(f"{name} compares one number with each label; the logits have {counts}.")
        if name == "mse":
            return float(np.mean((predictions.astype(np.float64) - labels) ** 2))
        return correlation(predictions, labels) if name == "pearson" else correlation(ranks(predictions), ranks(labels))


def usual(labels: torch.Tensor) -> Sequence[str]:
    if labels.is_floating_point():
        return ("mse", "pearson", "spearman") if labels.shape[1:].numel() == 1 else ()
    return ("accuracy",) if labels.ndim == 1 else ("perplexity",)


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one side does not vary."""
    a, b = a.astype(np.float64) - a.mean(dtype=np.float64), b.astype(np.float64) - b.mean(dtype=np.float64)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """Ranks, equal values sharing the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[inverse]


def stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """One array along the batch; shorter sequences are filled up with -100."""
    shape = np.max([array.shape[1:] for array in arrays], axis=0, initial=0)

    def widths(array: np.ndarray) -> list[tuple[int, int]]:
        return [(0, 0), *((0, int(full - own)) for full, own in zip(shape, array.shape[1:], strict=True))]

    return np.concatenate([np.pad(array, widths(array), constant_values=IGNORED) for array in arrays])
