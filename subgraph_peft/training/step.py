"""The training step: forward, backward, clipping and optimiser, compiled and, on CUDA, launched as recorded graphs."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from ..base.borrowed import pytree
from ..base.errors import TrainError, TrainWarning
from ..program.program import Program
from .compiled import Compiled
from .cuda_graph import Recorded, signature
from .evaluate import loss_and_logits
from .penalty import has_penalty, penalty
from .step_optimizer import Gradients, StepOptimizer, parameter_groups

FACTOR, SHARE = "loss factor", "share of the step"  # inputs beside a batch's, by names that no argument has
SHAPES = 8  # of batches that are compiled and recorded; torch.compile gives up after as many


class TrainStep:
    """step(batch) takes one optimiser step on what `program` trains and returns the loss, a scalar on the device.

        step = sp.TrainStep(adapted, lr=1e-3)
        schedule = sp.schedule(adapted, step.optimizer, total_steps=100)  # and any learning rate scheduler
        for batch in batches:
            loss = step(batch)

    The loss is the graph's in train mode, to which the module is switched, plus the penalties of its methods. Gradients
    of several batches add up with `accumulate`, as what `backward` gives would; `step.optimizer.step()` then takes the
    step. Random numbers and results are those of the graph that runs, so that equal steps give equal results on one
    machine.

    compile:       torch.compile; by default on CUDA. Where it fails, the step goes on without it, and warns
    record:        on CUDA, launch a shape of batches as a CUDA graph once it comes a third time; by default with
                   `compile`. At most 8 shapes are compiled and recorded. One that comes once, such as the last batch of
                   an epoch, runs as it is
    autocast:      dtype of torch.autocast in the forward pass
    memory_budget: see `Compiled`
    weight_decay, max_grad_norm, betas, eps: see `parameter_groups` and `StepOptimizer`

    Values that change between steps have to stay in their tensors (copy_); a program that was moved, whose parameters
    are other objects or whose gradient checkpointing was switched needs a new TrainStep. Raises TrainError where
    nothing trains or there is no loss.
    """

    def __init__(
        self,
        program: Program,
        lr: float = 1e-3,
        *,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        compile: bool | None = None,
        record: bool | None = None,
        autocast: torch.dtype | None = None,
        memory_budget: float = 1.0,
    ):
        self.program, self.module, self.autocast = program, program.module, autocast
        program.need_values("train", TrainError)
        groups = parameter_groups(program, lr, weight_decay)
        if not groups:
            raise TrainError("Nothing requires gradients: rewrite the program, or name parameters with trainable=[…].")
        self.device = program.home.device
        cuda = self.device.type == "cuda"
        self.compile = cuda if compile is None else compile
        self.record = cuda and (self.compile if record is None else record)
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.gradients = Gradients(self.parameters)
        self.optimizer = StepOptimizer(groups, self.gradients, lr, max_grad_norm, betas, eps, self.record)
        self.penalised = has_penalty(program)
        self.compiled_loss = Compiled(self.module, memory_budget) if self.compile else self.loss
        self.met: dict[tuple, int] = {}
        self.recorded: dict[tuple, Recorded] = {}
        self.numbers: dict[float, torch.Tensor] = {}
        self.at = -1
        self.stream = torch.cuda.Stream(self.device) if self.record else None
        self.pool = torch.cuda.graph_pool_handle() if self.record else None

    def __call__(self, batch: Mapping[str, Any]) -> torch.Tensor:
        loss = self.accumulate(batch)
        self.optimizer.step()
        return loss

    def accumulate(
        self, batch: Mapping[str, Any] | None, factor: float | torch.Tensor = 1.0, share: float = 1.0
    ) -> torch.Tensor:  # fmt: skip
        """Add the gradients of share · (factor · loss + penalties) of one batch to those since the last step of the
        optimiser; without a batch, those of the penalties. Returns that number."""
        if self.at != self.optimizer.taken:
            self.at = self.optimizer.taken
            self.gradients.zero()
            self.gradients.attach()
        if batch is None:
            return self.add(share * penalty(self.program))
        if not self.module.training:
            self.module.train()
        inputs = {n: v for n, v in batch.items() if v is not None}
        inputs |= {FACTOR: self.number(factor), SHARE: self.number(share)}
        key = signature(inputs)
        times = self.met[key] = self.met.get(key, 0) + 1
        if key in self.recorded:
            return self.recorded[key](inputs)
        inputs = pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(self.device), inputs)
        repeated = [known for known, count in self.met.items() if count > 1]
        if times > 1 and key not in repeated[:SHAPES]:
            self.announce(f"batches come in more than {SHAPES} shapes, others run uncompiled: pad to fewer lengths")
            return self.compute(self.loss, **inputs)
        if times == 1 and len(self.met) > 1:
            return self.compute(self.loss, **inputs)
        if self.record and times > 2 and (recorded := self.recording(key, inputs)):
            return recorded(inputs)
        return self.apart(inputs)

    def loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        loss, _ = loss_and_logits(self.module(**batch))
        if loss is None:
            raise TrainError("The graph gives no loss: capture the model with labels among its example inputs.")
        return loss

    def number(self, value: float | torch.Tensor) -> torch.Tensor:
        """A scalar on the device; plain numbers are copied there once."""
        if isinstance(value, torch.Tensor):
            return value.to(torch.float64)
        if value not in self.numbers:
            self.numbers[value] = torch.tensor(value, dtype=torch.float64, device=self.device)
        return self.numbers[value]

    def compute(self, loss_of: Any, **inputs: Any) -> torch.Tensor:
        factor, share = inputs.pop(FACTOR), inputs.pop(SHARE)
        with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
            loss = loss_of(inputs)
        loss = loss * factor.to(loss.dtype)
        if self.penalised:
            loss = loss + penalty(self.program)
        return self.add(loss * share.to(loss.dtype))

    def add(self, loss: torch.Tensor) -> torch.Tensor:
        if loss.requires_grad:
            self.gradients.add(torch.autograd.grad(loss, self.parameters, allow_unused=True))
        return loss.detach()

    def apart(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """One batch as it will be recorded: compiled, and on the stream of the recordings."""
        try:
            if self.stream is None:
                return self.compute(self.compiled_loss, **inputs)
            now = torch.cuda.current_stream(self.device)
            self.stream.wait_stream(now)
            with torch.cuda.stream(self.stream):
                loss = self.compute(self.compiled_loss, **inputs)
            now.wait_stream(self.stream)
            return loss
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not isinstance(self.compiled_loss, Compiled):
                raise
            loss = self.compute(self.loss, **inputs)
            self.compiled_loss = self.loss
            self.announce(f"torch.compile failed, the step runs uncompiled: {type(error).__name__}: {str(error)[:500]}")
            return loss

    def recording(self, key: tuple, inputs: Mapping[str, Any]) -> Recorded | None:
        try:
            self.recorded[key] = Recorded(
                lambda **given: self.compute(self.compiled_loss, **given), inputs, self.stream, self.pool
            )
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            self.record = False
            self.announce(f"the step is not recorded as a CUDA graph: {str(error)[:500]}")
        return self.recorded.get(key)

    def announce(self, text: str) -> None:
        warnings.warn(f"{self.program.source}: {text}.", TrainWarning, stacklevel=4)
