"""Stopping a write at each of its changes to the file system."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from subgraph_peft.base import files

CHANGES = ("replace", "rename", "link", "unlink", "rmdir", "mkdir", "open", "fsync", "chmod")


class Killed(BaseException):
    """The process is gone: nothing that it does from here on reaches the disk."""


class Stop:
    """Stops at change `number`. A kill also keeps what cleans up from changing anything."""

    def __init__(self, number: int, kind: str, when: str):
        self.number, self.killed, self.after, self.count = number, kind == "killed", when == "after", 0

    def through(self, change: Callable, *arguments: Any, **options: Any) -> Any:
        self.count += 1
        if (self.count == self.number and not self.after) or (self.killed and self.count > self.number):
            self.stop()
        result = change(*arguments, **options)
        if self.count == self.number:
            self.stop()
        return result

    def stop(self) -> None:
        raise Killed if self.killed else KeyboardInterrupt


def stops(write: Callable[[], None], how: str, before: Callable[[], None]) -> Iterator[int]:
    """Runs `write` again and again, each time after `before`, stopped at its first, second, … change, until it ends;
    yields after every stop.

    how: "killed" or "interrupted", and whether "before" or "after" the change
    """
    for number in range(1, 1000):
        before()
        stop, ended = Stop(number, *how.split()), False
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in [*((os, name) for name in CHANGES), (files, "exchanged")]:
                change = (lambda handle: None) if name == "fsync" else getattr(owner, name)
                patch.setattr(owner, name, lambda *a, change=change, stop=stop, **o: stop.through(change, *a, **o))
            try:
                write()
                ended = stop.count < number
            except (Killed, KeyboardInterrupt):
                pass
        yield number
        if ended:
            return
    raise AssertionError("it never ended")


STOPS = [f"{kind} {when}" for kind in ("killed", "interrupted") for when in ("before", "after")]


def contents(folder: Path) -> dict[str, bytes]:
    """What stands in a folder under names that are not hidden."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
