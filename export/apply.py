"""Delta files applied: to a model in memory, or to a folder, of which a merged copy is written without loading it."""

import os
from pathlib import Path

import torch
from torch import nn

from subgraph_peft.base.borrowed import uncompiled
from subgraph_peft.base.errors import CheckpointError
from subgraph_peft.base.files import replacing_folder
from subgraph_peft.store import shards
from subgraph_peft.store.merged_folder import LAID_OUT, assign, edit_config

from .delta import Delta, read_delta


def apply_delta(
    path: str | os.PathLike, base: nn.Module | str | os.PathLike, output: str | os.PathLike | None = None
) -> list[str]:
    """Replace what a delta file replaces; returns the names of the model's parameters and buffers that changed.

    base: a model, changed in place like `sp.write_to(folded, model)` does it; or a model folder, which stays as it is
    output: the folder to write, for a base folder: its files with the replaced tensors, every other byte the same, a
            tensor in memory at a time. A delta of a wider dtype widens the model's other tensors too

    All or nothing. Raises CheckpointError, with the tensor's name, for another base, a missing tensor, other shapes or
    dtypes, and a damaged file; and for an output that holds the delta, the base or files that are not written to it.
    """
    delta = read_delta(path)
    if isinstance(base, nn.Module):
        if output is not None:
            raise CheckpointError("output= belongs to a base folder; a model is changed in place.")
        return to_model(delta, uncompiled(base))
    if output is None:
        raise CheckpointError(f"Give output=, the folder to write; {base} itself stays as it is.")
    return to_folder(delta, Path(base), Path(output))


def to_model(delta: Delta, model: nn.Module) -> list[str]:
    held = model.state_dict(keep_vars=True)
    where = f"the {type(model).__name__}"
    if absent := next((name for name, tensor in held.items() if tensor.is_meta), None):
        raise CheckpointError(f"{absent} is on the meta device in {where}: load the model first.")
    delta.check(held.get, where)
    for name in delta.tensors:
        if held[name].dtype != (new := delta.shard.tensor(name)).dtype:
            raise CheckpointError(
                f"{name} is {held[name].dtype} in {where} and {new.dtype} in {delta.path}: convert the model, "
                f"model.to({new.dtype}), or write a delta of sp.fold(program, dtype={held[name].dtype})."
            )
    values = {name: delta.shard.tensor(name).to(held[name].device, copy=True) for name in delta.tensors}
    assign(model, values)
    return list(values)


def to_folder(delta: Delta, folder: Path, output: Path) -> list[str]:
    source = shards.stored(folder)
    if source is None:
        raise CheckpointError(f"{folder} is no folder with {shards.WEIGHTS} or {shards.INDEX}.")

    def held(name: str) -> torch.Tensor | None:
        found = next((n for n in (name, *delta.twins(name)) if n in source.places), None)
        return None if found is None else source.tensor(found)

    def value(name: str) -> torch.Tensor | None:
        if name in delta.tensors:
            return delta.shard.tensor(name)
        tensor = source.tensor(name) if name in delta.base else None
        if tensor is None or not tensor.is_floating_point():
            return None
        return tensor.to(torch.promote_types(tensor.dtype, delta.dtype))

    delta.check(held, str(folder))
    added = {n: delta.shard.tensor(n) for n in delta.tensors if n not in source.places and delta.parts(n)}
    with replacing_folder(output, CheckpointError, inputs=(delta.path, folder), earlier=LAID_OUT) as target:
        copied = shards.copy(source, target, value, added)
        shards.copy_beside(folder, target)
        edit_config(target, delta.dtype if copied.retyped else None, delta.unties())
    return list(delta.tensors)
