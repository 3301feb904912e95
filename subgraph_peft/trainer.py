"""transformers.Trainer over a Program: exact resumption, exact accumulation, its own evaluation, no chatter."""

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from . import resume
from .data import Padding
from .errors import CheckpointError, TrainError
from .evaluate import Metrics, evaluate, loss_and_logits, scored, shifts_labels
from .order import Order
from .penalty import has_penalty
from .program import Program
from .record import Bar, Record, signals
from .train import TrainOptions, parameter_groups

NEUTRAL = {
    "epochs", "max_steps", "eval_batch_size", "eval_every", "save_every", "logging_every", "keep_checkpoints", "resume",
    "device", "report",
}  # fmt: skip


class ProgramTrainer(Trainer):
    """Trainer with its hooks for data order, loss, optimizer, evaluation and checkpoints set to those of a Program."""

    def __init__(
        self,
        program: Program,
        arguments: TrainingArguments,
        options: TrainOptions,
        data: tuple[Dataset, Dataset | None],
        collate: Callable,
        metrics: Metrics | None,
        record: Record,
        run: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback],
    ):
        self.program, self.options, self.metrics, self.record, self.run = program, options, metrics, record, run
        self.shifted, self.penalised = shifts_labels(program), has_penalty(program)
        train, held_out = data
        lengths = [len(train[i]["input_ids"]) for i in range(len(train))] if options.group_by_length else None
        self.order = Order(len(train), options.seed, options.batch_size, lengths)
        record.trainer = self
        super().__init__(
            program.module, arguments, collate, train_dataset=train, eval_dataset=held_out,
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
        groups = parameter_groups(self.program, self.args.learning_rate, self.options.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        self.schedule = self.program.schedule(self.optimizer, self.args.max_steps)
        return self.optimizer

    # the loss of a step is the mean over all its labels, however they are spread over batches and processes

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, Any]:
        batches = list(islice(epoch_iterator, num_batches))
        alone = self.args.gradient_accumulation_steps * self.args.world_size == 1
        if alone or not batches or "labels" not in batches[0]:
            return batches, None
        count = sum(scored(batch["labels"], self.shifted).numel() for batch in batches)
        return batches, self.accelerator.reduce(torch.tensor(count, device=device), "sum")

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, logits = loss_and_logits(model(**inputs))
        if num_items_in_batch is not None:
            share = scored(inputs["labels"], self.shifted).numel() / num_items_in_batch
            loss = loss * share * self.current_gradient_accumulation_steps * self.args.world_size
        if self.penalised:
            loss = loss + self.program.penalty()
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

    def finished(self, folder: Path) -> None:
        """Take up a run whose last step is in `folder`; an interrupt may have kept it from its last evaluation."""
        self.program.load(folder)
        self.state.global_step = resume.step_of(folder)
        if not any(step == self.state.global_step for step, _ in self.record.evaluations):
            self.accelerator.prepare_model(self.model, evaluation_mode=True)
            self.evaluate()

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
            folder = output / f"{resume.PREFIX}{step}"
            resume.write(folder, self.program, self.optimizer, self.schedule, self.state, run)
            resume.rotate(output, self.options.keep_checkpoints)
        self.accelerator.wait_for_everyone()
        self.record.aside += time.perf_counter() - start

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.program.load(resume_from_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.load_optimizer(Path(checkpoint), self.optimizer)
            resume.load_schedule(Path(checkpoint), self.schedule)
            self.lr_scheduler.load_state_dict(resume.read_run(Path(checkpoint))["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            self.record.random = resume.read_run(Path(checkpoint))["random"][self.args.process_index]
            resume.set_random_state(self.record.random)


def build_trainer(
    program: Program,
    data: tuple[Dataset, Dataset | None],
    output: Path,
    options: TrainOptions,
    collate: Callable | None,
    metrics: Metrics | None,
    callbacks: Sequence[TrainerCallback],
    folder: Path | None,
) -> ProgramTrainer:
    """A trainer that starts anew, or goes on from the checkpoint `folder` if that is of the same run."""
    arguments = training_arguments(options, output)
    batches = math.ceil(len(data[0]) / (options.batch_size * arguments.world_size))
    steps_per_epoch = math.ceil(batches / options.gradient_accumulation)
    arguments.max_steps = options.max_steps or math.ceil(options.epochs * steps_per_epoch)
    arguments.warmup_steps = options.warmup_steps(arguments.max_steps)
    run = {
        **options.model_dump(mode="json", exclude=NEUTRAL),
        "steps": arguments.max_steps,
        "examples": len(data[0]),
        "data": getattr(data[0], "digest", None),
        "processes": arguments.world_size,
    }
    past = resume.read_run(folder) if folder else {}
    if folder and past["run"] != run:
        before = past["run"]
        differs = [f"{key} was {before.get(key)}, is {run.get(key)}" for key in run if before.get(key) != run[key]]
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(differs)}. Choose another output folder, or resume=False to "
            "remove it and start anew."
        )
    record = Record(options, steps_per_epoch, past)
    collate = collate or Padding()
    return ProgramTrainer(program, arguments, options, data, collate, metrics, record, run, callbacks)


def training_arguments(options: TrainOptions, output: Path) -> TrainingArguments:
    cuda = options.device != "cpu" and torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation,
        learning_rate=options.lr,
        lr_scheduler_type="constant_with_warmup" if options.schedule == "constant" else options.schedule,
        max_grad_norm=options.max_grad_norm,
        bf16=options.bf16,
        seed=options.seed,
        use_cpu=not cuda,
        dataloader_pin_memory=cuda,
        logging_steps=options.logging_every,
        eval_strategy="no",
        save_strategy="no",
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        disable_tqdm=True,
        report_to=options.report,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # several GPUs are for several processes
    return arguments


def run_trainer(trainer: ProgramTrainer, folder: Path | None, progress: bool | None) -> None:
    """Train to the end; on an interrupt save, if the last step is whole, and raise."""
    record, bar = trainer.record, None
    if progress or (progress is None and sys.stderr.isatty()):
        bar = Bar(trainer.args.max_steps, resume.step_of(folder) if folder else 0)
        trainer.add_callback(bar)
    try:
        with signals(record):
            if folder and resume.step_of(folder) >= trainer.args.max_steps:
                trainer.finished(folder)
            else:
                trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            record.check_signal()
    except KeyboardInterrupt:
        step, kept = trainer.state.global_step, trainer.checkpoint()
        if record.whole and step and (kept is None or resume.step_of(kept) != step):
            trainer._save_checkpoint(None)
            kept = trainer.checkpoint()
        if record.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        where = f"the checkpoint {kept} resumes it" if kept else "nothing had been saved"
        raise KeyboardInterrupt(f"Training was interrupted after step {step}; {where}.") from None
    finally:
        if bar is not None:
            bar.bar.close()
