"""Starting values of an adapter's tensors."""

import os
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from .adapter import Adapter, Target, targets
from .batches import Job, Values, grouped, prepare_group
from .cache import Cache
from .entry import rows
from .errors import MethodError
from .internals import Home
from .method import Method, Tensor, initial, starting
from .program import Program
from .site import PLACES, VECTORS, Site


@torch.no_grad()
def first_values(
    program: Program, adapter: Adapter, home: Home, dtype: torch.dtype, seed: int, cache: str | os.PathLike | None
) -> dict[str, nn.Parameter]:
    """Starting values by qualified name, from the weights under the adapters there already."""
    values: dict[str, nn.Parameter] = {}
    origins: dict[str, tuple[str, str, str]] = {}
    meta = home.device.type == "meta"

    def keep(path: str, method: Method, where: str, name: str, declared: Tensor, value: torch.Tensor) -> None:
        value = value.detach().to(device=home.device, dtype=dtype, copy=True).contiguous()
        values[path] = nn.Parameter(value, requires_grad=declared.trainable)
        origins[path] = method.name, where, name

    for site, given in prepared(program, adapter, home, None if meta or cache is None else Cache(cache)):
        method = adapter.at(site)
        for name, (declared, value) in initial(method, site, given, draws(seed, site.name), meta).items():
            keep(adapter.path(site, name), method, site.name, name, declared, value)
    for name, declared in adapter.shared.items():
        path, generator = adapter.path(adapter.sites[0], name), draws(seed, f"{adapter.name} {name}")
        value = starting(adapter.method, path, name, declared, None, generator, meta)
        keep(path, adapter.method, path, name, declared, value)
    if not meta:
        check_finite(values, origins)
    paths = [path for site in adapter.sites for name, path in adapter.paths(site).items() if name not in adapter.shared]
    return {path: values[path] for path in dict.fromkeys([*paths, *values])}


def prepared(program: Program, adapter: Adapter, home: Home, cache: Cache | None) -> Iterator[tuple[Site, Values]]:
    """Every site with what `prepare` computes there, or what the cache has of that."""
    tensors = dict(program.tensors())
    reading = [Job(adapter.at(site), site) for site in adapter.sites if adapter.at(site).reads_weight]
    if home.device.type == "meta":
        reading = []
    names = {job.site.name for job in reading}
    yield from ((site, {}) for site in adapter.sites if site.name not in names)

    there = {(target.part, target.name): target for target in targets(program.adapters)}

    def load(site: Site) -> torch.Tensor:
        return current_weight(program, site, there, tensors)

    for group in grouped(reading):
        if cache is None:
            yield from prepare_group(group, load, home.device)
            continue
        keys, missing = {}, []
        for job in group:
            keys[job.site.name] = cache.key(job.method, job.site, load(job.site))
            if (values := cache.read(keys[job.site.name])) is None:
                missing.append(job)
            else:
                yield job.site, values
        for site, values in prepare_group(missing, load, home.device) if missing else ():
            cache.write(keys[site.name], values)
            yield site, values


def check_finite(values: Mapping[str, torch.Tensor], origins: Mapping[str, tuple[str, str, str]]) -> None:
    """Raises MethodError for a starting value that is not finite. Waits for the device once: a sum is finite only where
    every number is."""
    if not values or torch.stack([value.sum() for value in values.values()]).isfinite().all():
        return
    for path, (method, where, name) in origins.items():
        if not values[path].isfinite().all():
            raise MethodError(f"{method} at {where}: the starting value of {name!r} is not finite.")


def draws(seed: int, name: str) -> torch.Generator:
    """A generator of its own for every site, so that starting values do not hang on the order of sites."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))


def current_weight(
    program: Program, site: Site, there: Mapping[tuple[str, str], Target], tensors: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The matrix φ(W) under the adapters that are `there` already, float32 or wider; the vector of a vector site. A
    place has none and gets an empty matrix."""
    if site.kind in PLACES:
        home = program.home
        return torch.empty(0, 0, device=home.device, dtype=torch.promote_types(torch.float32, home.dtype))
    part = "bias" if site.kind in VECTORS else "weight"
    current = there.get((part, site.name), Target(part, site.name, site, ())).evaluate(tensors)
    if site.kind != "sequence":
        return current
    return rows(program.captured.graphs()[0], dict(program.tensors()), current.T).T
