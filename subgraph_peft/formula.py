"""A method's equation as text, by running it on symbols instead of tensors; the catalogue is printed from this."""

from collections.abc import Callable
from typing import Any, get_args

import torch

from .errors import MethodError
from .method import Method, Wrapper
from .sites import Site

SUM, PRODUCT, ATOM = 1, 2, 3
NAMES = {"rho": "ρ", "delta": "δ", "sigma": "σ", "alpha": "α", "lam": "λ", "A0": "A₀", "B0": "B₀"}
FUNCTIONS = {"linalg_vector_norm": "‖{0}‖", "relu": "ReLU({0})", "gelu": "GELU({0})", "silu": "SiLU({0})"}
OUT, IN = 10007, 10009  # sizes that no option has by chance
INVISIBLE = {"detach", "clamp_min", "unsqueeze", "contiguous", "clone"}


class Symbol:
    """Text that composes under torch's operators. `rank` is 0 for scalars, 1 for vectors, 2 for matrices."""

    def __init__(self, text: str, rank: int = 2, level: int = ATOM, row: bool = False):
        self.text, self.rank, self.level, self.row = text, rank, level, row

    def at(self, level: int) -> str:
        return self.text if self.level >= level else f"({self.text})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> "Symbol":
        name = getattr(func, "__name__", str(func))
        subject = args[0]
        if name == "linear":
            return args[1] @ subject
        if name in INVISIBLE:
            return subject
        if name == "diag":
            return Symbol(f"diag({subject.text})")
        if name == "dropout":
            return Symbol(f"drop({subject.text})", subject.rank)
        pattern = FUNCTIONS.get(name, f"{name}({{0}})")
        return Symbol(pattern.format(subject.text), 1 if "norm" in name else subject.rank)

    def __getattr__(self, name: str) -> Any:
        if name == "dtype":
            return torch.float32
        if name in ("T", "mT"):
            return Symbol(f"{self.at(ATOM)}ᵀ")
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.__torch_function__(getattr(torch.Tensor, name), (), (self, *args), kwargs)

    def __getitem__(self, index: Any) -> "Symbol":
        is_row = isinstance(index, tuple) and len(index) == 2 and index[1] is None
        return Symbol(self.text, self.rank, self.level, row=is_row)

    def __add__(self, other: Any) -> "Symbol":
        return Symbol(f"{self.text} + {lift(other).text}", max(self.rank, lift(other).rank), SUM)

    def __sub__(self, other: Any) -> "Symbol":
        return Symbol(f"{self.text} − {lift(other).at(PRODUCT)}", max(self.rank, lift(other).rank), SUM)

    def __matmul__(self, other: "Symbol") -> "Symbol":
        return Symbol(f"{self.at(PRODUCT)} {other.at(PRODUCT)}", 2, PRODUCT)

    def __mul__(self, other: Any) -> "Symbol":
        left, right = self, lift(other)
        if left.row and right.rank == 2:
            return Symbol(f"diag({left.text}) {right.at(PRODUCT)}", 2, PRODUCT)
        if right.row and left.rank == 2:
            return Symbol(f"diag({right.text}) {left.at(PRODUCT)}", 2, PRODUCT)
        if left.rank == 2 and right.rank == 1:
            return Symbol(f"{left.at(PRODUCT)} diag({right.text})", 2, PRODUCT)
        if left.rank == right.rank == 0 or 0 in (left.rank, right.rank):
            scalar, rest = (left, right) if left.rank == 0 else (right, left)
            if scalar.text == "1.0":
                return rest
            return Symbol(f"{scalar.at(PRODUCT)} {rest.at(PRODUCT)}", rest.rank, PRODUCT)
        return Symbol(f"{left.at(PRODUCT)} ⊙ {right.at(PRODUCT)}", max(left.rank, right.rank), PRODUCT)

    def __truediv__(self, other: Any) -> "Symbol":
        divisor = lift(other)
        return Symbol(f"{self.at(PRODUCT)}/{divisor.at(ATOM)}", max(self.rank, divisor.rank), SUM)

    def __rtruediv__(self, other: Any) -> "Symbol":
        return lift(other) / self

    def __pow__(self, power: float) -> "Symbol":
        return Symbol(f"√{self.at(ATOM)}" if power == 0.5 else f"{self.at(ATOM)}^{power}", self.rank)

    def __neg__(self) -> "Symbol":
        return Symbol(f"−{self.at(PRODUCT)}", self.rank, PRODUCT)

    def __radd__(self, other: Any) -> "Symbol":
        return lift(other) + self

    def __rmul__(self, other: Any) -> "Symbol":
        return lift(other) * self


def lift(value: Any) -> Symbol:
    return value if isinstance(value, Symbol) else Symbol(f"{value:g}" if isinstance(value, float) else str(value), 0)


def generic_site(method: Method) -> Site:
    """A linear site, or a bias, whose sizes stand for any."""
    if method.defines("bias") and not method.defines("weight"):
        return Site("b", "bias", (OUT,), torch.float32, ())
    return Site("W", "linear", (OUT, IN), torch.float32, ())


def symbolic(method: Method) -> Method:
    """The method with its numeric options replaced by symbols; a dropout stays off."""
    values = {}
    for name, field in type(method).model_fields.items():
        value = getattr(method, name)
        numeric = {int, float} & {field.annotation, *get_args(field.annotation)}
        if isinstance(value, Method):
            values[name] = symbolic(value)
        elif numeric and "dropout" not in name:
            values[name] = Symbol(NAMES.get(name, name), 0)
    return method.model_copy(update=values)


def equations(method: Method) -> dict[str, str]:
    """Part ("weight", "bias", "output") -> the right-hand side of its equation."""
    declared = method.tensors(generic_site(method))
    found = {}
    symbols = {name: Symbol(NAMES.get(name, name), len(tensor.shape)) for name, tensor in declared.items()}
    subject = symbolic(method)
    for part, operands in {"weight": ("W",), "bias": ("b",), "output": ("x", "y")}.items():
        if not method.defines(part):
            continue
        given = [Symbol(name, 2 if name == "W" else 1) for name in operands]
        try:
            result = subject.evaluate(part, *given, tensors=symbols)
        except (TypeError, AttributeError) as error:
            raise MethodError(f"The equation {part} of {method.name} has no printed form: {error}.") from error
        if result.text != operands[-1]:
            found[part] = result.text
    return found


def count_formula(method: Method) -> str:
    """Numbers trained at one site: `r·in + out·r`."""
    names = size_names(method)
    tensors = method.tensors(generic_site(method)).values()
    return " + ".join("·".join(names.get(s, str(s)) for s in tensor.shape) for tensor in tensors if tensor.trainable)


def size_names(method: Method) -> dict[int, str]:
    """The name of a size: an integer option's, or in and out."""
    options = {getattr(m, n): n for m in chain(method) for n in type(m).model_fields if type(getattr(m, n)) is int}
    return {**options, OUT: "out", IN: "in"}


def chain(method: Method) -> list[Method]:
    return [method, *chain(method.of)] if isinstance(method, Wrapper) else [method]
