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
    """How to train. Steps are optimiser steps."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    epochs: PositiveFloat = Field(3.0, description="passes over the training data")
    max_steps: PositiveInt | None = Field(None, description="instead of `epochs`")
    batch_size: PositiveInt = Field(
        16, description="examples a forward pass and process; a step takes `gradient_accumulation` of them"
    )
    eval_batch_size: PositiveInt = Field(32, description="examples a forward pass of evaluations")
    gradient_accumulation: PositiveInt = Field(1, description="batches a step")
    lr: PositiveFloat = Field(5e-4, description="the largest learning rate")
    weight_decay: NonNegativeFloat = Field(0.0, description="of AdamW, where a tensor decays")
    warmup: NonNegativeInt | float = Field(0.06, ge=0, description="steps if whole, share of all steps if below 1")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="of the learning rate after the warmup"
    )
    max_grad_norm: NonNegativeFloat = Field(1.0, description="gradients are clipped to this norm; 0 leaves them")
    bf16: bool = Field(False, description="autocast; the adapter's tensors keep their own dtype")
    group_by_length: bool = Field(False, description="batches of examples of like length")
    seed: NonNegativeInt = Field(0, description="of the order of examples and of dropout")
    eval_every: Interval = Field("epoch", description="steps, epoch or null; the start and the end always count")
    save_every: Interval = Field("epoch", description="steps, epoch or null; the end always counts")
    logging_every: PositiveInt = Field(10, description="steps")
    keep_checkpoints: PositiveInt = Field(2, description="so many of the newest stay")
    resume: Literal["auto", False] = Field(
        "auto",
        description="auto goes on from the newest checkpoint in the output folder; false removes those and begins anew",
    )
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto is CUDA where there is one")
    shard: bool = Field(
        False,
        description="every process holds a share of the frozen weights on its device (FSDP2), which layers gather when "
        "they compute; a program on the CPU stays there. Needs a launcher",
    )
    report: Literal["none", "tensorboard"] = Field("none", description="where to log beside the result")
    compile: bool | Literal["auto"] = Field(
        "auto", description="torch.compile and, on CUDA, recorded graphs; auto on CUDA, not with `shard`"
    )
    memory_budget: float = Field(1.0, ge=0, le=1, description="share of the activations that compiled code may keep")
    lengths: NonNegativeInt | Literal["auto"] = Field(
        "auto",
        description="how many lengths batches are padded to, so that few shapes come; 0 pads each to its longest item; "
        "auto is 8 where the step is compiled. For the package's own collation",
    )

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
