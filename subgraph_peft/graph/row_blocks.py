"""Row blocks of fused weights: the q, k and v of a qkv, read off what the graph does with the result."""

import re
from collections.abc import Iterable, Sequence

from torch import fx

from .nodes import fixed_size
from .operators import VIEWS, Kind, dimensions, is_a, operand, permutation
from .site import Site
from .uses import Use, running
from .views import slice_of

Rows = tuple[tuple[int, int], ...]
# what the blocks of a weight are called, by the end of its name and their number
NAMES = (
    (r"(^|_)(w?qkv|c_attn|query_key_value|in_proj_weight)(_proj|_weight)?", ("q", "k", "v")),
    (r"(^|_)w?kv(_proj)?", ("k", "v")),
    (r"(^|_)gate_up(_proj)?", ("gate", "up")),
    (r"weight_[ih]h_l\d+\w*", ("i", "f", "g", "o")),
    (r"weight_[ih]h_l\d+\w*", ("r", "z", "n")),
)
GATES = {"lstm": 4, "gru": 3}


def blocks_of(site: Site, found: Sequence[Use]) -> tuple[tuple[str, int, int], ...]:
    """(name, start, stop) of the row blocks into which every use takes the result apart."""
    if site.layout.stack is not None and site.kind != "grouped_mm" or len(site.layout.out) > 1:
        return ()
    if all(len(use.view.cuts) == 1 and use.view.cuts[0][0] in site.layout.out for use in found):
        rows = partition(
            {use.view.cuts[0][1:] for use in found}, site.out_features
        )  # each use takes rows of the weight
    else:
        cut = {rows_of(site, use) for use in found}
        rows = cut.pop() if len(cut) == 1 else None
    if not rows or len(rows) < 2:
        return ()
    return tuple((name, start, stop) for name, (start, stop) in zip(names(site.name, len(rows)), rows, strict=True))


def names(weight: str, count: int) -> Sequence[str]:
    last = weight.removesuffix(".weight").rpartition(".")[2]
    known = (each for pattern, each in NAMES if len(each) == count and re.search(pattern + "$", last, re.IGNORECASE))
    return next(known, [str(i) for i in range(count)])


def rows_of(site: Site, use: Use) -> Rows | None:
    """(start, stop) of the blocks at one use."""
    out = site.out_features
    if use.form in GATES and re.search(r"weight_[ih]h_l\d", site.name):
        size = out // GATES[use.form]
        return tuple((i * size, (i + 1) * size) for i in range(GATES[use.form]))
    if use.form not in ("linear", "addmm", "matmul", "grouped_mm", "conv1d", "conv2d") or use.view.cuts:
        return None
    rank = use.node.meta["val"].ndim
    return taken_apart(use.node, 1 if use.form.startswith("conv") else rank - 1, out)


def taken_apart(node: fx.Node, at: int, size: int) -> Rows | None:
    """The blocks into which dimension `at` of a value is split, through views that leave it whole or split it."""
    users = list(node.users)
    if len(users) > 1 and all(is_a(user, Kind.SLICE) for user in users):
        return slices(node, users, at, size)
    if len(users) != 1:
        return None
    (user,) = users
    if is_a(user, Kind.SPLIT):
        return running(value.shape[at] for value in user.meta["val"]) if dimensions(user) == (at,) else None
    if not shows(user, node):
        return None
    kept = place_after(user, at)
    return reshaped(node, user, at, size) if kept is None else taken_apart(user, kept, size)


def shows(view: fx.Node, node: fx.Node) -> bool:
    """Whether a node is all entries of another, each once."""
    return is_a(view, VIEWS & ~Kind.BROADCAST) and operand(view) is node


def place_after(view: fx.Node, at: int) -> int | None:
    """Where dimension `at` of its operand is in a view, None where it is taken apart or joined with others."""
    if is_a(view, Kind.TRANSPOSE):
        return permutation(view).index(at)
    before, after = ([str(size) for size in each.meta["val"].shape] for each in (operand(view), view))
    if before == after:
        return at
    places = [place for place, size in enumerate(after) if size != "1"]
    same = [size for size in before if size != "1"] == [after[place] for place in places]
    return places[sum(size != "1" for size in before[:at])] if same and before[at] != "1" else None


def reshaped(node: fx.Node, user: fx.Node, at: int, size: int) -> Rows | None:
    """A view that leaves the features last, or splits them into [n, rest…] and takes the n apart."""
    before, after = node.meta["val"].shape, user.meta["val"].shape
    if at == len(before) - 1 and fixed_size(after[-1]) == size:
        return taken_apart(user, len(after) - 1, size)
    if at != len(before) - 1:
        return None
    total, first = 1, len(after)
    while first and total < size and (length := fixed_size(after[first - 1])) is not None:
        first, total = first - 1, total * length
    if total != size or first == len(after) - 1 or not takes(user, first):
        return None
    return running([size // after[first]] * after[first])


def takes(node: fx.Node, at: int) -> bool:
    """Whether all readers take single entries of dimension `at`, through views that keep it."""

    def taken(user: fx.Node) -> bool:
        if is_a(user, Kind.SELECT | Kind.UNBIND):
            return dimensions(user) == (at,)
        kept = place_after(user, at) if shows(user, node) else None
        return kept is not None and takes(user, kept)

    return bool(node.users) and all(map(taken, node.users))


def slices(node: fx.Node, users: Sequence[fx.Node], at: int, size: int) -> Rows | None:
    rank, found = node.meta["val"].ndim, set()
    for taken in map(slice_of, users):
        if taken is None or taken[0] % rank != at:
            return None
        _, start, stop = taken
        stop = size if stop is None else min(stop if stop >= 0 else stop + size, size)
        found.add((start if start >= 0 else start + size, stop))
    return partition(found, size)


def partition(found: Iterable[tuple[int, int]], size: int) -> Rows | None:
    """The parts in order, where they follow each other from 0 to `size`."""
    rows = tuple(sorted(found))
    joined = all(a[1] == b[0] for a, b in zip(rows, rows[1:], strict=False))
    return rows if rows and joined and rows[0][0] == 0 and rows[-1][1] == size else None
