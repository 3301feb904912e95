"""Train what a program's adapters added, and nothing else."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset

from ..base import processes
from ..base.errors import ConfigError, TrainError
from ..program.program import Program
from . import resume
from .evaluate import Metrics
from .options import TrainOptions, TrainResult


def train(
    program: Program,
    train_data: Dataset,
    eval_data: Dataset | None = None,
    *,
    output: str | os.PathLike,
    options: TrainOptions = TrainOptions(),  # noqa: B008
    collate: Callable[[Sequence[Any]], dict[str, torch.Tensor]] | None = None,
    metrics: Metrics | None = None,
    callbacks: Sequence[Any] = (),
    progress: bool | None = None,
) -> TrainResult:
    """Train `program` in place: its adapters' tensors and the parameters named trainable. All else stays as it is.

    train_data, eval_data: map-style datasets of dicts; `collate` makes batches of them (by default it stacks them)
    output:     folder of the checkpoints. They hold what trains, not the base
    metrics:    see `evaluate`
    callbacks:  transformers.TrainerCallback objects
    progress:   a bar on stderr; by default in a terminal only

    An interrupt (SIGINT, SIGTERM) is taken after the step in progress: a checkpoint is written, then KeyboardInterrupt
    or SystemExit(143) is raised. Calling `train` again goes on from there, to the same weights and losses bit for bit
    on the same machine, provided that `collate` draws no random numbers; where the step is compiled and batches come in
    several shapes, to rounding. A second interrupt stops without saving.

    Under torchrun or accelerate launch, every process calls this with the same arguments and trains on its GPU. A step
    is that of one process with as many examples: the loss is the mean over all labels, and gradients are averaged once,
    before they are clipped. (Batch norm takes the statistics of a process's own batch; running ones are averaged.) A
    checkpoint resumes on any number of processes with the same number of examples per step: batch_size ·
    gradient_accumulation · processes. Divided as before, it goes on bit for bit; otherwise to rounding, and with other
    random numbers in processes that are new.

    Raises TrainError if there is nothing to train, the loss is not finite or processes differ, CheckpointError if the
    output folder holds checkpoints of another run, ConfigError for a device or a library that is not there.
    """
    from .launch import build_trainer, run_trainer  # transformers.Trainer is slow to import

    processes.join()
    check_trainable(program, train_data, options)
    output = Path(output)
    folder = processes.on_first(lambda: prepare_output(output, options))
    module, attributes = program.module, set(program.module.__dict__)
    training, config = module.training, vars(module).get("config")
    use_cache = getattr(config, "use_cache", None)
    try:
        with ExitStack() as stack:
            data = (train_data, eval_data)
            trainer = build_trainer(program, data, output, options, collate, metrics, callbacks, folder, stack)
            run_trainer(trainer, folder, progress if processes.rank() == 0 else False)
    finally:
        for name in set(module.__dict__) - attributes:  # accelerate's, such as a forward under autocast
            del module.__dict__[name]
        module.zero_grad(set_to_none=True)
        module.train(training)
        if use_cache is not None:
            config.use_cache = use_cache
    record, (trainable, total) = trainer.record, program.counts()
    seconds = record.elapsed()
    return TrainResult(
        losses=record.losses,
        evaluations=record.evaluations,
        steps=trainer.args.max_steps,
        seconds=seconds,
        examples_per_second=record.examples / max(seconds - record.aside, 1e-9),
        trainable=trainable,
        total=total,
        checkpoint=trainer.checkpoint(),
        resumed_from=resume.step_of(folder) if folder else None,
    )


def check_trainable(program: Program, data: Dataset, options: TrainOptions) -> None:
    """Refuse early what could only fail late."""
    program.need_values("train", TrainError)
    if not any(program.parameters(trainable=True)):
        raise TrainError("Nothing requires gradients: rewrite the program, or name parameters with trainable=[…].")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or not len(data):
        raise TrainError("Training data is a dataset with at least one example, a length and random access.")
    names, outputs = program.signature.output_names(), program.graph.output_node().args[0]
    if "loss" not in names and (outputs[0] is None or outputs[0].meta["val"].ndim):
        raise TrainError(
            f"The graph gives {', '.join(names)} and no loss: capture the model with labels among its example inputs, "
            "or train program.module in a loop of your own."
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError('device is "cuda", but torch finds no CUDA device here.')
    if options.report == "tensorboard" and not importlib.util.find_spec("tensorboard"):
        raise ConfigError("report: tensorboard needs that package: pip install tensorboard.")
    if options.warmup > 1 and options.warmup != int(options.warmup):
        raise ConfigError(f"warmup is {options.warmup}: a whole number of steps, or a share below 1.")
    if options.compile is True and options.shard:
        raise ConfigError("shard: true gathers weights layer by layer, which is not compiled: leave out compile.")
    if options.group_by_length and "input_ids" not in data[0]:
        raise ConfigError("group_by_length needs examples with input_ids.")


def prepare_output(output: Path, options: TrainOptions) -> Path | None:
    """Make the folder. Returns the checkpoint in it to go on from; without resumption those there are removed."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise TrainError(f"The output folder {output} cannot be written: {error.strerror}. Choose another.") from error
    if options.resume is False:
        for folder in resume.found(output):
            shutil.rmtree(folder, ignore_errors=True)
    return next(reversed(resume.found(output)), None)
