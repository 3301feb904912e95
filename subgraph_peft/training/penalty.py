"""Penalties: what methods add to the loss, evaluated for all sites of equal shapes at once."""

from collections.abc import Sequence

import torch

from ..method.adapter import Adapter
from ..method.method import Method
from ..program.program import Program

Tensors = dict[str, torch.Tensor]


def penalty(program: Program) -> torch.Tensor:
    """Σ over adapters of the sum (or mean) over sites of `Method.penalty`, a scalar; 0 where no method has one.

    Computed in the dtype of the adapters' tensors, also under autocast.
    """
    home = program.home
    total = torch.zeros((), device=home.device, dtype=torch.promote_types(torch.float32, home.dtype))
    for adapter in program.adapters:
        shared = {n: program.module.get_parameter(adapter.path(adapter.sites[0], n)) for n in adapter.shared}
        groups = alike(program, adapter)
        for (method, _), sites in groups.items():
            with torch.autocast(home.device.type, enabled=False):
                value = of_sites(method, sites, shared)
            count = sum(len(others) for (other, _), others in groups.items() if other.name == method.name)
            total = total + (value / count if method.penalty_mean else value)
    return total


def alike(program: Program, adapter: Adapter) -> dict[tuple, list[Tensors]]:
    """(method, shapes) -> the tensors of every site, or part of one, at which that method has a penalty."""
    read = program.module.get_parameter
    groups: dict[tuple, list[Tensors]] = {}
    for site in adapter.sites:
        for layer in adapter.at(site).layers_at(site):
            if layer.method.defines("penalty"):
                own = {name: read(adapter.path(site, outer)) for name, outer in layer.names.items()}
                each = [{n: t[i] for n, t in own.items()} for i in range(site.stack)] if site.stack else [own]
                groups.setdefault((layer.method, tuple(t.shape for t in each[0].values())), []).extend(each)
    return groups


def of_sites(method: Method, sites: Sequence[Tensors], shared: Tensors) -> torch.Tensor:
    """The sum of one method's penalty over sites whose tensors have the same shapes."""

    def of_one(tensors: Tensors) -> torch.Tensor:
        return method.evaluate("penalty", tensors={**tensors, **shared})

    return torch.func.vmap(of_one)({name: torch.stack([site[name] for site in sites]) for name in sites[0]}).sum()


def has_penalty(program: Program) -> bool:
    return any(layer.defines("penalty") for adapter in program.adapters for layer in adapter.method.layers())
