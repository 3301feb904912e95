"""A method's equation as text, by running it on symbols instead of tensors; the catalogue is printed from this."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, get_args

import torch

from ..base.errors import MethodError
from ..graph.site import Site
from .method import Method
from .tensors import Tensor

SUM, PRODUCT, ATOM = 1, 2, 3
NAMES = {
    "rho": "ρ", "delta": "δ", "sigma": "σ", "alpha": "α", "lam": "λ", "scale": "s", "bd": "b_d",
    "bu": "b_u", "keys": "P_k", "values": "P_v",
}  # fmt: skip
SUBSCRIPTS = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
FUNCTIONS = {
    "linalg_vector_norm": "‖{0}‖", "relu": "ReLU({0})", "gelu": "GELU({0})", "silu": "SiLU({0})",
    "dropout": "drop({0})", "expm1": "(exp({0}) − 1)", "cayley": "Q({0})", "again.default": "f({0})",
}  # fmt: skip
INVISIBLE = {"detach", "clamp_min", "unsqueeze", "contiguous", "clone"}
OUT, IN = 30030, 60060  # sizes that no option has by chance, and that split into blocks


class Symbol:
    """Text that composes under torch's operators. `rank` is 0 for scalars, 1 for vectors, 2 for matrices."""

    def __init__(self, text: str, rank: int = 2, level: int = ATOM, row: bool = False, shape: tuple[int, ...] = ()):
        self.text, self.rank, self.level, self.row, self.shape = text, rank, level, row, shape

    def at(self, level: int) -> str:
        return self.text if self.level >= level else f"({self.text})"

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> "Symbol":
        name = getattr(func, "__name__", str(func))
        subject = args[0]
        if name == "linear":
            product = args[1] @ subject
            return product if len(args) < 3 or args[2] is None else product + args[2]
        if name in INVISIBLE:
            return subject
        if name == "diag":
            return Symbol(f"diag({subject.text})")
        if name == "cat":
            return Symbol(f"[{'; '.join(part.text for part in subject)}]", subject[0].rank)
        pattern = FUNCTIONS.get(name, f"{name}({', '.join(lift(arg).text for arg in args)})")
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

    def __rsub__(self, other: Any) -> "Symbol":
        return lift(other) - self

    def __pow__(self, power: Any) -> "Symbol":
        exponent = lift(power)
        if exponent.text == "0.5":
            return Symbol(f"√{self.at(ATOM)}", self.rank)
        return Symbol(f"{self.at(ATOM)}^{exponent.at(ATOM)}", max(self.rank, exponent.rank), PRODUCT)

    def __rpow__(self, other: Any) -> "Symbol":
        return lift(other) ** self

    def __neg__(self) -> "Symbol":
        return Symbol(f"−{self.at(PRODUCT)}", self.rank, PRODUCT)

    def __radd__(self, other: Any) -> "Symbol":
        return lift(other) + self

    def __rmul__(self, other: Any) -> "Symbol":
        return lift(other) * self


def lift(value: Any) -> Symbol:
    return value if isinstance(value, Symbol) else Symbol(f"{value:g}" if isinstance(value, float) else str(value), 0)


def generic_site(method: Method, out_features: int = OUT, in_features: int = IN) -> Site:
    """A linear site, or a bias, whose sizes stand for any."""
    if method.defines("bias") and not method.defines("weight"):
        return Site("b", "bias", (out_features,), torch.float32, ())
    return Site("W", "linear", (out_features, in_features), torch.float32, ())


def numeric(method: Method) -> dict[str, int | float | None]:
    """The numeric options of a method."""
    fields = type(method).model_fields.items()
    return {n: getattr(method, n) for n, f in fields if {int, float} & {f.annotation, *get_args(f.annotation)}}


def replaced(method: Method, value: Callable[[str, Any], Any]) -> Method:
    """The method with value(name, option) for its numeric options, and those of a method inside it."""
    inner = {n: replaced(m, value) for n in type(method).model_fields if isinstance(m := getattr(method, n), Method)}
    return method.model_copy(update={**inner, **{n: value(n, option) for n, option in numeric(method).items()}})


def symbolic(method: Method) -> Method:
    """The method with its numeric options replaced by symbols; a dropout stays off."""
    return replaced(method, lambda name, value: value if "dropout" in name else Symbol(NAMES.get(name, name), 0))


def declared(method: Method, site: Site) -> dict[str, Tensor]:
    return {**method.tensors(site), **method.shared((site,))}


def symbols(method: Method) -> dict[str, Symbol]:
    """The tensors of a method as symbols."""
    found = {}
    for name, tensor in declared(method, generic_site(method)).items():
        text = NAMES.get(name, re.sub(r"\d+$", lambda found: found[0].translate(SUBSCRIPTS), name))
        if h := method.nonlinear.get(name):
            text = FUNCTIONS.get(h, f"{h}({{0}})").format(f"{text}·")
        found[name] = Symbol(text, 0 if math.prod(tensor.shape) == 1 else len(tensor.shape))
    return found


OPERANDS = {"weight": ("W",), "bias": ("b",), "output": ("x", "y"), "embeddings": (), "keys_values": ()}
SIZES = {"embeddings": {"out": "d"}, "keys_values": {"out": "heads", "in": "width"}}


def equations(method: Method) -> dict[str, str]:
    """Part ("weight", "bias", "output", …) -> the right-hand side of its equation."""
    found = {}
    tensors, subject = symbols(method), symbolic(method)
    for part, operands in OPERANDS.items():
        if not method.defines(part):
            continue
        given = [Symbol(n, 2, shape=(OUT, IN)) if n == "W" else Symbol(n, 1, shape=(OUT,)) for n in operands]
        try:
            result = subject.evaluate(part, *given, tensors=tensors)
        except (TypeError, AttributeError) as error:
            raise MethodError(f"The equation {part} of {method.name} has no printed form: {error}.") from error
        if part == "embeddings":
            found[part] = f"[{result.text}; X]"
        elif part == "keys_values":
            found[part] = ", ".join(f"[{side.text}; {name}]" for side, name in zip(result, "KV", strict=True))
        elif result.text != operands[-1]:
            found[part] = result.text
    return found


def count_formula(method: Method) -> str:
    """Numbers trained at one site: `r·in + out·r`."""
    tensors, named = method.tensors(generic_site(method)), shapes(method)
    return " + ".join("·".join(named[name]) for name, tensor in tensors.items() if tensor.trainable)


def shapes(method: Method) -> dict[str, tuple[str, ...]]:
    """Tensor -> its sizes by name. They are told apart by their values at two sites, one wide and one tall, where every
    integer option has a value of its own."""
    options: dict[int, str] = {}

    def distinct(name: str, value: Any) -> Any:
        if type(value) is not int:
            return value
        size = 101 + 100 * len(options)
        options[size] = name
        return size

    probe = replaced(method, distinct)
    wide, tall = (declared(probe, generic_site(method, *sizes)) for sizes in ((OUT, IN), (IN, OUT)))
    words = next((words for part, words in SIZES.items() if method.defines(part)), {})
    found = {
        name: tuple(
            words.get(n := size_name(a, b, options), n) for a, b in zip(tensor.shape, tall[name].shape, strict=True)
        )
        for name, tensor in wide.items()
    }
    printed = {name: sizes for layer in method.layers() for name, sizes in layer.printed_shapes.items()}
    return {name: printed.get(name, sizes) for name, sizes in found.items()}


def size_name(wide: int, tall: int, options: Mapping[int, str]) -> str:
    """The name of a size from its values where (out, in) = (OUT, IN) and where they are the other way round."""
    if wide == tall:
        return {OUT: "min(in, out)", IN: "max(in, out)", **options}.get(wide, str(wide))
    name, whole = ("out", OUT) if wide < tall else ("in", IN)
    return name if wide == whole else f"{name}/{whole // wide}"
