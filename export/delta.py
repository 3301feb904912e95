"""What a fold changed, as one safetensors file: the new tensors, and hashes by which their base is known again."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

from subgraph_peft.base.errors import CheckpointError, ExportError
from subgraph_peft.base.files import replacing
from subgraph_peft.base.hashes import digest, sampled
from subgraph_peft.base.schema import Schema, read_as
from subgraph_peft.program.program import Program
from subgraph_peft.store.merged_folder import check_plain, same
from subgraph_peft.store.shards import Shard

HEADER, FORMAT = "subgraph_peft_delta", 1


class Replaced(Schema):
    """Hashes of the base's tensor, in the dtype of the new one, and of the new one."""

    before: str
    after: str


class Described(Schema):
    """The header of a delta file: fields as those of `Delta`, and the version of this package that wrote it."""

    format: Literal[1]
    version: str
    source: str
    dtype: str
    adapters: dict[str, Any]
    ties: tuple[tuple[str, ...], ...]
    tensors: dict[str, Replaced]
    base: dict[str, str]


@dataclass(frozen=True)
class Delta:
    """A delta file.

    source:   class name of the base                        dtype: of the model that it makes
    adapters: the methods that it came from, by adapter     ties:  groups of names that are one tensor in the base
    tensors:  what is replaced, by name                     base:  hashes of all else, of up to 256 values each
    """

    shard: Shard
    source: str
    dtype: torch.dtype
    adapters: Mapping[str, Any]
    ties: Sequence[Sequence[str]]
    tensors: Mapping[str, Replaced]
    base: Mapping[str, str]

    @property
    def path(self) -> Path:
        return self.shard.path

    def twins(self, name: str) -> list[str]:
        """The names that are tied to this one in the base."""
        return [other for group in self.ties if name in group for other in group if other != name]

    def parts(self, name: str) -> bool:
        """Whether a replaced tensor becomes another one than those that are tied to it in the base."""
        others = [self.tensors.get(other) for other in self.twins(name)]
        return any(other is None or other.after != self.tensors[name].after for other in others)

    def unties(self) -> bool:
        """Whether any tensor parts from its twins."""
        return any(map(self.parts, self.tensors))

    def check(self, held: Callable[[str], torch.Tensor | None], where: str) -> None:
        """CheckpointError unless `held` gives the base's tensors; narrower ones pass as the same numbers."""
        for name, item in self.tensors.items():
            new, old = self.shard.tensor(name), self.present(held, name, where)
            if old.shape != new.shape or torch.promote_types(old.dtype, new.dtype) != new.dtype:
                raise CheckpointError(
                    f"{name} is {list(old.shape)} {old.dtype} in {where} and {list(new.shape)} {new.dtype} in "
                    f"{self.path}, which replaces it."
                )
            self.compare(digest(old.to(new.dtype)), item.before, name, where)
        for name, expected in self.base.items():
            self.compare(sampled(self.present(held, name, where)), expected, name, where)

    def present(self, held: Callable[[str], torch.Tensor | None], name: str, where: str) -> torch.Tensor:
        if (tensor := held(name)) is None:
            raise CheckpointError(
                f"{where} has no tensor {name}, which the base of {self.path} has ({self.source}). Where a folder "
                "stores it under another name, or not at all, load the model first: apply_delta(path, model)."
            )
        return tensor

    def compare(self, found: str, expected: str, name: str, where: str) -> None:
        if found != expected:
            raise CheckpointError(
                f"{self.path} was made for another base ({self.source}): {name} has other values in {where}."
            )


def to_delta(folded: Program, path: str | os.PathLike, *, base: Program | None = None) -> Delta:
    """Write the parameters and buffers in which a folded program differs from the captured one, and nothing else.

    base: the captured program, needed where `folded` was read from a file, which does not hold it

    The file names the methods that it came from. Hashes of what it replaces, and of samples of all else, tell its base
    from others; `apply_delta` refuses those. Raises ExportError where nothing changed, FoldError for a program with
    adapters.
    """
    check_plain(folded, "write")
    base = base or folded.before
    if base is None:
        raise ExportError(
            f"This program of {folded.source} does not know what it was folded from: it was not folded, or was read "
            "from a file. Give base=, the captured program."
        )
    old, new = saved(base), saved(folded)
    if old.keys() != new.keys():
        raise ExportError(f"base is another program: only one of them has {sorted(old.keys() ^ new.keys())[0]}.")
    changed = [name for name in new if not same(new[name], old[name].to(new[name].dtype))]
    if not changed:
        raise ExportError(f"Every weight of {folded.source} is the base's: there is no delta to write.")
    tensors = apart({name: new[name].detach().cpu().contiguous() for name in changed})
    replaced = {
        name: Replaced(before=digest(old[name].to(tensor.dtype)), after=digest(tensor))
        for name, tensor in tensors.items()
    }
    described = {
        "format": FORMAT,
        "version": version("subgraph-peft"),
        "source": folded.source,
        "dtype": str(folded.home.dtype).removeprefix("torch."),
        "adapters": folded.folded.merged if folded.folded else {},
        "ties": sorted(sorted(group) for group in base.ties),
        "tensors": {name: item.model_dump() for name, item in replaced.items()},
        "base": {name: sampled(tensor) for name, tensor in old.items() if name not in changed},
    }
    with replacing(path, ExportError) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt", HEADER: json.dumps(described)})
    return read_delta(path)


def read_delta(path: str | os.PathLike) -> Delta:
    """A file that `to_delta` wrote, every tensor checked. Raises CheckpointError for a damaged or foreign one."""
    shard = Shard(Path(path))
    if HEADER not in (shard.metadata or {}):
        raise CheckpointError(f"{path} is no delta: it was not written by to_delta.")
    described = read_as(Described, shard.metadata[HEADER], path)
    if not isinstance(dtype := getattr(torch, described.dtype, None), torch.dtype):
        raise CheckpointError(f"{path} is damaged: the field 'dtype': {described.dtype!r} is no dtype of torch.")
    kept = {key: getattr(described, key) for key in ("source", "adapters", "ties", "tensors", "base")}
    delta = Delta(shard, dtype=dtype, **kept)
    for name, item in delta.tensors.items():
        if name not in shard.entries or digest(shard.tensor(name)) != item.after:
            raise CheckpointError(f"{path} is damaged: {name} is missing or not the tensor that was written.")
    return delta


def saved(program: Program) -> dict[str, torch.Tensor]:
    """The state dict's tensors themselves, tied names included."""
    return program.module.state_dict(keep_vars=True)


def apart(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with memory of its own for every one after the first that shares it: safetensors takes no others."""
    held: dict[int, str] = {}
    owners = {name: held.setdefault(t.untyped_storage().data_ptr(), name) for name, t in tensors.items()}
    return {name: t if owners[name] == name else t.clone() for name, t in tensors.items()}
