"""An adapter is a method applied to sites; a target is a parameter or result with all that rewrites it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from .method import Method
from .sites import Site


@dataclass(frozen=True)
class Adapter:
    """name: unique in its program; its tensors live at `<weight>_<name>.<tensor>`, beside the weight."""

    name: str
    method: Method
    sites: tuple[Site, ...]
    left_out: tuple[tuple[str, str], ...] = ()

    def path(self, site: Site, tensor: str) -> str:
        return f"{site.name}_{self.name}.{tensor}"

    def paths(self, site: Site) -> dict[str, str]:
        """Tensor name -> qualified name."""
        return {name: self.path(site, name) for name in self.method.tensors(site)}

    def on(self, name: str) -> bool:
        return any(site.name == name for site in self.sites)

    def all_paths(self) -> Iterator[tuple[Site, str, str]]:
        """(site, tensor name, qualified name)"""
        for site in self.sites:
            for tensor, path in self.paths(site).items():
                yield site, tensor, path


@dataclass(frozen=True)
class Target:
    """φₙ(…φ₁(·)) at one parameter (`part` "weight" or "bias") or at the results of one site ("output").

    name:  of the parameter        site:  whose layout and calls it has
    chain: (adapter, the site under which the adapter keeps its tensors), in order of application. A bias may be
           rewritten as a bias by one adapter and along with its weight by another.
    """

    part: str
    name: str
    site: Site
    chain: tuple[tuple[Adapter, Site], ...]

    def path(self, adapter: str, tensor: str) -> str:
        return next(a.path(site, tensor) for a, site in self.chain if a.name == adapter)

    def evaluate(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] or the bias under the chain, computed in `dtype`, or in the parameter's where wider."""
        stored = tensors[self.name].detach()
        value = stored.to(torch.promote_types(dtype, stored.dtype))
        value = self.site.matrix(value) if self.part == "weight" else value
        for adapter, site in self.chain:
            given = {name: tensors[path].detach().to(value.dtype) for name, path in adapter.paths(site).items()}
            value = adapter.method.evaluate(self.part, value, tensors=given)
        return value


def targets(adapters: Sequence[Adapter]) -> list[Target]:
    """Everything that the adapters rewrite: biases, then outputs, then weights."""
    found: dict[tuple[str, str], Target] = {}
    for adapter in adapters:
        for site in adapter.sites:
            names = {"weight": site.name, "output": site.name, "bias": site.name if site.kind == "bias" else site.bias}
            for part, name in names.items():
                if name and adapter.method.defines(part):
                    known = found.get((part, name), Target(part, name, site, ()))
                    found[part, name] = Target(part, name, known.site, (*known.chain, (adapter, site)))
    return sorted(found.values(), key=lambda target: ("bias", "output", "weight").index(target.part))


def identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)
