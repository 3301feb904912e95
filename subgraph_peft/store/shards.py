"""A folder of safetensors files, and a copy of it in which some tensors have other values: the same files, names, order
and metadata; every other byte stays."""

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..base.errors import CheckpointError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NOT_BESIDE = (
    ".safetensors", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".h5", ".msgpack", ".ot", ".onnx", ".data", ".gguf",
    ".npz", ".npy", ".index.json",
)  # fmt: skip
Value = Callable[[str], torch.Tensor | None]


class TensorForm(NamedTuple):
    """dtype as safetensors spells it, shape, size in bytes."""

    dtype: str
    shape: list[int]
    bytes: int

    @property
    def width(self) -> int:
        """Bytes of one number; where there are none, as many as any has."""
        return self.bytes // math.prod(self.shape) if self.bytes else 8

    @staticmethod
    def of(tensor: torch.Tensor) -> "TensorForm":
        return TensorForm(spelled(tensor.dtype), list(tensor.shape), tensor.nbytes)


class Shard:
    """One safetensors file: its header as it stands, its tensors in the order of their bytes, all mapped."""

    def __init__(self, path: Path) -> None:
        try:
            self.opened = safe_open(path, framework="pt")
            with path.open("rb") as file:
                self.header = file.read(int.from_bytes(file.read(8), "little"))
            self.bytes = path.stat().st_size - 8 - len(self.header)
            data = np.memmap(path, np.uint8, "r", 8 + len(self.header)) if self.bytes else np.empty(0, np.uint8)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is missing or damaged: {error}.") from error
        self.path = path
        described = json.loads(self.header)
        self.metadata = described.pop("__metadata__", None)
        self.entries = dict(sorted(described.items(), key=lambda item: item[1]["data_offsets"]))
        self.raw = {name: data[slice(*entry["data_offsets"])] for name, entry in self.entries.items()}

    def tensor(self, name: str) -> torch.Tensor:
        return self.opened.get_tensor(name)

    def form(self, name: str) -> TensorForm:
        return TensorForm(self.entries[name]["dtype"], self.entries[name]["shape"], self.raw[name].size)


@dataclass(frozen=True)
class Stored:
    """The tensors of a model folder.

    shards: its safetensors files by name          places: the shard of every tensor
    """

    folder: Path
    shards: Mapping[str, Shard]
    places: Mapping[str, Shard]

    def tensor(self, name: str) -> torch.Tensor:
        return self.places[name].tensor(name)


@dataclass(frozen=True)
class Copied:
    """files: whether each is the source's byte for byte         changed: the tensors that are other than the source's
    retyped: whether any of them has another dtype"""

    files: Mapping[str, bool]
    changed: tuple[str, ...]
    retyped: bool


def stored(folder: Path) -> Stored | None:
    """The tensors of a folder; None where it holds no `model.safetensors` and no index of shards.

    Raises CheckpointError for a damaged file, and for shards that are not those of the index.
    """
    if (folder / WEIGHTS).is_file():
        shards = {WEIGHTS: Shard(folder / WEIGHTS)}
    elif (folder / INDEX).is_file():
        try:
            listed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / INDEX} is damaged: {type(error).__name__}: {error}.") from error
        if outside := sorted(name for name in set(listed.values()) if Path(name).name != name):
            raise CheckpointError(f"{folder / INDEX} names {outside[0]!r}, which is no file of that folder.")
        shards = {name: Shard(folder / name) for name in sorted(set(listed.values()))}
        held = {tensor: name for name, shard in shards.items() for tensor in shard.entries}
        if differing := sorted(n for n in {*listed, *held} if listed.get(n) != held.get(n)):
            raise CheckpointError(f"{folder}: {INDEX} and the files do not agree about {differing[0]}.")
    else:
        return None
    return Stored(folder, shards, {name: shard for shard in shards.values() for name in shard.entries})


def copy(source: Stored, target: Path, value: Value, added: Mapping[str, torch.Tensor]) -> Copied:
    """Copy the safetensors files to the folder `target`, a tensor at a time.

    value: what a tensor of the source becomes; None where it stays      added: new tensors, for the last file
    """
    files, changed, retyped = {}, [], False
    for position, (name, shard) in enumerate(source.shards.items()):
        extra = added if position == len(source.shards) - 1 else {}
        other = dict(replaced(shard, value))
        files[name] = not other and not extra
        changed += [*other, *extra]
        retyped = retyped or any(form.dtype != shard.form(tensor).dtype for tensor, form in other.items())
        if files[name]:
            shutil.copyfile(shard.path, target / name)
        else:
            write_shard(shard, target / name, value, other, extra)
    if WEIGHTS not in source.shards:
        write_index(source, target, added)
    return Copied(files, tuple(changed), retyped)


def replaced(shard: Shard, value: Value) -> Iterator[tuple[str, TensorForm]]:
    """The tensors that become other ones, with their new dtype and shape."""
    for name in shard.entries:
        new = value(name)
        if new is None:
            continue
        form = TensorForm.of(new)
        if form != shard.form(name) or not np.array_equal(shard.raw[name], as_bytes(new)):
            yield name, form


def write_shard(
    shard: Shard, path: Path, value: Value, other: Mapping[str, TensorForm], added: Mapping[str, torch.Tensor]
) -> None:
    names, header = list(shard.entries), shard.header
    if added or any(form != shard.form(name) for name, form in other.items()):
        forms = {name: other.get(name) or shard.form(name) for name in names}
        names, header = laid_out(
            {**forms, **{name: TensorForm.of(tensor) for name, tensor in added.items()}}, shard.metadata
        )
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in names:
            if name in added:
                file.write(as_bytes(added[name]))
            else:
                file.write(as_bytes(value(name)) if name in other else shard.raw[name])


def laid_out(forms: Mapping[str, TensorForm], metadata: Mapping[str, str] | None) -> tuple[list[str], bytes]:
    """(order of the tensors, header). The given order, wider numbers first, so that all of them are aligned."""
    names = sorted(forms, key=lambda name: -forms[name].width)
    described: dict[str, object] = {} if metadata is None else {"__metadata__": metadata}
    start = 0
    for name in names:
        end = start + forms[name].bytes
        described[name] = {"dtype": forms[name].dtype, "shape": forms[name].shape, "data_offsets": [start, end]}
        start = end
    header = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    return names, header + b" " * (-len(header) % 8)


def write_index(source: Stored, target: Path, added: Mapping[str, torch.Tensor]) -> None:
    text = (source.folder / INDEX).read_text(encoding="utf-8")
    index, written = json.loads(text), {name: Shard(target / name) for name in source.shards}
    grown = sum(shard.bytes - source.shards[name].bytes for name, shard in written.items())
    if added or grown:
        index["weight_map"] |= dict.fromkeys(added, list(source.shards)[-1])
        numbers = {"total_size": grown, "total_parameters": sum(tensor.numel() for tensor in added.values())}
        index["metadata"] = {k: v + numbers.get(k, 0) for k, v in (index.get("metadata") or {}).items()}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (target / INDEX).write_text(text, encoding="utf-8")


def copy_beside(source: Path, target: Path) -> None:
    """The small files at the top of a model folder: configurations, tokenizer, code; no weights in any format."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(NOT_BESIDE):
            shutil.copyfile(path, target / path.name)


def as_bytes(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


@cache  # there are few dtypes
def spelled(dtype: torch.dtype) -> str:
    """A dtype's name in safetensors files."""
    data = save({"": torch.empty(0, dtype=dtype)})
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])[""]["dtype"]
