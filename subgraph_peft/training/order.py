"""The order in which examples are seen, and which process sees which."""

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

MEGABATCH = 50


class Order(Sampler[list[int]]):
    """The batches of one process in an epoch.

    count:       examples in all
    batch:       of one process          accumulation: batches of a step
    rank, world: this process, and how many there are

    The order of the examples is a function of (seed, epoch, examples per step) alone, and a step takes the next
    batch · accumulation · world of them: what a step sees does not depend on how it is divided. A batch of all
    processes is dealt out one example to each in turn, so that sizes differ by one at most. Where fewer examples than
    processes are left, the rest repeat one, which does not count (`idle`).

    With lengths, examples of a step are of similar length: within chunks of 50 steps examples are sorted, then steps
    shuffled.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        batch: int,
        accumulation: int = 1,
        rank: int = 0,
        world: int = 1,
        lengths: Sequence[int] | None = None,
    ):
        self.count, self.seed, self.lengths, self.rank, self.world = count, seed, lengths, rank, world
        self.together, self.step = batch * world, batch * world * accumulation
        self.epoch = 0

    def __len__(self) -> int:
        return -(-self.count // self.together)

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-self.count // self.step)

    def size(self, step: int) -> int:
        """Examples of a step, counted from 0, in all processes."""
        return min(self.step, self.count - step % self.steps * self.step)

    def idle(self, step: int) -> bool:
        """Whether this process has no example of its own in the last batch of a step."""
        left = self.size(step) % self.together
        return 0 < left <= self.rank

    def __iter__(self) -> Iterator[list[int]]:
        order = self.examples()
        for at in range(0, self.count, self.together):
            block = order[at : at + self.together]
            yield block[self.rank :: self.world] or block[:1]

    def examples(self) -> list[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None:
            return order
        chunk, length = self.step * MEGABATCH, self.lengths.__getitem__
        order = [i for at in range(0, self.count, chunk) for i in sorted(order[at : at + chunk], key=length)]
        steps = [order[at : at + self.step] for at in range(0, self.count, self.step)]
        last = [steps.pop()] if len(steps[-1]) < self.step else []
        shuffled = torch.randperm(len(steps), generator=generator).tolist()
        return [i for step in [*(steps[j] for j in shuffled), *last] for i in step]
