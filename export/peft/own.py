"""Methods that peft does not have, in its two files under their own names."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from subgraph_peft.base.schema import read_as
from subgraph_peft.graph.site import Site
from subgraph_peft.method.adapter import Adapter
from subgraph_peft.program.program import Program
from subgraph_peft.store.adapter_file import Entry, adapter_json, read_adapter

from .folder import CONFIG, MODULES, WRAPPER, FolderContents, Slot
from .form import PeftForm
from .options import Options


class OwnOptions(Options):
    """`peft_type` is the method's name; `adapter` says its options and sites, as adapter.json does."""

    adapter: dict[str, Any]
    target_modules: list[str] | None = None


class OwnForm(PeftForm):
    """`<module>.<method>_<tensor>` for every saved tensor; those that all sites share under `base_model`."""

    peft_type = "own"
    options = OwnOptions

    def layout(self, captured: Program, options: OwnOptions, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        adapter = read_adapter(captured, read_as(Entry, json.dumps(options.adapter), CONFIG), Path(CONFIG))
        keys = own_keys(adapter)
        return FolderContents(
            (adapter,), {path: Slot(keys[path], tensor.shape) for path, tensor in saved(adapter).items()}
        )


def written_own(program: Program, adapter: Adapter) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """(configuration, tensors by key)"""
    keys = own_keys(adapter)
    tensors = {keys[path]: program.module.get_parameter(path) for path in saved(adapter)}
    return {
        "peft_type": adapter.method.name,
        "adapter": adapter_json(adapter).model_dump(mode="json"),
        "target_modules": sorted({site.owner for site in adapter.sites}),
    }, tensors


def saved(adapter: Adapter) -> dict[str, Any]:
    return {path: tensor for path, tensor in adapter.declared().items() if tensor.saved}


def own_keys(adapter: Adapter) -> dict[str, str]:
    """Qualified name -> key."""

    def place(site: Site) -> str:
        module = site.name.removesuffix(".weight")
        return site.name if module != site.name and adapter.on(module) else module

    name = adapter.method.name
    return {
        path: f"{WRAPPER}{name}_{tensor}" if tensor in adapter.shared else f"{MODULES}{place(site)}.{name}_{tensor}"
        for site, tensor, path in adapter.all_paths()
    }
