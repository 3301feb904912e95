"""Methods that a pipeline file defines by their equations: as good as those written in Python."""

import math
from collections.abc import Callable, Mapping
from inspect import Parameter, Signature
from typing import Annotated, Any, ClassVar

import torch
from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt, create_model, model_serializer

from ..graph.site import Site
from .definition import OPERANDS, Definition, Parsed, named, option, read_definition, wrong_option
from .expression import Expression
from .formula import IN, NAMES, OUT, PRODUCT, Symbol, equations, generic_site, lift
from .method import Method
from .tensors import Tensor, zeros

WRITTEN = "method"  # as a configuration spells it
LARGEST = 2**33  # numbers of one tensor


class Written(Method):
    """A method made from a definition. Its options are fields: those that a shape names whole, the others real."""

    model_config = ConfigDict(protected_namespaces=())

    definition: ClassVar[Definition]
    parsed: ClassVar[Parsed]

    @property
    def spelling(self) -> str:
        return WRITTEN

    def given(self, **values: Any) -> dict[str, Any]:
        """Values by name for an equation, with the options."""
        return {**{name: getattr(self, name) for name in self.definition.numbers}, **values}

    @property
    def printed_shapes(self) -> dict[str, tuple[str, ...]]:
        given = {name: Symbol(NAMES.get(name, name), 0) for name in (*self.definition.numbers, "in", "out")}
        shapes = self.parsed.shapes.items()
        return {name: tuple(lift(size(given)).at(PRODUCT) for size in shape) for name, shape in shapes}

    def shape(self, site: Site, tensor: str) -> tuple[int, ...]:
        given = self.given(**sizes(site))
        shape = tuple(size(given) for size in self.parsed.shapes[tensor])
        if any(size < 1 or size != int(size) for size in shape) or math.prod(shape) > LARGEST:
            what = f"{named(str(list(shape)))} at {site.name} is no shape: sizes are whole and positive, of at most"
            raise wrong_option(self.name, f"tensors.{tensor}.shape", f"{what} {LARGEST:,} numbers in all.")
        return tuple(map(int, shape))

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {
            name: Tensor(
                self.shape(site, name), declared.drawn or zeros, declared.trainable, declared.decay, declared.lr
            )
            for name, declared in self.definition.tensors.items()
        }

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        values = {}
        for name, start in self.parsed.starts.items():
            with option(self.name, f"tensors.{name}.init"):
                value = start(self.given(W=W, b=W, **sizes(site)))
            values[name] = value if isinstance(value, torch.Tensor) else W.new_full(self.shape(site, name), value)
        return values

    def spelled(self) -> dict[str, Any]:
        """The definition, with the options as they are."""
        options = {name: getattr(self, name) for name in self.definition.options}
        return self.definition.model_copy(update={"options": options}).model_dump(mode="json", exclude_defaults=True)

    @model_serializer(mode="wrap")
    def _nested(self, handler: Callable) -> dict[str, Any]:
        return self.spelled()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Written) and self.spelled() == other.spelled()

    def __hash__(self) -> int:
        return hash((self.name, *self.definition.equations.values(), *self.given().values()))


def sizes(site: Site) -> dict[str, int]:
    return {"in": site.in_features, "out": site.out_features}


def define(spelled: Mapping[str, Any]) -> Written:
    """The method of a definition, with its options. Raises MethodError, which names the option at fault."""
    definition, parsed = read_definition(spelled, taken=set(dir(Written)) | Written.__class_vars__)
    fields: dict[str, Any] = {
        name: (PositiveInt if name in parsed.sizes else FiniteFloat, value)
        for name, value in definition.options.items()
    }
    if "dropout" in fields:
        fields["dropout"] = (Annotated[float, Field(ge=0, lt=1)], definition.options["dropout"])
    texts = [f"{part}: {text}" for part, text in definition.equations.items()]
    doc = "\n".join([*texts, "", definition.description])
    cls = create_model(definition.name, __base__=Written, __doc__=doc, **fields)
    cls.name, cls.family, cls.paper = definition.name, definition.family, definition.paper
    cls.definition, cls.parsed = definition, parsed
    for part, equation in parsed.equations.items():
        setattr(cls, part, function(part, equation, [t for t in definition.tensors if t in equation.names]))
    method = cls(**definition.options)
    check_values(method)
    return method


def function(part: str, equation: Expression, tensors: list[str]) -> Callable[..., torch.Tensor]:
    """The equation as a method of a class: `weight(self, W, A, B)`."""
    names = ["self", *OPERANDS[part], *tensors]
    signature = Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def evaluate(*args: Any, **kwargs: Any) -> torch.Tensor:
        values = signature.bind(*args, **kwargs).arguments
        method = values.pop("self")
        with option(method.name, part):
            return equation(method.given(**values))

    evaluate.__name__, evaluate.__signature__ = part, signature
    return evaluate


def check_values(method: Written) -> None:
    """Every equation keeps its operand's shape, every starting value has its tensor's, whatever out and in are, and
    the equations can be printed."""
    site = generic_site(method)
    shapes = {"W": (OUT, IN), "b": (OUT,), "x": (2, 3, IN), "y": (2, 3, OUT)}
    tensors = {name: meta(tensor.shape) for name, tensor in method.tensors(site).items()}

    def check(where: str, value: Any, expected: torch.Size) -> None:
        shape = list(value.shape) if isinstance(value, torch.Tensor) else []
        if shape != list(expected):
            what = f"its value is {shape}, not {list(expected)}"
            raise wrong_option(method.name, where, f"{named(what)}.")

    for part in method.definition.equations:
        operands = [meta(shapes[name]) for name in OPERANDS[part]]
        check(part, method.evaluate(part, *operands, tensors=tensors), operands[-1].shape)
    for tensor, value in method.prepare(site, meta(site.shape)).items():
        check(f"tensors.{tensor}.init", value, tensors[tensor].shape)
    equations(method)


def meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")
