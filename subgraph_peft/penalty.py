"""Penalties: what methods add to the loss, evaluated for all sites of equal shapes at once."""

from collections.abc import Sequence

import torch

from .adapter import Adapter
from .method import Method
from .program import Program
from .sites import Site


def penalty(program: Program) -> torch.Tensor:
    """Σ over adapters of the sum (or mean) over sites of `Method.penalty`, a scalar; 0 where no method has one."""
    home = program.module.home
    total = torch.zeros((), device=home.device, dtype=torch.promote_types(torch.float32, home.dtype))
    for adapter in program.adapters:
        groups: dict[tuple, list[Site]] = {}
        for site in adapter.sites:
            shapes = tuple((name, tensor.shape) for name, tensor in adapter.tensors(site).items())
            groups.setdefault((adapter.at(site), shapes), []).append(site)
        for (method, _), sites in groups.items():
            for layer in method.layers():
                if layer.defines("penalty"):
                    value = of_sites(program, adapter, layer, sites)
                    total = total + (value / len(adapter.sites) if layer.penalty_mean else value)
    return total


def of_sites(program: Program, adapter: Adapter, method: Method, sites: Sequence[Site]) -> torch.Tensor:
    """The sum of one method's penalty over sites whose tensors have the same shapes."""
    read = program.module.get_parameter
    names = adapter.tensors(sites[0])
    own = {n: torch.stack([read(adapter.path(s, n)) for s in sites]) for n in names if n not in adapter.shared}
    shared = {n: read(adapter.path(sites[0], n)) for n in adapter.shared}

    def of_one(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        return method.evaluate("penalty", tensors={**tensors, **shared})

    return torch.func.vmap(of_one)(own).sum()


def has_penalty(program: Program) -> bool:
    return any(layer.defines("penalty") for adapter in program.adapters for layer in adapter.method.layers())
