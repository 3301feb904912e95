"""Distribute an activation over an equation: x φ(W)ᵀ without forming φ(W).

    x(P + Q)ᵀ = xPᵀ + xQᵀ        x(PQ)ᵀ = (xQᵀ)Pᵀ        x(diag(v) P)ᵀ = (xPᵀ) ⊙ v
    x(P diag(v))ᵀ = (x ⊙ v) Pᵀ   x(sP)ᵀ = s · xPᵀ, on the narrowest operand
    x[P; Q]ᵀ = [xPᵀ, xQᵀ]        a nonlinearity h that follows A: h(xAᵀ)

Where no law applies the factor is evaluated as it stands, each step; one of full size is reported as dense. What
depends on no trainable tensor is kept as one matrix, unless its factors are cheaper: see `Equation.distributes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from .addends import SUMS
from .equation import MATMULS, is_elementwise, is_transpose
from .errors import MethodError
from .forms import At, Form
from .graphs import aten, operator_name
from .values import Values

NONLINEARITIES = {
    "relu": aten.relu.default, "gelu": aten.gelu.default, "silu": aten.silu.default, "tanh": aten.tanh.default,
}  # fmt: skip
DIAGONALS = {aten.diag.default, aten.diag_embed.default}


@dataclass(frozen=True)
class Scale:
    """A product of numbers and of scalar nodes of the equation."""

    number: float = 1.0
    nodes: tuple[tuple[fx.Node, bool], ...] = ()

    def times(self, factor: float | fx.Node, inverse: bool = False) -> "Scale":
        if isinstance(factor, fx.Node):
            return replace(self, nodes=(*self.nodes, (factor, inverse)))
        return replace(self, number=self.number / factor if inverse else self.number * factor)

    def __bool__(self) -> bool:
        return self.number != 1.0 or bool(self.nodes)


ONE = Scale()


INPUT = At()


class Distribution:
    """Emits the nodes of x φ(W)ᵀ + b at one call."""

    def __init__(
        self,
        values: Values,
        form: Form,
        emit: Callable,
        views: tuple[tuple, ...],
        dtype: torch.dtype,
        dropout: dict[str, float],
    ):
        self.values, self.form, self.raw_emit, self.views = values, form, emit, views
        self.equation = values.equation
        self.dtype, self.dropout = dtype, dropout
        self.dropped: dict[tuple[str, fx.Node], fx.Node] = {}
        self.current = self.equation.result
        form.emit = self.emit

    def emit(self, target: object, args: tuple, term: str, kwargs: Mapping | None = None) -> fx.Node:
        return self.raw_emit(target, args, term, self.equation.adapter(self.current), kwargs)

    def run(self) -> fx.Node:
        return self.apply(self.equation.result, self.form.x, ONE, self.form.bias, INPUT)

    def apply(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node:
        """scale · x·nodeᵀ + bias"""
        equation = self.equation
        if node.op == "placeholder" or (equation.is_constant(node) and not equation.distributes(node)):
            return self.contract(node, x, scale, bias, at)
        law = LAWS.get(node.target)
        result = law(self, node, x, scale, bias, at) if law else None
        if result is None:
            if self.values.is_dense(node):
                self.values.note(f"no law distributes over {operator_name(node)} of full-size factors")
            result = self.contract(node, x, scale, bias, at)
        return result

    def contract(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node:
        """scale · x·Mᵀ + bias for a matrix M that is used as it stands."""
        out_features, in_features = self.equation.shape(node)
        x, at = self.input(node, x, at)
        if h := self.nonlinearity(node):
            return self.followed(h, node, x, scale, bias, at)
        on_input = bool(scale) and in_features <= out_features and (at.later or self.form.scales_input)
        if on_input:
            x, scale = self.scaled(node, x, scale, in_features, at), ONE
        self.current = node
        is_weight = self.is_weight(node) and not at.inner and (not at.later or self.form.scales_input)
        own_bias = None if scale else bias
        term = "base" if is_weight else self.equation.term(node)
        if is_weight:
            y = self.form.stored(x, own_bias, term)
        else:
            y = self.form.apply(x, self.activation(node), own_bias, term, at)
            if not self.is_part_of_weight(node):
                self.values.lowered.per_token += 2 * out_features * in_features
        if scale:
            y = self.plus(self.scaled(node, y, scale, out_features, at, result=True), bias)
        return y

    def is_weight(self, node: fx.Node) -> bool:
        """Whether a matrix is the stored weight as the call sees it."""
        seen = []
        while node.target is aten.slice.Tensor or is_transpose(node):
            seen.append(("t",) if is_transpose(node) else ("slice", *node.args[1:4]))
            node = node.args[0]
        return self.equation.operands.get(node) == ("", "W") and tuple(reversed(seen)) == self.views

    def is_part_of_weight(self, node: fx.Node) -> bool:
        while node.target is aten.slice.Tensor or is_transpose(node):
            node = node.args[0]
        return self.equation.operands.get(node) == ("", "W")

    def nonlinearity(self, node: fx.Node) -> str | None:
        factor = node.args[0] if is_transpose(node) else node
        return self.values.nonlinear.get(self.equation.operands.get(factor, ("", "")))

    def followed(self, h: str, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node:
        """scale · h(x·Mᵀ) + bias"""
        out_features, in_features = self.equation.shape(node)
        term = self.equation.term(node)
        self.current = node
        y = self.form.apply(x, self.activation(node), None, term, at)
        self.values.lowered.per_token += 2 * out_features * in_features + out_features
        y = self.emit(NONLINEARITIES[h], (y,), h)
        return self.plus(self.scaled(node, y, scale, out_features, at, result=True), bias)

    def input(self, node: fx.Node, x: fx.Node, at: At) -> tuple[fx.Node, At]:
        """The operand of a trainable term, with the dropout of the adapter that the term belongs to."""
        adapter = self.equation.adapter(node)
        rate = self.dropout.get(adapter, 0.0)
        if at.dropped or not rate or node not in self.equation.trainable:
            return x, at
        if not at.later and not self.form.drops_input:
            raise MethodError(
                f"{adapter} at {self.form.site.name}: an {self.form.site.kind} has no input to drop. Rewrite it by "
                "itself, with dropout=0."
            )
        if (adapter, x) not in self.dropped:
            self.current = node
            self.dropped[adapter, x] = self.emit(aten.dropout.default, (x, rate, True), "dropout")
        return self.dropped[adapter, x], replace(at, dropped=True)

    def activation(self, node: fx.Node) -> fx.Node:
        """A value in the dtype of the activations."""
        return self.values.held_in(node, self.dtype)

    def scaled(
        self, node: fx.Node, x: fx.Node, scale: Scale, width: int, at: At, result: bool = False
    ) -> fx.Node:  # fmt: skip
        """x of `width` features, an operand or a result, times the scale."""
        self.values.lowered.per_token += width * (len(scale.nodes) + (scale.number != 1.0))
        for factor, inverse in scale.nodes:
            value = self.activation(factor)
            self.current = factor
            if factor in self.values.stacked:
                value = self.form.spread(self.shaped(value, (-1,), ()), at, result)
            x = self.emit(aten.div.Tensor if inverse else aten.mul.Tensor, (x, value), "scale")
        if scale.number != 1.0:
            self.current = node
            x = self.emit(aten.mul.Tensor, (x, scale.number), "scale")
        return x

    def shaped(self, value: fx.Node, sizes: tuple[int, ...], shape: tuple[int, ...]) -> fx.Node:
        """A value reshaped to `sizes`, which stand for `shape` in each entry of a stack."""
        if value.meta["shape"] != shape:
            stacked = value.meta["stacked"]
            value = self.emit(aten.reshape.default, (value, list(sizes)), "vector")
            value.meta |= {"shape": shape, "stacked": stacked}
        return value

    def plus(self, y: fx.Node, bias: fx.Node | None) -> fx.Node:
        return y if bias is None else self.emit(aten.add.Tensor, (y, self.form.spread(bias, INPUT, True)), "bias")

    # laws: (node, x, scale, bias, at) -> emitted node, or None where the law does not hold

    def sum(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node | None:
        """x(P ± Q)ᵀ = xPᵀ ± xQᵀ"""
        left, right = node.args[:2]
        whole = self.equation.shape(node)
        if not all(isinstance(a, fx.Node) and self.equation.shape(a) == whole for a in (left, right)) or node.kwargs:
            return None
        small = is_elementwise(node) and self.equation.numel(node) < self.values.full_size
        if small and not self.dropout.get(self.equation.adapter(node)) and not self.values.nonlinear:
            return None
        sign = SUMS[node.target]
        first = self.apply(left, x, scale, bias, at)
        negative = scale.times(-1.0) if sign < 0 and scale else scale
        second = self.apply(right, x, negative, None, at)
        self.current = node
        target = aten.sub.Tensor if sign < 0 and not scale else aten.add.Tensor
        self.values.lowered.per_token += whole[0]
        return self.emit(target, (first, second), "sum")

    def product(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node | None:
        """x(PQ)ᵀ = (xQᵀ)Pᵀ"""
        left, right = node.args
        if len(self.equation.shape(left)) != 2 or len(self.equation.shape(right)) != 2:
            return None
        if left.target in DIAGONALS and len(self.equation.shape(left.args[0])) == 1:
            return self.rows(node, right, left.args[0], x, scale, bias, at)
        if right.target in DIAGONALS and len(self.equation.shape(right.args[0])) == 1:
            return self.columns(node, left, right.args[0], x, scale, bias, at)
        x, at = self.input(node, x, at)
        width = self.equation.shape(right)[0]
        out_features, in_features = self.equation.shape(node)
        z = self.apply(right, x, ONE, None, replace(at, inner=True))
        at = replace(at, later=True)
        if scale and width <= min(out_features, in_features):
            z, scale = self.scaled(node, z, scale, width, at), ONE
        return self.apply(left, z, scale, bias, at)

    def multiple(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node | None:
        """scalars, row scalings and column scalings"""
        left, right = node.args[:2]
        inverse = node.target is aten.div.Tensor
        if not isinstance(right, fx.Node):
            return self.apply(left, x, scale.times(float(right), inverse), bias, at)
        if not isinstance(left, fx.Node):
            return None
        whole = self.equation.shape(node)
        options = [(left, right)] if inverse else [(left, right), (right, left)]
        for matrix, vector in options:
            if self.equation.shape(matrix) != whole:
                continue
            shape = self.equation.shape(vector)
            if self.equation.numel(vector) == 1:
                return self.apply(matrix, x, scale.times(vector, inverse), bias, at)
            if shape == (whole[0], 1):
                return self.rows(node, matrix, vector, x, scale, bias, at, inverse)
            if shape in ((whole[1],), (1, whole[1])):
                return self.columns(node, matrix, vector, x, scale, bias, at, inverse)
        return None

    def rows(
        self, node: fx.Node, matrix: fx.Node, vector: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None,
        at: At, inverse: bool = False,
    ) -> fx.Node:  # fmt: skip
        """x(diag(v) P)ᵀ = (xPᵀ) ⊙ v"""
        y = self.apply(matrix, x, scale, None, at)
        y = self.emit(aten.div.Tensor if inverse else aten.mul.Tensor, (y, self.vector(node, vector, at, True)), "rows")
        self.current = node
        return self.plus(y, bias)

    def columns(
        self, node: fx.Node, matrix: fx.Node, vector: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None,
        at: At, inverse: bool = False,
    ) -> fx.Node | None:  # fmt: skip
        """x(P diag(v))ᵀ = (x ⊙ v) Pᵀ"""
        if not at.later and not self.form.scales_input:
            return None
        x, at = self.input(node, x, at)
        x = self.emit(aten.div.Tensor if inverse else aten.mul.Tensor, (x, self.vector(node, vector, at)), "columns")
        return self.apply(matrix, x, scale, bias, replace(at, later=True))

    def vector(self, node: fx.Node, vector: fx.Node, at: At, result: bool = False) -> fx.Node:
        """A row or column vector of the equation as [features], to multiply an operand or a result."""
        while vector.target is aten.unsqueeze.default:
            vector = vector.args[0]
        value, size = self.activation(vector), self.equation.numel(vector)
        self.values.lowered.per_token += size
        self.current = vector
        value = self.shaped(value, (-1, size) if vector in self.values.stacked else (-1,), (size,))
        spread = self.form.spread(value, at, result)
        self.current = node
        return spread

    def diagonal(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node | None:
        """x diag(v)ᵀ = x ⊙ v"""
        vector = node.args[0]
        if len(self.equation.shape(vector)) != 1 or len(node.args) > 1 or not (at.later or self.form.scales_input):
            return None
        if not self.form.keeps_dimensions and not (at.later and at.inner):
            return None
        x, at = self.input(node, x, at)
        x = self.scaled(node, x, scale, self.equation.numel(vector), at)
        y = self.emit(aten.mul.Tensor, (x, self.vector(node, vector, at)), "diagonal")
        return self.plus(y, bias)

    def stack(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node | None:
        """x[P; Q]ᵀ = [xPᵀ, xQᵀ]"""
        parts, dimension = node.args[0], node.args[1] if len(node.args) > 1 else 0
        if dimension != 0 or len(self.equation.shape(node)) != 2 or self.form.features is None:
            return None
        results = [self.apply(part, x, scale, None, at) for part in parts]
        self.current = node
        return self.plus(self.emit(aten.cat.default, (results, self.form.features), "blocks"), bias)

    def negative(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node:
        return self.apply(node.args[0], x, scale.times(-1.0), bias, at)


LAWS: dict[object, Callable] = {
    **dict.fromkeys(SUMS, Distribution.sum),
    **dict.fromkeys(MATMULS, Distribution.product),
    **dict.fromkeys(DIAGONALS, Distribution.diagonal),
    aten.mul.Tensor: Distribution.multiple,
    aten.div.Tensor: Distribution.multiple,
    aten.neg.default: Distribution.negative,
    aten.cat.default: Distribution.stack,
}
