"""What a method is: tensors, and an equation over them. Everything else is derived."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, SerializationInfo, ValidationError, model_serializer

from ..base.errors import MethodError
from ..base.schema import explained, option_of
from ..graph.site import Site
from .tensors import Tensor


@torch.library.custom_op("subgraph_peft::again", mutates_args=())
def again(value: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """f(value) for y = f(x), in a traced equation; the compiler puts the nodes of f in its place."""
    raise NotImplementedError


again.register_fake(lambda value, y: torch.empty_like(y))
AGAIN = torch.ops.subgraph_peft.again.default


class Method(BaseModel):
    """Base of all methods. A subclass gives `tensors` and one or more of the equations

    weight(W, …)       φ(W) of the matrix W [out, in]                                       folds
    bias(b, …)         φ(b) of a bias [out]                                                 folds
    output(x, y, …)    the result of a site or module with input x [..., in], output y      stays in the graph
    embeddings(…)      g(P) [n, d], put before the embedded sequence                        stays in the graph
    keys_values(…)     (K, V), each [n, heads, d], put before the keys and values           stays in the graph

    whose further arguments are names of `tensors` or `shared`. Its fields are its options; it is frozen and hashable.
    `prepare` computes starting values from the loaded weight, once, when the rewrite is made. Beside these,

    penalty(…)         a number added to the loss, from one site's tensors; summed over sites, or their mean
    schedule(step)     called after every optimiser step: see `Step`
    """

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    name: ClassVar[str] = ""
    family: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    every_parameter: ClassVar[bool] = False  # rewrites vectors (biases, norm scales) as sites of their own

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            wrong, cls = error.errors(), type(self)
            what = f"{cls.name or cls.__name__}: {explained(wrong, cls)}."
            raise MethodError(what, option=option_of(wrong)) from error

    def tensors(self, site: Site) -> dict[str, Tensor]:
        """Tensors by name for one site."""
        raise NotImplementedError

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        """Tensors by name that all sites share."""
        return {}

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        """Starting values by tensor name, from the loaded weight W [out, in] (float32 or wider).

        Where it is ordinary torch without branches on values, it runs once for many sites, under torch.func.vmap.
        """
        return {}

    def check_start(self, site: Site, values: Mapping[str, torch.Tensor]) -> None:
        """Raises MethodError where no training can start from what `prepare` gave at a site."""

    @property
    def reads_weight(self) -> bool:
        """Whether `prepare` computes anything from the loaded weight."""
        return type(self).prepare is not Method.prepare

    @property
    def activation_dropout(self) -> float:
        """Dropout on the input of every term that contains a trainable tensor, in training."""
        return getattr(self, "dropout", 0.0)

    @property
    def nonlinear(self) -> dict[str, str]:
        """Tensor -> nonlinearity h that follows it: h(xAᵀ) in place of xAᵀ. Such a method does not fold."""
        return {}

    @property
    def moves_positions(self) -> bool:
        """Whether tokens behind this method's keys and values count their positions from n on, not from 0."""
        return True

    @property
    def penalty_mean(self) -> bool:
        """Whether `penalty` is averaged over sites, not summed."""
        return False

    def check_schedule(self, total: int) -> None:
        """Raises MethodError where `schedule` cannot fit into `total` optimiser steps."""

    @property
    def spelling(self) -> str:
        """The name under which a configuration spells it."""
        return self.name

    @property
    def printed_shapes(self) -> dict[str, tuple[str, ...]]:
        """Tensor -> its sizes as text, where they are not one size by its name."""
        return {}

    def layers(self) -> list["Method"]:
        """This method and those inside it, outermost first."""
        return [self]

    def layers_at(self, site: Site) -> list["Layer"]:
        """The `layers` as they stand at one site."""
        return [Layer(self, site, {name: name for name in self.tensors(site)})]

    @classmethod
    def defines(cls, part: str) -> bool:
        return callable(getattr(cls, part, None))

    @classmethod
    def foldable(cls) -> bool:
        return not any(map(cls.defines, ("output", "embeddings", "keys_values")))

    def evaluate(self, part: str, *operands: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The equation `part` on its operands, given those of the tensors that it names, and `f` where it names that:
        the layer or module itself, as a function of its input."""
        equation = getattr(self, part)
        names = list(inspect.signature(equation).parameters.values())[len(operands) :]
        if any(p.kind is p.VAR_KEYWORD for p in names):
            return equation(*operands, **tensors)
        known = {**tensors, "f": lambda value: AGAIN(value, operands[-1])}
        return equation(*operands, **{p.name: known[p.name] for p in names})

    @model_serializer(mode="wrap")
    def _nested(self, handler: Callable, info: SerializationInfo) -> dict[str, Any]:
        inner = {name: value for name in type(self).model_fields if isinstance(value := getattr(self, name), Method)}
        spelled = {name: spell(method, exclude_defaults=info.exclude_defaults) for name, method in inner.items()}
        return {name: spelled.get(name, value) for name, value in handler(self).items()}


@dataclass(frozen=True)
class Layer:
    """A method inside another, or itself, at one site.

    site:  as this method sees it        names: its tensors -> what the outermost method calls them
    rows:  of the weight that it rewrites, taken one after the other; all where there are none
    """

    method: Method
    site: Site
    names: Mapping[str, str]
    rows: tuple[slice, ...] = ()


class Wrapper(Method):
    """A method that is a function of another weight method, as DoRA is: option `of` names the inner one."""

    of: Method

    def model_post_init(self, context: Any) -> None:
        if not self.of.defines("weight") or not self.of.foldable():
            raise MethodError(f"{self.name} needs a weight method that folds inside; {self.of.name} is none.")

    def layers(self) -> list[Method]:
        return [self, *self.of.layers()]

    def layers_at(self, site: Site) -> list[Layer]:
        return [*super().layers_at(site), *self.of.layers_at(site)]

    def added(self, site: Site) -> dict[str, Tensor]:
        """Tensors by name beside the inner method's."""
        return {}

    def tensors(self, site: Site) -> dict[str, Tensor]:
        inner, own = self.of.tensors(site), self.added(site)
        if clash := set(own) & set(inner):
            raise MethodError(f"{self.name} and {self.of.name} inside it both have a tensor {sorted(clash)[0]!r}.")
        return {**inner, **own}

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return self.of.shared(sites)

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.of.prepare(site, W)

    @property
    def reads_weight(self) -> bool:
        return type(self).prepare is not Wrapper.prepare or self.of.reads_weight

    def weight(self, W: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        return self.of.evaluate("weight", W, tensors=tensors)

    @property
    def activation_dropout(self) -> float:
        return self.of.activation_dropout


def spell(method: Method, exclude_defaults: bool = False) -> dict[str, Any]:
    """The method as configuration: {"lora": {"r": 8, …}}."""
    return {method.spelling: method.model_dump(mode="json", exclude_defaults=exclude_defaults)}


def initial(
    method: Method, site: Site, prepared: Mapping[str, torch.Tensor], generator: torch.Generator, meta: bool = False
) -> dict[str, tuple[Tensor, torch.Tensor]]:
    """(declaration, starting value) of every tensor of a method on one site: those `prepared`, the others drawn. At a
    stack of matrices every entry starts by itself, and both have the stack in front."""
    if site.stack:
        entries = [{name: value[i] for name, value in prepared.items()} for i in range(site.stack)]
        each = [initial(method, site.entry, own, generator, meta) for own in entries]
        return {name: (tensor, torch.stack([own[name][1] for own in each])) for name, (tensor, _) in each[0].items()}
    declared = method.tensors(site)
    if unknown := set(prepared) - set(declared):
        raise MethodError(
            f"{method.name}.prepare gives {', '.join(sorted(unknown))}, which tensors() does not declare."
        )
    return {
        name: (tensor, starting(method, site.name, name, tensor, prepared.get(name), generator, meta))
        for name, tensor in declared.items()
    }


def starting(
    method: Method, where: str, name: str, tensor: Tensor, value: torch.Tensor | None, generator: torch.Generator,
    meta: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The starting value of one tensor, drawn where `value` is None, with its shape checked."""
    if meta:
        return torch.empty(tensor.shape, device="meta")
    value = tensor.init(tensor.shape, generator) if value is None else value
    if tuple(value.shape) != tensor.shape:
        raise MethodError(
            f"{method.name} at {where}: tensor {name!r} is declared {list(tensor.shape)}, "
            f"its value is {list(value.shape)}."
        )
    return value
