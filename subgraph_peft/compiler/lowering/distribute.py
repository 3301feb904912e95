"""Distribute an activation over an equation: x φ(W)ᵀ without forming φ(W).

    x(P + Q)ᵀ = xPᵀ + xQᵀ        x(PQ)ᵀ = (xQᵀ)Pᵀ        x(diag(v) P)ᵀ = (xPᵀ) ⊙ v
    x(P diag(v))ᵀ = (x ⊙ v) Pᵀ   x(sP)ᵀ = s · xPᵀ, on the narrowest operand
    x[P; Q]ᵀ = [xPᵀ, xQᵀ]        a nonlinearity h that follows A: h(xAᵀ)

Where no law applies the factor is evaluated as it stands, each step; one of full size is reported as dense. What
depends on no trainable tensor is kept as one matrix, unless its factors are cheaper: see `Equation.distributes`.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import fx

from ...base.errors import MethodError
from ...graph.nodes import aten, operator_name
from ...graph.operators import is_a
from ...method.equation import is_transpose
from .equation_values import Values
from .laws import LAWS, ONE, Scale
from .op_forms import At, OpForm

NONLINEARITIES = {
    "relu": aten.relu.default, "gelu": aten.gelu.default, "silu": aten.silu.default, "tanh": aten.tanh.default,
}  # fmt: skip
INPUT = At()


class Distribution:
    """Emits the nodes of x φ(W)ᵀ + b at one call, with x […, in], φ(W) [out, in] and b [out] or None.

    values:  those of the equation's nodes          form:    of the call
    views:   what the call sees of φ(W)             dtype:   of its activations
    dropout: rate by adapter
    """

    def __init__(
        self,
        values: Values,
        form: OpForm,
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
        form.emit = self.emit_for_form

    def run(self) -> fx.Node:
        return self.apply(self.equation.result, self.form.x, ONE, self.form.bias, INPUT)

    def emit(
        self, of: fx.Node, target: object, args: tuple, term: str, kwargs: Mapping | None = None
    ) -> fx.Node:  # fmt: skip
        """A node for the sake of the equation's node `of`, as are those that the form emits after it."""
        self.current = of
        return self.raw_emit(target, args, term, self.equation.adapter(of), kwargs)

    def emit_for_form(self, target: object, args: tuple, term: str, kwargs: Mapping | None = None) -> fx.Node:
        return self.emit(self.current, target, args, term, kwargs)

    def apply(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node:
        """scale · x Mᵀ + bias […, out] for a node M [out, in] and x […, in]"""
        equation = self.equation
        if node.op == "placeholder" or (equation.is_constant(node) and not equation.distributes(node)):
            return self.contract(node, x, scale, bias, at)
        law = next((law for kinds, law in LAWS.items() if is_a(node, kinds)), None)
        result = law(self, node, x, scale, bias, at) if law else None
        if result is None:
            if self.values.is_dense(node):
                self.values.note(f"no law distributes over {operator_name(node)} of full-size factors")
            result = self.contract(node, x, scale, bias, at)
        return result

    def contract(self, node: fx.Node, x: fx.Node, scale: Scale, bias: fx.Node | None, at: At) -> fx.Node:
        """scale · x Mᵀ + bias […, out] for a matrix M [out, in] that is used as it stands, and x […, in]"""
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
        """scale · h(x Aᵀ) + bias […, r] for A [r, in] and x […, in]"""
        out_features, in_features = self.equation.shape(node)
        self.current = node
        y = self.form.apply(x, self.activation(node), None, self.equation.term(node), at)
        self.values.lowered.per_token += 2 * out_features * in_features + out_features
        y = self.emit(node, NONLINEARITIES[h], (y,), h)
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
            self.dropped[adapter, x] = self.emit(node, aten.dropout.default, (x, rate, True), "dropout")
        return self.dropped[adapter, x], replace(at, dropped=True)

    def activation(self, node: fx.Node) -> fx.Node:
        """A value in the dtype of the activations."""
        return self.values.held_in(node, self.dtype)

    def scaled(
        self, node: fx.Node, x: fx.Node, scale: Scale, width: int, at: At, result: bool = False
    ) -> fx.Node:  # fmt: skip
        """scale · x for x […, width], an operand or a result"""
        self.values.lowered.per_token += width * (len(scale.nodes) + (scale.number != 1.0))
        for factor, inverse in scale.nodes:
            value = self.activation(factor)
            self.current = factor
            if factor in self.values.stacked:
                value = self.form.spread(self.shaped(factor, value, (-1,), ()), at, result)
            x = self.emit(factor, aten.div.Tensor if inverse else aten.mul.Tensor, (x, value), "scale")
        if scale.number != 1.0:
            x = self.emit(node, aten.mul.Tensor, (x, scale.number), "scale")
        return x

    def vector(self, vector: fx.Node, at: At, result: bool = False) -> fx.Node:
        """A vector of the equation, [n], [n, 1] or [1, n], as [n], to multiply the features of an operand or result."""
        while vector.target is aten.unsqueeze.default:
            vector = vector.args[0]
        value, size = self.activation(vector), self.equation.numel(vector)
        self.values.lowered.per_token += size
        self.current = vector
        value = self.shaped(vector, value, (-1, size) if vector in self.values.stacked else (-1,), (size,))
        return self.form.spread(value, at, result)

    def shaped(self, of: fx.Node, value: fx.Node, sizes: tuple[int, ...], shape: tuple[int, ...]) -> fx.Node:
        """A value reshaped to `sizes`, which stand for `shape` in each entry of a stack."""
        if value.meta["shape"] != shape:
            stacked = value.meta["stacked"]
            value = self.emit(of, aten.reshape.default, (value, list(sizes)), "vector")
            value.meta |= {"shape": shape, "stacked": stacked}
        return value

    def plus(self, y: fx.Node, bias: fx.Node | None) -> fx.Node:
        """y + bias, for the sake of what y was emitted for"""
        if bias is None:
            return y
        return self.emit_for_form(aten.add.Tensor, (y, self.form.spread(bias, INPUT, True)), "bias")
