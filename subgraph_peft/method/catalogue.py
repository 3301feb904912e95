"""The catalogue: every installed method, described by its own source."""

import inspect
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args, get_origin

import torch

from ..base.text import Table
from . import registry
from .formula import count_formula, equations, generic_site, shapes
from .method import Method

LEFT = {"weight": "φ(W)", "bias": "φ(b)", "output": "y", "embeddings": "X", "keys_values": "K, V"}
COLUMNS = ("method", "family", "equation", "trained per site", "folds", "paper")


@dataclass(frozen=True)
class Described:
    """One method: its name, family, printed equations, count of trained numbers, whether it folds, its source."""

    name: str
    family: str
    equation: str
    trained: str
    folds: bool
    paper: str
    text: str

    def row(self) -> tuple[str, ...]:
        return self.name, self.family, self.equation, self.trained, "yes" if self.folds else "no", self.paper


def described(subject: type[Method] | Method) -> Described:
    """The entry of a method as it stands, or of a class with its default options."""
    method = subject if isinstance(subject, Method) else subject()
    cls = type(method)
    printed = ", ".join(f"{LEFT[part]} = {text}" for part, text in equations(method).items())
    printed = "; ".join([printed, *(f"loss + {text}" for text in penalties(method))])
    text = inspect.cleandoc(cls.__doc__ or "")
    return Described(cls.name, cls.family, printed, count_formula(method), cls.foldable(), cls.paper, text)


def penalties(method: Method) -> list[str]:
    """What a method and those inside it add to the loss, as the first lines of their docstrings say it."""
    adding = [type(layer) for layer in method.layers() if layer.defines("penalty")]
    first = [inspect.cleandoc(cls.__doc__ or "").partition("\n")[0] for cls in adding]
    return [line.partition("loss + ")[2] or "penalty" for line in first]


def catalogue(beside: Iterable[type[Method]] = ()) -> list[Described]:
    """Every installed method, and those `beside` them."""
    order = ["reconstruction", "extension", "combination", "framework"]
    entries = map(described, [*registry.methods().values(), *beside])
    return sorted(entries, key=lambda e: (order.index(e.family) if e.family in order else len(order), e.name))


def table(beside: Iterable[type[Method]] = ()) -> Table:
    """One row a method."""
    return Table("Methods", COLUMNS, [item.row() for item in catalogue(beside)])


def markdown() -> str:
    """The catalogue as the README's table."""
    return "\n".join(table().markdown()).strip()


def options(cls: type[Method]) -> list[tuple[str, str, str, str]]:
    """(option, type, default, what it is)"""
    return [
        (name, type_text(field.annotation), repr(field.default), field.description or "")
        for name, field in cls.model_fields.items()
    ]


def type_text(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    return str(annotation).replace("typing.", "") if get_origin(annotation) else getattr(annotation, "__name__", "any")


def tensors(cls: type[Method]) -> list[tuple[str, str, str, str]]:
    """(tensor, shape, trained or frozen, starting value) at a linear site."""
    method = cls()
    sizes = shapes(method)
    small = replace(
        generic_site(method), shape=(24, 16) if method.defines("weight") or method.defines("output") else (24,)
    )
    prepared = method.prepare(small, torch.ones(small.shape)) if len(small.shape) == 2 else {}
    return [
        (
            name,
            f"[{', '.join(sizes[name])}]",
            "trained" if tensor.trainable else "frozen",
            "from W" if name in prepared else re.split(r",(?![^(]*\))", inspect.getdoc(tensor.init) or "")[0],
        )
        for name, tensor in method.tensors(generic_site(method)).items()
    ]
