"""Entries of the tensors that a graph computes, as formulas of where they are: value[i, j] of i, j, sizes and inputs.

Only operators whose every entry is known are read; what hangs on anything else has no formula, and none is guessed.
"""

from typing import Any

import sympy
import torch
from torch import fx

from .borrowed import size_formula
from .entry import EXTENDS
from .entry_rules import Index, rule_of
from .graphs import sizes, viewed, written
from .terms import AXES, Entry, Opaque, branches, constant, number, truth


class Reader:
    """Reads entries of the nodes of one graph.

    padding: names of inputs [batch, length] of which every row is known to be ones and then zeros
    """

    def __init__(self, graph: fx.Graph, padding: frozenset[str] = frozenset()):
        self.padding = padding
        self.written = {viewed(target) for node in graph.nodes for target in written(node)}
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
