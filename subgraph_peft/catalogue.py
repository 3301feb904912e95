"""The catalogue: every installed method, described by its own source."""

import inspect
from dataclasses import dataclass, replace

import torch

from . import registry
from .formula import count_formula, equations, generic_site, size_names
from .method import Method

LEFT = {"weight": "φ(W)", "bias": "φ(b)", "output": "y"}
COLUMNS = ("method", "family", "equation", "trained per site", "folds", "paper")


@dataclass(frozen=True)
class Entry:
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


def entry(cls: type[Method]) -> Entry:
    method = cls()
    printed = ", ".join(f"{LEFT[part]} = {text}" for part, text in equations(method).items())
    text = inspect.cleandoc(cls.__doc__ or "")
    return Entry(cls.name, cls.family, printed, count_formula(method), cls.foldable(), cls.paper, text)


def catalogue() -> list[Entry]:
    order = {"reconstruction": 0, "extension": 1, "combination": 2}
    return sorted(map(entry, registry.methods().values()), key=lambda e: (order.get(e.family, 3), e.name))


def markdown() -> str:
    """The catalogue as the README's table."""
    lines = [" | ".join(COLUMNS), " | ".join("---" for _ in COLUMNS)]
    lines += [" | ".join(cell.replace("|", "\\|") for cell in item.row()) for item in catalogue()]
    return "\n".join(f"| {line} |" for line in lines)


def options(cls: type[Method]) -> list[tuple[str, str, str]]:
    """(option, type, default)"""
    return [
        (name, str(getattr(field.annotation, "__name__", field.annotation)).replace("typing.", ""), repr(field.default))
        for name, field in cls.model_fields.items()
    ]


def tensors(cls: type[Method]) -> list[tuple[str, str, str, str]]:
    """(tensor, shape, trained or frozen, starting value) at a linear site."""
    method = cls()
    names = size_names(method)
    small = replace(
        generic_site(method), shape=(24, 16) if method.defines("weight") or method.defines("output") else (24,)
    )
    prepared = method.prepare(small, torch.ones(small.shape)) if len(small.shape) == 2 else {}
    return [
        (
            name,
            "[" + ", ".join(names.get(size, str(size)) for size in tensor.shape) + "]",
            "trained" if tensor.trainable else "frozen",
            "from W" if name in prepared else (inspect.getdoc(tensor.init) or "").partition(",")[0],
        )
        for name, tensor in method.tensors(generic_site(method)).items()
    ]
