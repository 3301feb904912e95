"""The record of a run: what happened at every step, when to evaluate and save, and how it stops."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers import TrainerCallback

from ..base import processes
from ..base.errors import TrainError
from . import resume
from .options import TrainOptions
from .order import Order


class Record(TrainerCallback):
    """What happened, step by step; decides when to evaluate and save, and stops cleanly.

    Losses stay on their device until they are needed; a loss that is not finite ends the run before anything is saved.

    past:     what a checkpoint kept of the record, empty for a new run
    order:    of the examples; it is told the epoch
    evaluate: evaluates now, and adds to `evaluations`
    rescue:   what to do about a loss that is not finite, as text
    """

    def __init__(
        self,
        options: TrainOptions,
        steps_per_epoch: int,
        past: Mapping[str, Any],
        order: Order,
        evaluate: Callable[[], Any],
        rescue: Callable[[], str],
    ):
        self.options, self.steps_per_epoch = options, steps_per_epoch
        self.order, self.evaluate, self.rescue = order, evaluate, rescue
        self.losses = [tuple(entry) for entry in past.get("losses", ())]
        self.evaluations = [tuple(entry) for entry in past.get("evaluations", ())]
        self.seconds, self.aside = past.get("seconds", 0.0), past.get("aside", 0.0)
        self.examples = past.get("examples", 0)
        self.started = time.perf_counter()
        self.current: list[torch.Tensor] = []
        self.pending: list[tuple[int, torch.Tensor]] = []
        self.random: Mapping[str, Any] | None = None
        self.signal: int | None = None
        self.whole = True

    def every(self, interval: int | str | None, step: int) -> bool:
        return bool(interval) and step % (self.steps_per_epoch if interval == "epoch" else interval) == 0

    def elapsed(self) -> float:
        return self.seconds + time.perf_counter() - self.started

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Time that is not training, and random numbers that do not count."""
        start, state = time.perf_counter(), resume.random_state()
        try:
            yield
        finally:
            resume.set_random_state(state)
            self.aside += time.perf_counter() - start

    def check_signal(self) -> None:
        """Stop if a signal came; all processes stop at the same step."""
        self.signal = processes.agreed(self.signal or 0) or None
        if self.signal is not None:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        due = step == 0 or self.every(self.options.eval_every, step)
        if due and not any(at == step for at, _ in self.evaluations):
            self.evaluate()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.order.epoch = state.global_step // self.steps_per_epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.whole = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
        self.examples += self.order.size(step - 1)
        self.pending.append((step, torch.stack(self.current).sum()))
        self.current.clear()
        self.random, self.whole = resume.random_state(), True
        control.should_evaluate = last or self.every(self.options.eval_every, step)
        control.should_save = last or self.every(self.options.save_every, step)
        if control.should_evaluate or control.should_save or control.should_log:
            self.settle()
        self.check_signal()

    def settle(self) -> None:
        """Read the losses of the last steps. Raises TrainError if one is not finite."""
        if not self.pending:
            return
        values = torch.stack([loss for _, loss in self.pending])
        if processes.world() > 1:
            dist.all_reduce(values)
            values /= processes.world()
        read = [(step, value) for (step, _), value in zip(self.pending, values.tolist(), strict=True)]
        self.pending.clear()
        for step, value in read:
            if not math.isfinite(value):
                raise TrainError(f"The loss is {value} at step {step}. {self.rescue()}")
        self.losses += read

    def as_json(self) -> dict[str, Any]:
        return {
            "losses": self.losses, "evaluations": self.evaluations, "seconds": self.elapsed(), "aside": self.aside,
            "examples": self.examples,
        }  # fmt: skip


class Bar(TrainerCallback):
    """A progress bar on stderr, with the last loss and metrics."""

    def __init__(self, steps: int, done: int):
        self.bar = tqdm(total=steps, initial=done, desc="train", unit="step", dynamic_ncols=True)
        self.shown: dict[str, str] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        self.shown |= {name: f"{logs[name]:.4g}" for name in logs if name == "loss" or name.startswith("eval_")}
        self.bar.set_postfix(self.shown)


@contextmanager
def signals(record: Record) -> Iterator[None]:
    """SIGINT and SIGTERM are noted in the record; a second one stops at once. Other threads get no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(number: int, frame: Any) -> None:
        if record.signal is not None:
            record.whole = False
            raise KeyboardInterrupt
        record.signal = number

    former = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
