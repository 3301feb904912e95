"""Conditions on the sizes of inputs under which a graph is the model: of a branch on a shape it holds one way."""

import ast
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from ..base.errors import CaptureError

NO_ONE = re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] (>= 2|!= 1|> 1)")
ALLOWED = (
    ast.Expression, ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Add, ast.Sub, ast.Mult,
    ast.FloorDiv, ast.Mod, ast.Pow, ast.Compare, ast.Eq, ast.NotEq, ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Constant,
    ast.Subscript, ast.Load,
)  # fmt: skip


def guards_of(codes: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The conditions of torch.export (`L['x'].size()[1] > 4`) that are over inputs of these names and can be read; not
    that a size is no 1, which torch.export takes of every dimension that varies."""
    known = set(names)
    wide = (code for code in codes if not NO_ONE.fullmatch(code))
    return tuple(code for code in wide if (read := inputs_of(code)) and read <= known and readable(code))


def compile_guards(guards: Sequence[str]) -> Callable[[Mapping[str, Any]], int]:
    """A function of the inputs by name that gives the number of the first condition they break, or -1. One over an
    input that was left out is not asked. Plain Python, so that torch.compile goes through it."""
    lines = ["def broken(L):"]
    for number, guard in enumerate(guards):
        given = " and ".join(f"L.get({name!r}) is not None" for name in sorted(inputs_of(guard)))
        lines.append(f"    if {given} and not ({guard}): return {number}")
    namespace: dict[str, Any] = {}
    exec("\n".join([*lines, "    return -1"]), namespace)
    return namespace["broken"]


def refusal(guard: str) -> CaptureError:
    return CaptureError(
        f"The captured graph is the model where {text(guard)}, which these inputs break: the model takes another way "
        "there. Capture it with example inputs of such sizes, as a program of its own."
    )


def text(guard: str) -> str:
    """`x.shape[1] > 4`"""
    return re.sub(r"L\['(\w+)'\]", r"\1", guard).replace(".size()", ".shape")


def between(guards: Iterable[str], names: Iterable[str]) -> tuple[str, ...]:
    """The conditions over these inputs, as text, but for those that say that two dimensions are one."""
    known, same = set(names), re.compile(r"L\['\w+'\]\.size\(\)\[\d+\] == L\['\w+'\]\.size\(\)\[\d+\]")
    return tuple(text(guard) for guard in guards if inputs_of(guard) <= known and not same.fullmatch(guard))


def inputs_of(guard: str) -> set[str]:
    return set(re.findall(r"L\['(\w+)'\]", guard))


def readable(guard: str) -> bool:
    """Whether a condition is arithmetic over sizes and nothing else."""
    try:
        tree = ast.parse(guard, mode="eval")
    except SyntaxError:
        return False
    return all(map(allowed, ast.walk(tree)))


def allowed(node: ast.AST) -> bool:
    if isinstance(node, ast.Name):
        return node.id == "L"
    if isinstance(node, ast.Attribute):
        return node.attr == "size"
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Attribute) and not node.args and not node.keywords
    return isinstance(node, ALLOWED)
