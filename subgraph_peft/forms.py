"""Op forms: how each operator applies a matrix W [out, in] to its input, and where features lie in its result."""

from collections.abc import Callable

from torch import fx

from .graphs import aten
from .sites import Site

Emit = Callable[..., fx.Node]


class Form:
    """y = op(x, W) + b at one call. `emit(target, args, term)` adds a node.

    A matrix other than W itself takes W's place in the first factor (`first`); later factors act on the features of
    what came before (`then`). `features` is their dimension in the result.
    """

    scales_input = True
    drops_input = True
    features = -1

    def __init__(self, site: Site, call: fx.Node, emit: Emit):
        self.site, self.call, self.emit = site, call, emit

    @property
    def x(self) -> fx.Node:
        return self.call.args[0]

    @property
    def bias(self) -> fx.Node | None:
        return self.call.args[2] if len(self.call.args) > 2 else None

    def stored(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        """The call's own operator on the stored weight."""
        return self.first(x, weight, bias, term)

    def first(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        return self.then(x, matrix, bias, term)

    def then(self, z: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        return self.emit(aten.linear.default, (z, matrix) if bias is None else (z, matrix, bias), term)

    def spread(self, vector: fx.Node) -> fx.Node:
        """A vector [features], shaped to multiply an activation."""
        return vector


class Linear(Form):
    """y = x Wᵀ + b"""


class Addmm(Form):
    """y = x W_stored + b with W_stored = Wᵀ [in, out]"""

    @property
    def x(self) -> fx.Node:
        return self.call.args[1]

    @property
    def bias(self) -> fx.Node | None:
        return self.call.args[0]

    def stored(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        if bias is None:
            return self.emit(aten.mm.default, (x, weight), term)
        return self.emit(aten.addmm.default, (bias, x, weight), term)


class Matmul(Form):
    """y = x @ Wᵀ, or x @ W_stored with W_stored [in, out]"""

    @property
    def bias(self) -> None:
        return None

    def stored(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        if not self.site.transposed:
            return self.then(x, weight, bias, term)
        y = self.emit(aten.matmul.default, (x, weight), term)
        return y if bias is None else self.emit(aten.add.Tensor, (y, bias), "bias")


class Convolution(Form):
    """y = conv(x, K) + b, W = K reshaped to [out, in·kernel]; later factors are convolutions with a kernel of one."""

    scales_input = False
    features = 1

    @property
    def dimensions(self) -> int:
        return len(self.site.shape) - 2

    def stored(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        return self.emit(self.call.target, (x, weight, bias, *self.call.args[3:]), term)

    def first(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        kernel = self.emit(aten.reshape.default, (matrix, [-1, *self.site.shape[1:]]), f"{term}_kernel")
        return self.stored(x, kernel, bias, term)

    def then(self, z: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        kernel = self.emit(
            aten.reshape.default, (matrix, [*matrix.meta["shape"], *[1] * self.dimensions]), f"{term}_kernel"
        )
        return self.emit(self.call.target, (z, kernel, bias), term)

    def spread(self, vector: fx.Node) -> fx.Node:
        return self.emit(aten.reshape.default, (vector, [-1, *[1] * self.dimensions]), "channels")


class Embedding(Form):
    """y = Wᵀ[ids] with the table stored as [vocabulary, out]: a one-hot input times Wᵀ"""

    scales_input = False
    drops_input = False

    @property
    def x(self) -> fx.Node:
        return self.call.args[1]

    @property
    def bias(self) -> None:
        return None

    def stored(self, x: fx.Node, weight: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        return self.emit(self.call.target, (weight, x, *self.call.args[2:]), term)

    def first(self, x: fx.Node, matrix: fx.Node, bias: fx.Node | None, term: str) -> fx.Node:
        table = self.emit(aten.t.default, (matrix,), f"{term}_table")
        return self.emit(self.call.target, (table, x, *self.call.args[2:]), term)


FORMS: dict[str, type[Form]] = {
    "linear": Linear,
    "addmm": Addmm,
    "matmul": Matmul,
    "matmul_in_out": Matmul,
    "conv1d": Convolution,
    "conv2d": Convolution,
    "embedding": Embedding,
}


def form_class(site: Site, form: str) -> type[Form] | None:
    """The form of a call, or None where only the weight as a whole can be replaced."""
    if site.kind == "other" or site.groups > 1:
        return None
    return FORMS.get(form)
