"""Definitions: what a pipeline file says of a method that it defines by equations, read, parsed and checked."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, StrictFloat, StrictInt, ValidationError
from torch import nn

from ..base.errors import MethodError, suggestion
from ..base.schema import explained, option_of
from .expression import FUNCTIONS, EquationError, Expression, parse
from .formula import IN, OUT
from .tensors import Init, kaiming_uniform, normal, ones, zeros

OPERANDS = {"weight": ("W",), "bias": ("b",), "output": ("x", "y")}
INITS: dict[str, Init] = {"zeros": zeros, "ones": ones, "kaiming_uniform": kaiming_uniform}
NORMAL = re.compile(r"normal\(\s*(\d*\.?\d+(?:[eE][+-]?\d+)?)\s*\)")
SIZE = re.compile(rf"(?<![\d.])({OUT}|{IN})(?!\d|\.\d)")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
RESERVED = {"W", "b", "x", "y", "in", "out", "self", "None", *FUNCTIONS}


class Declared(BaseModel):
    """A tensor of one or two sizes."""

    model_config = ConfigDict(frozen=True, extra="forbid", coerce_numbers_to_str=True)

    shape: list[StrictInt | str] = Field(
        min_length=1, max_length=2, description="numbers, options, in, out; and their sums, differences and products"
    )
    init: str = Field(
        "zeros",
        description="zeros, ones, kaiming_uniform, normal(0.02), or an equation over the loaded W (b) and the options",
    )
    trainable: bool = Field(True, description="whether training changes it")
    decay: bool = Field(True, description="whether weight decay applies")
    lr: PositiveFloat = Field(1.0, description="factor on the learning rate")

    @property
    def drawn(self) -> Init | None:
        """The init by its name; None for an equation."""
        drawn = NORMAL.fullmatch(self.init)
        return normal(float(drawn[1])) if drawn else INITS.get(self.init)


class Definition(BaseModel):
    """A method by its equations, with its tensors and options."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(description="what the pass and its tensors are called")
    tensors: dict[str, Declared] = Field(min_length=1, description="by the names that the equations use")
    weight: str | None = Field(None, description="φ(W) over W, tensors and options: W + alpha / r * B @ A")
    bias: str | None = Field(None, description="φ(b) over b, tensors and options")
    output: str | None = Field(
        None, description="the result of a site, over its input x, its result y, tensors, options"
    )
    options: dict[str, StrictInt | Annotated[StrictFloat, Field(allow_inf_nan=False)]] = Field(
        default_factory=dict, description="numbers by name; dropout acts on the input of the weight's terms"
    )
    family: str = Field(
        "written", description="in the catalogue: reconstruction, extension, combination or one of yours"
    )
    paper: str = Field("", description="where it comes from")
    description: str = Field("", description="what the catalogue says about it")

    @property
    def equations(self) -> dict[str, str]:
        return {part: text for part in OPERANDS if (text := getattr(self, part)) is not None}

    @property
    def numbers(self) -> list[str]:
        """Options that equations may name; `dropout` acts by itself."""
        return [name for name in self.options if name != "dropout"]


class Parsed(NamedTuple):
    """equations by part, shapes by tensor, and the starting values that are equations, by tensor"""

    equations: dict[str, Expression]
    shapes: dict[str, tuple[Expression, ...]]
    starts: dict[str, Expression]

    @property
    def sizes(self) -> set[str]:
        """Names in shapes."""
        return set().union(*(size.names for size in chain(*self.shapes.values())))


def read_definition(spelled: Mapping[str, Any], taken: set[str]) -> tuple[Definition, Parsed]:
    """The definition and its equations. Raises MethodError, which names the option at fault.

    taken: names that an option cannot have
    """
    if not isinstance(spelled, Mapping):
        raise MethodError(f"A method is defined by a mapping with name, tensors and an equation, not {spelled!r}.")
    try:
        definition = Definition.model_validate(dict(spelled))
    except ValidationError as error:
        depths = {"tensors": 3, "options": 2}  # what follows are members of a union
        wrong = [{**item, "loc": item["loc"][: depths.get(item["loc"][0], 1)]} for item in error.errors()]
        what = f"{spelled.get('name', 'method')}: {explained(wrong, Definition)}."
        raise MethodError(what, option=option_of(wrong)) from error
    check_names(definition, taken)
    parsed = parsed_equations(definition)
    check_uses(definition, parsed)
    return definition, parsed


@contextmanager
def option(method: str, name: str) -> Iterator[None]:
    """Says of an equation's error which option holds it, and calls sizes by name."""
    try:
        yield
    except EquationError as error:
        what = f"{method}: option {name!r}: {named(error.what)}"
        raise EquationError(what, error.text, error.column, tuple(name.split("."))) from error


def wrong_option(method: str, option: str, what: str) -> MethodError:
    return MethodError(f"{method}: option {option!r}: {what}", option=tuple(option.split(".")))


def named(text: str) -> str:
    """Text, of torch's errors too, with `out` and `in` for the sizes that stand for any; not within other numbers."""
    return SIZE.sub(lambda found: "out" if found[0] == str(OUT) else "in", text)


def parsed_equations(definition: Definition) -> Parsed:
    name, numbers = definition.name, definition.numbers
    of_bias = set(definition.equations) == {"bias"}
    sizes = [*numbers, "out"] if of_bias else [*numbers, "out", "in"]
    parsed = Parsed({}, {}, {})
    for part, text in definition.equations.items():
        with option(name, part):
            parsed.equations[part] = parse(text, [*OPERANDS[part], *definition.tensors, *numbers])
    for tensor, declared in definition.tensors.items():
        with option(name, f"tensors.{tensor}.shape"):
            parsed.shapes[tensor] = tuple(parsed_size(str(text), sizes) for text in declared.shape)
        if declared.drawn is None:
            with option(name, f"tensors.{tensor}.init"):
                parsed.starts[tensor] = parsed_start(declared.init, ["b" if of_bias else "W", *sizes])
    return parsed


def parsed_size(text: str, names: list[str]) -> Expression:
    size = parse(text, names)
    for step in size.steps:
        if step.takes and step.label not in ("+", "-", "*"):
            raise EquationError(f"{step.label!r} is not part of a size; + - * are.", size.text, step.column)
    return size


def parsed_start(text: str, names: list[str]) -> Expression:
    first = re.match(r"[A-Za-z]\w*|", text)[0]
    if first and first not in {*names, *FUNCTIONS}:
        what = f"{first!r} begins no starting value.{suggestion(first, INITS)}"
        known = f"{', '.join(INITS)}, normal(0.02), or an equation over {', '.join(names)}"
        raise EquationError(f"{what} One is {known}.", text, 0)
    return parse(text, names)


def check_names(definition: Definition, taken: set[str]) -> None:
    name = definition.name
    for field, reserved in {"tensors": RESERVED | set(dir(nn.Module())), "options": RESERVED | taken}.items():
        for own in getattr(definition, field):
            if not NAME.fullmatch(own) or own in reserved:
                why = "is taken" if own in reserved else "is no name: one has letters, digits and _"
                raise wrong_option(name, f"{field}.{own}", f"{own!r} {why}.")
    if not NAME.fullmatch(name):
        raise wrong_option(name, "name", f"{name!r} is no name: one has letters, digits and _.")
    if both := [tensor for tensor in definition.tensors if tensor in definition.options]:
        raise wrong_option(name, f"options.{both[0]}", f"{both[0]!r} is a tensor already.")
    if not definition.equations:
        raise MethodError(f"{name}: it has no equation: give one or more of {', '.join(OPERANDS)}.")
    if "dropout" in definition.options and definition.weight is None:
        what = "it acts on the input of a weight's terms, and there is no `weight`."
        raise wrong_option(name, "options.dropout", what)


def check_uses(definition: Definition, parsed: Parsed) -> None:
    """Every equation trains something; every tensor and every option is named."""
    name = definition.name
    trained = [tensor for tensor, declared in definition.tensors.items() if declared.trainable]
    for part, equation in parsed.equations.items():
        if not equation.names.intersection(trained):
            listed = f"trained are {', '.join(trained)}" if trained else "all are frozen"
            raise wrong_option(name, part, f"it names no trained tensor; {listed}.")
    used = set().union(*(equation.names for equation in parsed.equations.values()))
    for tensor in definition.tensors:
        if tensor not in used:
            raise wrong_option(name, f"tensors.{tensor}", "no equation names it.")
    used = used.union(parsed.sizes, *(start.names for start in parsed.starts.values()))
    for number in definition.numbers:
        if number not in used:
            raise wrong_option(name, f"options.{number}", "no equation, shape or init names it.")
