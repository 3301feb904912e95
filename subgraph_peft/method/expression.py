"""Equations as text. A small grammar is parsed and walked on tensors, symbols or numbers; nothing is run as Python.

sum     = product {("+" | "-") product}             postfix = atom {".T" | "[:, None]" | "[None, :]"}
product = unary {("*" | "/" | "@") unary}           atom    = number | name | function "(" arguments ")" | "(" sum ")"
unary   = "-" unary | postfix ["**" unary]

Precedence is Python's. `v[:, None]` is a vector as a column, `v[None, :]` as a row.
"""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from ..base.errors import MethodError, suggestion

LENGTH, NESTING, SHOWN = 1000, 40, 100
TOKEN = re.compile(
    r"(?P<number>(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?)|(?P<name>[A-Za-z_]\w*)|(?P<sign>\*\*|[-+*/@()\[\],:.])", re.A
)
REFUSED = {
    **dict.fromkeys("'\"", "strings have no place"),
    **dict.fromkeys("=<>!", "an equation is its right-hand side, without comparison or assignment"),
    "^": "a power is **", "·": "a product is *", "×": "a product is *", "−": "a minus is -",
}  # fmt: skip


class EquationError(MethodError):
    """An equation that cannot be read or evaluated. `column` is the offending character's, counted from 0."""

    def __init__(self, what: str, text: str, column: int):
        self.what, self.text, self.column = what, text, column
        start = max(0, column - SHOWN * 2 // 3)
        super().__init__(f"{what}\n    {text[start : start + SHOWN]}\n    {' ' * (column - start)}^")


class Function(NamedTuple):
    """on_numbers: the same on plain numbers, where it has a meaning; arguments: least and most"""

    on_tensors: Callable[..., Any]
    on_numbers: Callable[..., float] | None = None
    arguments: tuple[int, int] = (1, 1)


def over(reduce: Callable[..., Any]) -> Callable[..., Any]:
    """Over everything, or over one dimension."""
    return lambda x, dim=None: reduce(x) if dim is None else reduce(x, dim)


FUNCTIONS = {
    "sqrt": Function(torch.sqrt, math.sqrt),
    "exp": Function(torch.exp, math.exp),
    "log": Function(torch.log, math.log),
    "abs": Function(torch.abs, abs),
    "relu": Function(F.relu),
    "gelu": Function(F.gelu),
    "silu": Function(F.silu),
    "tanh": Function(torch.tanh),
    "sigmoid": Function(torch.sigmoid),
    "diag": Function(torch.diag),
    "norm": Function(lambda x: torch.linalg.vector_norm(x, dim=-1)),
    "sum": Function(over(torch.sum), arguments=(1, 2)),
    "mean": Function(over(torch.mean), arguments=(1, 2)),
    "clamp_min": Function(torch.clamp_min, arguments=(2, 2)),
    "detach": Function(lambda x: x.detach()),
    "linear": Function(F.linear, arguments=(2, 2)),
}  # fmt: skip


def power(base: Any, exponent: Any) -> Any:
    return (
        math.pow(base, exponent)
        if isinstance(base, int | float) and isinstance(exponent, int | float)
        else base**exponent
    )


OPERATORS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "@": operator.matmul, "**": power,
}  # fmt: skip
LEVELS = (("+", "-"), ("*", "/", "@"))


def vector(index: tuple[Any, ...]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim != 1:
            raise ValueError("it takes a vector")
        return value[index]

    return apply


POSTFIXES = {
    (".", "T"): lambda value: value.mT,
    ("[", ":", ",", "None", "]"): vector((slice(None), None)),
    ("[", "None", ",", ":", "]"): vector((None, slice(None))),
}


class Token(NamedTuple):
    kind: str
    text: str
    column: int


class Step(NamedTuple):
    """`apply` on the last `takes` values; a name has no `apply` and takes its value from what is given."""

    label: str
    column: int
    takes: int = 0
    apply: Callable[..., Any] | None = None


@dataclass(frozen=True)
class Expression:
    """A parsed equation: its steps in the order of evaluation. Called with values by name, it gives its value."""

    text: str
    steps: tuple[Step, ...]

    @property
    def names(self) -> set[str]:
        return {step.label for step in self.steps if step.apply is None}

    def __call__(self, given: Mapping[str, Any]) -> Any:
        """Raises EquationError where an operation does not fit its operands."""
        stack: list[Any] = []
        for label, column, takes, apply in self.steps:
            if apply is None:
                stack.append(given[label])
                continue
            values, stack = stack[len(stack) - takes :], stack[: len(stack) - takes]
            try:
                stack.append(apply(*values))
            except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError) as error:
                reason = str(error).partition("\n")[0].rstrip(".")
                raise EquationError(
                    f"{label!r} cannot be applied to {' and '.join(map(described, values))}: {reason}.",
                    self.text,
                    column,
                ) from error
        return stack[0]


def described(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else f"the number {value}"


def parse(text: str, names: Collection[str]) -> Expression:
    """The equation over `names`. Raises EquationError, which shows the text and points at the character."""
    text = re.sub(r"\s", " ", text).strip()
    if len(text) > LENGTH:
        raise EquationError(f"The equation has {len(text)} characters; {LENGTH} are allowed.", text, LENGTH)
    return Parser(text, names).run()


def tokens(text: str) -> list[Token]:
    found, column = [], 0
    while column < len(text):
        if text[column] == " ":
            column += 1
            continue
        match = TOKEN.match(text, column)
        if match is None:
            why = REFUSED.get(text[column], "it has ASCII letters, digits, and + - * / @ ** ( ) [ ] , : .")
            raise EquationError(f"{text[column]!r} is not part of an equation: {why}.", text, column)
        found.append(Token(match.lastgroup, match[0], column))
        column = match.end()
    return [*found, Token("end", "", len(text))]


class Parser:
    """Recursive descent; each rule appends its steps."""

    def __init__(self, text: str, names: Collection[str]):
        self.text, self.names = text, names
        self.tokens, self.position, self.depth = tokens(text), 0, 0
        self.steps: list[Step] = []

    @property
    def here(self) -> Token:
        return self.tokens[self.position]

    def take(self) -> Token:
        self.position += 1
        return self.tokens[self.position - 1]

    def refuse(self, what: str, at: Token | None = None) -> EquationError:
        return EquationError(what, self.text, (at or self.here).column)

    def expect(self, what: str, *texts: str) -> Token:
        if self.here.text not in texts:
            found = repr(self.here.text) if self.here.text else "the end"
            raise self.refuse(f"{what} is expected, not {found}.")
        return self.take()

    def run(self) -> Expression:
        self.binary()
        self.expect("An operator", "")
        return Expression(self.text, tuple(self.steps))

    def binary(self, level: int = 0) -> None:
        if level == len(LEVELS):
            self.unary()
            return
        self.binary(level + 1)
        while self.here.text in LEVELS[level]:
            sign = self.take()
            self.binary(level + 1)
            self.steps.append(Step(sign.text, sign.column, 2, OPERATORS[sign.text]))

    def unary(self) -> None:
        self.depth += 1
        if self.depth > NESTING:
            raise self.refuse(f"The equation is nested more than {NESTING} deep.")
        if self.here.text == "-":
            sign = self.take()
            self.unary()
            self.steps.append(Step("-", sign.column, 1, operator.neg))
        else:
            self.postfix()
            if self.here.text == "**":
                sign = self.take()
                self.unary()
                self.steps.append(Step("**", sign.column, 2, power))
        self.depth -= 1

    def postfix(self) -> None:
        self.atom()
        while self.here.text in (".", "["):
            first = self.here
            form = next((form for form in POSTFIXES if self.follows(form)), None)
            if form is None and first.text == ".":
                raise self.refuse("The only attribute is .T, the transpose.", self.tokens[self.position + 1])
            if form is None:
                raise self.refuse("The only subscripts are [:, None] and [None, :].")
            self.position += len(form)
            self.steps.append(Step("".join(form), first.column, 1, POSTFIXES[form]))

    def follows(self, form: tuple[str, ...]) -> bool:
        return tuple(token.text for token in self.tokens[self.position : self.position + len(form)]) == form

    def atom(self) -> None:
        token = self.here
        if token.kind == "number":
            self.take()
            self.number(token)
        elif token.kind == "name":
            self.take()
            self.call(token) if self.here.text == "(" else self.name(token)
        else:
            self.expect("A value", "(")
            self.binary()
            self.expect("')'", ")")

    def number(self, token: Token) -> None:
        value = int(token.text) if token.text.isdecimal() else float(token.text)
        if abs(value) > torch.finfo(torch.float32).max:
            raise self.refuse(f"The number {token.text[:20]} is too large.", token)
        self.steps.append(Step(token.text, token.column, 0, lambda: value))

    def name(self, token: Token) -> None:
        if token.text not in self.names:
            if token.text in FUNCTIONS:
                raise self.refuse(f"{token.text} is a function: write {token.text}(…).", token)
            raise self.refuse(
                f"Unknown name {token.text!r}.{suggestion(token.text, self.names)} Names: {', '.join(self.names)}.",
                token,
            )
        self.steps.append(Step(token.text, token.column))

    def call(self, token: Token) -> None:
        if token.text not in FUNCTIONS:
            hint = suggestion(token.text, FUNCTIONS)
            known = f"{token.text!r} is no function: write a product as *." if token.text in self.names else ""
            raise self.refuse(
                known or f"Unknown function {token.text!r}.{hint} Functions: {', '.join(FUNCTIONS)}.", token
            )
        function, count = FUNCTIONS[token.text], 1
        self.take()
        self.binary()
        while self.here.text == ",":
            self.take()
            self.binary()
            count += 1
        self.expect("',' or ')'", ")")
        least, most = function.arguments
        if not least <= count <= most:
            wanted = str(least) if least == most else f"{least} or {most}"
            raise self.refuse(f"{token.text} takes {wanted} arguments, not {count}.", token)

        def apply(*values: Any) -> Any:
            numbers = function.on_numbers and all(isinstance(value, int | float) for value in values)
            return function.on_numbers(*values) if numbers else function.on_tensors(*values)

        self.steps.append(Step(token.text, token.column, count, apply))
