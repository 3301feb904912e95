"""Uses of a weight: every operator that reads it, and how that operator applies it."""

import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

from torch import fx

from .layout import MATRIX, TRANSPOSED, Layout, convolution, transposed_convolution
from .nodes import operator_name
from .operators import Kind, argument, arguments, dimensions, is_a
from .views import View, cut, reads_entries, selected, step, whole


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
    """Every use of a parameter's get_attr node. An operator that reads it twice, as W Wᵀ, takes it as a whole; one that
    reads its shape or dtype alone is none."""
    found = list(follow(weight, whole(weight.meta["val"].shape)))
    counts = Counter(each.node for each in found)
    for each in found:
        twice = counts[each.node] > 1
        yield Use(each.node, each.source, each.view, "other") if twice else each


def follow(source: fx.Node, view: View) -> Iterator[Use]:
    for user in source.users:
        if not reads_entries(user, source):
            continue
        if is_a(user, Kind.SPLIT | Kind.UNBIND):
            yield from through_parts(user, source, view)
        elif seen := step(user, source, view):
            yield from follow(user, seen)
        else:
            yield use(user, source, view)


def through_parts(node: fx.Node, source: fx.Node, view: View) -> Iterator[Use]:
    """The parts of a split, each a slice; those of an unbind, each an entry."""
    at, values = dimensions(node)[0], node.meta["val"]
    if is_a(node, Kind.UNBIND):
        places = [selected(view, at, index) for index in range(len(values))]
    else:
        places = [cut(view, at, *bounds, source) for bounds in running(value.shape[at] for value in values)]
    for part in node.users:
        seen = places[part.args[1]] if view.picked is None else None
        yield from [use(part, node, view)] if seen is None else follow(part, seen)


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
    found = applied(known) if view.picked is None or is_a(node, Kind.MATMUL) else None
    if found is not None and view.entry is not None:
        single = found.layout.stack is None and found.form in ("linear", "addmm", "matmul", "einsum")
        found = replace(found, layout=replace(found.layout, stack=0)) if single else None
    if found is not None:
        return found
    return replace(known, form=operator_name(node)) if is_a(node, Kind.WHOLE) else known


def applied(known: Use) -> Use | None:
    """The use with its form, where the node is an operator that applies a matrix."""
    kind = next((kind for kind in APPLIED if is_a(known.node, kind)), None)
    return APPLIED[kind](known, *arguments(known.node)) if kind else None


def linear(known: Use, x: fx.Node, weight: fx.Node, bias: fx.Node | None) -> Use | None:
    layout = matrix(known.view.dims) if weight is known.source else None
    return layout and replace(known, form=single("linear", layout), x=x, bias=bias, layout=layout)


def addmm(known: Use, bias: fx.Node, x: fx.Node, weight: fx.Node, beta: float, alpha: float) -> Use | None:
    layout = matrix(known.view.dims[::-1]) if weight is known.source and beta == alpha == 1 else None
    form = "linear" if layout == MATRIX else "addmm"
    return layout and replace(known, form=single(form, layout), x=x, bias=bias, layout=layout)


def matrix(dims: tuple[tuple[int, ...], ...]) -> Layout | None:
    """The layout of a weight that an operator takes as [out, in]."""
    return Layout(*dims) if len(dims) == 2 and all(dims) else None


def single(form: str, layout: Layout) -> str:
    """The form of a matrix whose rows or columns are several stored dimensions is that of a product."""
    return form if len(layout.out) == len(layout.in_) == 1 else "matmul"


def convolve(known: Use, x: fx.Node, weight: fx.Node, bias: fx.Node | None, *_: Any) -> Use | None:
    if weight is not known.source or not known.view.is_plain or operator_name(known.node) == "convolution":
        return None
    groups, dimensions = argument(known.node, "groups"), len(known.view.dims) - 2
    turned = is_a(known.node, Kind.TRANSPOSED_CONVOLUTION)
    layout = transposed_convolution(dimensions, groups) if turned else convolution(dimensions)
    return replace(known, form=operator_name(known.node), x=x, bias=bias, layout=layout, groups=groups)


def look_up(known: Use, table: fx.Node, ids: Any, *_: Any) -> Use | None:
    """Rows of a table, by one tensor of their numbers."""
    several = isinstance(ids, (list, tuple))
    if table is not known.source or not known.view.is_plain or (several and (len(ids), len(known.view.dims)) != (1, 2)):
        return None
    return replace(known, form="embedding", x=ids[0] if several else ids, layout=TRANSPOSED)


def grouped(known: Use, x: fx.Node, weight: fx.Node, *_: Any) -> Use | None:
    dims = known.view.dims
    if weight is not known.source or len(dims) != 3 or any(len(d) != 1 for d in dims) or known.view.cuts:
        return None
    return replace(known, form="grouped_mm", x=x, layout=Layout(dims[2], dims[1], dims[0][0]))


def product(known: Use, left: fx.Node, right: fx.Node, *_: Any) -> Use | None:
    """x @ W, W @ x, and products of stacks of matrices."""
    dims, on_right = known.view.dims, right is known.source
    x = left if on_right else right
    repeats, shown = sum(not d for d in dims), [d for d in dims if d]
    if any(dims[:repeats]) or len(shown) not in (2, 3):
        return None
    rank, value = x.meta["val"].ndim, known.node.meta["val"]
    if value.ndim != rank or (len(shown) == 3 and (rank < 3 or repeats or len(shown[0]) > 1)):
        return None
    batch = slice(0, rank - 2) if len(shown) == 2 else slice(0, rank - 3)
    if [str(s) for s in value.shape[batch]] != [str(s) for s in x.meta["val"].shape[batch]]:
        return None
    rows, columns = (shown[-1], shown[-2]) if on_right else (shown[-2], shown[-1])
    layout = Layout(rows, columns, shown[0][0] if len(shown) == 3 else None)
    lead = "".join(letter for letter, _ in zip("uvwxyz", range(rank - 2 - (len(shown) == 3)), strict=False))
    stack = "e" if len(shown) == 3 else ""
    if on_right:
        spec = (f"{lead}{stack}ti", f"{lead}{stack}to", f"{stack}oi")
    else:
        spec = (f"{lead}{stack}it", f"{lead}{stack}ot", f"{stack}oi")
    if not stack and (on_right or rank == 1):
        return replace(known, form="matmul", x=x, layout=layout)
    return replace(known, form="einsum", x=x, layout=layout, spec=spec) if len(rows) == len(columns) == 1 else None


def einsum(known: Use, equation: str, operands: Sequence[fx.Node], *_: Any) -> Use | None:
    equation = equation.replace(" ", "")
    if "->" not in equation or "." in equation or len(operands) != 2:
        return None
    inputs, y = equation.split("->")
    at = operands.index(known.source)
    w, x = inputs.split(",")[at], inputs.split(",")[1 - at]
    if any(len(set(labels)) < len(labels) for labels in (w, x, y)) or any(len(d) != 1 for d in known.view.dims):
        return None
    dims = [d for (d,) in known.view.dims]
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


APPLIED: dict[Kind, Callable[..., Use | None]] = {
    Kind.LINEAR: linear,
    Kind.ADDMM: addmm,
    Kind.MATMUL: product,
    Kind.EINSUM: einsum,
    Kind.CONVOLUTION | Kind.TRANSPOSED_CONVOLUTION: convolve,
    Kind.LOOKUP | Kind.INDEX: look_up,
    Kind.GROUPED: grouped,
}
