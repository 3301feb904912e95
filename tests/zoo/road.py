"""The whole road of one architecture: captured, listed, trained, adapted, folded and exported, each step compared with
the eager model."""

import copy
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import subgraph_peft as sp
from subgraph_peft.base.compare import difference
from subgraph_peft.base.errors import first_line
from subgraph_peft.export import to_onnx
from subgraph_peft.export.onnx.axes import resize, sizes_of
from subgraph_peft.export.onnx.inference import axes_of, flat_example
from subgraph_peft.graph.signature import export_arguments
from subgraph_peft.passes import SSB, DoRA, LoRA
from tests.zoo.entry import STAGES, Entry, Inputs

YES, NOT_REACHED = "yes", "not reached"
METHODS = {"lora": LoRA(r=2, alpha=4.0), "ssb": SSB(), "dora": DoRA(of=LoRA(r=2, alpha=4.0))}
EAGER_BOUND, FOLD_BOUND = 2e-4, 1e-5
LEARNING_RATE, STEPS = 2e-3, 3


class Failed(AssertionError):
    """A stage gave a wrong result; the message is the cell."""


@dataclass
class Row:
    """cells: stage -> "yes", or why not; notes: what is narrower than in the model, without being wrong"""

    name: str
    group: str
    cells: dict[str, str] = field(default_factory=lambda: dict.fromkeys(STAGES, NOT_REACHED))
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def surprises(self, entry: Entry) -> dict[str, str]:
        """Cells that are no "yes" for a reason that the entry does not declare, and declared limits that are gone."""
        reached = {stage: cell for stage, cell in self.cells.items() if cell != NOT_REACHED}
        bad = {stage: cell for stage, cell in reached.items() if cell != YES and stage not in entry.limits}
        gone = {s: f"declared as a limit ({entry.limits[s]}), but works" for s in entry.limits if reached.get(s) == YES}
        return {**bad, **gone}


def walk(entry: Entry) -> Row:
    """Take one architecture the whole road. A stage that fails leaves its reason in the row; those that need its result
    are not reached."""
    row, start = Row(entry.name, entry.group), time.perf_counter()
    try:
        Walk(entry, row).run()
    finally:
        row.seconds = time.perf_counter() - start
    return row


class Walk:
    def __init__(self, entry: Entry, row: Row):
        self.entry, self.row = entry, row
        self.model, self.inputs = entry.build()
        self.program: sp.Program | None = None
        self.folded: dict[str, sp.Program] = {}

    def run(self) -> None:
        self.stage("capture", self.capture)
        if self.program is None:
            return
        self.stage("sites", self.sites)
        self.stage("train", self.train)
        self.stage("eval", self.eval)
        self.stage("shapes", self.shapes)
        for name in METHODS:
            self.stage(name, lambda name=name: self.adapt(name))
        if "lora" in self.folded:
            self.stage("onnx", self.onnx)

    def stage(self, name: str, step: Callable[[], None]) -> None:
        try:
            step()
            self.row.cells[name] = YES
        except Exception as error:
            first = first_line(error)
            self.row.cells[name] = first if isinstance(error, Failed) else f"{type(error).__name__}: {first}"

    def capture(self) -> None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            self.program = sp.capture(self.model, self.inputs, **self.entry.capture)
        self.row.notes += [str(w.message) for w in caught if issubclass(w.category, sp.CaptureWarning)]

    def sites(self) -> None:
        """Every weight is a site; what nothing reads is none, and gets no gradient from the model either."""
        listed = {name for site in sp.sites(self.program) for name in (site.name, *site.ties)}
        missing = [n for n, p in self.model.named_parameters() if p.ndim >= 2 and n not in listed]
        read = {str(node.target) for graph in self.program.graphs() for node in graph.find_nodes(op="get_attr")}
        if lost := [name for name in missing if name in read]:
            raise Failed(f"no site: {', '.join(lost)}")
        if missing:
            self.row.notes.append(f"read by nothing: {', '.join(missing)}")

    def train(self) -> None:
        """Outputs and gradients in train mode, one seed, dropout and all."""
        eager, captured = copy.deepcopy(self.model).train(), copy.deepcopy(self.program.module).train()
        outputs, gradients = [], []
        for module in (eager.requires_grad_(True), captured.requires_grad_(True)):
            torch.manual_seed(0)
            outputs.append(called(module, self.inputs))
            self.loss(outputs[-1]).backward()
            gradients.append({n: p.grad for n, p in module.named_parameters(remove_duplicate=False)})
        same("outputs", *outputs, EAGER_BOUND)
        expected, actual = gradients
        largest = max(g.abs().max().item() for g in expected.values() if g is not None)
        for name, gradient in expected.items():
            wanted, found = (torch.zeros(()) if g is None else g for g in (gradient, actual[name]))
            error = (wanted - found).abs().max().item()
            if not error <= EAGER_BOUND * max(wanted.abs().max().item(), 1e-3 * largest):
                raise Failed(f"gradient of {name} differs by {error / largest:.0e} of the largest")

    def eval(self) -> None:
        same("outputs", run(self.model, self.inputs), self.program.run(self.inputs), EAGER_BOUND)

    def shapes(self) -> None:
        """Another size of every dimension that is asked to vary."""
        if fixed := [note for note in self.row.notes if " is fixed to " in note]:
            raise Failed("; ".join(note.partition(": ")[2].partition(" in the captured")[0] for note in fixed))
        other = self.other()
        same("outputs", run(self.model, other), self.program.run(other), EAGER_BOUND)

    def adapt(self, name: str) -> None:
        """Train an adapter of every weight for some steps, fold it, and write it into the eager model."""
        adapted = sp.rewrite(self.program, METHODS[name], where=lambda site: True, tied="untie")
        everywhere = {site.name for site in sp.sites(self.program)}
        if left := sorted(everywhere - {site.name for site in adapted.adapters[0].sites}):
            raise Failed(f"not adapted: {', '.join(left)}")
        same("outputs before training", self.program.run(self.inputs), adapted.run(self.inputs), EAGER_BOUND)
        self.fit(adapted)
        other = self.other()
        before = [adapted.run(inputs) for inputs in (self.inputs, other)]
        folded = sp.fold(adapted)
        for inputs, expected in zip((self.inputs, other), before, strict=True):
            error = largest_difference(expected, folded.run(inputs))
            if not error <= FOLD_BOUND and not error <= rounding(adapted, inputs) + rounding(folded, inputs):
                raise Failed(f"folded outputs differ by {error:.0e}")
        if not largest_difference(self.program.run(self.inputs), before[0]) > 10 * FOLD_BOUND:
            raise Failed("training changed no output")
        merged = copy.deepcopy(self.model)
        sp.write_to(folded, merged)
        same("the model with folded weights", run(merged, other), folded.run(other), EAGER_BOUND)
        self.folded[name] = folded

    def fit(self, adapted: sp.Program) -> None:
        module = adapted.module.train()
        optimizer = torch.optim.AdamW([p for _, p in adapted.parameters(trainable=True)], lr=LEARNING_RATE)
        losses = []
        for _ in range(STEPS + 1):
            torch.manual_seed(0)
            loss = self.loss(called(module, self.inputs))
            losses.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        module.eval()
        if not losses[-1] < losses[0]:
            raise Failed(f"the loss goes from {losses[0]:.4f} to {losses[-1]:.4f}")

    def onnx(self) -> None:
        """Written and, in onnxruntime, compared with torch at two sizes of every dimension."""
        with tempfile.TemporaryDirectory() as folder:
            to_onnx(self.folded["lora"], Path(folder) / "model.onnx")

    def loss(self, outputs: Any) -> torch.Tensor:
        if self.entry.loss is not None:
            return self.entry.loss(outputs)
        loss = outputs.get("loss") if isinstance(outputs, dict) else None
        return floating(outputs)[0].square().mean() if loss is None else loss

    def other(self) -> Inputs:
        """Inputs that are larger by one in every dynamic dimension; in the batch alone, where a length is fixed."""
        if self.entry.other is not None:
            return self.entry.other()
        signature, axes = self.program.signature, axes_of(self.program)
        flat = flat_example(self.program, self.inputs)
        sizes, fixed = sizes_of(axes, flat), any(" is fixed to " in note for note in self.row.notes)
        larger = {axis: size if fixed and axis != "batch" else size + 1 for axis, size in sizes.items()}
        resized = resize(flat, axes, larger)
        named = zip(signature.input_names(), signature.flatten(self.inputs), strict=True)
        leaves = iter([resized.get(name, leaf) for name, leaf in named])
        return {
            name: pytree.tree_unflatten([next(leaves) for _ in range(spec.num_leaves)], spec)
            for name, spec in signature.inputs.items()
        }


def rounding(program: sp.Program, inputs: Inputs) -> float:
    """How far float32 is from float64 on the same program."""
    wide = replace(program, module=copy.deepcopy(program.module).double())
    return largest_difference(wide.run(inputs), program.run(inputs))


def run(model: nn.Module, inputs: Inputs) -> Any:
    with evaluating(model), torch.no_grad():
        return called(model, inputs)


def called(module: nn.Module, inputs: Inputs) -> Any:
    args, kwargs = export_arguments(module.forward, copied(inputs))
    return module(*args, **kwargs)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    yield
    model.train(training)


def copied(inputs: Inputs) -> Inputs:
    return pytree.tree_map_only(torch.Tensor, torch.clone, inputs)


def floating(outputs: Any) -> list[torch.Tensor]:
    return [t for t in pytree.tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def largest_difference(expected: Any, actual: Any) -> float:
    return max(map(difference, floating(expected), floating(actual)), default=0.0)


def same(what: str, expected: Any, actual: Any, bound: float) -> None:
    shapes = [
        [tuple(t.shape) for t in pytree.tree_leaves(o) if isinstance(t, torch.Tensor)] for o in (expected, actual)
    ]
    if shapes[0] != shapes[1]:
        raise Failed(f"{what} have the shapes {shapes[1]}, not {shapes[0]}")
    error = largest_difference(expected, actual)
    if not error <= bound:
        raise Failed(f"{what} differ by {error:.0e}")
