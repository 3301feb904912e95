"""Starting values of an adapter's tensors; `prepare` runs over all sites of equal shapes at once."""

import math
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..base.errors import MethodError, MethodWarning, first_line
from ..graph.sequence.token_embedding import rows
from ..graph.site import PLACES, VECTORS, Site
from ..method.adapter import Adapter, Target, targets
from ..method.method import Method, initial, starting
from ..method.tensors import Tensor
from ..program.internals import Home
from ..program.program import Program
from .factor_cache import Cache

Values = dict[str, torch.Tensor]
Load = Callable[[Site], torch.Tensor]
BATCH_BYTES = {"cuda": 2**31}  # of weights, as `prepare` sees them, in one batch; on other devices one by one
SHARE = 8  # of the free memory of a GPU, one part at most
NAMES = {"name": "its name", "calls": "its calls", "bias": "the name of its bias", "ties": "its ties"}


class Differs(Exception):
    """What was read of a site is not the same at those that stand in one batch with it."""


class Nameless(Site):
    """Any site of a batch: they differ in NAMES alone, and reading one of these raises Differs."""

    def __getattribute__(self, key: str) -> Any:
        if key in NAMES:
            raise Differs(f"it reads {NAMES[key]}")
        return super().__getattribute__(key)

    def part(self, name: str, rows: int) -> "Nameless":
        return Nameless(**vars(Site(**vars(self)).part(name, rows)))


class Job(NamedTuple):
    """A method at one of its sites."""

    method: Method
    site: Site

    def like(self, other: "Job") -> bool:
        """Whether one `prepare` can serve both: equal options, sites that differ in names alone."""
        mine, theirs = ({k: v for k, v in vars(s).items() if k not in NAMES} for s in (self.site, other.site))
        return mine == theirs and (self.method is other.method or self.method == other.method)


def grouped(jobs: Sequence[Job]) -> list[list[Job]]:
    groups: list[list[Job]] = []
    for job in jobs:
        known = next((group for group in groups if job.like(group[0])), None)
        if known is None:
            groups.append([job])
        else:
            known.append(job)
    return groups


def prepare_group(group: Sequence[Job], load: Load, device: torch.device) -> Iterator[tuple[Site, Values]]:
    """(site, what `prepare` gives there) for jobs that are alike; at a stack of matrices, values have it in front.

    load: the weight of a site, [out, in] or [stack, out, in]; those of one batch are in memory at a time

    A `prepare` that vmap cannot batch, since it branches on values, draws numbers or reads a site's name, runs site by
    site, with a MethodWarning. Where memory runs out the batch is halved; MethodError where one site is too much.
    """
    method, first = group[0]
    count, size, rest = batch_size(first, device), first.stack or 1, [job.site for job in group]
    while rest:
        sites = rest[: max(1, count // size)]
        entries = [site.entry for site in sites for _ in range(size)]
        try:
            W = weights(sites, load)
            values = batched(method, entries, W) if count >= len(W) > 1 else one_by_one(method, entries, W)
        except torch.OutOfMemoryError as error:
            if count == 1:
                raise MethodError(
                    f"{method.name} at {sites[0].name}: {device} has not the memory to prepare it. Rewrite it on the "
                    "CPU, or leave it out."
                ) from error
            count = min(count, len(entries)) // 2 or 1
            continue
        finally:
            W = None
        if values is None:
            count = 1
            continue
        rest = rest[len(sites) :]
        for index, entry in enumerate(entries):
            check_prepared(method, entry, {name: value[index] for name, value in values.items()})
        for index, site in enumerate(sites):
            rows = slice(index * size, (index + 1) * size) if site.stack else index
            yield site, {name: value[rows] for name, value in values.items()}
        del values


def batch_size(site: Site, device: torch.device) -> int:
    """How many matrices like the site's make up a batch."""
    most = BATCH_BYTES.get(device.type, 0)
    if device.type == "cuda":
        most = min(most, torch.cuda.mem_get_info(device)[0] // SHARE)
    numbers = max(1, math.prod(site.shape) // (site.stack or 1))
    return max(1, most // (numbers * torch.promote_types(site.dtype, torch.float32).itemsize))


def weights(sites: Sequence[Site], load: Load) -> torch.Tensor:
    """The matrices of all sites, [n, out, in]; without a copy where there is one site."""
    first = load(sites[0])
    first = first if sites[0].stack else first[None]
    if len(sites) == 1:
        return first
    size = len(first)
    W = first.new_empty(len(sites) * size, *first.shape[1:])
    W[:size] = first
    for index, site in enumerate(sites[1:], 1):
        W[index * size : (index + 1) * size] = load(site)
    return W


def batched(method: Method, sites: Sequence[Site], W: torch.Tensor) -> Values | None:
    """`prepare` under vmap. None, with a MethodWarning, where vmap alone is at fault: an error that also comes at one
    site is raised as it comes there."""
    like = Nameless(**vars(sites[0]))
    try:
        return torch.func.vmap(lambda matrix: method.prepare(like, matrix))(W)
    except torch.OutOfMemoryError:
        raise
    except (Differs, RuntimeError) as error:
        why = first_line(error)
    method.prepare(sites[0], W[0])
    warnings.warn(f"prepare of {method.name} runs site by site, not over many at once: {why}", MethodWarning, 2)
    return None


def one_by_one(method: Method, sites: Sequence[Site], W: torch.Tensor) -> Values:
    each = [method.prepare(site, matrix) for site, matrix in zip(sites, W, strict=True)]
    return {name: torch.stack([values[name] for values in each]) for name in each[0]}


def check_prepared(method: Method, site: Site, values: Values) -> None:
    """`check_start` of a method and of those inside it."""
    for layer in method.layers_at(site):
        own = {name: values[outer] for name, outer in layer.names.items() if outer in values}
        layer.method.check_start(layer.site, own)


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
