"""Batches: items of several lengths, padded to one of few."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from ..program.label_shift import IGNORED

Item = dict[str, Any]
Collate = Callable[[Sequence[Item]], dict[str, torch.Tensor]]


@dataclass(frozen=True)
class Padding:
    """Collates items: tokens padded as the tokenizer pads them, sequences of labels with -100, the rest stacked.

    lengths: to the first of which that is long enough a batch is padded; to its longest item where none is
    """

    tokenizer: Any | None = None
    lengths: tuple[int, ...] = ()

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        if self.tokenizer is None or "input_ids" not in items[0]:
            return default_collate([{k: torch.as_tensor(v) for k, v in item.items()} for item in items])
        named = [name for name in self.tokenizer.model_input_names if name in items[0]]
        longest = max(len(item["input_ids"]) for item in items)
        width = next((length for length in self.lengths if length >= longest), longest)
        tokens = [{name: item[name] for name in named} for item in items]
        batch = dict(self.tokenizer.pad(tokens, padding="max_length", max_length=width, return_tensors="pt"))
        for name in items[0].keys() - batch.keys():
            values = [torch.as_tensor(item[name]) for item in items]
            if name == "labels" and values[0].ndim:
                values = [self.pad(value, width) for value in values]
            batch[name] = torch.stack(values)
        return batch

    def pad(self, labels: torch.Tensor, width: int) -> torch.Tensor:
        filler = labels.new_full((width - len(labels),), IGNORED)
        return torch.cat([filler, labels] if self.tokenizer.padding_side == "left" else [labels, filler])


def token_counts(data: Dataset) -> list[int]:
    return [len(data[index]["input_ids"]) for index in range(len(data))]


def spread(lengths: Sequence[int], count: int) -> tuple[int, ...]:
    """At most `count` lengths to pad to, evenly spaced multiples of 8 up to the longest, which itself stays."""
    longest = max(lengths)
    width = -(-longest // count)
    width = -(-width // 8) * 8
    return (*range(width, longest, width), longest)


def example_batch(examples: Sequence[Item] | Dataset, collate: Collate) -> dict[str, torch.Tensor]:
    """Two examples as one batch, with their labels: of different length where there are such, so that one is padded."""
    first, *others = (examples[i] for i in range(min(len(examples), 64)))

    def length(item: Item) -> int:
        return len(item["input_ids"]) if "input_ids" in item else 0

    second = next((item for item in others if length(item) != length(first)), [*others, first][0])
    return collate([first, second])
