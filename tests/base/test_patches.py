"""What is changed for the whole process is given back: nested, failing, ended in any order, by one thread at a time."""

import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import subgraph_peft as sp
from subgraph_peft.base import patches
from subgraph_peft.base.borrowed import get
from subgraph_peft.base.errors import CaptureError, SubgraphPeftError

LOG = logging.getLogger("torch")


def state() -> dict[str, Any]:
    """Of the process, what captures and exports change."""
    return {
        "hooks": vars(saved_tensors_hooks)["__enter__"],
        "apply": vars(Function)["apply"],
        "reentrant": vars(CheckpointFunction).get("apply"),
        "environment": {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "collector": gc.isenabled(),
        "log": LOG.level,
        "root": (logging.getLogger().level, logging.getLogger().handlers[:]),
        "stderr": sys.stderr,
        "path": sys.path[:],
        "rules": get("onnxscript.rewriter.ort_fusions.gqa:gqa_rules").rules,
    }


@pytest.fixture(autouse=True)
def given_back() -> Iterator[None]:
    before = state()
    yield
    assert state() == before


CONTEXTS: dict[str, Callable[[], AbstractContextManager]] = {
    "watched": patches.watched,
    "silenced": patches.silenced,
    "uncollected": patches.uncollected,
    "weights_only": patches.weights_only,
    "importable": patches.importable,
    "root_logger_kept": patches.root_logger_kept,
    "masks_kept": patches.masks_kept,
    "quiet": lambda: patches.quiet("torch.onnx"),
}


@pytest.mark.parametrize("name", CONTEXTS)
def test_nested_and_failing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = state()
    with pytest.raises(ZeroDivisionError), CONTEXTS[name]():
        within = state()
        with pytest.raises(KeyError), CONTEXTS[name]():
            raise KeyError
        assert state() == within
        raise ZeroDivisionError
    assert state() == before


SWITCHING = ["watched", "uncollected", "weights_only", "importable", "masks_kept"]


@pytest.mark.parametrize("name", SWITCHING)
def test_the_outer_one_ends_first(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    before = state()
    outer, inner = CONTEXTS[name](), CONTEXTS[name]()
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    changed = [key for key, value in state().items() if value != before[key]]
    inner.__exit__(None, None, None)
    assert changed and state() == before


def test_calls_are_told_to_everyone_who_watches():
    x = torch.ones(2, requires_grad=True)
    with patches.watched() as (outer, names):
        with patches.watched() as (inner, _):
            checkpoint(torch.sin, x, use_reentrant=True)
        assert inner == {"reentrant"}
        checkpoint(torch.sin, x, use_reentrant=False)
        patches.Probe.apply(x)
    assert "not reentrant" in outer and names == {"Probe"}


class Nested(nn.Module):
    """Captures another model while it is captured itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        sp.capture(nn.Linear(2, 2), torch.ones(3, 2))
        return x * 2


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")


def test_captures_that_fail_or_nest():
    with pytest.raises(CaptureError, match="no"):
        sp.capture(Failing(), torch.ones(3, 2))
    before = state()
    with suppress(CaptureError):  # whether torch.export can trace within a trace is its own affair
        sp.capture(Nested(), torch.ones(3, 2))
    assert state() == before


def test_two_threads_capture_one_after_the_other():
    inside, most, failures = [], [], []

    class Slow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside.append(1)
            most.append(len(inside))
            gone.wait(0.05)
            inside.pop()
            return x * 2

    gone = threading.Event()

    def capture() -> None:
        try:
            assert sp.capture(Slow(), torch.ones(3, 2)).run().shape == (3, 2)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=capture) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and set(most) == {1}


def test_a_thread_that_the_one_inside_waits_for_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(patches, "WAIT", 0.1)
    raised: list[BaseException] = []

    def capture() -> None:
        try:
            sp.capture(nn.Linear(2, 2), torch.ones(3, 2))
        except SubgraphPeftError as error:
            raised.append(error)

    with patches.alone():
        thread = threading.Thread(target=capture)
        thread.start()
        thread.join()
    assert "Another thread (MainThread)" in str(raised[0]) and "one thread at a time" in str(raised[0])
