"""What a method is: tensors, and an equation over them. Everything else is derived."""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, SerializationInfo, ValidationError, model_serializer, model_validator

from .errors import MethodError, suggestion
from .sites import Site

Init = Callable[[tuple[int, ...], torch.Generator], torch.Tensor]


def zeros(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """0"""
    return torch.zeros(shape)


def ones(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """1"""
    return torch.ones(shape)


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """U(±1/√in), `in` the last dimension: torch's own default for linear layers (He et al. 2015, a = √5)."""
    bound = 1 / math.sqrt(shape[-1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def normal(std: float) -> Init:
    """N(0, std²)"""

    def init(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
        return torch.empty(shape).normal_(0, std, generator=generator)

    init.__doc__ = f"N(0, {std}²)"
    return init


@dataclass(frozen=True)
class Tensor:
    """A tensor that a method adds beside a weight.

    decay: whether weight decay applies (not to factors that multiply, whose neutral value is 1)
    """

    shape: tuple[int, ...]
    init: Init = zeros
    trainable: bool = True
    decay: bool = True


def trainable(*shape: int, init: Init = zeros, decay: bool = True) -> Tensor:
    return Tensor(shape, init, trainable=True, decay=decay)


def frozen(*shape: int, init: Init = zeros) -> Tensor:
    return Tensor(shape, init, trainable=False, decay=False)


class Method(BaseModel):
    """Base of all methods. A subclass gives `tensors` and one or more of the equations

    weight(W, …)     φ(W) of the matrix W [out, in]                          folds
    bias(b, …)       φ(b) of a bias [out]                                     folds
    output(x, y, …)  the result of a site with input x [..., in], output y    stays in the graph

    whose further arguments are names of `tensors`. Its fields are its options; it is frozen and hashable.
    `prepare` computes starting values from the loaded weight, once, when the rewrite is made.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise option_error(type(self), error) from error

    def tensors(self, site: Site) -> dict[str, Tensor]:
        """Tensors by name for one site."""
        raise NotImplementedError

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        """Starting values by tensor name, from the loaded weight W [out, in] (float32 or wider)."""
        return {}

    @property
    def activation_dropout(self) -> float:
        """Dropout on the input of every term that contains a trainable tensor, in training."""
        return getattr(self, "dropout", 0.0)

    @classmethod
    def defines(cls, part: str) -> bool:
        return callable(getattr(cls, part, None))

    @classmethod
    def foldable(cls) -> bool:
        return not cls.defines("output")

    def evaluate(self, part: str, *operands: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The equation `part` on its operands, given those of the tensors that it names."""
        equation = getattr(self, part)
        names = list(inspect.signature(equation).parameters.values())[len(operands) :]
        if any(p.kind is p.VAR_KEYWORD for p in names):
            return equation(*operands, **tensors)
        return equation(*operands, **{p.name: tensors[p.name] for p in names})

    @model_serializer(mode="wrap")
    def _nested(self, handler: Callable, info: SerializationInfo) -> dict[str, Any]:
        inner = {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Method)}
        spelled = {name: spell(method, exclude_defaults=info.exclude_defaults) for name, method in inner.items()}
        return {name: spelled.get(name, value) for name, value in handler(self).items()}


class Wrapper(Method):
    """A method that is a function of another weight method, as DoRA is: option `of` names the inner one."""

    of: Method

    @model_validator(mode="before")
    @classmethod
    def _read_inner(cls, data: Any) -> Any:
        if isinstance(data, dict) and "of" in data and not isinstance(data["of"], Method):
            from .registry import read

            data = {**data, "of": read(data["of"])}
        return data

    def model_post_init(self, context: Any) -> None:
        if not self.of.defines("weight") or self.of.defines("output"):
            raise MethodError(f"{self.name} needs a weight method inside; {self.of.name} rewrites something else.")

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return self.of.tensors(site)

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.of.prepare(site, W)

    @property
    def activation_dropout(self) -> float:
        return self.of.activation_dropout


def spell(method: Method, exclude_defaults: bool = False) -> dict[str, Any]:
    """The method as configuration: {"lora": {"r": 8, …}}."""
    return {method.name: method.model_dump(mode="json", exclude_defaults=exclude_defaults)}


def option_error(cls: type[Method], error: ValidationError) -> MethodError:
    known = list(cls.model_fields)
    parts = []
    for item in error.errors():
        name = ".".join(map(str, item["loc"]))
        if item["type"] == "extra_forbidden":
            parts.append(f"unknown option {name!r}.{suggestion(name, known)} Options: {', '.join(known) or 'none'}")
        elif item["type"] == "missing":
            parts.append(f"option {name!r} is required")
        else:
            parts.append(f"option {name!r}: {item['msg']}, got {item['input']!r}")
    return MethodError(f"{cls.name or cls.__name__}: " + "; ".join(parts) + ".")


def initial(
    method: Method, site: Site, W: torch.Tensor, generator: torch.Generator
) -> dict[str, tuple[Tensor, torch.Tensor]]:
    """(declaration, starting value) of every tensor of a method on one site; W is the matrix in float32 or wider."""
    declared = method.tensors(site)
    if W.is_meta:
        return {name: (tensor, torch.empty(tensor.shape, device="meta")) for name, tensor in declared.items()}
    prepared = method.prepare(site, W)
    if unknown := set(prepared) - set(declared):
        raise MethodError(
            f"{method.name}.prepare gives {', '.join(sorted(unknown))}, which tensors() does not declare."
        )
    values = {}
    for name, tensor in declared.items():
        value = prepared[name] if name in prepared else tensor.init(tensor.shape, generator)
        if tuple(value.shape) != tensor.shape:
            raise MethodError(
                f"{method.name} at {site.name}: tensor {name!r} is declared {list(tensor.shape)}, "
                f"its value is {list(value.shape)}."
            )
        if not torch.isfinite(value).all():
            raise MethodError(f"{method.name} at {site.name}: the starting value of {name!r} is not finite.")
        values[name] = (tensor, value)
    return values
