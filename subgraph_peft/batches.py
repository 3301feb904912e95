"""`prepare` is the equation of one site; here it runs over all sites with equal shapes at once."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from .method import Method
from .sites import Site

Values = dict[str, torch.Tensor]
Load = Callable[[Site], torch.Tensor]

BATCH_BYTES = {"cuda": 2**31}  # of weights, as `prepare` sees them, in one batch; on other devices one by one
SHARE = 8  # of the free memory of a GPU, one part at most


class Differs(Exception):
    """What was asked of sites as one is not the same for all of them."""


class Alike:
    """Sites as one. What they have in common can be read, such as sizes; reading what differs, such as names, raises
    Differs."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._sites = sites

    def __getattr__(self, name: str) -> Any:
        return common([getattr(site, name) for site in self._sites])


def common(values: Sequence[Any]) -> Any:
    if all(isinstance(value, Site) for value in values):
        return Alike(values)
    if all(map(callable, values)):
        return lambda *args, **options: common([value(*args, **options) for value in values])
    if any(value != values[0] for value in values):
        raise Differs
    return values[0]


class Job(NamedTuple):
    """A method at one of its sites."""

    method: Method
    site: Site

    def like(self, other: "Job") -> bool:
        """Whether one `prepare` can serve both: equal options, weights of one shape."""
        mine, theirs = ((s.kind, s.shape, s.dtype, s.layout) for s in (self.site, other.site))
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

    A `prepare` that cannot be batched, since it branches on values, draws numbers or reads what differs between sites,
    runs site by site, and so does one that raises: the error that a method gives is about one site.
    """
    method, first = group[0]
    count, size, rest = batch_size(first, device), first.stack or 1, [job.site for job in group]
    while rest:
        most = max(1, count // size)
        sites, rest = rest[:most], rest[most:]
        entries = [site.entry for site in sites for _ in range(size)]
        W = weights(sites, load)
        values = batched(method, entries, W) if count >= len(W) > 1 else None
        if values is None:
            count, values = 1, one_by_one(method, entries, W)
        del W
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
    """`prepare` under vmap; None where it does not go through."""
    try:
        return torch.func.vmap(lambda matrix: method.prepare(Alike(sites), matrix))(W)
    except Exception:
        return None


def one_by_one(method: Method, sites: Sequence[Site], W: torch.Tensor) -> Values:
    each = [method.prepare(site, matrix) for site, matrix in zip(sites, W, strict=True)]
    return {name: torch.stack([values[name] for values in each]) for name in each[0]}


def check(method: Method, site: Site, values: Values) -> None:
    """`check_start` of a method and of those inside it."""
    for layer in method.layers_at(site):
        own = {name: values[outer] for name, outer in layer.names.items() if outer in values}
        layer.method.check_start(layer.site, own)
