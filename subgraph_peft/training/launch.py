"""Set up a training run, new or gone on with, and take it to its end or to an interrupt."""

import logging
import math
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainerCallback, TrainingArguments

from ..base import processes
from ..base.borrowed import one_gpu, save_checkpoint
from ..base.errors import CheckpointError, ConfigError
from ..base.patches import log_level
from ..program.program import Program
from ..store.adapter_file import restore
from . import distributed, resume
from .collation import Padding, spread, token_counts
from .evaluate import Metrics
from .options import TrainOptions
from .record import Bar, signals
from .sharded import sharded
from .trainer import ProgramTrainer

NEUTRAL = {
    "epochs", "max_steps", "eval_batch_size", "eval_every", "save_every", "logging_every", "keep_checkpoints", "resume",
    "device", "report", "shard", "batch_size", "gradient_accumulation", "compile", "memory_budget", "lengths",
}  # fmt: skip


def build_trainer(
    program: Program,
    data: tuple[Dataset, Dataset | None],
    output: Path,
    options: TrainOptions,
    collate: Callable | None,
    metrics: Metrics | None,
    callbacks: Sequence[TrainerCallback],
    folder: Path | None,
    stack: ExitStack,
) -> ProgramTrainer:
    """A trainer that starts anew, or goes on from the checkpoint `folder` if that is of the same run.

    stack: closed after training
    """
    arguments = training_arguments(options, output)
    together = options.batch_size * options.gradient_accumulation * processes.world()
    steps_per_epoch = math.ceil(len(data[0]) / together)
    arguments.max_steps = options.max_steps or math.ceil(options.epochs * steps_per_epoch)
    arguments.warmup_steps = options.warmup_steps(arguments.max_steps)
    run = {
        **options.model_dump(mode="json", exclude=NEUTRAL),
        "steps": arguments.max_steps,
        "examples": len(data[0]),
        "data": getattr(data[0], "digest", None),
        "examples per step (batch_size · gradient_accumulation · processes)": together,
    }
    past = resume.read_run(folder) if folder else {}
    if folder:
        check_same(folder, past["run"], run)
        restore(program, folder)
    distributed.start(program)
    module = stack.enter_context(sharded(program, arguments.device)) if options.shard else program.module
    compiles = options.compiles(arguments.device)
    if compiles:
        arguments.max_grad_norm = 0.0  # the step's own optimiser clips
    collate = collation(collate or Padding(), options, compiles, data[0])
    return ProgramTrainer(
        program, module, arguments, options, data, collate, metrics, steps_per_epoch, past, run, callbacks
    )


def check_same(folder: Path, before: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises CheckpointError where a checkpoint is of another run."""
    if before != run:
        differs = [f"{key} was {before.get(key)}, is {run.get(key)}" for key in run if before.get(key) != run[key]]
        raise CheckpointError(
            f"{folder} belongs to another run: {'; '.join(differs)}. Choose another output folder, or resume=False to "
            "remove it and start anew."
        )


def collation(collate: Callable, options: TrainOptions, compiles: bool, data: Dataset) -> Callable:
    """What makes batches of examples; the package's own pads to few lengths where that is asked for."""
    count = (8 if compiles else 0) if options.lengths == "auto" else options.lengths
    if count and isinstance(collate, Padding) and "input_ids" in data[0]:
        return replace(collate, lengths=spread(token_counts(data), count))
    return collate


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
    one_gpu(arguments)
    if arguments.world_size != processes.world():
        raise ConfigError(
            f"torch.distributed has {processes.world()} processes, accelerate finds {arguments.world_size}: start them "
            "with torchrun or accelerate launch, or set RANK, WORLD_SIZE and LOCAL_RANK in each."
        )
    return arguments


def run_trainer(trainer: ProgramTrainer, folder: Path | None, progress: bool | None) -> None:
    """Train to the end; on an interrupt save, if the last step is whole, and raise."""
    record, bar = trainer.record, None
    library = log_level("transformers.trainer_utils")  # warns of a batch size that may be another one
    if progress or (progress is None and sys.stderr.isatty()):
        bar = Bar(trainer.args.max_steps, resume.step_of(folder) if folder else 0)
        trainer.add_callback(bar)
    try:
        with library.set(logging.ERROR), signals(record):
            if folder and resume.step_of(folder) >= trainer.args.max_steps:
                trainer.finished(folder)
            else:
                trainer.train(resume_from_checkpoint=str(folder) if folder else None)
            record.check_signal()
    except KeyboardInterrupt:
        step, kept = trainer.state.global_step, trainer.checkpoint()
        if record.whole and step and (kept is None or resume.step_of(kept) != step):
            save_checkpoint(trainer)
            kept = trainer.checkpoint()
        if record.signal == signal.SIGTERM:
            raise SystemExit(128 + signal.SIGTERM) from None
        where = f"the checkpoint {kept} resumes it" if kept else "nothing had been saved"
        raise KeyboardInterrupt(f"Training was interrupted after step {step}; {where}.") from None
    finally:
        if bar is not None:
            bar.bar.close()
