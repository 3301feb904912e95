"""Uses of a weight: every operator that reads it, through the views in between, and how that operator applies it."""

import string
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate

from torch import fx

from .graphs import aten, operator_name
from .layout import MATRIX, TRANSPOSED, Layout, convolution, transposed_convolution

TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.mT.default}
SAME = {
    aten.to.dtype, aten._to_copy.default, aten.contiguous.default, aten.clone.default, aten.alias.default,
    aten.view_as.default,
}  # fmt: skip
SPLITS = {aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.unsafe_chunk.default,
          aten.split.sizes, aten.tensor_split.sections}  # fmt: skip
SLICES = {aten.slice.Tensor, aten.narrow.default}
MATMULS = {aten.matmul.default, aten.mm.default, aten.bmm.default}
CONVOLUTIONS = {
    **dict.fromkeys((aten.conv1d.default, aten.conv1d.padding), "conv1d"),
    **dict.fromkeys((aten.conv2d.default, aten.conv2d.padding), "conv2d"),
    **dict.fromkeys((aten.conv3d.default, aten.conv3d.padding), "conv3d"),
}
TRANSPOSED_CONVOLUTIONS = {
    aten.conv_transpose1d.default: "conv_transpose1d",
    aten.conv_transpose2d.input: "conv_transpose2d",
    aten.conv_transpose3d.input: "conv_transpose3d",
}
GROUPED = {"_grouped_mm", "grouped_mm", "grouped_mm_fallback"}
# operators that read a weight whole, and are what it is for
WHOLE = {"lstm", "gru", "rnn_tanh", "rnn_relu", "bilinear", "embedding_bag"}


@dataclass(frozen=True)
class View:
    """What an operator sees of a stored weight.

    dims:   for every dimension the stored one that it shows, None for one that repeats
    cuts:   (stored dimension, start, stop) of every slice
    picked: the node of the indices along the first dimension, where an index picks entries of a stack
    entry:  the one entry along the first dimension that a select takes of a stack
    """

    dims: tuple[int | None, ...]
    cuts: tuple[tuple[int, int, int], ...] = ()
    picked: fx.Node | None = None
    entry: int | None = None


@dataclass(frozen=True)
class Use:
    """One operator that reads a weight.

    node:    the operator           source: its argument that shows the weight         view: what it shows
    form:    how it applies it: linear, addmm, matmul, einsum, grouped_mm, conv…, embedding; or that it takes it as a
             whole: lstm, …, other
    layout:  which stored dimensions are rows and columns for this operator
    spec:    (x, y, weight) labels of a contraction, as in einsum
    """

    node: fx.Node
    source: fx.Node
    view: View
    form: str
    x: fx.Node | None = None
    bias: fx.Node | None = None
    layout: Layout | None = None
    spec: tuple[str, str, str] | None = None
    groups: int = 1


def uses(weight: fx.Node) -> Iterator[Use]:
    """Every use of a parameter's get_attr node. An operator that reads it twice, as W Wᵀ, takes it as a whole."""
    found = list(follow(weight, View(tuple(range(weight.meta["val"].ndim)))))
    counts = Counter(each.node for each in found)
    for each in found:
        twice = counts[each.node] > 1
        yield Use(each.node, each.source, each.view, "other") if twice else each


def follow(source: fx.Node, view: View) -> Iterator[Use]:
    for user in source.users:
        if user.target is aten.unbind.int and view.dims == (0, 1, 2) and not view.cuts and user.args[1:] in ((), (0,)):
            for part in user.users:
                yield from follow(part, replace(view, dims=(1, 2), entry=part.args[1]))
        elif user.target in SPLITS and user.args[0] is source:
            yield from through_split(user, source, view)
        elif user.op == "call_function" and user.args and user.args[0] is source and (seen := step(user, view)):
            yield from follow(user, seen)
        else:
            yield use(user, source, view)


def step(node: fx.Node, view: View) -> View | None:
    """What is seen after a view operator, or None where the node is no such."""
    target, args, dims = node.target, node.args, view.dims
    rank = len(dims)
    if view.picked is not None:
        return view if target in SAME else None
    if target in SAME:
        return view
    if target in TRANSPOSES:
        last = rank - 2 if target is aten.mT.default else 0
        return replace(view, dims=(*dims[:last], *reversed(dims[last:])))
    if target is aten.transpose.int:
        moved, (a, b) = list(dims), args[1:3]
        moved[a], moved[b] = moved[b], moved[a]
        return replace(view, dims=tuple(moved))
    if target is aten.permute.default:
        return replace(view, dims=tuple(dims[d] for d in args[1]))
    if target is aten.unsqueeze.default:
        at = args[1] % (rank + 1)
        return replace(view, dims=(*dims[:at], None, *dims[at:]))
    if target is aten.squeeze.dim and dims[args[1]] is None:
        return replace(view, dims=tuple(d for i, d in enumerate(dims) if i != args[1] % rank))
    if target is aten.expand.default:
        before, after = args[0].meta["val"].shape, node.meta["val"].shape[-rank:]
        if any(d is not None and a != b for d, a, b in zip(dims, before, after, strict=True)):
            return None
        return replace(view, dims=(*[None] * (len(args[1]) - rank), *dims))
    if target in SLICES:
        found = slice_of(node)
        return found and cut(view, found[0] % rank, *found[1:], args[0])
    if target is aten.select.int and dims == (0, 1, 2) and not view.cuts and args[1] == 0 and isinstance(args[2], int):
        return replace(view, dims=(1, 2), entry=args[2])
    if target is aten.index.Tensor and rank == 3 and not view.cuts and len(args[1]) == 1 and dims == (0, 1, 2):
        return replace(view, picked=args[1][0]) if args[1][0].meta["val"].ndim == 1 else None
    return None


def slice_of(node: fx.Node) -> tuple[int, int, int | None] | None:
    """(dimension, start, stop) of a slice by whole steps from known positions."""
    if node.target is aten.narrow.default:
        _, dimension, start, length = node.args
        start, stop = start, start + length if isinstance(start, int) and isinstance(length, int) else length
    else:
        dimension, start, stop, step = (*node.args[1:], *(0, None, None, 1)[len(node.args) - 1 :])
        if step != 1:
            return None
    start = start or 0
    return (dimension, start, stop) if isinstance(start, int) and isinstance(stop, int | None) else None


def cut(view: View, at: int, start: int, stop: int | None, source: fx.Node) -> View | None:
    size = source.meta["val"].shape[at]
    if view.dims[at] is None:
        return None
    stop = size if stop is None else min(stop if stop >= 0 else stop + size, size)
    start = start if start >= 0 else start + size
    if (start, stop) == (0, size):
        return view
    if any(d == view.dims[at] for d, _, _ in view.cuts):
        return None
    return replace(view, cuts=(*view.cuts, (view.dims[at], start, stop)))


def through_split(node: fx.Node, source: fx.Node, view: View) -> Iterator[Use]:
    """The parts of a split, each a slice."""
    at = dimension(node, 2) % len(view.dims)
    parts = {part.args[1]: part for part in node.users}
    for index, (start, stop) in enumerate(running(value.shape[at] for value in node.meta["val"])):
        if index in parts:
            seen = cut(view, at, start, stop, source)
            if seen is None:
                yield use(parts[index], node, view)
            else:
                yield from follow(parts[index], seen)


def dimension(node: fx.Node, position: int) -> int:
    """The `dim` of an operator, by name or at a position."""
    return node.kwargs.get("dim", node.args[position] if len(node.args) > position else 0)


def running(sizes: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """(start, stop) of parts of these sizes, one after the other."""
    stops = tuple(accumulate(sizes))
    return tuple(zip((0, *stops), stops, strict=False))


def use(node: fx.Node, source: fx.Node, view: View) -> Use:
    """How an operator applies what it sees of a weight."""
    known = Use(node, source, view, "other")
    read: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), read.append)
    if "val" not in node.meta or read.count(source) > 1:
        return known
    found = applied(known, node.args) if view.picked is None or node.target in MATMULS else None
    if found is not None and view.entry is not None:
        single = found.layout.stack is None and found.form in ("linear", "addmm", "matmul", "einsum")
        found = replace(found, layout=replace(found.layout, stack=0)) if single else None
    if found is not None:
        return found
    name = operator_name(node)
    return replace(known, form=name) if name in WHOLE else known


def applied(known: Use, args: tuple) -> Use | None:
    node, source, view, target = known.node, known.source, known.view, known.node.target
    dims, plain = view.dims, view.dims == tuple(range(len(view.dims))) and not view.cuts

    def argument(index: int) -> fx.Node | None:
        return args[index] if len(args) > index else None

    if target is aten.linear.default and args[1] is source:
        layout = matrix(dims)
        return layout and replace(known, form="linear", x=args[0], bias=argument(2), layout=layout)
    if target is aten.addmm.default and args[2] is source and not node.kwargs:
        layout = matrix(reversed(dims))
        form = "linear" if layout == MATRIX else "addmm"
        return layout and replace(known, form=form, x=args[1], bias=args[0], layout=layout)
    if target in MATMULS:
        return product(known, *args[:2])
    if target is aten.einsum.default and len(args[1]) == 2:
        return einsum(known, args[0], args[1])
    if (name := CONVOLUTIONS.get(target)) and args[1] is source and plain:
        groups = argument(6) or 1
        layout = convolution(len(dims) - 2)
        return replace(known, form=name, x=args[0], bias=argument(2), layout=layout, groups=groups)
    if (name := TRANSPOSED_CONVOLUTIONS.get(target)) and args[1] is source and plain:
        groups = argument(6) or 1
        layout = transposed_convolution(len(dims) - 2, groups)
        return replace(known, form=name, x=args[0], bias=argument(2), layout=layout, groups=groups)
    if target is aten.embedding.default and args[0] is source and plain:
        return replace(known, form="embedding", x=args[1], layout=TRANSPOSED)
    if target is aten.index.Tensor and args[0] is source and plain and len(dims) == 2 and len(args[1]) == 1:
        return replace(known, form="embedding", x=args[1][0], layout=TRANSPOSED)
    if operator_name(node) in GROUPED and args[1] is source and len(dims) == 3 and None not in dims and not view.cuts:
        layout = Layout((dims[2],), (dims[1],), dims[0])
        return replace(known, form="grouped_mm", x=args[0], layout=layout)
    return None


def matrix(dims: Iterable[int | None]) -> Layout | None:
    """The layout of a weight that an operator takes as [out, in]."""
    dims = tuple(dims)
    return Layout(dims[:1], dims[1:]) if len(dims) == 2 and None not in dims else None


def product(known: Use, left: fx.Node, right: fx.Node) -> Use | None:
    """x @ W, W @ x, and products of stacks of matrices."""
    dims, on_right = known.view.dims, right is known.source
    x = left if on_right else right
    repeated, shown = [d for d in dims if d is None], tuple(d for d in dims if d is not None)
    if dims[: len(repeated)] != tuple(repeated) or len(shown) not in (2, 3):
        return None
    rank, value = x.meta["val"].ndim, known.node.meta["val"]
    if value.ndim != rank or (len(shown) == 3 and (rank < 3 or repeated)):
        return None
    batch = slice(0, rank - 2) if len(shown) == 2 else slice(0, rank - 3)
    if [str(s) for s in value.shape[batch]] != [str(s) for s in x.meta["val"].shape[batch]]:
        return None
    rows, columns = (shown[-1], shown[-2]) if on_right else (shown[-2], shown[-1])
    layout = Layout((rows,), (columns,), shown[0] if len(shown) == 3 else None)
    lead = "".join(letter for letter, _ in zip("uvwxyz", range(rank - 2 - (len(shown) == 3)), strict=False))
    stack = "e" if len(shown) == 3 else ""
    if on_right:
        spec = (f"{lead}{stack}ti", f"{lead}{stack}to", f"{stack}oi")
    else:
        spec = (f"{lead}{stack}it", f"{lead}{stack}ot", f"{stack}oi")
    if not stack and (on_right or rank == 1):
        return replace(known, form="matmul", x=x, layout=layout)
    return replace(known, form="einsum", x=x, layout=layout, spec=spec)


def einsum(known: Use, equation: str, operands: list[fx.Node]) -> Use | None:
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation:
        return None
    inputs, y = equation.split("->")
    at = operands.index(known.source)
    w, x, dims = inputs.split(",")[at], inputs.split(",")[1 - at], known.view.dims
    if any(len(set(labels)) < len(labels) for labels in (w, x, y)) or None in dims:
        return None
    stack = [a for a in w if a in x and a in y]
    columns, rows = [a for a in w if a in x and a not in y], [a for a in w if a in y and a not in x]
    if len(stack) > 1 or not columns or not rows or len(stack) + len(rows) + len(columns) < len(w):
        return None
    stored = dict(zip(w, dims, strict=True))
    rows, columns = (sorted(labels, key=stored.get) for labels in (rows, columns))
    layout = Layout(
        tuple(stored[a] for a in rows), tuple(stored[a] for a in columns), stored[stack[0]] if stack else None
    )
    if not stack and len(rows) == len(columns) == 1 and x[-1] == columns[0] and y == x[:-1] + rows[0]:
        return replace(known, form="matmul", x=operands[1 - at], layout=layout)
    spec = (x, y, "".join(stack + rows + columns))
    return replace(known, form="einsum", x=operands[1 - at], layout=layout, spec=spec)


def free_label(*taken: str) -> str:
    """A label that an einsum does not use yet."""
    return next(letter for letter in reversed(string.ascii_letters) if not any(letter in labels for labels in taken))
