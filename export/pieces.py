"""A program's adapters as pieces that adapter folders can hold: one method with its tensors at one site."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from subgraph_peft.graph.site import Site
from subgraph_peft.method.adapter import Adapter
from subgraph_peft.method.method import Method, Wrapper
from subgraph_peft.passes import DoRA, LoRA, PiSSA
from subgraph_peft.program.program import Program

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Piece:
    """A method with its own tensors at one site; `shared` are those that all sites of its adapter share."""

    adapter: str
    site: Site
    method: Method
    tensors: Tensors
    shared: Tensors


def pieces(program: Program, adapters: tuple[Adapter, ...]) -> list[Piece]:
    """One a site and adapter, in the form that others know."""
    held = dict(program.tensors())
    found = []
    for adapter in adapters:
        for site in adapter.sites:
            given = {name: held[path].detach() for name, path in adapter.paths(site).items()}
            shared = {name: given[name] for name in adapter.shared}
            own = {name: value for name, value in given.items() if name not in shared}
            found.append(Piece(adapter.name, site, *plain(adapter.at(site), own), shared))
    return found


def plain(method: Method, tensors: Tensors) -> tuple[Method, Tensors]:
    """The same function with fewer kinds of method: a wrapper that only adds a penalty is its inner method, and PiSSA
    is the LoRA  ΔW = s (B A − B₀ A₀) = s [B, −B₀] [A; A₀]  of rank 2r, whose α is 2sr."""
    if isinstance(method, Wrapper) and type(method).weight is Wrapper.weight and method.foldable():
        return plain(method.of, tensors)
    if isinstance(method, DoRA):
        inner, factors = plain(method.of, {name: value for name, value in tensors.items() if name != "m"})
        return DoRA(of=inner, norm_gradient=method.norm_gradient), {**factors, "m": tensors["m"]}
    if isinstance(method, PiSSA):
        A = torch.cat([tensors["A"], tensors["A0"]], dim=-2)
        B = torch.cat([tensors["B"], -tensors["B0"]], dim=-1)
        alpha = method.r if method.alpha is None else method.alpha
        return LoRA(r=2 * method.r, alpha=2 * alpha), {"A": A, "B": B}
    return method, tensors


def number(value: float) -> int | float:
    """An integer where it is one, as peft's own configurations have it."""
    return int(value) if float(value).is_integer() else value
