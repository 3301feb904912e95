"""A budget of trained numbers: the largest rank, or the sites, that meet it."""

import math
import re
from collections.abc import Callable, Sequence
from itertools import combinations

from ..base.errors import MethodError
from ..base.text import layered
from ..graph.site import Site
from ..method.adapter import Adapter
from ..method.method import Method
from .per_site_options import with_options

Make = Callable[[Method, Sequence[Site]], Adapter]
EXHAUSTIVE = 14  # kinds of sites up to which every choice of them is tried


def allowed(budget: str | float, total: int) -> int:
    """Numbers that `budget` allows: "0.02%" of the model's `total`, a share below 1, or a count."""
    percent = re.fullmatch(r"\s*([\d.]+(?:[eE][+-]?\d+)?)\s*%\s*", budget) if isinstance(budget, str) else None
    try:
        value = float(percent[1]) / 100 if percent else float(budget)
    except ValueError:
        value = math.nan
    if not value > 0 or not math.isfinite(value) or (percent and value > 1):
        raise MethodError(f"A budget is a percentage such as '0.02%', a share below 1 or a count, not {budget!r}.")
    return int(value * total) if percent or value < 1 else int(value)


def trained(adapter: Adapter) -> int:
    """Numbers that an adapter trains."""
    return sum(math.prod(t.shape) for t in adapter.declared().values() if t.trainable)


def choose(budget: str | float, total: int, method: Method, sites: Sequence[Site], make: Make) -> tuple[Adapter, str]:
    """(adapter, what was chosen in words). The largest rank at all sites, up to their smallest dimension, that stays
    within the budget; without a rank, or where rank 1 is too much, the kinds of sites (the same in every layer) that
    come closest to it from below.

    Raises MethodError where not even one kind of site fits.
    """
    limit = allowed(budget, total)
    ranked = next((layer for layer in method.layers() if "r" in type(layer).model_fields), None)
    named = budget if isinstance(budget, str) or budget < 1 else f"{limit:,}"
    text = f"budget {named} of {total:,} = {limit:,}"
    if ranked is not None:
        r = largest(lambda r: trained(make(with_options(method, {"r": r}), sites)) <= limit, cap(sites))
        method = with_options(method, {"r": max(r, 1)})
        text += f": r = {max(r, 1)}"
        if r:
            adapter = make(method, sites)
            return adapter, f"{text} at {len(sites)} sites, {trained(adapter):,}"
    adapter = fitting(limit, method, sites, make)
    if adapter is None:
        smallest = min(trained(make(method, kind)) for kind in by_kind(sites))
        raise MethodError(
            f"{text}: {method.name} needs at least {smallest:,} numbers at the selected sites. Raise the budget to "
            f"{smallest}, or select fewer sites."
        )
    chosen = ", ".join(dict.fromkeys(layered(site.name) for site in adapter.sites))
    return adapter, f"{text}: {len(adapter.sites)} of {len(sites)} sites ({chosen}), {trained(adapter):,}"


def cap(sites: Sequence[Site]) -> int:
    return min(min(site.in_features, site.out_features) for site in sites)


def largest(fits: Callable[[int], bool], cap: int) -> int:
    """The largest r in 1 … cap that fits, or 0."""
    low, high = 0, cap
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def by_kind(sites: Sequence[Site]) -> list[tuple[Site, ...]]:
    """Sites that differ only in their layer's number."""
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(layered(site.name), []).append(site)
    return [tuple(group) for group in groups.values()]


def fitting(limit: int, method: Method, sites: Sequence[Site], make: Make) -> Adapter | None:
    """The kinds of sites that come closest to the limit from below, or None. Up to EXHAUSTIVE kinds every choice of
    them is tried, the larger ones first; of more, the smallest kinds, as many as fit."""
    kinds = by_kind(sites)
    costs = [trained(make(method, kind)) for kind in kinds]
    if len(kinds) <= EXHAUSTIVE:
        choices = [c for size in range(len(kinds), 0, -1) for c in combinations(range(len(kinds)), size)]
    else:
        ascending = sorted(range(len(kinds)), key=costs.__getitem__)
        choices = [tuple(ascending[:size]) for size in range(len(kinds), 0, -1)]
    totals = [sum(costs[kind] for kind in choice) for choice in choices]
    best = max((i for i, total in enumerate(totals) if total <= limit), key=totals.__getitem__, default=None)
    if best is None:
        return None
    wanted = {site.name for kind in choices[best] for site in kinds[kind]}
    return make(method, [site for site in sites if site.name in wanted])
