"""What a graph may consist of. Python code is made of it and compiled, so that a name that is none could run anything,
and a file must not name what does more than compute."""

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from keyword import iskeyword
from typing import Any
from unicodedata import normalize

import torch

from ..base.borrowed import HigherOrderOperator, OpOverload, has_kernel, schema_of
from ..base.errors import CheckpointError

OPERATOR = (
    "abs", "add", "and_", "eq", "floordiv", "ge", "getitem", "gt", "invert", "le", "lshift", "lt", "mod", "mul", "ne",
    "neg", "not_", "or_", "pos", "pow", "rshift", "sub", "truediv", "xor",
)  # fmt: skip
MATH = (
    "acos", "asin", "atan", "ceil", "cos", "cosh", "exp", "floor", "log", "log2", "pow", "sin", "sinh", "sqrt", "tan",
    "tanh", "trunc",
)  # fmt: skip
TORCH = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum", "_sym_sqrt")
FUNCTIONS: Mapping[str, Callable] = {
    f"{library}.{name}": getattr(module, name)
    for library, module, names in (("_operator", operator, OPERATOR), ("math", math, MATH), ("torch", torch, TORCH))
    for name in names
}
HIGHER_ORDER = ("associative_scan", "cond", "flex_attention", "map_impl", "scan", "while_loop", "wrap_with_autocast")
OPS = ("placeholder", "get_attr", "call_function", "output")


def is_name(text: Any) -> bool:
    return isinstance(text, str) and text.isidentifier() and not iskeyword(text)


def is_path(text: Any) -> bool:
    """Whether a qualified name ends where a string literal of it ends, and names the same in code, where Python reads
    identifiers in their NFKC form."""
    if not isinstance(text, str) or not text.isprintable() or {'"', "\\"} & set(text):
        return False
    return all(part == normalize("NFKC", part) for part in text.split(".") if part.isidentifier())


def illegal(op: str, name: Any, target: Any, args: Sequence[Any], kwargs: Any) -> str | None:
    """Why the code that a node becomes could be something else than the node, or None."""
    if not is_name(name):
        return "has no valid name"
    if not isinstance(kwargs, dict) or not all(map(is_name, kwargs)):
        return f"has arguments {kwargs!r}, which are not named by identifiers"
    if op == "placeholder" and not is_name(target):
        return f"is an input called {target!r}, which is no identifier"
    if op in ("get_attr", "call_module") and not is_path(target):
        return f"reads {target!r}, which is no qualified name"
    if op == "output" and len(args) != 1:
        return "returns more than one value"
    return None


def check_node(op: str, name: Any, target: Any, args: Sequence[Any], kwargs: Any, held: Collection[str]) -> None:
    """Raises CheckpointError for a node that a file cannot have. `held`: what the graph's module holds."""
    problem = illegal(op, name, target, args, kwargs)
    if op not in OPS:
        problem = f"is a {op!r}; a graph is made of {', '.join(OPS)}"
    elif problem is None and op == "placeholder" and (target != name or args or kwargs):
        problem = f"is an input that is called {target!r} or has arguments"
    elif problem is None and op == "get_attr" and target not in held:
        problem = f"reads {target!r}, which is no tensor of the program"
    if problem:
        raise CheckpointError(f"The node {name!r} of the graph {problem}.")


def operator_text(name: str, target: Any) -> str:
    """`torch.ops.<library>.<name>.<overload>`, or `<module>.<function>`. Raises CheckpointError for what
    `operator_of` does not find."""
    if isinstance(target, OpOverload):
        text = f"torch.ops.{target}"
    elif isinstance(target, HigherOrderOperator):
        text = f"torch.ops.higher_order.{target}"
    else:
        text = f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', '')}"
    try:
        operator_of(name, text)
    except CheckpointError as error:
        raise CheckpointError(f"The node {name} cannot be written: {target} is no operator of a library.") from error
    return text


def operator_of(name: str, text: Any) -> Any:
    """The operator of a node: one of a library that computes on tensors, a function in FUNCTIONS, or one of
    HIGHER_ORDER. Raises CheckpointError for any other."""
    if text in FUNCTIONS:
        return FUNCTIONS[text]
    try:
        if not re.fullmatch(r"torch\.ops\.(higher_order\.\w+|\w+\.\w+\.\w+)", str(text), re.ASCII):
            raise AttributeError
        found = operator.attrgetter(text.removeprefix("torch.ops."))(torch.ops)
    except AttributeError:
        raise CheckpointError(
            f"The node {name!r} of the graph calls {text}, which this process does not know. Import the library that "
            "registers it first."
        ) from None
    if isinstance(found, HigherOrderOperator) and text in [f"torch.ops.higher_order.{n}" for n in HIGHER_ORDER]:
        return found
    if isinstance(found, OpOverload) and computes(found):
        return found
    raise CheckpointError(f"The node {name!r} of the graph calls {text}, which does more than compute on tensors.")


def computes(operator: OpOverload) -> bool:
    """Whether an operator has a kernel, which those of TorchScript alone have not, and takes the name of no file."""
    names = [a.name for a in schema_of(operator).arguments if "str" in str(a.type)]
    return has_kernel(operator) and not any("file" in n or "path" in n for n in names)
