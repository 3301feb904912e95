"""The laws by which an activation is distributed over an equation, each a function of its own.

A law is given a node of the equation, a matrix W [out, in], an operand x […, in], a scale s (a number times scalar
nodes), a bias b [out] or None, and where in the equation it stands. It emits s · x Wᵀ + b […, out] and returns its
node, or None where it does not hold. Dimensions are those of a linear layer; a form puts the features where its
operator has them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from torch import fx

from ...graph.nodes import aten
from ...graph.operators import SUMS, Kind, argument, is_a, operand
from ...method.equation import Equation, is_elementwise
from .equation_values import Values
from .op_forms import At, OpForm


@dataclass(frozen=True)
class Scale:
    """A product of numbers and of scalar nodes of the equation, each (node, whether it divides)."""

    number: float = 1.0
    nodes: tuple[tuple[fx.Node, bool], ...] = ()

    def times(self, factor: float | fx.Node, inverse: bool = False) -> "Scale":
        if isinstance(factor, fx.Node):
            return replace(self, nodes=(*self.nodes, (factor, inverse)))
        return replace(self, number=self.number / factor if inverse else self.number * factor)

    def __bool__(self) -> bool:
        return self.number != 1.0 or bool(self.nodes)


ONE = Scale()


class Context(Protocol):
    """What a law may ask of the distribution that it is part of: see `distribute.Distribution`.

    dropout: rate by adapter
    """

    equation: Equation
    values: Values
    form: OpForm
    dropout: Mapping[str, float]

    def apply(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node: ...
    def emit(self, of: fx.Node, target: object, args: tuple, term: str) -> fx.Node: ...
    def input(self, node: fx.Node, x: fx.Node, at: At) -> tuple[fx.Node, At]: ...
    def scaled(self, node: fx.Node, x: fx.Node, scale: Scale, width: int, at: At) -> fx.Node: ...
    def vector(self, vector: fx.Node, at: At, result: bool = False) -> fx.Node: ...
    def plus(self, y: fx.Node, bias: fx.Node | None) -> fx.Node: ...


Law = Callable[[Context, fx.Node, fx.Node, Scale, "fx.Node | None", At], "fx.Node | None"]


def sum_law(
    context: Context, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At
) -> fx.Node | None:  # fmt: skip
    """x(P ± Q)ᵀ = xPᵀ ± xQᵀ

    x […, in], P and Q [out, in], result […, out]. A sum of small matrices, computed entry by entry, is evaluated
    instead: it costs less than a second product.
    """
    equation, (left, right) = context.equation, node.args[:2]
    whole = equation.shape(node)
    if not all(isinstance(a, fx.Node) and equation.shape(a) == whole for a in (left, right)) or node.kwargs:
        return None
    small = is_elementwise(node) and equation.numel(node) < context.values.full_size
    if small and not context.dropout.get(equation.adapter(node)) and not context.values.nonlinear:
        return None
    minus = is_a(node, Kind.SUBTRACT)
    first = context.apply(left, x, scale, bias, at)
    second = context.apply(right, x, scale.times(-1.0) if minus and scale else scale, None, at)
    context.values.lowered.per_token += whole[0]
    return context.emit(node, aten.sub.Tensor if minus and not scale else aten.add.Tensor, (first, second), "sum")


def product_law(
    context: Context, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At
) -> fx.Node | None:  # fmt: skip
    """x(PQ)ᵀ = (xQᵀ)Pᵀ

    x […, in], P [out, r], Q [r, in], xQᵀ […, r], result […, out]; P or Q may be diag(v). The scale multiplies xQᵀ where
    that is narrowest.
    """
    equation, (left, right) = context.equation, node.args
    if len(equation.shape(left)) != 2 or len(equation.shape(right)) != 2:
        return None
    if is_diagonal(equation, left):
        return rows_law(context, node, right, left.args[0], x, scale, bias, at)
    if is_diagonal(equation, right):
        return columns_law(context, node, left, right.args[0], x, scale, bias, at)
    x, at = context.input(node, x, at)
    width = equation.shape(right)[0]
    z = context.apply(right, x, ONE, None, replace(at, inner=True))
    at = replace(at, later=True)
    if scale and width <= min(equation.shape(node)):
        z, scale = context.scaled(node, z, scale, width, at), ONE
    return context.apply(left, z, scale, bias, at)


def is_diagonal(equation: Equation, node: fx.Node) -> bool:
    return is_a(node, Kind.DIAGONAL) and len(equation.shape(node.args[0])) == 1


def multiple_law(
    context: Context, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At
) -> fx.Node | None:  # fmt: skip
    """x(tP)ᵀ = t · xPᵀ for a number or scalar t, which joins the scale; diag(v) P and P diag(v) written as v ⊙ P

    x […, in], P [out, in], result […, out]; v [out, 1] scales rows, v [in] or [1, in] columns. So for P / t.
    """
    equation, (left, right) = context.equation, node.args[:2]
    inverse = is_a(node, Kind.DIVIDE)
    if not isinstance(right, fx.Node):
        return context.apply(left, x, scale.times(float(right), inverse), bias, at)
    if not isinstance(left, fx.Node):
        return None
    whole = equation.shape(node)
    for matrix, factor in [(left, right)] if inverse else [(left, right), (right, left)]:
        if equation.shape(matrix) != whole:
            continue
        shape = equation.shape(factor)
        if equation.numel(factor) == 1:
            return context.apply(matrix, x, scale.times(factor, inverse), bias, at)
        if shape == (whole[0], 1):
            return rows_law(context, node, matrix, factor, x, scale, bias, at, inverse)
        if shape in ((whole[1],), (1, whole[1])):
            return columns_law(context, node, matrix, factor, x, scale, bias, at, inverse)
    return None


def rows_law(
    context: Context, node: fx.Node, matrix: fx.Node, vector: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None,
    at: At, inverse: bool = False,
) -> fx.Node:  # fmt: skip
    """x(diag(v) P)ᵀ = (xPᵀ) ⊙ v

    x […, in], P [out, in], v [out], result […, out]; ⊘ v where `inverse`
    """
    y = context.apply(matrix, x, scale, None, at)
    factor = context.vector(vector, at, result=True)
    return context.plus(context.emit(node, aten.div.Tensor if inverse else aten.mul.Tensor, (y, factor), "rows"), bias)


def columns_law(
    context: Context, node: fx.Node, matrix: fx.Node, vector: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None,
    at: At, inverse: bool = False,
) -> fx.Node | None:  # fmt: skip
    """x(P diag(v))ᵀ = (x ⊙ v) Pᵀ

    x […, in], P [out, in], v [in], result […, out]; ⊘ v where `inverse`. Not where the call's own input cannot be
    scaled by feature, as the ids of an embedding or the channels of a convolution over in·kernel.
    """
    if not at.later and not context.form.scales_input:
        return None
    x, at = context.input(node, x, at)
    factor = context.vector(vector, at)
    x = context.emit(node, aten.div.Tensor if inverse else aten.mul.Tensor, (x, factor), "columns")
    return context.apply(matrix, x, scale, bias, replace(at, later=True))


def diagonal_law(
    context: Context, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At
) -> fx.Node | None:  # fmt: skip
    """x diag(v)ᵀ = x ⊙ v

    x […, n], v [n], result […, n]. Not where x and the result have different dimensions.
    """
    equation, vector = context.equation, node.args[0]
    if len(equation.shape(vector)) != 1 or len(node.args) > 1 or not (at.later or context.form.scales_input):
        return None
    if not context.form.keeps_dimensions and not (at.later and at.inner):
        return None
    x, at = context.input(node, x, at)
    x = context.scaled(node, x, scale, equation.numel(vector), at)
    return context.plus(context.emit(node, aten.mul.Tensor, (x, context.vector(vector, at)), "diagonal"), bias)


def blocks_law(
    context: Context, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At
) -> fx.Node | None:  # fmt: skip
    """x[P; Q]ᵀ = [xPᵀ, xQᵀ]

    x […, in], P [p, in], Q [q, in], result […, p + q]
    """
    parts = operand(node)
    if argument(node, "dim") != 0 or len(context.equation.shape(node)) != 2 or context.form.features is None:
        return None
    results = [context.apply(part, x, scale, None, at) for part in parts]
    return context.plus(context.emit(node, aten.cat.default, (results, context.form.features), "blocks"), bias)


def negative_law(
    context: Context, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At
) -> fx.Node:  # fmt: skip
    """x(−P)ᵀ = −1 · xPᵀ

    x […, in], P [out, in], result […, out]
    """
    return context.apply(node.args[0], x, scale.times(-1.0), bias, at)


LAWS: Mapping[Kind, Law] = {
    SUMS: sum_law,
    Kind.MATMUL: product_law,
    Kind.DIAGONAL: diagonal_law,
    Kind.MULTIPLY | Kind.DIVIDE: multiple_law,
    Kind.NEGATE: negative_law,
    Kind.JOIN: blocks_law,
}
