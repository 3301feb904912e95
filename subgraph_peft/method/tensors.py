"""Tensors that a method adds beside a weight: their shapes, and the values that they start from."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

Init = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """0"""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """1"""
    return torch.ones(shape)


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """U(±1/√in), `in` the last dimension: torch's own default for linear layers (He et al. 2015, a = √5)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def normal(std: float) -> Init:
    """N(0, std²)"""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    init.__doc__ = f"N(0, {std}²)"
    return init


@dataclass(frozen=True)
class Tensor:
    """A tensor that a method adds beside a weight.

    decay: whether weight decay applies (not to factors that multiply, whose neutral value is 1)
    lr:    factor on the learning rate
    saved: whether checkpoints hold it; one that they leave out is drawn again by an `init` that needs no generator
    """

    shape: tuple[int, ...]
    init: Init = zeros
    trainable: bool = True
    decay: bool = True
    lr: float = 1.0
    saved: bool = True


def trainable(*shape: int, init: Init = zeros, decay: bool = True, lr: float = 1.0) -> Tensor:
    """A tensor of these sizes that trains; decay: weight decay acts on it; lr: factor on the learning rate."""
    return Tensor(shape, init, trainable=True, decay=decay, lr=lr)


def frozen(*shape: int, init: Init = zeros, saved: bool = True) -> Tensor:
    """A tensor of these sizes that does not train; saved=False: files leave it out, and it is drawn again."""
    return Tensor(shape, init, trainable=False, decay=False, saved=saved)
