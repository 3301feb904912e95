"""Layouts: which dimensions of a stored weight are rows and columns of its matrix W [out, in]."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import fx

from .nodes import aten

Step = tuple[Any, ...]  # an operator, and its arguments behind the value
Value = TypeVar("Value", torch.Tensor, fx.Node)


@dataclass(frozen=True)
class Layout:
    """W [out, in], or one matrix [stack, out, in] for each entry of a stack (experts), of a stored weight.

    out, in_:  its dimensions, in order, that make up rows and columns
    stack:     the dimension along which whole matrices lie, if one
    groups:    the first dimension is read as two, [groups, rest], and the others count from there (a grouped transposed
               convolution)
    """

    out: tuple[int, ...] = (0,)
    in_: tuple[int, ...] = (1,)
    stack: int | None = None
    groups: int = 1

    @property
    def order(self) -> tuple[int, ...]:
        return (() if self.stack is None else (self.stack,)) + self.out + self.in_

    def sizes(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored sizes, the first dimension in groups."""
        return shape if self.groups == 1 else (self.groups, shape[0] // self.groups, *shape[1:])

    def rows(self, shape: tuple[int, ...]) -> int:
        return math.prod(self.sizes(shape)[d] for d in self.out)

    def columns(self, shape: tuple[int, ...]) -> int:
        return math.prod(self.sizes(shape)[d] for d in self.in_)

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        depth = () if self.stack is None else (shape[self.stack],)
        return (*depth, self.rows(shape), self.columns(shape))

    def reading(self, shape: tuple[int, ...]) -> list[Step]:
        """Operators that make of the stored tensor its matrix or matrices."""
        if self.order == (1, 0):
            return [(aten.t.default,)]
        sizes = self.sizes(shape)
        ordered, wanted = tuple(sizes[d] for d in self.order), self.matrix_shape(shape)
        return [*reshaped(shape, sizes), *permuted(self.order), *reshaped(ordered, wanted)]

    def writing(self, shape: tuple[int, ...]) -> list[Step]:
        """Inverse of `reading`: operators that make of the matrix the stored tensor."""
        if self.order == (1, 0):
            return [(aten.t.default,)]
        sizes = self.sizes(shape)
        ordered, back = tuple(sizes[d] for d in self.order), tuple(self.order.index(d) for d in range(len(sizes)))
        return [*reshaped(self.matrix_shape(shape), ordered), *permuted(back), *reshaped(sizes, shape)]

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored tensor as its matrix or matrices (a view where strides allow)."""
        return through(self.reading(tuple(stored.shape)), stored, computed)

    def stored(self, matrix: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """Inverse of `matrix`: contiguous, in the shape of the parameter."""
        return through(self.writing(shape), matrix, computed).contiguous()

    def emit_matrix(self, stored: fx.Node, shape: tuple[int, ...], emit: Callable[..., fx.Node], term: str) -> fx.Node:
        """Nodes of `matrix`."""
        return through(self.reading(shape), stored, lambda target, args: emit(target, args, term))

    def emit_stored(self, matrix: fx.Node, shape: tuple[int, ...], emit: Callable[..., fx.Node], term: str) -> fx.Node:
        """Nodes of `stored`."""
        return through(self.writing(shape), matrix, lambda target, args: emit(target, args, term))

    def text(self, names: tuple[str, str] = ("out", "in")) -> str:
        """`[out, in]`, `[experts, in, out]`, …"""
        named = {**dict.fromkeys(self.out, names[0]), **dict.fromkeys(self.in_, names[1])}
        if self.stack is not None:
            named[self.stack] = "experts"
        if self.groups > 1:
            named = {0: names[1], **{d - 1: name for d, name in named.items() if d > 1}}
        return "[" + ", ".join(named[d] for d in sorted(named)) + "]"


def reshaped(shape: tuple[int, ...], wanted: tuple[int, ...]) -> list[Step]:
    return [] if shape == wanted else [(aten.reshape.default, list(wanted))]


def permuted(order: tuple[int, ...]) -> list[Step]:
    return [] if order == tuple(sorted(order)) else [(aten.permute.default, list(order))]


def through(steps: Sequence[Step], value: Value, apply: Callable[[Callable, tuple], Value]) -> Value:
    """The value after all steps, each applied to a tensor or emitted after a node."""
    for target, *args in steps:
        value = apply(target, (value, *args))
    return value


def computed(target: Callable[..., torch.Tensor], args: tuple[Any, ...]) -> torch.Tensor:
    return target(*args)


MATRIX, TRANSPOSED = Layout(), Layout((1,), (0,))


def convolution(dimensions: int) -> Layout:
    """[out, in/groups, kernel…]"""
    return Layout((0,), tuple(range(1, dimensions + 2)))


def transposed_convolution(dimensions: int, groups: int) -> Layout:
    """[in, out/groups, kernel…]"""
    if groups == 1:
        return Layout((1,), (0, *range(2, dimensions + 2)))
    return Layout((0, 2), (1, *range(3, dimensions + 3)), groups=groups)


def whole(shape: tuple[int, ...]) -> Layout:
    """Of a tensor that no product reads: rows are the first dimension that is more than 1, with those before it."""
    first = next((d for d, size in enumerate(shape[:-1]) if size > 1), len(shape) - 2)
    return Layout(tuple(range(first + 1)), tuple(range(first + 1, len(shape))))


def turned(layout: Layout) -> Layout:
    return replace(layout, out=layout.in_, in_=layout.out)
