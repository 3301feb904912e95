"""What is changed for the whole process while something runs: classes of torch, settings of libraries, the environment.

What others would notice is for one thread at a time: a second one waits until the first is done. Changes nest, and may
end in any order: the last that is still on rules, and with the end of all of them everything is as it was.
"""

import gc
import io
import logging
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.autograd import Function
from torch.utils.checkpoint import checkpoint

from .borrowed import CHECKPOINTS, TORCH, WEIGHTS_ONLY, check_weights_only, get, missing
from .errors import SubgraphPeftError

WAIT = 600.0  # seconds
LOCK = threading.RLock()  # held while what others would see is changed
BOOKS = threading.RLock()  # held while a switch is turned
ABSENT = object()
holders: list[str] = []  # names of threads that hold the lock, as often as they do


@contextmanager
def alone() -> Iterator[None]:
    """While no other thread is in here. One that is waited for by the thread inside would wait for ever: after
    `WAIT` seconds it raises SubgraphPeftError."""
    if not LOCK.acquire(timeout=WAIT):
        raise SubgraphPeftError(
            f"Another thread ({holders[-1] if holders else 'unknown'}) has been capturing, rewriting or exporting for "
            f"{WAIT:.0f} s, which changes the whole process and is for one thread at a time. Do it in one thread; a "
            "model must not wait in its forward for a thread that captures."
        )
    holders.append(threading.current_thread().name)
    try:
        yield
    finally:
        holders.pop()
        LOCK.release()


class Switch:
    """A setting of the process: of the values that are asked for the last one that is still on, without any the one
    that it had before."""

    def __init__(self, read: Callable[[], Any], write: Callable[[Any], None]):
        self.read, self.write = read, write
        self.on: list[list[Any]] = []
        self.before: Any = None

    @contextmanager
    def set(self, value: Any) -> Iterator[None]:
        mine = [value]
        with BOOKS:
            if not self.on:
                self.before = self.read()
            self.on.append(mine)
            self.write(value)
        try:
            yield
        finally:
            with BOOKS:
                self.on = [other for other in self.on if other is not mine]
                self.write(self.on[-1][0] if self.on else self.before)


@cache
def attribute(owner: Any, name: str) -> Switch:
    """An attribute of its own of a class or a module; without it, it is inherited again."""

    def write(value: Any) -> None:
        if value is not ABSENT:
            setattr(owner, name, value)
        elif name in vars(owner):
            delattr(owner, name)

    return Switch(lambda: vars(owner).get(name, ABSENT), write)


@cache
def variable(name: str) -> Switch:
    """A variable of the environment; None where it is not set."""

    def write(value: str | None) -> None:
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value

    return Switch(lambda: os.environ.get(name), write)


@cache
def log_level(name: str) -> Switch:
    log = logging.getLogger(name)
    return Switch(lambda: log.level, log.setLevel)


@cache
def searched(folder: str) -> Switch:
    """Whether modules are looked for in a folder too, after all else."""

    def write(value: bool) -> None:
        if value and folder not in sys.path:
            sys.path.append(folder)
        elif not value and folder in sys.path:
            sys.path.remove(folder)

    return Switch(lambda: folder in sys.path, write)


def set_root(value: tuple[list[logging.Handler], int]) -> None:
    root.handlers[:], root.level = value


root = logging.getLogger()
ROOT = Switch(lambda: (root.handlers[:], root.level), set_root)
COLLECTOR = Switch(gc.isenabled, lambda on: gc.enable() if on else gc.disable())


@contextmanager
def watched() -> Iterator[tuple[set[str], set[str]]]:
    """Reentrant calls of torch.utils.checkpoint compute their function as it is, so that none of it is traced.

    Gives the kinds of the calls of torch.utils.checkpoint that are met ("reentrant", "not reentrant"), and the names of
    the torch.autograd.Functions that are applied. Raises VersionError where torch does not call what is changed.
    """
    calls: set[str] = set()
    names: set[str] = set()
    hooks = get("torch.autograd.graph:saved_tensors_hooks")
    reentrant = get("torch.utils.checkpoint:CheckpointFunction")
    enter = own("torch.autograd.graph:saved_tensors_hooks.__enter__", hooks, "__enter__")
    apply = own("torch.autograd:Function.apply", Function, "apply")

    def entered(held: Any) -> Any:
        if type(held).__module__ == CHECKPOINTS:
            calls.add("not reentrant")
        return enter(held)

    def computed(function: Callable, preserve_rng_state: bool, *args: Any) -> Any:
        calls.add("reentrant")
        return function(*args)

    def applied(cls: type, *args: Any, **kwargs: Any) -> Any:
        names.add(cls.__qualname__)
        return apply.__get__(None, cls)(*args, **kwargs)

    with (
        alone(),
        attribute(hooks, "__enter__").set(entered),
        attribute(reentrant, "apply").set(staticmethod(computed)),
        attribute(Function, "apply").set(classmethod(applied)),
    ):
        check_watched(calls, names)
        calls.clear()
        names.clear()
        yield calls, names


def own(path: str, cls: type, name: str) -> Any:
    """What a class itself has under a name."""
    get(path)
    if name not in vars(cls):
        raise missing(path.replace(":", "."), TORCH, "calls of it are seen")
    return vars(cls)[name]


class Probe(Function):
    """Gives back what it is given."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def check_watched(calls: set[str], names: set[str]) -> None:
    """Raises VersionError where a call of each kind is not seen."""
    with torch.inference_mode(False), torch.enable_grad(), unwarned():
        x = torch.zeros(1, device="cpu")
        for again in (True, False):
            checkpoint(torch.clone, x, use_reentrant=again, preserve_rng_state=False)
        Probe.apply(x)
    if calls != {"reentrant", "not reentrant"}:
        raise missing("a call of torch.utils.checkpoint", TORCH, "recomputation must not be traced", "is not seen")
    if Probe.__qualname__ not in names:
        raise missing("a call of torch.autograd.Function", TORCH, "backward passes by hand are compared", "is not seen")


@contextmanager
def silenced() -> Iterator[None]:
    """Without what torch says of a trace on stderr: the graph of a failed one, warnings, log lines (those asked for
    with TORCH_LOGS stay). What the model prints there appears when the trace is done."""
    held = io.StringIO()
    with alone(), ExitStack() as stack:
        if logging.getLogger("torch").level >= logging.WARNING:
            stack.enter_context(log_level("torch").set(logging.CRITICAL + 1))
        stack.enter_context(attribute(sys, "stderr").set(held))
        stack.enter_context(unwarned())
        yield
    sys.stderr.write(held.getvalue())


@contextmanager
def quiet(*names: str) -> Iterator[None]:
    """Without warnings, Python's and those of these loggers."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(log_level(name).set(logging.ERROR))
        stack.enter_context(unwarned())
        yield


@contextmanager
def unwarned() -> Iterator[None]:
    with alone(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextmanager
def uncollected() -> Iterator[None]:
    """Without Python's cyclic garbage collector, which walks through every node again and again while a graph grows: a
    twelfth of the time of a capture, half of that of a rewrite. Tensors go as their last reference goes."""
    with COLLECTOR.set(False):
        yield


@contextmanager
def weights_only() -> Iterator[None]:
    """torch unpickles nothing beyond tensors. Raises VersionError where it does so all the same."""
    with alone(), variable(WEIGHTS_ONLY).set("1"):
        check_weights_only()
        yield


@contextmanager
def importable() -> Iterator[None]:
    """The current directory is searched for modules too, after all else."""
    with searched(str(Path.cwd())).set(True):
        yield


@contextmanager
def root_logger_kept() -> Iterator[None]:
    """What an import does to the root logger is undone."""
    with ROOT.set((logging.getLogger().handlers[:], logging.getLogger().level)):
        yield


@contextmanager
def masks_kept() -> Iterator[None]:
    """Without onnxscript's rule for GroupQueryAttention, which takes any mask for one of full length and drops it."""
    get("onnxscript.rewriter.ort_fusions.gqa:gqa_rules.rules")
    gqa = get("onnxscript.rewriter.ort_fusions.gqa:gqa_rules")
    with alone(), attribute(gqa, "rules").set([]):
        yield


@contextmanager
def without_progress() -> Iterator[None]:
    """Without the bars and tables of transformers: what they say is in the result."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
