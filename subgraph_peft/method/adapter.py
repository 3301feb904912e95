"""An adapter is a method applied to sites; a target is a parameter or result with all that rewrites it."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from ..graph.site import VECTORS, Site
from .method import Method
from .stacks import over_stack
from .tensors import Tensor


@dataclass(frozen=True)
class Adapter:
    """A method at sites, with other options at some of them.

    name:     unique in its program. Tensors live at `<weight>_<name>.<tensor>`, beside the weight; those that all sites
              share at `shared_<name>.<tensor>`
    variants: (site name, the method with that site's own options)
    chosen:   what a budget chose, in words
    """

    name: str
    method: Method
    sites: tuple[Site, ...]
    left_out: tuple[tuple[str, str], ...] = ()
    variants: tuple[tuple[str, Method], ...] = ()
    chosen: str = ""

    @cached_property
    def _variants(self) -> dict[str, Method]:
        return dict(self.variants)

    @cached_property
    def shared(self) -> dict[str, Tensor]:
        return self.method.shared(self.sites)

    def at(self, site: Site) -> Method:
        """The method with the options of this site."""
        return self._variants.get(site.name, self.method)

    def entry_tensors(self, site: Site) -> dict[str, Tensor]:
        """Declarations by name of what the equations at a site read, the site's own first; at a stack of matrices those
        of one."""
        return {**self.at(site).tensors(site.entry), **self.shared}

    def tensors(self, site: Site) -> dict[str, Tensor]:
        """Declarations by name of the tensors at a site: at a stack each holds one entry a matrix, [stack, …]."""
        declared = self.entry_tensors(site)
        if not site.stack:
            return declared
        return {n: t if n in self.shared else replace(t, shape=(site.stack, *t.shape)) for n, t in declared.items()}

    def evaluate(
        self, site: Site, part: str, value: torch.Tensor, tensors: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:  # fmt: skip
        """The equation `part` on tensors."""
        method = self.at(site)
        if part != "weight" or not site.stack:
            return method.evaluate(part, value, tensors=tensors)
        return over_stack(lambda W, own: method.evaluate(part, W, tensors=own), value, tensors, set(self.shared))

    def path(self, site: Site, tensor: str) -> str:
        return f"shared_{self.name}.{tensor}" if tensor in self.shared else f"{site.name}_{self.name}.{tensor}"

    def paths(self, site: Site) -> dict[str, str]:
        """Tensor name -> qualified name."""
        return {name: self.path(site, name) for name in self.tensors(site)}

    def on(self, name: str) -> bool:
        return any(site.name == name for site in self.sites)

    def declared(self) -> dict[str, Tensor]:
        """Declarations by qualified name, each once."""
        return {self.path(site, name): tensor for site in self.sites for name, tensor in self.tensors(site).items()}

    def all_paths(self) -> Iterator[tuple[Site, str, str]]:
        """(site, tensor name, qualified name), each tensor once; a shared one with the first site."""
        for index, site in enumerate(self.sites):
            for tensor, path in self.paths(site).items():
                if not index or tensor not in self.shared:
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

    @property
    def shared(self) -> frozenset[tuple[str, str]]:
        """(adapter, tensor) of those that all sites share."""
        return frozenset((adapter.name, tensor) for adapter, _ in self.chain for tensor in adapter.shared)

    def read(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The parameter as equations see it: W [out, in] (or [stack, out, in]) or b, without gradient, in `dtype` or in
        its own where wider."""
        stored = tensors[self.name].detach()
        value = stored.to(torch.promote_types(dtype, stored.dtype))
        return self.site.matrix(value) if self.part == "weight" else value

    def evaluate(self, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The matrix [out, in] (or [stack, out, in]) or the bias under the chain, computed in `dtype`, or in the
        parameter's where wider."""
        value = self.read(tensors, dtype)
        for adapter, site in self.chain:
            given = {name: tensors[path].detach().to(value) for name, path in adapter.paths(site).items()}
            value = adapter.evaluate(site, self.part, value, given)
        return value


PARTS = ("bias", "keys_values", "embeddings", "output", "weight")


def targets(adapters: Sequence[Adapter]) -> list[Target]:
    """Everything that the adapters rewrite, in the order in which it is lowered: results of inner modules first."""
    found: dict[tuple[str, str], Target] = {}
    for adapter in adapters:
        for site in adapter.sites:
            for part, name in rewritten(adapter.method, site).items():
                known = found.get((part, name), Target(part, name, site, ()))
                found[part, name] = Target(part, name, known.site, (*known.chain, (adapter, site)))

    def place(target: Target) -> tuple[int, int]:
        return PARTS.index(target.part), -target.name.count(".") if target.part == "output" else 0

    return sorted(found.values(), key=place)


def rewritten(method: Method, site: Site) -> dict[str, str]:
    """Part -> name of the parameter or place that a method rewrites at one of its sites."""
    if site.kind in VECTORS:
        return {"bias": site.name}
    names = {part: site.name for part in PARTS if method.defines(part)}
    if "bias" in names and (method.every_parameter or not site.bias):
        del names["bias"]
    elif "bias" in names:
        names["bias"] = site.bias
    return names


def identifier(text: str) -> str:
    return re.sub(r"\W", "_", text)
