"""Equations as text. Python's own parser reads them; a whitelist of its nodes is walked on tensors, symbols or numbers,
and nothing is run as Python.

    names, numbers, ( ), + - * / @ **, .T, [:, None] (a vector as a column), [None, :] (as a row), function(…)
"""

import ast
import keyword
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
WORD = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|[A-Za-z_]\w*"
TOKEN = re.compile(rf"(?P<word>{WORD})|[-+*/@()\[\],:. ]", re.A)
SIGN = re.compile(r"\*\*|//|[-+*/@]")
REFUSED = {
    **dict.fromkeys("'\"", "strings have no place"),
    **dict.fromkeys("=<>!", "an equation is its right-hand side, without comparison or assignment"),
    "^": "a power is **", "·": "a product is *", "×": "a product is *", "−": "a minus is -",
}  # fmt: skip


class EquationError(MethodError):
    """An equation that cannot be read or evaluated. `column` is the offending character's, counted from 0."""

    def __init__(self, what: str, text: str, column: int, option: tuple[str, ...] = ()):
        self.what, self.text, self.column = what, text, column
        start = max(0, column - SHOWN * 2 // 3)
        super().__init__(f"{what}\n    {text[start : start + SHOWN]}\n    {' ' * (column - start)}^", option=option)


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
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.MatMult: operator.matmul, ast.Pow: power,
}  # fmt: skip


def vector(index: tuple[Any, ...]) -> Callable[[Any], Any]:
    def apply(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.ndim != 1:
            raise ValueError("it takes a vector")
        return value[index]

    return apply


SUBSCRIPTS = {"[:,None]": vector((slice(None), None)), "[None,:]": vector((None, slice(None)))}


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
    tree = parsed(text)
    return Expression(text, tuple(Reader(text, names).step(node) for node in in_order(text, tree)))


def parsed(text: str) -> ast.expr:
    """The text is of ASCII characters once its tokens are read, so that columns are those of Python."""
    known = plain(text)
    try:
        return ast.parse(known, mode="eval").body
    except (RecursionError, MemoryError) as error:
        raise EquationError(f"The equation is nested more than {NESTING} deep.", text, 0) from error
    except SyntaxError as error:
        raise misplaced(error, text) from error


def plain(text: str) -> str:
    """The text with words of Python, which may be names here (`in`), as others of their length."""
    column, parts, after = 0, [], False
    while column < len(text):
        match = TOKEN.match(text, column)
        if match is None:
            why = REFUSED.get(text[column], "it has ASCII letters, digits, and + - * / @ ** ( ) [ ] , : .")
            raise EquationError(f"{text[column]!r} is not part of an equation: {why}.", text, column)
        word = match["word"]
        if word and after:
            raise EquationError(f"An operator is expected, not {word!r}.", text, column)
        after = bool(word) or match[0] in (")", "]") or (after and match[0] == " ")
        parts.append("_" * len(word) if word and keyword.iskeyword(word) and word != "None" else match[0])
        column = match.end()
    return "".join(parts)


def misplaced(error: SyntaxError, text: str) -> EquationError:
    column = (error.offset or len(text) + 1) - 1
    if "nested" in error.msg:
        return EquationError(f"The equation is nested more than {NESTING} deep.", text, column)
    if re.search("never closed|unmatched|does not match", error.msg):
        return EquationError(f"{error.msg[0].upper()}{error.msg[1:]}.", text, column)
    match = TOKEN.match(text, column)
    found = f"{match[0]!r} is not expected here" if match else "A value is expected, not the end"
    return EquationError(f"{found}.", text, column)


def in_order(text: str, tree: ast.expr) -> list[ast.expr]:
    """The nodes in the order in which they are evaluated."""
    pending, found = [(tree, 0)], []
    while pending:
        node, depth = pending.pop()
        if depth > NESTING:
            raise EquationError(f"The equation is nested more than {NESTING} deep.", text, node.col_offset)
        found.append(node)
        match node:
            case ast.BinOp(left, _, right):
                pending += [(left, depth), (right, depth + 1)]
            case ast.UnaryOp(_, operand):
                pending.append((operand, depth + 1))
            case ast.Attribute(value) | ast.Subscript(value):
                pending.append((value, depth))
            case ast.Call(_, arguments):
                pending += [(argument, depth + 1) for argument in arguments]
    return found[::-1]


class Reader:
    """Steps of the nodes that an equation has."""

    def __init__(self, text: str, names: Collection[str]):
        self.text, self.names = text, names

    def source(self, node: ast.expr) -> str:
        return self.text[node.col_offset : node.end_col_offset]

    def refuse(self, what: str, column: int) -> EquationError:
        return EquationError(what, self.text, column)

    def step(self, node: ast.expr) -> Step:
        match node:
            case ast.BinOp(left, sign):
                at = SIGN.search(self.text, left.end_col_offset)
                if type(sign) not in OPERATORS:
                    raise self.refuse(f"{at[0]!r} is not part of an equation.", at.start())
                return Step(at[0], at.start(), 2, OPERATORS[type(sign)])
            case ast.UnaryOp(ast.USub()):
                return Step("-", node.col_offset, 1, operator.neg)
            case ast.Attribute(value, attribute):
                if attribute != "T":
                    column = node.end_col_offset - len(attribute)
                    raise self.refuse("The only attribute is .T, the transpose.", column)
                return Step(".T", self.text.index(".", value.end_col_offset), 1, lambda value: value.mT)
            case ast.Subscript(value):
                column = self.text.index("[", value.end_col_offset)
                form = self.text[column : node.end_col_offset].replace(" ", "")
                if form not in SUBSCRIPTS:
                    raise self.refuse("The only subscripts are [:, None] and [None, :].", column)
                return Step(form, column, 1, SUBSCRIPTS[form])
            case ast.Call(ast.Name(), arguments, []):
                return self.call(self.source(node.func), node.col_offset, len(arguments))
            case ast.Constant(int() | float() as value) if not isinstance(value, bool):
                return self.number(node, value)
            case ast.Name() | ast.Constant():
                return self.name(self.source(node), node.col_offset)
        raise self.refuse(f"{self.source(node)[:20]!r} is not part of an equation.", node.col_offset)

    def number(self, node: ast.expr, value: float) -> Step:
        text = self.source(node)
        if value > torch.finfo(torch.float32).max:
            raise self.refuse(f"The number {text[:20]} is too large.", node.col_offset)
        return Step(text, node.col_offset, 0, lambda: value)

    def name(self, name: str, column: int) -> Step:
        if name in self.names:
            return Step(name, column)
        if name in FUNCTIONS:
            raise self.refuse(f"{name} is a function: write {name}(…).", column)
        hint = suggestion(name, self.names)
        raise self.refuse(f"Unknown name {name!r}.{hint} Names: {', '.join(self.names)}.", column)

    def call(self, name: str, column: int, count: int) -> Step:
        if name not in FUNCTIONS:
            hint = suggestion(name, FUNCTIONS)
            known = f"{name!r} is no function: write a product as *." if name in self.names else ""
            raise self.refuse(known or f"Unknown function {name!r}.{hint} Functions: {', '.join(FUNCTIONS)}.", column)
        function = FUNCTIONS[name]
        least, most = function.arguments
        if not least <= count <= most:
            wanted = str(least) if least == most else f"{least} or {most}"
            raise self.refuse(f"{name} takes {wanted} arguments, not {count}.", column)

        def apply(*values: Any) -> Any:
            numbers = function.on_numbers and all(isinstance(value, int | float) for value in values)
            return function.on_numbers(*values) if numbers else function.on_tensors(*values)

        return Step(name, column, count, apply)
