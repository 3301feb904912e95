"""What an operator sees of a stored weight, through the views in between."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from .nodes import fixed_size
from .operators import SEEN, VIEWS, Kind, argument, dimensions, extent, is_a, operand, permutation


@dataclass(frozen=True)
class View:
    """What an operator sees of a stored weight.

    shape:  as stored
    dims:   for every dimension the stored ones that it runs over, in order; none for one that repeats
    cuts:   (stored dimension, start, stop) of every slice
    picked: the node of the indices along the first dimension, where an index picks entries of a stack
    entry:  the one entry along the first dimension that a select takes of a stack
    """

    shape: tuple[int, ...]
    dims: tuple[tuple[int, ...], ...]
    cuts: tuple[tuple[int, int, int], ...] = ()
    picked: fx.Node | None = None
    entry: int | None = None

    @property
    def is_plain(self) -> bool:
        """Whether the weight is seen as it is stored."""
        return self == whole(self.shape)

    @property
    def is_stack(self) -> bool:
        return self.is_plain and len(self.dims) == 3

    def size(self, dim: int) -> int:
        return next((stop - start for cut, start, stop in self.cuts if cut == dim), self.shape[dim])


def whole(shape: Sequence[int]) -> View:
    return View(tuple(shape), tuple((dim,) for dim in range(len(shape))))


def reads_entries(node: fx.Node, source: fx.Node) -> bool:
    """Whether an operator reads more of a tensor than its shape, dtype and device, as `x.type_as(W)` does."""
    return not is_a(node, Kind.FILL | Kind.SIZE) and not (is_a(node, VIEWS) and operand(node) is not source)


def step(node: fx.Node, source: fx.Node, view: View) -> View | None:
    """What is seen of a weight after a view of `source`, or None where the node is no such."""
    if is_a(node, Kind.SAME | Kind.CAST):
        return view
    if view.picked is not None or not is_a(node, SEEN | Kind.INDEX) or operand(node) is not source:
        return None
    before, after = source.meta["val"].shape, getattr(node.meta.get("val"), "shape", ())
    if is_a(node, Kind.TRANSPOSE):
        return replace(view, dims=tuple(view.dims[dim] for dim in permutation(node)))
    if is_a(node, Kind.RESHAPE):
        return regrouped(view, before, after)
    if is_a(node, Kind.BROADCAST):
        return repeated(view, before, after)
    if is_a(node, Kind.SLICE):
        found = slice_of(node)
        return found and cut(view, found[0] % len(before), *found[1:], source)
    if is_a(node, Kind.SELECT):
        return selected(view, dimensions(node)[0], argument(node, "index"))
    indices = argument(node, "indices")
    one = view.is_stack and len(indices) == 1 and indices[0].meta["val"].ndim == 1
    return replace(view, picked=indices[0]) if one else None


def regrouped(view: View, before: Sequence[Any], after: Sequence[Any]) -> View | None:
    """The view in other dimensions of the same order, or None where they take a stored one apart."""
    parts: list[tuple[int | None, int | str]] = []
    for dims, size in zip(view.dims, map(known, before), strict=True):
        parts += [(dim, view.size(dim)) for dim in dims] or ([] if size == 1 else [(None, size)])
    groups: list[list[int | None]] = []
    for size in map(known, after):
        group, total = [], 1
        while parts and (total != size or (size == 1 and not group and parts[0][1] == 1)):
            dim, length = parts.pop(0)
            group.append(dim)
            total = total * length if isinstance(length, int) else length
            if not isinstance(total, int):
                break
        if total != size or (None in group and len(group) > 1):
            return None
        groups.append(group)
    if any(size != 1 for _, size in parts) or (parts and not groups):
        return None
    if parts:
        groups[-1] += [dim for dim, _ in parts]
    return replace(view, dims=tuple(tuple(dim for dim in group if dim is not None) for group in groups))


def known(size: int | torch.SymInt) -> int | str:
    """A size as a number, or the text of one that varies."""
    fixed = fixed_size(size)
    return str(size) if fixed is None else fixed


def repeated(view: View, before: Sequence[Any], after: Sequence[Any]) -> View | None:
    """The view broadcast, or None where a stored dimension is repeated."""
    lead = len(after) - len(before)
    pairs = zip(view.dims, map(known, before), map(known, after[lead:]), strict=True)
    return None if any(dims and a != b for dims, a, b in pairs) else replace(view, dims=((),) * lead + view.dims)


def selected(view: View, at: int, index: Any) -> View | None:
    """One entry of a stack, or of a dimension that repeats."""
    dims = view.dims[:at] + view.dims[at + 1 :]
    if not view.dims[at]:
        return replace(view, dims=dims)
    first = view.dims[at] == (0,) and len(view.shape) == 3 and not view.cuts
    return replace(view, dims=dims, entry=index) if first and isinstance(index, int) else None


def slice_of(node: fx.Node) -> tuple[int, int, int | None] | None:
    """(dimension, start, stop) of a slice by whole steps from known positions."""
    dimension, start, stop, step = extent(node)
    start = start or 0
    ok = step == 1 and isinstance(start, int) and isinstance(stop, int | None)
    return (dimension, start, stop) if ok else None


def cut(view: View, at: int, start: int, stop: int | None, source: fx.Node) -> View | None:
    size = source.meta["val"].shape[at]
    stop = size if stop is None else min(stop if stop >= 0 else stop + size, size)
    start = start if start >= 0 else start + size
    if (start, stop) == (0, size):
        return view
    if len(view.dims[at]) != 1 or any(d == view.dims[at][0] for d, _, _ in view.cuts):
        return None
    return replace(view, cuts=(*view.cuts, (view.dims[at][0], start, stop)))
