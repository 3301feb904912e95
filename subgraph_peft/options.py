"""How to train, and what a run did."""

import math
import os
from pathlib import Path
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from . import curve

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
        curve.draw(path, self.losses, self.evaluations)
