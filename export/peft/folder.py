"""The two files of an adapter folder, and what stands where in them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from subgraph_peft.base.errors import CheckpointError
from subgraph_peft.base.files import replacing_set, settle
from subgraph_peft.method.adapter import Adapter

CONFIG, TENSORS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MODULES, WRAPPER = "base_model.model.", "base_model."


@dataclass(frozen=True)
class Slot:
    """Where the file holds a tensor, in which shape, and how ours comes from it."""

    key: str
    shape: tuple[int, ...]
    restore: Callable[[torch.Tensor], torch.Tensor] = lambda stored: stored


@dataclass(frozen=True)
class FolderContents:
    """What a folder says: adapters, the place of each of their tensors by qualified name, and values that the file does
    not hold but that follow from it."""

    adapters: tuple[Adapter, ...]
    slots: Mapping[str, Slot]
    computed: Mapping[str, torch.Tensor] = field(default_factory=dict)


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, tensors by key). Raises CheckpointError; nothing is unpickled."""
    config = read_config(folder)
    path = folder / TENSORS
    if not path.is_file():
        pickled = (
            f" {PICKLE} is a pickle, which is never opened here: load it with peft and save it again, "
            "save_pretrained(folder, safe_serialization=True)."
        )
        raise CheckpointError(f"{folder}: {TENSORS} is missing.{pickled if (folder / PICKLE).exists() else ''}")
    try:
        return config, load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error


def read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    settle(path, CheckpointError)
    if not path.is_file():
        raise CheckpointError(f"{folder} is no peft adapter: {CONFIG} is missing.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise CheckpointError(f"{path} names no peft_type.")
    return config


def write_folder(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Both files together; where that fails, the former ones stay."""
    held = {key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()}
    with replacing_set(folder / CONFIG, CheckpointError) as new:
        save_file(held, new / TENSORS, metadata={"format": "pt"})
        (new / CONFIG).write_text(json.dumps(dict(config), indent=2, sort_keys=True) + "\n", encoding="utf-8")
