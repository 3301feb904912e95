"""transformers.Trainer over a Program: exact resumption, exact accumulation over batches and processes, its own
evaluation, no chatter."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from ..base import processes
from ..base.borrowed import pytree, trainer_class
from ..base.errors import TrainError
from ..program.label_shift import label_shift, scored
from ..program.module import GraphModel
from ..program.program import Program
from . import distributed, resume
from .collation import token_counts
from .evaluate import Metrics, evaluate, loss_and_logits
from .options import TrainOptions
from .order import Order
from .penalty import has_penalty, penalty
from .record import Record
from .schedule import schedule
from .step import TrainStep
from .step_optimizer import parameter_groups

Trainer = trainer_class()


class ProgramTrainer(Trainer):
    """Trainer with its hooks for data order, loss, optimizer, evaluation and checkpoints set to those of a Program.

    module: what computes: the program's own module, or a sharded view of it
    past:   what the checkpoint that the run goes on from kept of it, see `Record`
    run:    what two sessions of one run have in common, kept in checkpoints
    fast:   the compiled step, which then takes the place of Trainer's forward, backward, clipping and optimiser
    """

    def __init__(
        self,
        program: Program,
        module: GraphModel,
        arguments: TrainingArguments,
        options: TrainOptions,
        data: tuple[Dataset, Dataset | None],
        collate: Callable,
        metrics: Metrics | None,
        steps_per_epoch: int,
        past: Mapping[str, Any],
        run: Mapping[str, Any],
        callbacks: Sequence[TrainerCallback],
    ):
        self.program, self.options, self.metrics, self.run = program, options, metrics, run
        self.shift, self.penalised = label_shift(program), has_penalty(program)
        self.trained = [parameter for _, parameter in program.parameters(trainable=True)]
        self.fast: TrainStep | None = None
        self.statistics = distributed.statistics(module)
        train, held_out = data
        lengths = token_counts(train) if options.group_by_length else None
        self.order = Order(
            len(train), options.seed, options.batch_size, options.gradient_accumulation, processes.rank(),
            processes.world(), lengths,
        )  # fmt: skip
        self.record = Record(options, steps_per_epoch, past, self.order, self.evaluate, self.rescue)
        super().__init__(
            module, arguments, collate, train_dataset=train, eval_dataset=held_out,
            callbacks=[self.record, *callbacks],
        )  # fmt: skip
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = False
        if processes.rank():
            set_seed(options.seed + processes.rank())  # masks of dropout of its own

    def create_accelerator_and_postprocess(self) -> None:
        """Autocast is accelerate's; gradients are averaged here, so that nothing is wrapped in DDP."""
        super().create_accelerator_and_postprocess()
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)

    def _move_model_to_device(self, model: GraphModel, device: torch.device) -> None:
        if model is self.program.module:
            model.to(device)

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(
            self.train_dataset, batch_sampler=self.order, collate_fn=self.data_collator,
            pin_memory=self.args.dataloader_pin_memory,
        )  # fmt: skip

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return pytree.tree_map_only(
            torch.Tensor, lambda tensor: tensor.to(self.args.device, non_blocking=True), dict(inputs)
        )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        lr, options = self.args.learning_rate, self.options
        if options.compiles(self.args.device):
            self.fast = TrainStep(
                self.program, lr, weight_decay=options.weight_decay, max_grad_norm=options.max_grad_norm, compile=True,
                autocast=torch.bfloat16 if options.bf16 else None, memory_budget=options.memory_budget,
            )  # fmt: skip
            self.optimizer = self.fast.optimizer
        else:
            self.optimizer = torch.optim.AdamW(parameter_groups(self.program, lr, options.weight_decay), lr=lr)
        self.schedule = schedule(self.program, self.optimizer, self.args.max_steps)
        return self.optimizer

    # the loss of a step is the mean over all its labels, however they are spread over batches and processes

    def get_batch_samples(self, epoch_iterator: Iterator, num_batches: int, device: Any) -> tuple[list, Any]:
        """The batches of a step, and an iterator over the factor of each one's loss; None where it is 1.

        Trainer divides by the number of batches and gradients are averaged over processes: hence their product.
        """
        batches = list(islice(epoch_iterator, num_batches))
        counts = [self.weight(batch) for batch in batches]
        if self.args.gradient_accumulation_steps * processes.world() == 1 and all(counts) or not batches:
            return batches, None
        if self.order.idle(self.state.global_step):
            counts[-1] = 0
        held = torch.tensor(counts, dtype=torch.float64, pin_memory=self.args.dataloader_pin_memory)
        held = held.to(device, non_blocking=True)
        total = held.sum()
        if processes.world() > 1:
            dist.all_reduce(total)
        factors = held * (len(batches) * processes.world() / total)
        return batches, iter([factor if count else None for factor, count in zip(factors, counts, strict=True)])

    def weight(self, batch: Mapping[str, Any]) -> int:
        """What the loss of a batch is a mean over: labels, or examples where it has none."""
        labels = batch.get("labels")
        return scored(labels, self.shift).numel() if isinstance(labels, torch.Tensor) else examples(batch)

    def compute_loss(
        self, model: Any, inputs: dict, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, logits = loss_and_logits(model(**inputs))
        if num_items_in_batch is not None:
            factor = next(num_items_in_batch)
            # a mean over no labels is not a number, nor is its gradient
            loss = loss * factor.to(loss.dtype) if factor is not None else (logits * 0).sum().to(loss.dtype)
        if self.penalised:
            loss = loss + penalty(self.program)
        return (loss, logits) if return_outputs else loss

    def training_step(self, model: Any, inputs: dict, num_items_in_batch: Any = None) -> torch.Tensor:
        if self.fast is None:
            loss = super().training_step(model, inputs, num_items_in_batch)
        else:
            loss = self.fast_step(inputs, 1.0 if num_items_in_batch is None else next(num_items_in_batch))
        self.record.current.append(loss)
        if self.accelerator.sync_gradients:
            self.reduce_gradients()
        return loss

    def fast_step(self, inputs: Mapping[str, Any], factor: float | torch.Tensor | None) -> torch.Tensor:
        """Forward and backward of a batch; one without labels gives no gradient but that of the penalties."""
        share = 1 / self.current_gradient_accumulation_steps
        if factor is None:
            return self.fast.accumulate(None, share=share)
        return self.fast.accumulate(self._prepare_inputs(inputs), factor, share)

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """Of a compiled step the tensor that the optimiser's step will write the norm to, before it is logged."""
        if self.fast is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self.fast.optimizer.norm if self.options.max_grad_norm else None

    def reduce_gradients(self) -> None:
        """After the last backward pass of a step, before its gradients are clipped."""
        distributed.average_gradients(self.trained)
        distributed.average_statistics(self.model, self.statistics)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        if self.eval_dataset is None:
            return {}
        with self.record.apart():
            values = evaluate(
                replace(self.program, module=self.model), self.eval_dataset, metrics=self.metrics,
                batch_size=self.args.eval_batch_size, collate=self.data_collator,
                each=self.record.check_signal if processes.world() == 1 else None,
            )  # fmt: skip
        self.record.evaluations.append((self.state.global_step, values))
        named = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        self.log(dict(named))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, named)
        return named

    # checkpoints

    def finished(self, folder: Path) -> None:
        """Take up a run whose last step is in `folder`; an interrupt may have kept it from its last evaluation."""
        self.state.global_step = resume.step_of(folder)
        if not any(step == self.state.global_step for step, _ in self.record.evaluations):
            self.accelerator.prepare_model(self.model)
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
        states = [self.record.random] * processes.world()
        if processes.world() > 1:
            dist.all_gather_object(states, self.record.random)

        def write() -> None:
            run = {
                "run": self.run, "scheduler": self.lr_scheduler.state_dict(), "random": states, **self.record.as_json(),
            }  # fmt: skip
            folder = output / f"{resume.PREFIX}{step}"
            resume.write_checkpoint(folder, self.program, self.optimizer, self.schedule, self.state, run)
            resume.rotate(output, self.options.keep_checkpoints)

        processes.on_first(write)
        self.record.aside += time.perf_counter() - start

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """The program has been loaded before it was sharded."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            resume.load_optimizer(Path(checkpoint), self.optimizer)
            resume.load_schedule(Path(checkpoint), self.schedule)
            self.lr_scheduler.load_state_dict(resume.read_run(Path(checkpoint))["scheduler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            states = resume.read_run(Path(checkpoint))["random"]
            if processes.rank() < len(states):
                resume.set_random_state(states[processes.rank()])
            else:
                set_seed(self.options.seed + processes.rank() + self.state.global_step * processes.world())
            self.record.random = resume.random_state()


def examples(batch: Mapping[str, Any]) -> int:
    return len(next(value for value in batch.values() if isinstance(value, torch.Tensor)))
