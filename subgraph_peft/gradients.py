"""Gradients of all that trains in one buffer a dtype, of which each `parameter.grad` is a view."""

from collections.abc import Sequence

import torch
from torch import nn

from .borrowed import add_to


class Gradients:
    """Buffers that stay where they are, so that recorded work finds them again.

    buffers: one flat tensor a dtype        views: parameter by parameter, in their order
    used:    which parameters have had a gradient; the others have none, so that no optimiser decays them
    """

    def __init__(self, parameters: Sequence[nn.Parameter]):
        self.parameters = list(parameters)
        sizes: dict[torch.dtype, int] = {}
        places = []
        for parameter in self.parameters:
            start = sizes.get(parameter.dtype, 0)
            places.append(start)
            sizes[parameter.dtype] = start + -(-parameter.numel() // 16) * 16  # every view starts at 64 bytes or more
        device = self.parameters[0].device
        flat = {dtype: torch.zeros(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
        self.buffers = list(flat.values())
        self.views = [
            flat[p.dtype][start : start + p.numel()].view(p.shape)
            for p, start in zip(self.parameters, places, strict=True)
        ]
        self.used: set[int] = set()

    def attach(self) -> None:
        """The `grad` of every parameter is its view, or None where it never had one, whatever it was."""
        for index, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            parameter.grad = view if index in self.used else None

    def adopt(self) -> None:
        """Take over gradients that others, such as another process, gave to parameters that never had one."""
        for index, (parameter, view) in enumerate(zip(self.parameters, self.views, strict=True)):
            if index not in self.used and parameter.grad is not None:
                view.copy_(parameter.grad)
                self.used.add(index)

    def zero(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one gradient a parameter; None where the loss does not depend on it."""
        given = [index for index, new in enumerate(gradients) if new is not None]
        if not self.used.issuperset(given):
            self.used.update(given)
            self.attach()
        if given:
            add_to([self.views[index] for index in given], [gradients[index] for index in given])
