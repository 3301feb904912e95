"""transformers.Trainer over a Program: exact resumption, exact accumulation, its own evaluation, no chatter."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import resume
from .errors import TrainError
from .evaluate import Metrics, evaluate, loss_and_logits, scored, shifts_labels
from .program import Program

if TYPE_CHECKING:
    from .train import TrainOptions

MEGABATCH = 50


class Order(Sampler[int]):
    """The order of the examples in an epoch: a function of (seed, epoch) alone.

    With lengths, batches are of similar length: within chunks of 50 batches examples are sorted, then batches shuffled.
    """

    def __init__(self, count: int, seed: int, batch: int, lengths: Sequence[int] | None = None):
        self.count, self.seed, self.batch, self.lengths = count, seed, batch, lengths
        self.epoch = 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed << 20) + self.epoch)
        order = torch.randperm(self.count, generator=generator).tolist()
        if self.lengths is None:
            return iter(order)
        size = self.batch * MEGABATCH
        order = [i for at in range(0, self.count, size) for i in sorted(order[at : at + size], key=self.lengths.__getitem__)]
        batches = [order[at : at + self.batch] for at in range(0, self.count, self.batch)]
        last = [batches.pop()] if len(batches[-1]) < self.batch else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        return (i for batch in [*(batches[j] for j in shuffled), *last] for i in batch)


class Record(TrainerCallback):
    """What happened, step by step; decides when to evaluate and save, and stops cleanly.

    Losses stay on their device until they are needed; a loss that is not finite ends the run before anything is saved.
    """

    def __init__(self, options: "TrainOptions", steps_per_epoch: int, past: Mapping[str, Any]):
        self.options, self.steps_per_epoch = options, steps_per_epoch
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
        self.trainer: "ProgramTrainer"

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
        """Stop if a signal came; under torch.distributed all processes stop at the same step."""
        if dist.is_initialized():
            asked = torch.tensor(self.signal or 0, device=self.trainer.args.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
            self.signal = int(asked) or None
        if self.signal is not None:
            raise KeyboardInterrupt

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        due = step == 0 or self.every(self.options.eval_every, step)
        if due and not any(at == step for at, _ in self.evaluations):
            self.trainer.evaluate()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.order.epoch = state.global_step // self.steps_per_epoch

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.whole = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, last = state.global_step, state.global_step >= state.max_steps
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
        if dist.is_initialized():
            dist.all_reduce(values)
            values /= dist.get_world_size()
        read = [(step, value) for (step, _), value in zip(self.pending, values.tolist(), strict=True)]
        self.pending.clear()
        for step, value in read:
            if not math.isfinite(value):
                raise TrainError(f"The loss is {value} at step {step}. {self.trainer.rescue()}")
        self.losses += read

    def as_json(self) -> dict[str, Any]:
        return {
            "losses": self.losses, "evaluations": self.evaluations, "seconds": self.elapsed(), "aside": self.aside,
            "examples": self.examples,
        }  # fmt: skip


class Bar(TrainerCallback):
    """A progress bar on stderr."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.shown: dict[str, str] = {}
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", dynamic_ncols=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.update()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, float], **kwargs: Any) -> None:
        self.shown |= {name: f"{logs[name]:.4g}" for name in logs if name == "loss" or name.startswith("eval_")}
        self.bar.set_postfix(self.shown)

    def close(self) -> None:
        if hasattr(self, "bar"):
            self.bar.close()


class ProgramTrainer(Trainer):
    """Trainer with its hooks for data order, loss, optimizer, evaluation and checkpoints set to those of a Program."""

    def __init__(
        self,
        program: Program,
        arguments: TrainingArguments,
        options: "TrainOptions",
        groups: list[dict[str, Any]],
        data: tuple[Dataset, Dataset | None],
        collate: Callable,
        metrics: Metrics | None,
        record: Record,
        run: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback],
    ):
        self.program, self.options, self.groups, self.metrics, self.record, self.run = (
            program, options, groups, metrics, record, run,
        )  # fmt: skip
        self.shifted = shifts_labels(program)
        train_data, eval_data = data
        lengths = [len(train_data[i]["input_ids"]) for i in range(len(train_data))] if options.group_by_length else None
        self.order = Order(len(train_data), options.seed, options.batch_size, lengths)
        record.trainer = self
        super().__init__(
            model=program.module, args=arguments, data_collator=collate, train_dataset=train_data, eval_dataset=eval_data,
            callbacks=[record, *callbacks],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False

    def get_train_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset, self.args.train_batch_size, sampler=self.order, collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip
        return self.accelerator.prepare(loader)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        self.optimizer = torch.optim.AdamW(self.groups, lr=self.args.learning_rate)
        return self.optimizer

    # the loss of a step is the mean over all its labels, however they are spread over batches and processes

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, Any]:
        batches = list(islice(epoch_iterator, num_batches))
        if self.args.gradient_accumulation_steps * self.args.world_size == 1 or not batches or "labels" not in batches[0]:
            return batches, None
        count = sum(scored(batch["labels"], self.shifted).numel() for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(count, device=device), "sum")

    def compute_loss(self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        loss, logits = loss_and_logits(model(**inputs))
        if num_items_in_batch is not None:
            share = scored(inputs["labels"], self.shifted).numel() / num_items_in_batch
            loss = loss * share * self.current_gradient_accumulation_steps * self.args.world_size
        return (loss, logits) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.record.current.append(loss)
        first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        self.record.examples += len(first) * self.args.world_size
        return loss

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        if self.eval_dataset is None:
            return {}
        with self.record.apart():
            values = evaluate(
                self.program, self.eval_dataset, metrics=self.metrics, batch_size=self.args.eval_batch_size,
                collate=self.data_collator, each=self.record.check_signal if self.args.world_size == 1 else None,
            )  # fmt: skip
        self.record.evaluations.append((self.state.global_step, values))
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    # checkpoints

    def checkpoint(self) -> Path | None:
        """The newest checkpoint of this run."""
        return next(reversed(resume.found(Path(self.args.output_dir))), None)

    def rescue(self) -> str:
        kept = self.checkpoint()
        return (
            f"Try a lower lr (now {self.options.lr:g}), a longer warmup, a smaller max_grad_norm"
            f"{', or training without bf16' if self.options.bf16 else ''}. "
            + (f"The last good checkpoint is {kept}." if kept else "No checkpoint had been written yet.")
        )

    def _save_checkpoint(self, model: Any, trial: Any = None) -> None:
        self.record.settle()
        step, output = self.state.global_step, Path(self.args.output_dir)
        for name, parameter in self.program.parameters(trainable=True):
            if not torch.isfinite(parameter).all():
                raise TrainError(f"{name} is not finite after step {step}. {self.rescue()}")
        start = time.perf_counter()
        states = [self.record.random]
        if dist.is_initialized():
            states = [None] * self.args.world_size
            dist.all_gather_object(states, self.record.random)
        if self.is_world_process_zero():
            run = {
                "run": self.run, "scheduler": self.lr_scheduler.state_dict(), "random": states, **self.record.as_json(),
            }  # fmt: skip
            resume.write(output / f"{resume.PREFIX}{step}", self.program, self.optimizer, self.state, run)
            resume.rotate(output, self.options.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.record.aside += time.perf_counter() - start

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        resume.load_weights(Path(resume_from_checkpoint), self.program)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.load_optimizer(Path(checkpoint), self.optimizer)
            self.lr_scheduler.load_state_dict(resume.read_run(Path(checkpoint))["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.record.random = resume.read_run(Path(checkpoint))["random"][self.args.process_index]
            resume.set_random_state(self.record.random)

