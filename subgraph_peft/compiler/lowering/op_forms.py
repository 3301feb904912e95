"""Op forms: how each operator applies a matrix W [out, in] to its input, and where features lie in its result."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import fx

from ...base.errors import MethodError
from ...graph.layout import Layout, turned
from ...graph.nodes import aten
from ...graph.operators import Kind, argument, is_a
from ...graph.site import Site
from ...graph.uses import Use, free_label

Emit = Callable[..., fx.Node]


@dataclass(frozen=True)
class At:
    """Where in the equation an operand or a factor stands.

    later:   the operand is no longer the call's own input but the result of a factor or a scaling
    inner:   the result is no longer that of the call but the operand of a further factor
    dropped: the dropout of the adapter whose term this is has been applied
    """

    later: bool = False
    inner: bool = False
    dropped: bool = False


class OpForm:
    """y = op(x, W) + b at one call. `emit(target, args, term)` adds a node.

    `forms` are those of a `Use` that it applies. `apply` puts another matrix in the place of W, or one factor of a
    product. `features` is their dimension in the result, None where they are several; x and y have the same dimensions
    but for their sizes (`keeps_dimensions`).
    """

    forms: tuple[str, ...] = ()
    scales_input = True
    drops_input = True
    keeps_dimensions = True
    features: int | None = -1

    def __init__(self, site: Site, use: Use, emit: Emit):
        self.site, self.use, self.emit = site, use, emit

    @property
    def x(self) -> fx.Node:
        return self.use.x

    @property
    def bias(self) -> fx.Node | None:
        return self.use.bias

    def stored(self, x: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        """The call's own operator on the stored weight."""
        node = self.use.node
        if bias is None and self.bias is not None:
            stored = self.without_bias(x, term)
        else:
            args = fx.node.map_arg(node.args, lambda n: x if n is self.x else n)
            stored = self.emit(node.target, args, term, dict(node.kwargs))
        stored.meta["val"] = node.meta["val"]
        return stored

    def without_bias(self, x: fx.Node, term: str) -> fx.Node:
        target = self.use.node.target
        return self.emit(aten.mm.default if is_a(self.use.node, Kind.ADDMM) else target, (x, self.use.source), term)

    def apply(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str, at: At) -> fx.Node:
        """x Mᵀ + bias […, m], for a matrix M [m, n] in the place of W, or one factor of a product, and x […, n].

        n is in where x is the call's own input, else the rank of the factor before (`at.later`); m is out, or the rank
        of this one (`at.inner`). A stack of matrices is [entries, m, n].
        """
        matrix = self.picked(matrix)
        return self.emit(aten.linear.default, (x, matrix) if bias is None else (x, matrix, bias), term)

    def spread(self, vector: fx.Node, at: At, result: bool) -> fx.Node:
        """A vector [n], of a stack [entries, n], shaped to multiply the n features of an operand, or of a `result`;
        a scalar of each entry [entries] too."""
        return self.picked(vector)

    def picked(self, value: fx.Node) -> fx.Node:
        """The entry or the entries of a stack that the call takes."""
        view, stacked = self.use.view, value.meta.get("stacked")
        if not stacked or (view.picked is None and view.entry is None):
            return value
        if view.entry is None:
            picked = self.emit(aten.index.Tensor, (value, [view.picked]), "picked")
        else:
            picked = self.emit(aten.select.int, (value, 0, view.entry), "entry")
        picked.meta |= {"shape": value.meta["shape"], "stacked": view.entry is None}
        return picked


class Linear(OpForm):
    """y = x Wᵀ + b; addmm and matmul with W_stored [in, out] too"""

    forms = ("linear", "addmm", "matmul")


class Contraction(OpForm):
    """y = einsum(x, W): rows and columns of W may be several dimensions, and it may be a stack of matrices.

    A product goes through z, which has the rank r in the place of the rows.
    """

    forms = ("einsum",)

    keeps_dimensions = False

    def __init__(self, site: Site, use: Use, emit: Emit):
        super().__init__(site, use, emit)
        x, y, w = use.spec
        depth = use.layout.stack is not None and use.view.entry is None
        layout = w[depth:]
        self.stack, self.rows, self.columns = w[:depth], layout[: len(use.layout.out)], layout[len(use.layout.out) :]
        self.rank = free_label(x, y, w)
        first = min(y.index(row) for row in self.rows)
        z = y[:first] + self.rank + "".join(label for label in y[first:] if label not in self.rows)
        self.labels = {"x": x, "y": y, "z": z}
        self.features = y.index(self.rows) - len(y) if len(self.rows) == 1 else None

    def sizes(self, labels: str) -> list[int]:
        if labels == self.rank:
            return [-1]
        dims = dict(zip(self.rows + self.columns, self.use.layout.out + self.use.layout.in_, strict=True))
        return [self.site.shape[dims[label]] for label in labels]

    def apply(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str, at: At) -> fx.Node:
        columns = self.rank if at.later else self.columns
        rows = (free_label(*self.labels.values(), self.columns) if at.later else self.rank) if at.inner else self.rows
        before, after = self.labels["z" if at.later else "x"], self.labels["z" if at.inner else "y"]
        matrix = self.picked(matrix)
        stack = self.stack if matrix.meta["stacked"] else ""
        if len(rows) > 1 or len(columns) > 1:
            lead = [-1] if stack else []
            rank = matrix.meta["shape"]
            row_sizes = self.sizes(rows) if rows == self.rows else [rank[0]]
            column_sizes = self.sizes(columns) if columns == self.columns else [rank[1]]
            matrix = self.emit(aten.reshape.default, (matrix, lead + row_sizes + column_sizes), f"{term}_dims")
        if at.later and at.inner:
            after = after.replace(self.rank, rows)
        equation = f"{before},{stack}{rows}{columns}->{after}"
        y = self.emit(aten.einsum.default, (equation, [x, matrix]), term)
        return y if bias is None else self.emit(aten.add.Tensor, (y, bias), "bias")

    def spread(self, vector: fx.Node, at: At, result: bool) -> fx.Node:
        inner = at.inner if result else at.later
        labels = self.labels["z" if inner else "y" if result else "x"]
        own = self.rank if inner else self.rows if result else self.columns
        vector = self.picked(vector)
        scalar, stack = vector.meta["shape"] == (), self.stack if vector.meta["stacked"] else ""
        named = stack + ("" if scalar else own)
        order = sorted(named, key=labels.index)
        if not scalar and len(own) > 1:
            vector = self.emit(aten.reshape.default, (vector, [-1] * len(stack) + self.sizes(own)), "dims")
        if order != list(named):
            vector = self.emit(aten.permute.default, (vector, [named.index(label) for label in order]), "dims")
        for position, label in enumerate(labels[labels.index(order[0]) :] if order else ""):
            if label not in order:
                vector = self.emit(aten.unsqueeze.default, (vector, position), "dims")
        return vector


class GroupedMM(OpForm):
    """y = x Wₑᵀ for each row of x, sorted by expert e: W stacked, the last row of each expert in `offsets`"""

    forms = ("grouped_mm",)

    def apply(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str, at: At) -> fx.Node:
        if not matrix.meta["stacked"]:
            return super().apply(x, matrix, bias, term, at)
        node = self.use.node
        value, shape = node.meta["val"], matrix.meta["shape"]
        if value.device.type == "cuda" and any(size * value.element_size() % 16 for size in shape):
            raise MethodError(
                f"{self.site.name}: grouped_mm on CUDA multiplies by matrices whose sizes are multiples of 16 bytes; "
                f"{list(shape)} in {value.dtype} is none. Choose r as a multiple of {16 // value.element_size()}."
            )
        turned = self.emit(aten.transpose.int, (matrix, -2, -1), f"{term}_t")
        return self.emit(node.target, (x, turned, *node.args[2:]), term, dict(node.kwargs))

    def spread(self, vector: fx.Node, at: At, result: bool) -> fx.Node:
        if not vector.meta["stacked"]:
            return vector
        node = self.use.node
        offsets = argument(node, "offs")
        rows = self.emit(aten.sym_size.int, (node.args[0], 0), "rows")
        device = node.meta["val"].device
        positions = self.emit(aten.arange.default, (rows,), "rows", {"device": device})
        experts = self.emit(aten.searchsorted.Tensor, (offsets, positions), "expert", {"right": True})
        experts = self.emit(aten.clamp.default, (experts, None, self.site.stack - 1), "expert")
        each = self.emit(aten.index_select.default, (vector, 0, experts), "each")
        return each if vector.meta["shape"] else self.emit(aten.unsqueeze.default, (each, -1), "each")


class Convolution(OpForm):
    """y = conv(x, K) + b, W = K reshaped to [out, in·kernel]; later factors are convolutions with a kernel of one."""

    forms = ("conv1d", "conv2d", "conv3d")

    scales_input = False
    features = 1

    def without_bias(self, x: fx.Node, term: str) -> fx.Node:
        return self.kernel(x, self.use.source, None, term)

    def kernel(self, x: fx.Node, kernel: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        node = self.use.node
        return self.emit(node.target, (x, kernel, bias, *node.args[3:]), term, dict(node.kwargs))

    def first(self, matrix: fx.Node, term: str) -> fx.Node:
        return self.emit(aten.reshape.default, (matrix, [-1, *self.site.shape[1:]]), f"{term}_kernel")

    def apply(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str, at: At) -> fx.Node:
        if not at.later:
            return self.kernel(x, self.first(matrix, term), bias, term)
        ones = [1] * len(self.site.kernel)
        kernel = self.emit(aten.reshape.default, (matrix, [*matrix.meta["shape"], *ones]), f"{term}_kernel")
        return self.emit(POINTWISE[len(ones)], (x, kernel, bias), term)

    def spread(self, vector: fx.Node, at: At, result: bool) -> fx.Node:
        if vector.meta.get("shape") == ():
            return vector
        return self.emit(aten.reshape.default, (vector, [-1, *[1] * len(self.site.kernel)]), "channels")


class TransposedConvolution(Convolution):
    """y = conv_transpose(x, K) + b, W [out, in·kernel] of K [in, out, kernel…]"""

    forms = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")

    def first(self, matrix: fx.Node, term: str) -> fx.Node:
        channels, _, *kernel = self.site.shape
        unfolded = self.emit(aten.reshape.default, (matrix, [-1, channels, *kernel]), f"{term}_kernel")
        return self.emit(aten.transpose.int, (unfolded, 0, 1), f"{term}_kernel")


class Embedding(OpForm):
    """y = Wᵀ[ids] with the table stored as [vocabulary, out], by embedding or index: a one-hot input times Wᵀ"""

    forms = ("embedding",)

    scales_input = False
    drops_input = False

    def apply(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str, at: At) -> fx.Node:
        if at.later:
            return super().apply(x, matrix, bias, term, at)
        table = self.emit(aten.t.default, (matrix,), f"{term}_table")
        node = self.use.node
        picked = [x] if is_a(node, Kind.INDEX) else x
        return self.emit(node.target, (table, picked, *node.args[2:]), term)


POINTWISE: Mapping[int, object] = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}
CLASSES = (Linear, Contraction, GroupedMM, Convolution, TransposedConvolution, Embedding)
FORMS: dict[str, type[OpForm]] = {form: each for each in CLASSES for form in each.forms}


def form_class(site: Site, use: Use) -> type[OpForm] | None:
    """The form of a use, or None where only the weight as a whole can be replaced."""
    if site.groups > 1 or use.form not in FORMS or use.layout not in (site.layout, turned(site.layout)):
        return None
    if (use.view.cuts or use.layout != site.layout) and not is_matrix(site.layout):
        return None
    return FORMS[use.form]


def is_matrix(layout: Layout) -> bool:
    return layout.stack is None and len(layout.out) == len(layout.in_) == 1


def views_of(site: Site, use: Use) -> tuple[tuple, ...]:
    """What the use sees of φ(W): ("slice", dimension, start, stop) of its rows or columns, then ("t",) if turned."""
    rows = site.layout.out
    cuts = tuple(("slice", 0 if dim in rows else 1, start, stop) for dim, start, stop in use.view.cuts)
    return cuts if use.layout == site.layout else (*cuts, ("t",))
