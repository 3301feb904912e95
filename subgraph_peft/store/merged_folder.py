"""Folded weights where others look for them: in the eager model, in a model folder."""

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import nn

from ..base.borrowed import commit_of, uncompiled
from ..base.errors import CheckpointError, FoldError
from ..base.files import TOKENIZER, replacing, replacing_folder
from ..base.patches import without_progress
from ..program.program import Program
from . import shards
from .stored_names import StoredNames

LAID_OUT = shards.WEIGHTS, "model-*-of-*.safetensors", shards.INDEX, "config.json", "generation_config.json"
UNCOMPARED = "transformers_version", "dtype", "torch_dtype", "architectures"


@dataclass(frozen=True)
class MergedReport:
    """What was written.

    dtype:   of the folded program, hence of the folder
    source:  the folder whose files, names, order and metadata it has; None where there is none, and `reason` says why
    files:   with a source, whether each of its files is the source's byte for byte
    changed: with a source, the tensors that differ from its; retyped: whether any of them has another dtype
    """

    folder: Path
    dtype: torch.dtype
    source: Path | None = None
    reason: str = ""
    files: Mapping[str, bool] = field(default_factory=dict)
    changed: tuple[str, ...] = ()
    retyped: bool = False

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + (", other than stored there" if self.retyped else "")
        if self.source is None:
            return f"{self.folder} ({dtype}; laid out anew: {self.reason})"
        same = sum(self.files.values())
        return (
            f"{self.folder} (laid out like {self.source}; {dtype}; {len(self.changed)} tensors changed, "
            f"{same} of {len(self.files)} files the same)"
        )


def save_merged(program: Program, model: nn.Module | None, tokenizer: Any, folder: str | Path) -> MergedReport:
    """The folded weights as a folder, which appears whole and replaces a former one.

    A model that was loaded from a folder of safetensors gets that folder's files, names, order and metadata; a file in
    which no tensor changed is the same byte for byte. Otherwise `save_pretrained` decides, or, where the model has
    none, there is one `model.safetensors`. The dtype is the folded program's: that of a 16-bit model is kept by
    `fold(…, dtype=…)`, which refuses to lose updates. The model keeps its weights, and no weight is copied in memory.

    Raises FoldError for a program with adapters, a model that is not the captured one, what cannot be written, and a
    folder that holds the model's own files or any that a merged one does not have.
    """
    check_plain(program, "save")
    folder, dtype = Path(folder), program.home.dtype
    if not hasattr(model, "save_pretrained"):
        with replacing(folder / shards.WEIGHTS, FoldError) as temporary:
            save_model(program.module, str(temporary), {"format": "pt"})
        return MergedReport(folder, dtype, reason="the model has no save_pretrained")
    merged, untied = merged_model(program, model)
    inputs = [own] if (own := folder_of(model)) else []
    earlier = (*LAID_OUT, *(TOKENIZER if tokenizer is not None else ()))
    with replacing_folder(folder, FoldError, inputs=inputs, earlier=earlier) as target, without_progress():
        names, source, reason = layout(merged, untied)
        if source is None:
            merged.save_pretrained(target)
            report = MergedReport(folder, dtype, reason=reason)
        else:
            added = {name: names.tensor(name) for name in names.lacking(source.places)}
            copied = shards.copy(source, target, names.tensor, added)
            shards.copy_beside(source.folder, target)
            write_settings(model, merged, source.folder, target, dtype if copied.retyped else None, bool(untied))
            report = MergedReport(folder, dtype, source.folder, "", copied.files, copied.changed, copied.retyped)
        if tokenizer is not None:
            tokenizer.save_pretrained(target)
    return report


def merged_model(program: Program, model: nn.Module) -> tuple[nn.Module, list[str]]:
    """(the model's modules around the program's tensors, names of parameters that only the program has untied)"""
    own = dict(program.tensors())
    theirs = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    check_names(program, theirs)
    shared: dict[int, Any] = {}
    for name, tensor in theirs.items():
        shared.setdefault(id(tensor), own[name] if name in own else wide(tensor, program.home.dtype))
    merged = copy.deepcopy(model, shared)
    placed = dict(merged.named_parameters(remove_duplicate=False))
    untied = [name for name in placed if name in own and not same(placed[name], own[name])]
    for name in untied:
        set_parameter(merged, name, own[name])
    return merged, untied


def wide(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """In `dtype`, where that is the wider one."""
    if not tensor.is_floating_point() or torch.promote_types(tensor.dtype, dtype) == tensor.dtype:
        return tensor
    widened = tensor.detach().to(torch.promote_types(tensor.dtype, dtype))
    return nn.Parameter(widened, requires_grad=False) if isinstance(tensor, nn.Parameter) else widened


def layout(merged: nn.Module, untied: list[str]) -> tuple[StoredNames | None, shards.Stored | None, str]:
    """(the model's stored names, the folder that has all of them but what was untied; else None, and why)"""
    if (folder := folder_of(merged)) is None:
        return None, None, "the model was loaded from no folder"
    try:
        source = shards.stored(folder)
    except CheckpointError as error:
        return None, None, str(error)
    if source is None:
        return None, None, f"{folder} holds no {shards.WEIGHTS}"
    names = StoredNames(merged)
    if missing := [name for name in names.lacking(source.places) if name not in untied]:
        return None, None, f"{folder} does not store {missing[0]}"
    return names, source, ""


def write_settings(
    model: nn.Module, merged: nn.Module, source: Path, target: Path, dtype: torch.dtype | None, untied: bool
) -> None:
    """The configurations as the source has them, but for what folding changed; from the model where it has others."""
    if same_settings(model.config, type(model.config).from_pretrained(source)):
        edit_config(target, dtype, untied)
    else:
        merged.config.dtype, merged.config.architectures = merged.dtype, [type(merged).__name__]
        merged.config.save_pretrained(target)
    if merged.can_generate():
        own = merged.generation_config
        stored = (source / "generation_config.json").is_file()
        found = type(own).from_pretrained(source) if stored else type(own).from_model_config(model.config)
        if not same_settings(own, found):
            own.save_pretrained(target)


def edit_config(folder: Path, dtype: torch.dtype | None, untied: bool) -> None:
    """Set what differs in a folder's `config.json`; where nothing does it stays byte for byte."""
    path = folder / "config.json"
    changes = {} if dtype is None else {"dtype": str(dtype).removeprefix("torch.")}
    changes |= {"tie_word_embeddings": False} if untied else {}
    if changes and path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {key: value for key, value in config.items() if key != "torch_dtype" or dtype is None}
        path.write_text(json.dumps({**config, **changes}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def same_settings(own: Any, other: Any) -> bool:
    def facts(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {k: facts(v) for k, v in value.items() if k not in UNCOMPARED and not k.startswith("_")}

    return facts(json.loads(own.to_json_string(use_diff=False))) == facts(json.loads(other.to_json_string(False)))


def write_to(program: Program, model: nn.Module) -> list[str]:
    """Copy the program's weights, and the buffers that training wrote, into `model`; returns the names that changed.

    Nothing is written unless everything fits. A weight that was untied in the program is untied in the model. Programs
    captured from it keep the memory that they shared with it, hence their weights. Raises FoldError.
    """
    check_plain(program, "write")
    model = uncompiled(model)
    own = dict(program.module.named_parameters(remove_duplicate=False))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    check_names(program, theirs)
    for name, value in own.items():
        if theirs[name].is_meta:
            raise FoldError(f"{name} is on the meta device in the model and has no memory to write to: load it first.")
        if theirs[name].shape != value.shape or theirs[name].dtype != value.dtype:
            raise FoldError(
                f"{name} is {list(theirs[name].shape)} {theirs[name].dtype} in the model and {list(value.shape)} "
                f"{value.dtype} in the program. Convert the model (model.to({value.dtype})) or fold with "
                f"dtype={theirs[name].dtype}."
            )
    statistics = dict(program.module.named_buffers(remove_duplicate=False))
    written = {
        name: statistics[name] for name, value in model.named_buffers(remove_duplicate=False)
        if name in statistics and not same(value, statistics[name])
    }  # fmt: skip
    changed = {name: value for name, value in own.items() if not same(theirs[name], value)} | written
    assign(model, {name: value.detach().to(home(model, name), copy=True) for name, value in changed.items()})
    return list(changed)


def assign(model: nn.Module, values: Mapping[str, torch.Tensor]) -> None:
    """Give parameters and buffers of `model` these tensors, on their devices; one that is tied to another which does
    not become the same is untied."""
    parameters = dict(model.named_parameters(remove_duplicate=False))

    def parts(name: str) -> bool:
        twins = [other for other, held in parameters.items() if held is parameters[name] and other != name]
        return any(other not in values or not torch.equal(values[other], values[name]) for other in twins)

    untied = [name for name in values if name in parameters and parts(name)]
    with torch.no_grad():
        for name, value in values.items():
            if name in untied:
                set_parameter(model, name, nn.Parameter(value))
            elif name in parameters:
                parameters[name].data = value
            else:
                model.get_buffer(name).copy_(value)


def set_parameter(model: nn.Module, name: str, value: nn.Parameter) -> None:
    """Put a parameter in the place of one that was tied to others."""
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, value)
    if hasattr(getattr(model, "config", None), "tie_word_embeddings"):
        model.config.tie_word_embeddings = False


def home(model: nn.Module, name: str) -> torch.device:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf).device


def same(value: torch.Tensor, other: torch.Tensor) -> bool:
    return value is other or torch.equal(value.detach(), other.detach().to(value.device))


def check_plain(program: Program, purpose: str) -> None:
    """FoldError for a program that is not plain weights."""
    if any(adapter.method.foldable() for adapter in program.adapters):
        raise FoldError(
            "The program still has adapters: write_to takes a folded one, sp.write_to(sp.fold(program), model)."
        )
    if program.adapters:
        names = ", ".join(adapter.name for adapter in program.adapters)
        raise FoldError(f"{names} cannot become plain weights; the eager model has no place for their nodes.")
    program.need_values(purpose, FoldError)


def check_names(program: Program, theirs: Mapping[str, torch.Tensor]) -> None:
    for name, _ in program.module.named_parameters(remove_duplicate=False):
        if name not in theirs:
            raise FoldError(
                f"The model has no parameter {name!r}; write_to takes the model that was captured ({program.source})."
            )


def folder_of(model: nn.Module) -> Path | None:
    """The folder that a transformers model was loaded from: its own, or the hub's copy on this machine."""
    name = getattr(model, "name_or_path", "")
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=commit_of(model.config))
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None
