"""Train what a program's adapters added, and nothing else."""

import importlib.util
import math
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch.utils.data import Dataset

from . import processes, resume
from .errors import ConfigError, TrainError
from .evaluate import Metrics, evaluate
from .program import Program

Interval = PositiveInt | Literal["epoch"] | None


class TrainOptions(BaseModel):
    """How to train. Steps are optimiser steps.

    max_steps:      instead of `epochs`
    batch_size:     examples a forward pass and process; a step takes `gradient_accumulation` of them
    warmup:         steps if whole, share of all steps if below 1
    bf16:           autocast; the adapter's tensors keep their own dtype
    compile:        `TrainStep`: torch.compile and, on CUDA, recorded graphs; "auto" on CUDA, not with `shard`
    memory_budget:  share of the activations that compiled code may keep, see `Compiled`
    lengths:        how many lengths batches are padded to, so that few shapes come; 0 pads each to its longest item;
                    "auto" is 8 where the step is compiled. For the package's own collation
    eval_every, save_every: steps, "epoch", or None; the start (evaluation only) and the end always count
    resume:         "auto" goes on from the newest checkpoint in the output folder; False removes those and starts anew
    device:         "auto" is CUDA where there is one
    shard:          every process holds a share of the frozen weights on its device (FSDP2), which layers gather when
                    they compute; a program on the CPU stays there. Needs a launcher
    report:         where Trainer logs to beside the result
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: PositiveFloat = 3.0
    max_steps: PositiveInt | None = None
    batch_size: PositiveInt = 16
    eval_batch_size: PositiveInt = 32
    gradient_accumulation: PositiveInt = 1
    lr: PositiveFloat = 5e-4
    weight_decay: NonNegativeFloat = 0.0
    warmup: NonNegativeInt | float = Field(0.06, ge=0)
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    max_grad_norm: NonNegativeFloat = 1.0
    bf16: bool = False
    group_by_length: bool = False
    seed: NonNegativeInt = 0
    eval_every: Interval = "epoch"
    save_every: Interval = "epoch"
    logging_every: PositiveInt = 10
    keep_checkpoints: PositiveInt = 2
    resume: Literal["auto", False] = "auto"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    shard: bool = False
    report: Literal["none", "tensorboard"] = "none"
    compile: bool | Literal["auto"] = "auto"
    memory_budget: float = Field(1.0, ge=0, le=1)
    lengths: NonNegativeInt | Literal["auto"] = "auto"

    def compiles(self, device: torch.device) -> bool:
        """Whether the step is compiled on this device."""
        return (device.type == "cuda" and not self.shard) if self.compile == "auto" else self.compile

    def warmup_steps(self, steps: int) -> int:
        return int(self.warmup) if self.warmup >= 1 else math.ceil(self.warmup * steps)


class TrainResult(BaseModel):
    """What a run did, over all its sessions.

    losses:              (step, training loss of that step)
    evaluations:         (step, {"loss": …, metric: …}); step 0 is the program before training
    seconds:             wall time, evaluations and checkpoints included
    examples_per_second: over the time spent on training steps alone
    resumed_from:        step of the checkpoint that this session went on from
    """

    model_config = ConfigDict(frozen=True)

    losses: list[tuple[int, float]]
    evaluations: list[tuple[int, dict[str, float]]]
    steps: int
    seconds: float
    examples_per_second: float
    trainable: int
    total: int
    checkpoint: Path | None
    resumed_from: int | None

    def curve(self, path: str | os.PathLike) -> None:
        """Write the loss curve, and that of the first metric, as a PNG."""
        from . import curve

        curve.draw(path, self.losses, self.evaluations)


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
    from .launch import build_trainer, run_trainer

    processes.join()
    check(program, train_data, options)
    output = Path(output)
    folder = processes.on_first(lambda: prepare_output(output, options))
    module, attributes = program.module, set(program.module.__dict__)
    training, config = module.training, getattr(module, "config", None)
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


def parameter_groups(program: Program, lr: float, weight_decay: float = 0.0) -> list[dict[str, Any]]:
    """Groups for any torch optimiser, over exactly what trains, each with its learning rate.

    Weight decay is off for a method's tensors that say so (those whose neutral value is not 0), and for vectors among
    the model's own parameters (biases, norm scales).
    """
    declared = {path: tensor for adapter in program.adapters for path, tensor in adapter.declared().items()}
    groups: dict[tuple[bool, float], list[torch.nn.Parameter]] = {}
    for name, parameter in program.parameters(trainable=True):
        tensor = declared.get(name)
        decays, factor = (tensor.decay, tensor.lr) if tensor else (parameter.ndim > 1, 1.0)
        groups.setdefault((decays, factor), []).append(parameter)
    return [
        {"params": parameters, "weight_decay": weight_decay if decays else 0.0, "lr": lr * factor}
        for (decays, factor), parameters in groups.items()
    ]


def check(program: Program, data: Dataset, options: TrainOptions) -> None:
    """Refuse early what could only fail late."""
    program.need_values("train", TrainError)
    if not any(program.parameters(trainable=True)):
        raise TrainError("Nothing requires gradients: rewrite the program, or name parameters with trainable=[…].")
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__") or not len(data):
        raise TrainError("Training data is a dataset with at least one example, a length and random access.")
    names, outputs = program.module.signature.output_names(), program.module.graph.output_node().args[0]
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


__all__ = ["TrainOptions", "TrainResult", "evaluate", "parameter_groups", "train"]
