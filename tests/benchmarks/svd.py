"""Decompositions that PiSSA starts from, beside the peft library's: seconds, and how far they are from the exact ones.

    python -m tests.benchmarks.svd --device cuda --json results.json       on a GPU with 80 GB
    python -m tests.benchmarks.svd --tiny                                  a rehearsal

First, matrices one at a time: iterations × rank. Then the whole job: all seven linears of a Llama of 7 G parameters in
bfloat16, r = 128 and 4 iterations, by `sp.rewrite` and by `peft.get_peft_model`, which take turns; numbers are medians.

Weights have known factors: W = U diag(σ) Vᵀ with random orthonormal U and V and a power law σᵢ = i^-0.5, near those of
trained weights. In the whole job the orthonormal factors of weights with equal shapes are one another's with rows in
another order. Subspace distance is the sine of the largest angle between the subspaces of the first r singular vectors.

In a source tree that is not installed, first `pip install -e . --no-deps --no-build-isolation`, or, without building
anything, `ln -s ../passes ../export subgraph_peft/`.
"""

import copy
import gc
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import peft
import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging

import subgraph_peft as sp
from subgraph_peft.base.files import write_json
from subgraph_peft.method.svd import svd
from subgraph_peft.passes import LoRA, PiSSA
from tests.benchmarks.attach import machine
from tests.benchmarks.fresh import MIB
from tests.benchmarks.sides import ATTENTION_AND_MLP

ITERATIONS = (1, 2, 4, 8, 16, None)
RANKS = (1, 2, 4, 8, 16, 32, 64, 128)
DECAY = 0.5
NITER = 4
Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where weights live.")] = "cpu",
    tiny: Annotated[bool, typer.Option(help="Small matrices and two small layers.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Timed runs of each side.")] = 3,
    json: Annotated[Path | None, typer.Option(help="Write every number to this file.")] = None,
) -> None:
    """Compare with the peft library."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    console = Console(width=150)
    report: dict[str, Any] = {"machine": machine(device), "matrices": []}
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    report["job"] = job = whole_job(device, tiny, rounds)
    console.print(job_table(job))
    for shape in ((256, 256), (688, 256)) if tiny else ((4096, 4096), (11008, 4096)):
        cells = list(matrix_cells(shape, device, RANKS[:6] if tiny else RANKS))
        report["matrices"].append({"shape": shape, "cells": cells})
        for title, keys, form in (
            ("milliseconds", ("seconds",), lambda value: f"{1e3 * value:.1f}"),
            ("subspace distance, left | right", ("left", "right"), lambda value: f"{value:.0e}"),
        ):
            console.print(matrix_table(f"{shape[0]} × {shape[1]} in float32: {title}", cells, keys, form))
        if json:
            write_json(json, report, sp.SubgraphPeftError)


def timed(action: Callable[[], Any], device: str) -> tuple[Any, float]:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = action()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, time.perf_counter() - start


# one matrix at a time


def factors(shape: tuple[int, int], device: str, dtype: torch.dtype) -> Factors:
    """U [out, k], σ [k], V [in, k] with random orthonormal columns and a power law."""
    generator = torch.Generator(device).manual_seed(0)
    k = min(shape)
    options = {"generator": generator, "device": device, "dtype": dtype}
    U, V = (torch.linalg.qr(torch.randn(size, k, **options)).Q for size in shape)
    return U, torch.arange(1, k + 1, device=device, dtype=dtype) ** -DECAY, V


def matrix_cells(shape: tuple[int, int], device: str, ranks: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """Seconds and subspace distances of every number of iterations, rank and side."""
    U, sigma, V = factors(shape, device, torch.float64)
    W = ((U * sigma) @ V.T).float()
    svd(W[:64, :64])
    exact, seconds = timed(lambda: svd(W), device)
    for niter in ITERATIONS:
        sides: dict[str, Callable[[int], Any]] = {
            "ours": lambda r, niter=niter: svd(W, r, niter),
            "peft": lambda r, niter=niter: peft_svd(W, r, niter),
        }
        for side, decompose in sides.items():
            if niter is not None:
                decompose(max(ranks))
            for r in ranks:
                if niter is None:
                    found, spent = (exact[0][:, :r], exact[1][:r], exact[2][:r]), [seconds]
                else:
                    runs = [timed(lambda r=r, decompose=decompose: decompose(r), device) for _ in range(2)]
                    found, spent = runs[0][0], [run[1] for run in runs]
                yield {
                    "side": side, "niter": niter, "rank": r, "seconds": min(spent),
                    "left": distance(U[:, :r], found[0]), "right": distance(V[:, :r], found[2].T),
                }  # fmt: skip


def peft_svd(W: torch.Tensor, r: int, niter: int) -> Factors:
    """As LoraLayer.pissa_init calls it."""
    U, sigma, V = torch.svd_lowrank(W, r, niter=niter)
    return U, sigma, V.T


def distance(exact: torch.Tensor, found: torch.Tensor) -> float:
    """sin of the largest angle between the columns' spans: ‖(I − U Uᵀ) F‖₂ in float64."""
    F = torch.linalg.qr(found.double()).Q
    outside = F - exact @ (exact.T @ F)
    return torch.linalg.eigvalsh(outside.T @ outside)[-1].clamp_min(0).sqrt().item()


def matrix_table(title: str, cells: list[dict[str, Any]], keys: tuple[str, ...], form: Callable[[float], str]) -> Table:
    shown = Table(title=title, title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("iterations", no_wrap=True)
    for r in dict.fromkeys(cell["rank"] for cell in cells):
        shown.add_column(f"r = {r}", justify="right", no_wrap=True)
    for niter in ITERATIONS:
        for side in ("ours", "peft") if niter is not None else ("ours",):
            row = [cell for cell in cells if (cell["niter"], cell["side"]) == (niter, side)]
            label = f"{niter}, {side}" if niter is not None else "exact, both"
            shown.add_row(label, *("|".join(form(cell[key]) for key in keys) for cell in row))
    return shown


# the whole job


def whole_job(device: str, tiny: bool, rounds: int) -> dict[str, Any]:
    """Samples of seconds and MiB by measure and side, reconstruction errors, and seconds of exact decompositions."""
    r = 16 if tiny else 128
    model = llama(device, tiny)
    targets = {name: module.weight for name, module in model.named_modules() if name.endswith(ATTENTION_AND_MLP)}
    ids = torch.ones(1, 16, dtype=torch.long, device=device)
    program, capture = timed(lambda: sp.capture(model, {"input_ids": ids}), device)
    where = [f"*.{name}" for name in ATTENTION_AND_MLP]
    samples: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in ("ours", "peft")}
    errors: dict[str, dict[str, float]] = {}

    def ours(start: str) -> None:
        method = PiSSA(r=r, niter=NITER) if start == "pissa" else LoRA(r=r)
        adapted = measured(samples["ours"], start, lambda: sp.rewrite(program, method, where=where), device)
        if start == "pissa" and "ours" not in errors:
            tensors = dict(adapted.tensors())
            paths = {site.owner: adapted.adapters[0].paths(site) for site in adapted.adapters[0].sites}
            pairs = {name: (tensors[paths[name]["B0"]], tensors[paths[name]["A0"]]) for name in targets}
            errors["ours"] = {name: left_over(targets[name], *pair) for name, pair in pairs.items()}

    def theirs(start: str) -> None:
        init = f"pissa_niter_{NITER}" if start == "pissa" else True
        config = peft.LoraConfig(r=r, lora_alpha=r, target_modules=[*ATTENTION_AND_MLP], init_lora_weights=init)
        fresh = copy.deepcopy(model)
        wrapped = measured(samples["peft"], start, lambda: peft.get_peft_model(fresh, config), device)
        if start == "pissa" and "peft" not in errors:
            layers = {name: wrapped.base_model.model.get_submodule(name) for name in targets}
            pairs = {n: (layer.lora_B["default"].weight, layer.lora_A["default"].weight) for n, layer in layers.items()}
            errors["peft"] = {name: left_over(targets[name], *pair) for name, pair in pairs.items()}

    for index in range(rounds):
        for side in (ours, theirs) if index % 2 == 0 else (theirs, ours):
            for start in ("lora", "pissa"):
                side(start)
    shapes = defaultdict(list)
    for name, weight in targets.items():
        shapes[tuple(weight.shape)].append(name)
    exact = []
    for shape, names in shapes.items():
        W = targets[names[0]].detach().float()
        (_, sigma, _), seconds = timed(lambda W=W: torch.linalg.svd(W, full_matrices=False), device)
        best = torch.linalg.vector_norm(sigma[r:].double()).item()
        exact.append({
            "site": names[0], "shape": shape, "sites": len(names), "seconds": seconds,
            **{side: errors[side][names[0]] / best for side in errors},
        })  # fmt: skip
    numbers = sum(weight.numel() for weight in targets.values())
    return {
        "text": f"{len(targets)} sites of {numbers / 1e9:.2f} G numbers in bfloat16, r = {r}, {NITER} iterations",
        "capture": capture, "samples": samples, "exact": exact,
        "errors": {side: sum(own.values()) for side, own in errors.items()},
    }  # fmt: skip


def llama(device: str, tiny: bool) -> nn.Module:
    hidden, intermediate, layers, heads, vocabulary = (256, 688, 2, 4, 100) if tiny else (4096, 11008, 32, 32, 32000)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    made: dict[torch.Size, Factors] = {}
    for name, module in model.named_modules():
        if name.endswith(ATTENTION_AND_MLP):
            shape = module.weight.shape
            if shape not in made:
                made[shape] = factors(tuple(shape), device, torch.float32)
            U, sigma, V = made[shape]
            rows, columns = (torch.randperm(size, device=device) for size in shape)
            module.weight.data.copy_((U[rows] * sigma) @ V[columns].T)
    return model


def measured(samples: dict[str, list[float]], name: str, action: Callable[[], Any], device: str) -> Any:
    """The result; its seconds and, on CUDA, the most MiB beyond those held before go to the samples."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    result, seconds = timed(action, device)
    samples[name].append(seconds)
    if device == "cuda":
        samples[f"{name} MiB"].append((torch.cuda.max_memory_allocated() - held) / MIB)
        samples[f"{name} kept MiB"].append((torch.cuda.memory_allocated() - held) / MIB)
    return result


@torch.no_grad()
def left_over(W: torch.Tensor, B: torch.Tensor, A: torch.Tensor) -> float:
    """‖W − B A‖_F"""
    return torch.linalg.vector_norm(W.float() - B.float() @ A.float(), dtype=torch.float64).item()


def job_table(job: dict[str, Any]) -> Table:
    shown = Table(title=job["text"], title_justify="left", show_edge=False, pad_edge=False, header_style="bold")
    shown.add_column("", no_wrap=True)
    for column in ("ours", "peft", "ours / peft"):
        shown.add_column(column, justify="right")
    ours, theirs = (job["samples"][side] for side in ("ours", "peft"))

    def row(label: str, one: float, two: float, digits: str) -> None:
        shown.add_row(label, format(one, digits), format(two, digits), format(one / two, ".3f"))

    def seconds(start: str, without: str | None = None) -> list[float]:
        return [median(side[start]) - (median(side[without]) if without else 0) for side in (ours, theirs)]

    row("PiSSA (s)", *seconds("pissa"), ".3f")
    row("LoRA, which decomposes nothing (s)", *seconds("lora"), ".3f")
    row("difference: decompositions (s)", *seconds("pissa", without="lora"), ".3f")
    shown.add_row("capture, once, not counted above (s)", format(job["capture"], ".2f"), "", "")
    if "pissa MiB" in ours:
        row("peak memory beyond the model (MiB)", median(ours["pissa MiB"]), median(theirs["pissa MiB"]), ".0f")
        kept = (median(side["pissa kept MiB"]) for side in (ours, theirs))
        row("    of which kept", *kept, ".0f")
    row("‖W − BA‖, summed over all sites", job["errors"]["ours"], job["errors"]["peft"], ".4f")
    for entry in job["exact"]:
        label = f"    {entry['site']} {list(entry['shape'])}, over the best"
        row(label, entry["ours"], entry["peft"], ".6f")
    each = " + ".join(f"{entry['sites']} × {entry['seconds']:.2f}" for entry in job["exact"])
    total = sum(entry["sites"] * entry["seconds"] for entry in job["exact"])
    shown.add_row(f"exact, scaled up from one site a shape: {each} (s)", format(total, ".1f"), "", "")
    return shown


if __name__ == "__main__":
    typer.run(main)
