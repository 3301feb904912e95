"""The order in which examples are seen."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH = 50


class Order(Sampler[int]):
    """The order of the examples in an epoch: a function of (seed, epoch) alone.

    With lengths, batches are of similar length: within chunks of 50 batches examples are sorted, then batches shuffled.
    """

    def __init__(self, count: int, seed: int, batch: int, lengths: Sequence[int] | None = None):
        self.count, self.seed, self.batch, self.lengths = count, seed, batch, lengths
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        chunk, length = self.batch * MEGABATCH, self.lengths.__getitem__
        order = [i for at in range(0, self.count, chunk) for i in sorted(order[at : at + chunk], key=length)]
        batches = [order[at : at + self.batch] for at in range(0, self.count, self.batch)]
        last = [batches.pop()] if len(batches[-1]) < self.batch else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return (i for batch in [*(batches[j] for j in shuffled), *last] for i in batch)
