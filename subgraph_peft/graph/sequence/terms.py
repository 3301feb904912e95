"""Numbers and truth values that hang on positions: one normal form for however they were computed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sympy
from sympy.logic.boolalg import Boolean

BATCH, _, QUERY, KEY = AXES = sympy.symbols("batch head query key", integer=True, nonnegative=True)

Entry = Any  # a Boolean, a number (sympy.Expr), or a Choice of these


class Opaque(Exception):
    """What has no formula, and why."""


@dataclass(frozen=True)
class Choice:
    """A number that hangs on a condition."""

    condition: Boolean
    yes: Any
    no: Any


def is_truth(entry: Entry) -> bool:
    """Whether an entry is a truth value. To sympy an integer symbol is one as well."""
    return isinstance(entry, Boolean) and not (isinstance(entry, sympy.Symbol) and entry.is_integer)


def choice(condition: Boolean, yes: Entry, no: Entry) -> Entry:
    if condition in (sympy.true, sympy.false):
        return yes if condition else no
    if yes == no:
        return yes
    if is_truth(yes) and is_truth(no):
        return (condition & yes) | (~condition & no)
    return Choice(condition, number(yes), number(no))


def number(entry: Entry) -> Entry:
    return choice(entry, sympy.Integer(1), sympy.Integer(0)) if is_truth(entry) else entry


def truth(entry: Entry) -> Boolean:
    return entry if is_truth(entry) else lift(differs, entry, sympy.Integer(0))


def lift(function: Callable[..., Entry], *entries: Entry) -> Entry:
    """A function of numbers, on every branch of numbers that hang on conditions."""
    entries = tuple(map(number, entries))
    for at, entry in enumerate(entries):
        if isinstance(entry, Choice):
            yes, no = (lift(function, *entries[:at], e, *entries[at + 1 :]) for e in (entry.yes, entry.no))
            return choice(entry.condition, yes, no)
    return function(*entries)


def at_most(a: sympy.Expr, b: sympy.Expr) -> Boolean:
    """a <= b, as one symbol of the same text however it was written: of d <= 0 and its negation 1 - d <= 0, the one
    whose first variable is positive."""
    d = linear(a - b)
    if d.is_nonpositive or d.is_positive:
        return sympy.true if d.is_nonpositive else sympy.false
    if leading(d) < 0:
        return ~at_most(sympy.expand(1 - d), sympy.Integer(0))
    return sympy.Symbol(" <= ".join(sides(d)))


def differs(a: sympy.Expr, b: sympy.Expr) -> Boolean:
    d = linear(a - b)
    if d.is_zero is not None:
        return sympy.false if d.is_zero else sympy.true
    return ~sympy.Symbol(" == ".join(sides(d if leading(d) > 0 else -d)))


def linear(d: sympy.Expr) -> sympy.Expr:
    """An integer, affine in positions, sizes and entries of inputs; or a number."""
    d = sympy.expand(d)
    if d.is_number and d.is_finite:
        return d
    if d.free_symbols and d.is_polynomial() and sympy.Poly(d).is_linear and d.is_integer:
        return d
    raise Opaque(f"compares {d}")


def leading(d: sympy.Expr) -> sympy.Expr:
    return d.coeff(min(d.free_symbols, key=str))


def sides(d: sympy.Expr) -> tuple[str, str]:
    """The terms of d with positive coefficients, and the others with their signs turned."""
    terms = [(term, term.as_coeff_Mul()[0] > 0) for term in sympy.Add.make_args(d)]
    return str(sympy.Add(*(t for t, up in terms if up))), str(sympy.Add(*(-t for t, up in terms if not up)))


def below(a: sympy.Expr, b: sympy.Expr) -> Boolean:
    """a < b"""
    d = linear(a - b)
    return sympy.sympify(bool(d < 0)) if d.is_number else at_most(d + 1, sympy.Integer(0))


def constant(value: Any) -> Entry:
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, (int, float)):
        return sympy.sympify(int(value) if value == value // 1 else value)
    raise Opaque(f"reads {value}")


def branches(entry: Entry) -> list[sympy.Expr]:
    return [*branches(entry.yes), *branches(entry.no)] if isinstance(entry, Choice) else [entry]
