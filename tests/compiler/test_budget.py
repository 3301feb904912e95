"""Kinds of sites under a budget: the choice against every one tried, and how much work it takes."""

from collections.abc import Sequence
from itertools import combinations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from subgraph_peft.compiler import budget
from subgraph_peft.graph.site import Site
from subgraph_peft.method.adapter import Adapter
from subgraph_peft.method.method import Method
from subgraph_peft.passes import SSL


def site(kind: str, layer: int, width: int) -> Site:
    return Site(f"layers.{layer}.{kind}.weight", "linear", (3, width), torch.float32, ())


def make(method: Method, sites: Sequence[Site]) -> Adapter:
    return Adapter("a", method, tuple(sites))


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=7), st.integers(1, 3), st.integers(1, 500))
def test_the_kinds_that_come_closest_from_below(widths, layers, limit):
    sites = [site(f"k{index}", layer, width) for layer in range(layers) for index, width in enumerate(widths)]
    sums = [layers * sum(c) for size in range(1, len(widths) + 1) for c in combinations(widths, size)]
    best = max((total for total in sums if total <= limit), default=None)
    adapter = budget.fitting(limit, SSL(), sites, make)
    assert (adapter and budget.trained(adapter)) == best
    if adapter:
        chosen = {s.name for s in adapter.sites}
        assert all({s.name.replace("layers.0.", f"layers.{i}.") for s in adapter.sites if ".0." in s.name} <= chosen
                   for i in range(layers))  # fmt: skip


def test_a_kind_is_counted_once_and_no_site_is_asked_for_its_hash(monkeypatch):
    """14 kinds of 32 layers: 2¹⁴ choices of numbers, not of sites."""
    sites = [site(f"k{index}", layer, 2 * index + 3) for layer in range(32) for index in range(14)]
    hashed, made, hash_of = [], [], Site.__hash__
    monkeypatch.setattr(Site, "__hash__", lambda self: hashed.append(self.name) or hash_of(self))
    adapter = budget.fitting(32 * 100, SSL(), sites, lambda *args: made.append(args) or make(*args))
    assert budget.trained(adapter) == 32 * 100
    assert len(made) == 14 + 1 and len(hashed) <= len(sites)


def test_the_smallest_kinds_go_first_where_there_are_too_many_to_try():
    widths = [3 * index for index in range(1, budget.EXHAUSTIVE + 4)]
    sites = [site(f"k{index}", 0, width) for index, width in enumerate(widths)]
    adapter = budget.fitting(sum(widths[:5]) + 1, SSL(), sites, make)
    assert [s.in_features for s in adapter.sites] == widths[:5]
