"""The metrics of an ONNX file on a set of examples: what half precision or quantised weights cost."""

import os
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

from subgraph_peft.graph.rewriter import META
from subgraph_peft.program.label_shift import IGNORED, shifted
from subgraph_peft.training.collation import Padding
from subgraph_peft.training.evaluate import Metrics, Tally

from ..serving.adapters import Adapters
from .runtime import run, session


def evaluate(
    path: str | os.PathLike,
    data: Dataset,
    *,
    metrics: Metrics | None = None,
    batch_size: int = 32,
    collate: Callable | None = None,
    adapter: str | os.PathLike | None = None,
) -> dict[str, float]:
    """As `subgraph_peft.evaluate`, of the logits that onnxruntime computes, with an adapter file in the model's slots;
    the loss is that of classes or tokens."""
    opened = session(path)
    slots = Adapters(opened).load(adapter).values if adapter else {}
    taken = {value.name for value in opened.get_inputs()}
    shift = opened.get_modelmeta().custom_metadata_map.get(f"{META}.label_shift")
    tally = Tally(metrics, None if shift is None else int(shift))
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=collate or Padding()):
        outputs = run(opened, {name: tensor for name, tensor in batch.items() if name in taken}, slots)
        logits = outputs.get("logits", next(iter(outputs.values()))).float()
        tally.add(loss(logits, batch["labels"], tally.shift), logits, batch["labels"])
    return tally.result()


def loss(logits: torch.Tensor, labels: torch.Tensor, shift: int | None) -> torch.Tensor | None:
    """Mean cross entropy of class numbers; None for other labels."""
    if labels.is_floating_point() or logits.shape[:-1] != labels.shape:
        return None
    labels = shifted(labels, shift)
    if labels.ndim > 1:
        logits = logits[:, : labels.shape[1]]
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)
