"""Rewrite a captured program as a peft folder says."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from subgraph_peft.base.errors import CheckpointError, suggestion
from subgraph_peft.compiler.rewrite import adapter_dtype, resolve_ties
from subgraph_peft.program.program import Program
from subgraph_peft.store.adapter_file import assembled, check_fit

from . import beside
from .folder import CONFIG, TENSORS, FolderContents, read_folder
from .form import PeftForm
from .forms import FORMS, OWN


def from_peft(program: Program, folder: str | os.PathLike) -> Program:
    """The captured program rewritten as the adapter in `folder` says, with its tensors.

    `program` is the base that the adapter was trained on, captured. A PiSSA folder (init_lora_weights = "pissa") goes
    on the original weights too: the residual is computed as peft does when it loads. P-tuning and a projected prefix
    come back as the virtual tokens that were saved. A weight that is tied to another gets memory of its own, since an
    adapter of peft changes one of the two modules.

    Raises CheckpointError for a damaged folder, for options that are not implemented, by name, and for missing,
    unexpected and misshapen tensors, all listed.
    """
    folder = Path(folder)
    config, tensors = read_folder(folder)
    form = form_of(config, folder)
    options = form.options.read(config, str(folder / CONFIG))
    captured = program.captured
    layout = form.layout(captured, options, tensors)
    captured = resolve_ties(captured, [site for a in layout.adapters for site in a.sites], "untie")
    adapted = {site.owner for adapter in layout.adapters for site in adapter.sites}
    own = beside.read_beside(captured, form, options, adapted, tensors)
    found = {key: value for key, value in tensors.items() if key not in own.ignored}
    slots = {**layout.slots, **own.slots}
    expected = {slot.key: torch.Size(slot.shape) for slot in (*slots.values(), *own.copies.values())}
    check_fit(folder / TENSORS, found, expected)
    beside.check_copies(captured, own, found, str(folder / TENSORS))
    return built(captured, layout, slots, found)


def form_of(config: Mapping[str, Any], folder: Path) -> PeftForm:
    name = config["peft_type"]
    if name in FORMS:
        return FORMS[name]
    if "adapter" in config:
        return OWN
    raise CheckpointError(
        f"{folder / CONFIG}: peft_type {name!r} is not known here.{suggestion(name, FORMS)} Known: {', '.join(FORMS)}. "
        "Merge it in peft (merge_and_unload) and capture the result."
    )


def built(
    captured: Program, layout: FolderContents, slots: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> Program:
    declared = {path: tensor for adapter in layout.adapters for path, tensor in adapter.declared().items()}
    stored = {path: slot.restore(tensors[slot.key]) for path, slot in slots.items()} | dict(layout.computed)
    dtype = adapter_dtype(captured, None)
    for path, value in stored.items():
        dtype = torch.promote_types(dtype, value.dtype) if path in declared else dtype
    buffers = dict(captured.module.named_buffers(remove_duplicate=False))
    values = {path: value if path in buffers else value.to(dtype) for path, value in stored.items()}
    values |= {path: value.reshape(declared[path].shape) for path, value in values.items() if path in declared}
    return assembled(captured, layout.adapters, values)
