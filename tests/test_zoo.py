"""Every architecture of the zoo takes the whole road, up to the limits that it declares."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.models import made
from tests.zoo import entries
from tests.zoo.entry import STAGES, Entry
from tests.zoo.road import NOT_REACHED, YES, Row, walk
from tests.zoo.table import text

EVERY = entries()
MARKED = [pytest.param(e, id=e.name, marks=() if e.fast else pytest.mark.zoo) for e in EVERY]


@pytest.mark.parametrize("entry", MARKED)
def test_an_architecture_takes_the_whole_road(entry):
    row = walk(entry)
    assert row.surprises(entry) == {}
    assert all(cell == YES for stage, cell in row.cells.items() if cell != NOT_REACHED and stage not in entry.limits)


def test_names_are_unique():
    names = [entry.name for entry in EVERY]
    assert len(set(names)) == len(names)


class Branching(nn.Module):
    """Decides on a value."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) if x.sum() > 0 else x


class Drawing(nn.Module):
    """Draws in Python, where a captured graph cannot follow."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * random.random() if self.training else self.linear(x)


def entry_of(module: type[nn.Module]) -> Entry:
    return Entry(module.__name__, "test", lambda: made(module, lambda: {"x": torch.randn(3, 4)}))


def test_what_cannot_be_captured_fails_with_the_reason_unless_it_is_declared():
    entry = entry_of(Branching)
    row = walk(entry)
    assert list(row.surprises(entry)) == ["capture"] and "data-dependent" in row.cells["capture"]
    assert [row.cells[stage] for stage in STAGES[1:]] == [NOT_REACHED] * (len(STAGES) - 1)
    declared = replace(entry, limits={"capture": "a branch"})
    assert row.surprises(declared) == {}
    assert "limit 1: Branching: a branch" in text([row], {"Branching": declared})


def test_a_graph_that_is_not_the_model_fails_in_training():
    entry = entry_of(Drawing)
    assert "outputs differ by" in walk(entry).surprises(entry)["train"]


def test_a_limit_that_is_gone_fails():
    row = Row("x", "test", dict.fromkeys(STAGES, YES))
    entry = Entry("x", "test", lambda: None, limits={"onnx": "no kernel"})
    assert row.surprises(entry) == {"onnx": "declared as a limit (no kernel), but works"}


def test_a_limit_of_an_unknown_stage_is_refused():
    with pytest.raises(ValueError, match="'flying'.*capture, sites"):
        Entry("x", "test", lambda: None, limits={"flying": "no"})
