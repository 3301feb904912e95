"""Folded weights where others look for them: in the eager model, in a model folder."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from .errors import FoldError
from .files import replacing
from .program import Program
from .sources import quiet


def save_merged(program: Program, model: nn.Module | None, tokenizer: Any, folder: str | Path) -> None:
    """The folded weights: as `save_pretrained` writes them where the model has it, else `model.safetensors`.

    The model itself keeps its weights. The folder appears whole; an older one is replaced.
    """
    program.need_values("save", FoldError)
    folder = Path(folder)
    if not hasattr(model, "save_pretrained"):
        tensors = {name: t.detach().contiguous() for name, t in program.module.state_dict().items()}
        with replacing(folder / "model.safetensors", FoldError) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        return
    dtype = program.module.home.dtype
    merged = copy.deepcopy(model).to(dtype)
    program.write_to(merged)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
            target = Path(temporary) / "model"
            with quiet():
                merged.save_pretrained(target)
            if tokenizer is not None:
                tokenizer.save_pretrained(target)
            if folder.exists():
                folder.rename(Path(temporary) / "former")
            target.rename(folder)
    except OSError as error:
        raise FoldError(
            f"{folder} cannot be written: {error.strerror or error}. Choose another folder or free space."
        ) from error


def write_to(program: Program, model: nn.Module) -> list[str]:
    """Copy the program's weights, and the buffers that training wrote, into `model`; returns the names that changed.

    Nothing is written unless everything fits. A weight that was untied in the program is untied in the model. Programs
    captured from it keep the memory that they shared with it, hence their weights. Raises FoldError.
    """
    if any(adapter.method.foldable() for adapter in program.adapters):
        raise FoldError(
            "The program still has adapters: write_to takes a folded one, sp.fold(program).write_to(model)."
        )
    if program.adapters:
        names = ", ".join(adapter.name for adapter in program.adapters)
        raise FoldError(f"{names} cannot become plain weights; the eager model has no place for their nodes.")
    program.need_values("write", FoldError)
    model = getattr(model, "_orig_mod", model)
    own = dict(program.module.named_parameters(remove_duplicate=False))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for name, value in own.items():
        if name not in theirs:
            raise FoldError(
                f"The model has no parameter {name!r}; write_to takes the model that was captured ({program.source})."
            )
        if theirs[name].is_meta:
            raise FoldError(f"{name} is on the meta device in the model and has no memory to write to: load it first.")
        if theirs[name].shape != value.shape or theirs[name].dtype != value.dtype:
            raise FoldError(
                f"{name} is {list(theirs[name].shape)} {theirs[name].dtype} in the model and {list(value.shape)} "
                f"{value.dtype} in the program. Convert the model (model.to({value.dtype})) or fold with "
                f"dtype={theirs[name].dtype}."
            )
    statistics = dict(program.module.named_buffers(remove_duplicate=False))
    written = [
        name for name, value in model.named_buffers(remove_duplicate=False)
        if name in statistics and not torch.equal(value, statistics[name].to(value.device))
    ]  # fmt: skip
    changed = [
        name
        for name, value in own.items()
        if not torch.equal(theirs[name].detach(), value.detach().to(theirs[name].device))
    ]
    untied = [
        name
        for name in changed
        if any(t is theirs[name] and not torch.equal(own[o], own[name]) for o, t in theirs.items() if o != name)
    ]
    with torch.no_grad():
        for name in changed:
            if name in untied:
                owner, _, leaf = name.rpartition(".")
                setattr(
                    model.get_submodule(owner),
                    leaf,
                    nn.Parameter(own[name].detach().to(theirs[name].device, copy=True)),
                )
                if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
                    model.config.tie_word_embeddings = False
            else:
                theirs[name].data = own[name].detach().to(theirs[name].device, copy=True)
        for name in written:
            model.get_buffer(name).copy_(statistics[name])
    return changed + written
