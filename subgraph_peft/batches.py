"""`prepare` is the equation of one site; here it runs over all sites with equal shapes at once."""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .errors import MethodError, MethodWarning, first_line
from .method import Method
from .site import Site

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
            check(method, entry, {name: value[index] for name, value in values.items()})
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


def check(method: Method, site: Site, values: Values) -> None:
    """`check_start` of a method and of those inside it."""
    for layer in method.layers_at(site):
        own = {name: values[outer] for name, outer in layer.names.items() if outer in values}
        layer.method.check_start(layer.site, own)
