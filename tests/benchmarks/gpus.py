"""One GPU and two: data parallel, and with the frozen base sharded (FSDP2).

    python -m tests.benchmarks.gpus --json results.json            two GPUs, NCCL
    python -m tests.benchmarks.gpus --tiny                         a rehearsal on the CPU, gloo

A Llama 4096 wide of 8 layers in bfloat16, LoRA r=16 at every linear layer but the head, 4×1024 tokens a process and
step; a step is forward, backward, one all-reduce of the gradients and AdamW. Each number of processes is a torchrun of
its own, in which the base of one process is whole, and of two first whole, then sharded, from one start.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import torch.distributed as dist
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base import processes
from subgraph_peft.base.files import write_json
from subgraph_peft.passes import LoRA
from subgraph_peft.training.distributed import average_gradients, start
from subgraph_peft.training.sharded import held_bytes, sharded
from tests.benchmarks.attach import machine
from tests.benchmarks.sides import ALPHA, ATTENTION_AND_MLP, CASES, RANK

COMPARED, WARM, TIMED = 10, 3, 20  # steps: losses, then tokens/s
Batch = dict[str, torch.Tensor]


def compute(module: nn.Module, batch: Batch) -> torch.Tensor:
    """Forward and backward of one batch: gradients of what trains, and the loss."""
    loss = module(**batch).loss
    loss.backward()
    return loss.detach()


def measure(shard: bool, device: torch.device, tiny: bool, step: Callable = compute) -> dict[str, Any]:
    """Losses, seconds of the timed steps, and bytes of this process, with the base whole or sharded."""
    with ExitStack() as stack:
        model, batch, _ = CASES["llama"].make(str(device), tiny)
        home = "cpu" if shard else device
        program = sp.capture(model.to(home), {n: t.to(home) for n, t in batch.items()}, verify=False)
        where = [f"*.{name}" for name in ATTENTION_AND_MLP]
        program = sp.rewrite(program, LoRA(r=RANK, alpha=ALPHA), where=where)
        del model
        start(program)
        reset(device)
        module = stack.enter_context(sharded(program, device)) if shard else program.module
        base = held_bytes(module)
        trained = [parameter for _, parameter in program.parameters(trainable=True)]
        groups = sp.parameter_groups(program, lr=1e-3)
        optimizer = torch.optim.AdamW(groups, fused=device.type == "cuda")
        generator = torch.Generator(device).manual_seed(processes.rank())
        ids = batch["input_ids"]
        ids = torch.randint(1, 99, (COMPARED, *ids.shape), generator=generator, device=device)
        batches = [{**batch, "input_ids": part, "labels": part} for part in ids]

        def whole_step(index: int) -> torch.Tensor:
            loss = step(module, batches[index % COMPARED])
            average_gradients(trained)
            optimizer.step()
            optimizer.zero_grad()
            return loss

        module.train()
        losses = torch.stack([whole_step(index) for index in range(COMPARED)]).double()
        seconds = [timed(lambda index=index: whole_step(index), device) for index in range(WARM + TIMED)][WARM:]
        if processes.world() > 1:
            dist.all_reduce(losses)
        peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
        tokens = ids[0].numel() * processes.world()
    reset(device)
    return {
        "losses": (losses / processes.world()).tolist(), "tokens per second": tokens / median(seconds),
        "step": median(seconds), "base bytes": base, "peak bytes": peak, "trained": sum(p.numel() for p in trained),
    }  # fmt: skip


def timed(action: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    begun = time.perf_counter()
    action()
    wait(device)
    return time.perf_counter() - begun


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def reset(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def work(tiny: bool, file: Path) -> None:
    """In a process of torchrun: measure, and let the first one write what all found."""
    transformers.utils.logging.set_verbosity_error()
    with processes.processes() as first:
        device = torch.device("cpu" if tiny else "cuda", None if tiny else torch.cuda.current_device())
        own = {"whole": measure(False, device, tiny)}
        if processes.world() > 1:
            own["sharded"] = measure(True, device, tiny)
        found: list[Any] = [None] * processes.world()
        dist.all_gather_object(found, own)
        if first:
            write_json(file, found, sp.SubgraphPeftError)


def launch(count: int, tiny: bool) -> list[dict[str, Any]]:
    """What `count` processes found, by rank. The environment, NCCL's variables included, is handed on."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
        command += ["-m", "tests.benchmarks.gpus", "--worker", str(file), *(["--tiny"] if tiny else [])]
        environment = {"OMP_NUM_THREADS": "4", **os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if tiny else {})}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=140, check=False)
        if done.returncode:
            raise SystemExit(f"{count} processes failed:\n{done.stderr[-4000:]}")
        return json.loads(file.read_text())


def main(
    tiny: Annotated[bool, typer.Option(help="A small model on the CPU.")] = False,
    json: Annotated[Path | None, typer.Option(help="Write what was measured to this file.")] = None,
    worker: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure one process and two."""
    if worker:
        work(tiny, worker)
        return
    console = Console(width=120)
    report: dict[str, Any] = {"machine": machine("cpu" if tiny else "cuda")}
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    report |= {"one": launch(1, tiny), "two": launch(2, tiny)}
    report |= compared(report)
    console.print(table(report))
    if json:
        write_json(json, report, sp.SubgraphPeftError)


def compared(report: dict[str, Any]) -> dict[str, Any]:
    one, two = report["one"][0]["whole"], report["two"]
    whole, shards = two[0]["whole"], two[0]["sharded"]
    return {
        "data parallel, times one": whole["tokens per second"] / one["tokens per second"],
        "base, of the whole": max(part["sharded"]["base bytes"] for part in two) / whole["base bytes"],
        "largest difference of losses": max(
            abs(a - b) for a, b in zip(whole["losses"], shards["losses"], strict=True)
        ),
    }  # fmt: skip


def table(report: dict[str, Any]) -> Table:
    one, whole, shards = report["one"][0]["whole"], report["two"][0]["whole"], report["two"][0]["sharded"]
    shown = Table(
        title=f"LoRA r={RANK}, {one['trained']:,} trained", title_justify="left", show_edge=False, pad_edge=False,
        header_style="bold",
    )  # fmt: skip
    shown.add_column("", no_wrap=True)
    for column in ("one process", "two, data parallel", "two, sharded base"):
        shown.add_column(column, justify="right")
    runs = (one, whole, shards)
    shown.add_row("tokens/s", *(f"{run['tokens per second']:,.0f}" for run in runs))
    shown.add_row("    times one", "", *(f"{r['tokens per second'] / one['tokens per second']:.2f}" for r in runs[1:]))
    shown.add_row("step (ms)", *(f"{run['step'] * 1e3:.2f}" for run in runs))
    shown.add_row("frozen base in a process (MiB)", *(f"{run['base bytes'] / 2**20:.1f}" for run in runs))
    if one["peak bytes"] is not None:
        shown.add_row("peak memory of a process (GiB)", *(f"{run['peak bytes'] / 2**30:.2f}" for run in runs))
    for index in (0, COMPARED - 1):
        shown.add_row(f"loss of step {index + 1}", *(f"{run['losses'][index]:.6f}" for run in runs))
    shown.add_row("largest difference of losses", "", "", f"{report['largest difference of losses']:.1e}")
    return shown


if __name__ == "__main__":
    typer.run(main)
