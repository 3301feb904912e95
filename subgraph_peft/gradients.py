"""Gradients of all that trains in one buffer a dtype, of which each `parameter.grad` is a view."""

from collections.abc import Sequence

import torch
from torch import nn


class Gradients:
    """Buffers that stay where they are, so that recorded work finds them again.

    buffers: one flat tensor a dtype        views: parameter by parameter, in their order
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

    def attach(self) -> None:
        """Every parameter's `grad` is its view, whatever it was."""
        for parameter, view in zip(self.parameters, self.views, strict=True):
            parameter.grad = view

    def zero(self) -> None:
        for buffer in self.buffers:
            buffer.zero_()

    def add(self, gradients: Sequence[torch.Tensor | None]) -> None:
        """Add one gradient a parameter; None where the loss does not depend on it."""
        pairs = [(view, new) for view, new in zip(self.views, gradients, strict=True) if new is not None]
        torch._foreach_add_([view for view, _ in pairs], [new for _, new in pairs])
