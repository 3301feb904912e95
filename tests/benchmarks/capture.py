"""Seconds and memory of capture, sites and rewrite(LoRA(r=16)), each model in a process of its own.

python -m tests.benchmarks.capture                       every model
python -m tests.benchmarks.capture "Llama 32 × 4096"     one of them

Seconds are of the wall clock; those of the processor, which other programs on the machine disturb less, are all three
together. Growth is the most memory held at any time from the capture on, less what was held before it, by a process
that has captured another model already, so that torch's own modules are no part of it; the activations of the check in
eval mode and the adapters are. Copied is the bytes of parameters that the programs do not share with the model, by
address; a model on the meta device has no bytes to copy.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import subgraph_peft as sp
from subgraph_peft.passes import LoRA
from tests.benchmarks.fresh import MIB, peak

Built = tuple[nn.Module, dict[str, torch.Tensor]]


def bert(layers: int, width: int) -> Built:
    config = BertConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=12, intermediate_size=4 * width
    )
    ids = torch.ones(2, 16, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": ids, "labels": torch.zeros(2, dtype=torch.long)}
    return BertForSequenceClassification(config), inputs


def llama(layers: int, width: int, feed_forward: int, device: str) -> Built:
    config = LlamaConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 128,
        num_key_value_heads=width // 512, intermediate_size=feed_forward, vocab_size=32000,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
        ids = torch.ones(2, 16, dtype=torch.long)
    if device == "meta":
        model.to(torch.bfloat16)
    return model, {"input_ids": ids, "attention_mask": ids, "labels": ids}


MODELS: dict[str, Callable[[], Built]] = {
    "MiniLM 6 × 384": lambda: bert(6, 384),
    "BERT 12 × 768": lambda: bert(12, 768),
    "Llama 4 × 2048": lambda: llama(4, 2048, 5632, "cpu"),
    "Llama 32 × 4096": lambda: llama(32, 4096, 14336, "meta"),
}


def measure(name: str) -> dict[str, float]:
    """Seconds, and bytes in MiB."""
    sp.rewrite(sp.capture(*bert(1, 24)), LoRA(r=2))
    model, inputs = MODELS[name]()
    real = [p for p in model.parameters() if not p.is_meta]
    for parameter in real:
        parameter.detach().sum()  # every page of it is resident
    held = psutil.Process().memory_info().rss / MIB
    processor, times = time.process_time(), [time.perf_counter()]
    program = sp.capture(model, inputs)
    times.append(time.perf_counter())
    found = sp.sites(program)
    times.append(time.perf_counter())
    adapted = sp.rewrite(program, LoRA(r=16))
    times.append(time.perf_counter())
    own = {n: p.data_ptr() for n, p in model.named_parameters(remove_duplicate=False) if not p.is_meta}
    copied = [
        p.nbytes
        for made in (program, adapted)
        for n, p in made.module.named_parameters(remove_duplicate=False)
        if n in own and p.data_ptr() != own[n]
    ]
    return {
        "nodes": len(program.graph.nodes),
        "weights": len(found),
        "capture": times[1] - times[0],
        "sites": times[2] - times[1],
        "rewrite": times[3] - times[2],
        "processor": time.process_time() - processor,
        "model": sum(p.nbytes for p in real) / MIB,
        "growth": peak("cpu") - held,
        "copied": sum(copied) / MIB,
    }


def in_new_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", __spec__.name, name, "--here"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main(names: list[str]) -> None:
    table = Table(
        "model", "nodes", "weights", "capture s", "sites s", "rewrite s", "processor s", "MiB", "growth", "copied"
    )
    for name in names or MODELS:
        row = in_new_process(name)
        seconds = (f"{row[key]:.2f}" for key in ("capture", "sites", "rewrite", "processor"))
        growth = f"{row['growth']:.0f} MiB" + (f", {row['growth'] / row['model']:.1%}" if row["model"] else "")
        copied = f"{row['copied']:.0f}" if row["model"] else "–"
        table.add_row(name, str(row["nodes"]), str(row["weights"]), *seconds, f"{row['model']:.0f}", growth, copied)
    Console(width=120).print(table)


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if "--here" in sys.argv:
        print(json.dumps(measure(sys.argv[1])))
    else:
        main(sys.argv[1:])
