"""Attach, step, merge and peak memory, beside the peft library, in one run.

    python -m tests.benchmarks.attach                              all-MiniLM-L6-v2 on the CPU
    python -m tests.benchmarks.attach --tiny                       a rehearsal in seconds
    python -m tests.benchmarks.attach --device cuda --compile --json results.json
                                                                   MiniLM and a Llama of 1.9 G parameters in bfloat16

LoRA and DoRA of rank 16 at every linear layer but the head; a step is forward, backward and AdamW. The two sides take
turns, step by step: numbers are medians, the ratio is the median of the turns' ratios, which a drifting machine moves
less than a ratio of medians. The first attach and the peak memory are measured in a new process for each side.

In a source tree that is not installed, first `pip install -e . --no-deps --no-build-isolation`, or, without building
anything, `ln -s ../passes ../export subgraph_peft/`.
"""

import copy
import gc
import platform
import warnings
from collections import defaultdict
from enum import StrEnum
from operator import truediv
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import peft
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table

import subgraph_peft as sp
from subgraph_peft.base.files import write_json
from tests.benchmarks.fresh import in_new_process
from tests.benchmarks.sides import CASES, METHODS, SIDES, Side

# measure -> (row, factor to its unit, format)
ROWS = {
    "first attach": ("attach, first in a process (s)", 1, ".2f"),
    "attach": ("attach, again (s)", 1, ".3f"),
    "capture": ("    of which capture (s)", 1, ".3f"),
    "rewrite": ("    of which rewrite (s)", 1, ".3f"),
    "step": ("step (ms)", 1e3, ".2f"),
    "step, compiled": ("step under torch.compile (ms)", 1e3, ".2f"),
    "compile": ("first compiled step (s)", 1, ".1f"),
    "merge": ("merge (s)", 1, ".3f"),
    "merge, checked": ("merge, outputs and update checked (s)", 1, ".3f"),
    "model": ("memory with the model loaded (MiB)", 1, ".0f"),
    "peak attaching": ("peak memory, attaching (MiB)", 1, ".0f"),
    "peak training": ("peak memory, training too (MiB)", 1, ".0f"),
}
CaseName = StrEnum("CaseName", [*CASES])
MethodName = StrEnum("MethodName", [*METHODS])
Samples = dict[str, dict[str, list[float]]]


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where models live.")] = "cpu",
    case: Annotated[list[CaseName] | None, typer.Option(help="llama needs a GPU unless --tiny.")] = None,
    method: Annotated[list[MethodName] | None, typer.Option(help="All by default.")] = None,
    tiny: Annotated[bool, typer.Option(help="Small random models.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Steps under torch.compile too.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 20,
    rounds: Annotated[int, typer.Option(min=1, help="Timed attachments and merges of each side.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write every sample to this file.")] = None,
) -> None:
    """Compare with the peft library."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=120)
    chosen = case or ([*CASES] if device == "cuda" or tiny else ["minilm"])
    report: dict[str, Any] = {"machine": machine(device), "results": []}
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    for name in chosen:
        for adapter in method or METHODS:
            result = compare(name, adapter, device, tiny, compiled, steps, rounds)
            report["results"].append(result)
            console.print(table(result))
            if json:
                write_json(json, report, sp.SubgraphPeftError)


def machine(device: str) -> dict[str, str]:
    chip = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        chip = named[0].partition(":")[2].strip() if named else chip
    return {
        "on": torch.cuda.get_device_name() if device == "cuda" else chip,
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "subgraph_peft": sp.__version__,
    }


def compare(case: str, method: str, device: str, tiny: bool, compiled: bool, steps: int, rounds: int) -> dict[str, Any]:
    """Every sample of every measure, by side; and the errors of measures that failed."""
    release(device)
    samples: Samples = {side: defaultdict(list) for side in SIDES}
    for side in SIDES:
        extend(samples[side], in_new_process(case, method, side, device, tiny))
    model, inputs, text = CASES[case].make(device, tiny)
    libraries = {side: cls(CASES[case], method, device) for side, cls in SIDES.items()}
    for index in range(rounds):
        for side, library in turns(libraries, index):
            extend(samples[side], library.attach(copy.deepcopy(model), inputs))
    trained = same_work(libraries, inputs)

    def merges() -> None:
        for index in range(rounds):
            for side, library in turns(libraries, index):
                extend(samples[side], library.merge())

    measures = {"step": lambda: time_steps(libraries, samples, inputs, steps, compiled=False), "merge": merges}
    if compiled:
        measures["compiled step"] = lambda: time_steps(libraries, samples, inputs, steps, compiled=True)
    errors = {}
    for name, measure in measures.items():
        try:
            measure()
        except Exception as error:  # shown in the table: one measure that fails leaves the others standing
            errors[name] = f"{type(error).__name__}: {error}"[:500]
    return {"case": case, "method": method, "text": text, "trainable": trained, "samples": samples, "errors": errors}


def release(device: str) -> None:
    """Let go of what earlier comparisons left."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def same_work(libraries: dict[str, Side], inputs: dict[str, torch.Tensor]) -> int:
    """The number of trained parameters, if both sides agree in it and in the loss before training."""
    trained = {side: sum(p.numel() for p in library.trainable()) for side, library in libraries.items()}
    loss = {side: library.loss(inputs) for side, library in libraries.items()}
    bound = 1e-4 if next(libraries["peft"].module.parameters()).dtype == torch.float32 else 2e-2
    if trained["ours"] != trained["peft"] or not abs(loss["ours"] - loss["peft"]) <= bound * loss["peft"]:
        raise AssertionError(f"The two sides do different work: {trained} parameters trained, loss {loss}.")
    return trained["ours"]


def time_steps(libraries: dict[str, Side], samples: Samples, inputs: dict, steps: int, compiled: bool) -> None:
    warm = 3
    steppers = {side: library.stepper(inputs, compiled) for side, library in libraries.items()}
    for index in range(warm + steps):
        for side, library in turns(libraries, index):
            _, seconds = library.timed(steppers[side])
            if compiled and index == 0:
                samples[side]["compile"].append(seconds)
            if index >= warm:
                samples[side]["step, compiled" if compiled else "step"].append(seconds)


def turns(libraries: dict[str, Side], index: int) -> list[tuple[str, Side]]:
    """Both sides, the first one changing from turn to turn."""
    order = list(libraries.items())
    return order if index % 2 == 0 else order[::-1]


def extend(samples: dict[str, list[float]], measured: dict[str, float]) -> None:
    for name, value in measured.items():
        samples[name].append(value)


def table(result: dict[str, Any]) -> Table:
    title = f"{result['case']}, {result['method']}: {result['text']}, {result['trainable']:,} trained"
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("", no_wrap=True)
    for column in ("ours", "peft", "ours / peft"):
        shown.add_column(column, justify="right")
    ours, theirs = (result["samples"][side] for side in ("ours", "peft"))
    for measure, (row, factor, digits) in ROWS.items():
        pair = [format(median(side[measure]) * factor, digits) if side.get(measure) else "" for side in (ours, theirs)]
        ratio = format(median(map(truediv, ours[measure], theirs[measure])), ".2f") if all(pair) else ""
        if any(pair):
            shown.add_row(row, *pair, ratio)
    for name, error in result["errors"].items():
        shown.add_row(f"{name} failed", error, "", "")
    return shown


if __name__ == "__main__":
    typer.run(main)
