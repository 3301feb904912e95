"""What a mask is: where it lets a query see a key, as a formula.

    key <= query                                             causal
    key <= query and key + 4 > query                         causal in a window of 4
    key <= query and attention_mask[batch, key]              causal, padding hidden

The formula is read from the graph that computes the mask.
"""

from dataclasses import dataclass
from itertools import product
from typing import Literal

import sympy
import torch
from sympy.logic.boolalg import Boolean
from torch import fx

from ..nodes import sizes
from .index_formulas import Reader
from .terms import AXES, BATCH, KEY, QUERY, Choice, Entry, Opaque, is_truth

CAUSAL = sympy.Symbol("key <= query")


def allowed(entry: Entry, dtype: torch.dtype) -> Boolean:
    """Where a mask lets a query see a key. Raises Opaque for one that adds anything but 0 and the least number."""
    if is_truth(entry):
        return entry
    if isinstance(entry, Choice):
        yes, no = allowed(entry.yes, dtype), allowed(entry.no, dtype)
        return (entry.condition & yes) | (~entry.condition & no)
    if not entry.is_zero and not (entry.is_extended_real and entry <= torch.finfo(dtype).min):
        raise Opaque(f"adds {entry}")
    return sympy.true if entry.is_zero else sympy.false


@dataclass(frozen=True)
class Mask:
    """What is known of a mask.

    form:     "all" where every query sees every key, "causal" where it sees those up to its own, else None
    formula:  where it lets a query see a key, or what it hangs on
    promise:  inputs that have to be padded on the right for this form
    """

    form: Literal["all", "causal"] | None
    formula: str
    promise: frozenset[str] = frozenset()


def recognise(graph: fx.Graph, mask: fx.Node, padding: frozenset[str] = frozenset()) -> Mask:
    """The form of a mask; with inputs that are `padding`, up to queries that are padding themselves.

    Where every row of m is ones and then zeros, key <= query and m[query] give m[key]: the causal mask hides from a
    token all that `key <= query and m[key]` hides.
    """
    reader = Reader(graph, padding)
    if not 0 < len(sizes(mask)) <= len(AXES):
        return Mask(None, f"{mask.name} is {list(sizes(mask))}")
    try:
        seen = allowed(reader.at(mask, AXES), mask.meta["val"].dtype)
    except Opaque as reason:
        return Mask(None, f"{mask.name} {reason}")
    if seen == sympy.true:
        return Mask("all", "all")
    symbols = seen.free_symbols
    names = frozenset(name for name in padding if any(str(symbol).startswith(f"{name}[") for symbol in symbols))
    real = [[sympy.Symbol(f"{name}[{BATCH}, {place}]") for place in (QUERY, KEY)] for name in names]
    known = [CAUSAL, *(symbol for pair in real for symbol in pair)]

    def differs(*values: bool) -> bool:
        """Whether the mask is not the causal one where these values of `known` can be at a token."""
        at = dict(zip(known, values, strict=True))
        possible = all(at[query] and (at[key] or not at[CAUSAL]) for query, key in real)
        return possible and bool(seen.xreplace({s: sympy.sympify(v) for s, v in at.items()})) != at[CAUSAL]

    if not symbols <= set(known) or any(differs(*values) for values in product((False, True), repeat=len(known))):
        return Mask(None, text(seen))
    return Mask("causal", text(seen), names)


def text(condition: Boolean) -> str:
    if isinstance(condition, sympy.Not):
        inner = text(condition.args[0])
        turned = inner.replace(" <= ", " > ").replace(" == ", " != ")
        return turned if turned != inner else f"not {inner}"
    if isinstance(condition, (sympy.And, sympy.Or)):
        word = " and " if isinstance(condition, sympy.And) else " or "
        parts = [f"({text(part)})" if isinstance(part, sympy.Or) else text(part) for part in condition.args]
        parts.sort(key=lambda part: ("[" in part, " > " in part, part))  # bounds from above, from below, then inputs
        return word.join(parts)
    return str(condition)
