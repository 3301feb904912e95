"""Entries of the tensors that a graph computes, as formulas of where they are: value[i, j] of i and j."""

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from ...base.borrowed import size_formula
from ..nodes import aten, operator_name, sizes, viewed, written_arguments
from ..operators import Kind, argument, extent, is_a, operator_text, permutation, schema
from .terms import AXES, Choice, Entry, Opaque, at_most, below, branches, choice, constant, differs, lift, number, truth
from .token_embedding import EXTENDS

if TYPE_CHECKING:
    pass


Index = tuple[sympy.Expr, ...]
Rule = Callable[["Reader", fx.Node, Index], Entry]  # the entry of a node's value at `index`


def unread(node: fx.Node) -> Opaque:
    return Opaque(f"reads {node.name} = {operator_name(node)}(…)")


def same(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """The operand, broadcast."""
    return reader.at(node.args[0], index)


def repeated(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """Dimensions of size 1 are repeated; of others, no repetition is read."""
    source, counts = node.args
    kept = list(counts)[len(counts) - len(sizes(source)) :]
    if any(size != 1 and count != 1 for size, count in zip(sizes(source), kept, strict=True)):
        raise unread(node)
    return reader.at(source, index)


def reshaped(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """Dimensions of size 1 come and go; no other reshaping is read."""
    before, after = sizes(node.args[0]), sizes(node)
    if [str(s) for s in before if s != 1] != [str(s) for s in after if s != 1]:
        raise Opaque(f"reshapes {list(before)} to {list(after)}")
    moving = iter([i for s, i in zip(after, index, strict=True) if s != 1])
    return reader.entry(node.args[0], tuple(sympy.Integer(0) if s == 1 else next(moving) for s in before))


def permuted(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    order = permutation(node)
    return reader.entry(node.args[0], tuple(index[order.index(d)] for d in range(len(index))))


def sliced(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    dim, start, _, step = extent(node)
    dim, start = dim % len(index), reader.size(start or 0)
    return reader.entry(node.args[0], (*index[:dim], counted(start + step * index[dim]), *index[dim + 1 :]))


def selected(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    dim, at = argument(node, "dim") % (len(index) + 1), argument(node, "index")
    return reader.entry(node.args[0], (*index[:dim], counted(reader.size(at)), *index[dim:]))


def indexed(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    source, indices = node.args
    if None in indices:
        raise unread(node)
    taken = len(index) - (len(sizes(source)) - len(indices))
    places = (counted(number(reader.at(i, index[:taken]))) for i in indices)
    return reader.entry(source, (*places, *index[taken:]))


def counted(place: Entry) -> sympy.Expr:
    """A place in a tensor, counted from its front."""
    if isinstance(place, Choice) or not place.is_nonnegative:
        raise Opaque("indexes from behind")
    return place


def counting(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """arange: start + step·i"""
    given = schema(node.target)
    start, step = (reader.size(argument(node, n) if n in given else i) for i, n in enumerate(("start", "step")))
    return start + step * index[0]


def filled(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    return reader.at(argument(node, "s" if node.target is aten.scalar_tensor.default else "fill_value"), ())


def every(value: int) -> Rule:
    return lambda reader, node, index: sympy.Integer(value)


def applied(function: Callable[..., Entry], operands: int = 2) -> Rule:
    """An elementwise function of numbers."""

    def rule(reader: "Reader", node: fx.Node, index: Index) -> Entry:
        if node.kwargs.get("alpha", 1) != 1 or len(node.args) > operands:
            raise unread(node)
        return lift(function, *(reader.at(operand, index) for operand in node.args[:operands]))

    return rule


def logical(function: Callable[..., Boolean], operands: int = 2) -> Rule:
    """An elementwise function of truth values; of integers, bit by bit, it is not read."""

    def rule(reader: "Reader", node: fx.Node, index: Index) -> Entry:
        if node.meta["val"].dtype != torch.bool:
            raise unread(node)
        return function(*(truth(reader.at(operand, index)) for operand in node.args[:operands]))

    return rule


def chosen(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """where(condition, a, b)"""
    condition, yes, no = (reader.at(operand, index) for operand in node.args)
    return choice(truth(condition), yes, no)


def refilled(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """masked_fill(x, condition, value)"""
    source, condition, value = (reader.at(operand, index) for operand in node.args)
    return choice(truth(condition), value, source)


def triangle(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """tril keeps column − row <= diagonal, triu column − row >= diagonal."""
    diagonal, across = reader.size(argument(node, "diagonal")), index[-1] - index[-2]
    kept = at_most(across, diagonal) if node.target is aten.tril.default else at_most(diagonal, across)
    return choice(kept, reader.at(node.args[0], index), sympy.Integer(0))


def difference(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """diff with one entry in front, where the first difference is as all others."""
    source, n, dim, front, behind = (argument(node, name) for name in ("self", "n", "dim", "prepend", "append"))
    dim %= len(index)
    if n != 1 or front is None or sizes(front)[dim] != 1 or behind is not None:
        raise unread(node)

    def along(x: fx.Node, i: sympy.Expr) -> Entry:
        return number(reader.at(x, (*index[:dim], i, *index[dim + 1 :])))

    step = sympy.Dummy("step", integer=True, nonnegative=True)
    zero = sympy.Integer(0)
    later = lift(operator.sub, along(source, step + 1), along(source, step))
    first = lift(operator.sub, along(source, zero), along(front, zero))
    if isinstance(later, Choice) or isinstance(first, Choice) or sympy.expand(later) != sympy.expand(first):
        raise unread(node)
    return sympy.expand(first)


def summed(reader: "Reader", node: fx.Node, index: Index) -> Entry:
    """cumsum of zeros"""
    dim = argument(node, "dim") % len(index)
    step = sympy.Dummy("step", integer=True, nonnegative=True)
    if number(reader.at(node.args[0], (*index[:dim], step, *index[dim + 1 :]))) != 0:
        raise unread(node)
    return sympy.Integer(0)


COMPARED: dict[str, Callable[..., Entry]] = {
    "le": at_most,
    "lt": below,
    "ge": lambda a, b: at_most(b, a),
    "gt": lambda a, b: below(b, a),
    "ne": differs,
    "eq": lambda a, b: ~differs(a, b),
}
LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
OF_KINDS: dict[Kind, Rule] = {
    Kind.SAME | Kind.CAST | Kind.BROADCAST: same,
    Kind.RESHAPE: reshaped,
    Kind.TRANSPOSE: permuted,
    Kind.SLICE: sliced,
    Kind.SELECT: selected,
    Kind.INDEX: indexed,
    Kind.RANGE: counting,
    Kind.ADD: applied(operator.add),
    Kind.SUBTRACT: applied(operator.sub),
    Kind.MULTIPLY: applied(operator.mul),
    Kind.NEGATE: applied(operator.neg, 1),
    Kind.MASKED: refilled,
}
OF_NAMES: dict[str, Rule] = {
    "repeat": repeated,
    **dict.fromkeys(("ones", "new_ones", "ones_like"), every(1)),
    **dict.fromkeys(("zeros", "new_zeros", "zeros_like"), every(0)),
    **dict.fromkeys(("full", "full_like", "new_full", "scalar_tensor"), filled),
    **{f"{n}.{kind}": applied(f) for n, f in COMPARED.items() for kind in ("Tensor", "Scalar")},
    "rsub.Scalar": applied(lambda a, b: b - a),
    **{f"bitwise_{n}.Tensor": logical(f) for n, f in LOGIC.items()},
    **{f"logical_{n}": logical(f) for n, f in LOGIC.items()},
    **{f"__{n}__.Tensor": logical(f) for n, f in LOGIC.items()},
    **dict.fromkeys(("bitwise_not", "logical_not"), logical(operator.invert, 1)),
    **dict.fromkeys(("where.self", "where.ScalarOther", "where.ScalarSelf", "where.Scalar"), chosen),
    **dict.fromkeys(("tril", "triu"), triangle),
    "diff": difference,
    "cumsum": summed,
}


def rule_of(node: fx.Node) -> Rule:
    """The rule of a node's operator. Raises Opaque where there is none."""
    of_kind = (rule for kinds, rule in OF_KINDS.items() if is_a(node, kinds))
    rule = OF_NAMES.get(operator_text(node.target)) or next(of_kind, None)
    if rule is None:
        raise unread(node)
    return rule


class Reader:
    """Reads entries of the nodes of one graph.

    padding: names of inputs [batch, length] of which every row is known to be ones and then zeros
    """

    def __init__(self, graph: fx.Graph, padding: frozenset[str] = frozenset()):
        self.padding = padding
        self.written = {viewed(target) for node in graph.nodes for target in written_arguments(node)}
        self.known: dict[tuple[fx.Node, Index], Entry] = {}

    def at(self, value: Any, index: Index) -> Entry:
        """The entry of an operand, broadcast to the shape that `index` goes through."""
        if not isinstance(value, fx.Node):
            return constant(value)
        if not isinstance(value.meta.get("val"), torch.Tensor):
            return self.size(value)
        shape = sizes(value)
        own = index[len(index) - len(shape) :]
        return self.entry(value, tuple(sympy.Integer(0) if s == 1 else i for s, i in zip(shape, own, strict=True)))

    def size(self, value: Any) -> sympy.Expr:
        """A number that is known when the graph is: a literal, or a size."""
        if isinstance(value, fx.Node):
            value = value.meta.get("val")
        if isinstance(value, torch.SymInt):
            expression = size_formula(value)
            if {str(symbol) for symbol in expression.free_symbols}.intersection(map(str, AXES)):
                raise Opaque(f"takes a size that is named {expression}")
            return expression
        if isinstance(value, int):
            return sympy.Integer(value)
        raise Opaque(f"takes {value} for a size")

    def entry(self, node: fx.Node, index: Index) -> Entry:
        key = (node, index)
        if key not in self.known:
            if viewed(node) in self.written:
                raise Opaque(f"reads {node.name}, which is written to in place")
            self.known[key] = self.converted(node, self.read(node, index))
        return self.known[key]

    def converted(self, node: fx.Node, entry: Entry) -> Entry:
        """In the dtype of the node. Positions in floating-point or short numbers, which round or wrap, are not read."""
        dtype = node.meta["val"].dtype
        if dtype == torch.bool:
            return truth(entry)
        entry = number(entry)
        if (dtype.is_floating_point or dtype.itemsize < 4) and not all(leaf.is_number for leaf in branches(entry)):
            raise Opaque(f"reads positions as {dtype} in {node.name}")
        if not dtype.is_floating_point and not all(leaf.is_integer for leaf in branches(entry)):
            raise Opaque(f"rounds in {node.name}")
        return entry

    def read(self, node: fx.Node, index: Index) -> Entry:
        source = node.meta.get(EXTENDS, node.name if node.op == "placeholder" else None)
        if source is not None:
            dtype = node.meta["val"].dtype
            text = f"{source}[{', '.join(map(str, index))}]"
            if source in self.padding or dtype == torch.bool:
                return sympy.Symbol(text)
            if dtype.is_floating_point:
                raise Opaque(f"adds the input {source}")
            return sympy.Symbol(text, integer=True)
        if node.op == "get_attr":
            raise Opaque(f"reads the tensor {node.target}")
        return rule_of(node)(self, node, index)
