"""Training checkpoints: the adapter, and what a resumed run needs to go on as if it had never stopped.

A folder `checkpoint-<step>` appears as a whole or not at all. Tensors are safetensors, the rest is JSON; base weights
are not in it.
"""

import json
import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from ..base.errors import CheckpointError
from ..base.files import FORMER, replacing_folder, settle
from ..program.program import Program
from ..store.adapter_file import save
from .schedule import Schedule

OPTIMIZER, SCHEDULE, STATE = "optimizer.safetensors", "schedule.safetensors", "run.json"
TRAINER_STATE = "trainer_state.json"  # the name that Trainer reads
PREFIX = "checkpoint-"
REMEDY = "Remove the folder to resume from the one before it."


def write_checkpoint(
    folder: Path, program: Program, optimizer: Any, schedule: Schedule, progress: Any, run: Mapping[str, Any]
) -> None:
    """Write a checkpoint folder.

    progress: the TrainerState
    run:      what else JSON can hold; arrays and tensors become lists
    """
    state = optimizer.state_dict()
    tensors = {
        f"{index}.{key}": value.detach().cpu().contiguous()
        for index, entries in state["state"].items()
        for key, value in entries.items()
    }
    scheduled = schedule.state_dict()
    with replacing_folder(folder, CheckpointError, earlier=("*",)) as new:
        save(program, new)
        save_file(tensors, new / OPTIMIZER)
        if scheduled["tensors"]:
            save_file({n: v.cpu().contiguous() for n, v in scheduled["tensors"].items()}, new / SCHEDULE)
        kept = {**run, "groups": state["param_groups"], "scheduled": scheduled["number"]}
        text = json.dumps(kept, default=lambda value: value.tolist())
        (new / STATE).write_text(text, encoding="utf-8")
        progress.save_to_json(str(new / TRAINER_STATE))


def read_run(folder: Path) -> dict[str, Any]:
    try:
        return json.loads((folder / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is damaged: {STATE}: {error}. {REMEDY}") from error


def load_optimizer(folder: Path, optimizer: Any) -> None:
    state: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in read_tensors(folder / OPTIMIZER).items():
        index, _, key = name.partition(".")
        state.setdefault(int(index), {})[key] = value
    try:
        optimizer.load_state_dict({"state": state, "param_groups": read_run(folder)["groups"]})
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{folder / OPTIMIZER} does not fit the program: {error}.") from error


def load_schedule(folder: Path, schedule: Schedule) -> None:
    tensors = read_tensors(folder / SCHEDULE) if (folder / SCHEDULE).exists() else {}
    schedule.load_state_dict({"number": read_run(folder)["scheduled"], "tensors": tensors})


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:
        raise CheckpointError(f"{path} is damaged: {error}. {REMEDY}") from error


def found(output: Path) -> list[Path]:
    """Checkpoint folders, oldest first; one whose replacement was stopped on the way comes back."""
    for path in output.glob(f".{PREFIX}*{FORMER}"):
        settle(output / path.name.removeprefix(".").removesuffix(FORMER), CheckpointError)
    folders = [path for path in output.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit() and path.is_dir()]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def rotate(output: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints, and what an interrupted write left behind."""
    stale = [path for path in output.glob(f".{PREFIX}*") if path.is_dir()]
    for folder in found(output)[: -keep or None] + stale:
        shutil.rmtree(folder, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """States of the random number generators of Python, NumPy and torch."""
    state = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def set_random_state(state: Mapping[str, Any]) -> None:
    """Takes what `random_state` gives, also after a journey through JSON."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.asarray(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(torch.as_tensor(state["torch"], dtype=torch.uint8))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.as_tensor(state["cuda"], dtype=torch.uint8))
