"""First attach and peak memory of one side, in a process of its own.

python -m tests.benchmarks.fresh minilm lora ours cpu        prints one JSON object
"""

import json
import re
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import torch
from transformers.utils import logging

from tests.benchmarks.sides import CASES, SIDES

MIB = 2**20


def peak(device: str) -> float:
    """MiB: allocated by torch on CUDA, resident in the process on the CPU.

    Linux hands ru_maxrss of a parent down to its children; VmHWM is the process's own.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status")
    if status.exists():
        return int(re.search(r"VmHWM:\s+(\d+) kB", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)


def measure(case: str, method: str, side: str, device: str, tiny: bool, steps: int = 3) -> dict[str, float]:
    """Seconds of the first attach; MiB held before it, and the most held up to the end of attaching and of training."""
    model, inputs, _ = CASES[case].make(device, tiny)
    for parameter in model.parameters():
        parameter.detach().sum()  # weights that are mapped from a file become resident
    held = torch.cuda.memory_allocated() / MIB if device == "cuda" else psutil.Process().memory_info().rss / MIB
    library = SIDES[side](CASES[case], method, device)
    seconds = library.attach(model, inputs)["attach"]
    attached = peak(device)
    step = library.stepper(inputs)
    for _ in range(steps):
        step()
    return {"first attach": seconds, "model": held, "peak attaching": attached, "peak training": peak(device)}


def in_new_process(case: str, method: str, side: str, device: str, tiny: bool) -> dict[str, float]:
    command = [sys.executable, "-m", __name__, case, method, side, device, *(["--tiny"] if tiny else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(json.dumps(measure(*sys.argv[1:5], tiny="--tiny" in sys.argv)))
