"""Values of an equation as nodes of the target graph: each made once, cast where it is read in another dtype."""

from collections.abc import Callable, Mapping

import torch
from torch import fx

from ...base.errors import MethodError
from ...graph.nodes import aten, flat_outputs, operator_name
from ...graph.operators import Kind, is_a
from ...graph.rewriter import copied
from ...method.equation import VIEWS, Equation, Operand
from ...method.stacks import lift, stacked
from ...program.records import Lowered


class Values:
    """Nodes of the target graph that hold values of an equation, each made once, before the first use.

    emit:    (target, args, term, adapter) -> node, inserted before the site's first call
    operand: placeholder of the equation -> node of the target graph
    hoisted: constant of the equation -> node that reads its buffer
    dtype:   in which values are computed, see `dtype_of`
    stack:   how many matrices the weight holds; 0 for one. `stacked` are the nodes whose values then have that many
             entries, [stack, *shape]
    nonlinear: operand -> nonlinearity that follows its product with an activation

    A value's node says in meta["dtype"] which dtype it is held in, in meta["shape"] its shape (of one entry, where
    meta["stacked"]).
    """

    def __init__(
        self,
        equation: Equation,
        emit: Callable,
        operand: Callable,
        hoisted: Callable,
        dtype: torch.dtype,
        full_size: int,
        lowered: Lowered,
        nonlinear: Mapping[Operand, str],
        stack: int = 0,
        shared: frozenset[Operand] = frozenset(),
    ):
        self.nonlinear = nonlinear
        self.stacked = stacked(equation, shared) if stack else set()
        self.stack = stack
        self.equation, self.emit, self.operand, self.hoisted = equation, emit, operand, hoisted
        self.dtype, self.full_size, self.lowered = dtype, full_size, lowered
        self.made: dict[fx.Node, fx.Node] = {}
        self.cast: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}

    def of(self, node: fx.Node) -> fx.Node:
        """The node's value as it stands."""
        if node not in self.made:
            self.made[node] = self._make(node)
            self.made[node].meta |= {"shape": self.equation.shape(node), "stacked": node in self.stacked}
        return self.made[node]

    def _make(self, node: fx.Node) -> fx.Node:
        equation = self.equation
        if node.op == "placeholder":
            return self.operand(equation.operands[node])
        if equation.is_constant(node):
            return self.hoisted(node)
        self.check_linear(node)
        for source in node.all_input_nodes:
            if self.is_dense(source) and not self.is_dense(node):
                self.note(f"{operator_name(node)} reads a full-size matrix")
        if node in equation.trainable:
            self.lowered.per_step += flops(equation, node) * (self.stack if node in self.stacked else 1)
        dtype = self.dtype_of(node)
        if node in self.stacked:
            made = self.lifted(node, dtype)
        else:
            args = fx.node.map_arg(node.args, lambda n: self.held_in(n, dtype))
            kwargs = fx.node.map_arg(node.kwargs, lambda n: self.held_in(n, dtype))
            made = self.emit(node.target, args, equation.term(node), equation.adapter(node), kwargs)
        made.meta["dtype"] = dtype
        return made

    def dtype_of(self, node: fx.Node) -> torch.dtype:
        """In which a node is computed: a product with a matrix of the weight's size in that matrix's dtype, as a call
        of the weight is, so that no matrix is widened each step; all else in `dtype`."""
        sizes = {source: self.equation.numel(source) for source in node.all_input_nodes}
        full = [source for source, size in sizes.items() if is_a(node, Kind.MATMUL) and size >= self.full_size > 1]
        dtypes = [self.of(source).meta["dtype"] for source in full]
        return dtypes[0] if dtypes else self.dtype

    def lifted(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The operator for every entry of the stack."""
        sources = list(dict.fromkeys(node.all_input_nodes))
        values = {source: self.held_in(source, dtype) for source in sources}
        inner = lift(node, tuple(source in self.stacked for source in sources), self.stack)
        known = dict(zip(inner.find_nodes(op="placeholder"), values.values(), strict=True))
        term, adapter = self.equation.term(node), self.equation.adapter(node)
        made = copied(inner, known, lambda each, args, kwargs: self.emit(each.target, args, term, adapter, kwargs))
        return made[flat_outputs(inner)[0]]

    def check_linear(self, node: fx.Node) -> None:
        """A tensor that a nonlinearity follows has to meet the activation alone."""
        operands = [self.equation.operands[leaf] for leaf in self.equation.leaves(node)]
        if not is_a(node, VIEWS) and (found := [operand for operand in operands if operand in self.nonlinear]):
            adapter, tensor = found[0]
            raise MethodError(
                f"{adapter}: a nonlinearity follows {tensor}, but {operator_name(node)} needs {tensor} in a matrix of "
                "its own here. Such a method takes linear and convolution sites, and no method over it that reads φ(W)."
            )

    def held_in(self, node: fx.Node, dtype: torch.dtype) -> fx.Node:
        """The node's value, cast where it is held in another dtype."""
        value = self.of(node)
        if value.meta["dtype"] == dtype:
            return value
        if (value, dtype) not in self.cast:
            term, adapter = f"{self.equation.term(node)}_cast", self.equation.adapter(node)
            cast = self.emit(aten.to.dtype, (value, dtype), term, adapter)
            cast.meta |= {"shape": value.meta["shape"], "stacked": value.meta["stacked"], "dtype": dtype}
            self.cast[value, dtype] = cast
        return self.cast[value, dtype]

    def is_dense(self, node: fx.Node) -> bool:
        """A computed matrix of the weight's own size that changes each step."""
        computed = node.op == "call_function" and not is_a(node, VIEWS)
        return computed and node in self.equation.trainable and self.equation.numel(node) >= self.full_size > 1

    def note(self, reason: str) -> None:
        if reason not in self.lowered.dense:
            self.lowered.dense.append(reason)


def flops(equation: Equation, node: fx.Node) -> int:
    """Multiply-adds ×2 of a product, one per element of anything else; views are free."""
    if is_a(node, Kind.MATMUL):
        return 2 * equation.numel(node) * equation.shape(node.args[0])[-1]
    return 0 if is_a(node, VIEWS) else equation.numel(node)
