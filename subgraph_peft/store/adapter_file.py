"""Adapters on disk: `adapter.json` (methods, sites, base) and `adapter.safetensors` (tensors by qualified name)."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from ..base.errors import CheckpointError, SubgraphPeftError, nearest
from ..base.files import replacing_set, settle
from ..base.schema import Schema, read_as
from ..compiler.constants import refresh
from ..compiler.generate import generate
from ..compiler.places import candidates
from ..graph.legal import is_name
from ..graph.site import Site
from ..method import registry
from ..method.adapter import Adapter
from ..method.method import Method, spell
from ..program.program import Program
from .state import buffers, fingerprint, set_buffers, state, trained, untie, untied, written

CONFIG, TENSORS = "adapter.json", "adapter.safetensors"
FORMAT = 1


class Entry(Schema):
    """An adapter: its method, its sites, and the method of the sites that have other options."""

    name: str
    method: dict[str, Any]
    sites: tuple[str, ...]
    variants: dict[str, dict[str, Any]]


class Base(Schema):
    source: str
    fingerprint: str


class Config(Schema):
    """What adapter.json holds. `untied`: weights that were tied until adapters rewrote them."""

    format: Literal[1]
    base: Base
    untied: tuple[str, ...]
    trained: tuple[str, ...]
    buffers: tuple[str, ...]
    adapters: tuple[Entry, ...]


def save(program: Program, folder: str | os.PathLike) -> None:
    """Write the program's adapters, and the parameters and buffers of the model that training changed beside them.

    Both files appear together; a save that stops on the way leaves the former ones.
    """
    if not program.adapters:
        raise CheckpointError("The program has no adapters to save; a folded program is saved as plain weights.")
    program.need_values("save", CheckpointError)
    folder = Path(folder)
    tensors = {name: value.detach().contiguous().cpu() for name, value in state(program).items()}
    text = json.dumps(described(program).model_dump(mode="json"), indent=2) + "\n"
    with replacing_set(folder / CONFIG, CheckpointError) as new:
        save_file(tensors, new / TENSORS, metadata={"format": "pt", "config": digest(text)})
        (new / CONFIG).write_text(text, encoding="utf-8")


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def described(program: Program) -> Config:
    return Config(
        format=FORMAT,
        base=Base(source=program.source, fingerprint=fingerprint(program, trained(program))),
        untied=tuple(untied(program)),
        trained=tuple(trained(program)),
        buffers=tuple(written(program)),
        adapters=tuple(map(adapter_json, program.adapters)),
    )


def adapter_json(adapter: Adapter) -> Entry:
    return Entry(
        name=adapter.name,
        method=spell(adapter.method),
        sites=tuple(site.name for site in adapter.sites),
        variants={name: spell(method) for name, method in adapter.variants},
    )


def read_config(folder: Path) -> Config:
    path = folder / CONFIG
    settle(path, CheckpointError)
    if not path.exists():
        if (folder / "adapter_config.json").exists():
            raise CheckpointError(
                f"{folder} is a huggingface/peft adapter, not one of this package: it has no {CONFIG}. Read it "
                "with subgraph_peft.export.from_peft(program, folder), or turn it into one with subgraph-peft convert."
            )
        raise CheckpointError(f"{folder} holds no adapter: {CONFIG} is missing.")
    return read_as(Config, path.read_bytes(), path)


def read_tensors(folder: Path, expected: Mapping[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The tensors of the file, strictly those expected; aligned in memory, since kernels round by alignment."""
    path = folder / TENSORS
    if not path.exists():
        raise CheckpointError(f"{folder} is incomplete: {TENSORS} is missing.")
    try:
        with safe_open(path, framework="pt") as file:
            found = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            saved_with = (file.metadata() or {}).get("config")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}.") from error
    if saved_with != digest((folder / CONFIG).read_text(encoding="utf-8")):
        raise CheckpointError(
            f"{folder}: {CONFIG} is not the one that {TENSORS} was saved with. Restore both from one save."
        )
    check_fit(path, found, expected)
    return found


def check_fit(path: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Size]) -> None:
    """CheckpointError that lists what is missing, unexpected and misshapen."""
    problems = [f"missing {name}" for name in sorted(set(expected) - set(found))]
    problems += [f"unexpected {name}" for name in sorted(set(found) - set(expected))]
    problems += [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        listed = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" if len(problems) > 8 else "")
        raise CheckpointError(f"{path} does not fit the program: {listed}.")


def check_base(program: Program, config: Config, folder: Path) -> None:
    if config.base.fingerprint != fingerprint(program, config.trained):
        raise CheckpointError(
            f"{folder} was trained on another base ({config.base.source}) than this program "
            f"({program.source}): the weights differ. Load the model that the adapter was trained on."
        )


def restore(program: Program, folder: str | os.PathLike) -> Program:
    """Read tensors into the program's own adapters, in place, as training does that goes on from a checkpoint; nothing
    changes unless everything fits. Returns it."""
    program.need_values("load adapters for", CheckpointError)
    folder = Path(folder)
    config = read_config(folder)
    own = [adapter_json(adapter) for adapter in program.adapters]
    for theirs, ours in zip(config.adapters, own, strict=False):
        if differing := [key for key in Entry.model_fields if getattr(theirs, key) != getattr(ours, key)]:
            raise CheckpointError(
                f"{folder} holds the adapter {theirs.name!r} with another {differing[0]} than the program's "
                f"{ours.name!r}. Use sp.load(program, folder) on the captured program to rebuild it from the file."
            )
    if len(own) != len(config.adapters) or list(config.trained) != trained(program):
        raise CheckpointError(
            f"{folder} holds {len(config.adapters)} adapters and trains {list(config.trained) or 'nothing else'}; "
            f"the program has {len(own)} and trains {trained(program) or 'nothing else'}. Use sp.load on the "
            "captured program."
        )
    check_base(program, config, folder)
    held = {name: value for name, value in state(program).items() if isinstance(value, nn.Parameter)}
    found = read_tensors(folder, {name: value.shape for name, value in held.items()} | buffer_shapes(program, config))
    with torch.no_grad():
        for name, value in held.items():
            value.copy_(found[name])
    set_buffers(program, found)
    refresh(program.module, program.constants)
    return program


def buffer_shapes(program: Program, config: Config) -> dict[str, torch.Size]:
    own = buffers(program)
    if missing := set(config.buffers) - set(own):
        raise CheckpointError(f"The program has no buffer {sorted(missing)[0]}, which the adapter's training wrote.")
    return {name: own[name].shape for name in config.buffers}


def load(program: Program, folder: str | os.PathLike) -> Program:
    """The captured program rewritten as the adapter in `folder` says, with its tensors. Nothing is recomputed from W.

    `program` is left as it is. A method of the folder that is one of its adapters' is taken from there, so that it need
    not be registered.

    Raises CheckpointError for a damaged, foreign or ill-fitting folder.
    """
    program.need_values("load adapters for", CheckpointError)
    folder = Path(folder)
    config = read_config(folder)
    check_base(program.captured, config, folder)
    captured = untie(program.captured, config.untied)
    known = [method for a in program.adapters for method in (a.method, *(method for _, method in a.variants))]
    adapters = tuple(read_adapter(captured, item, folder, known) for item in config.adapters)
    base = dict(captured.module.named_parameters())
    if missing := set(config.trained) - set(base):
        raise CheckpointError(f"{folder}: the program has no parameter {sorted(missing)[0]}.")
    declared = {path: tensor for adapter in adapters for path, tensor in adapter.declared().items()}
    expected = {path: torch.Size(tensor.shape) for path, tensor in declared.items() if tensor.saved}
    expected |= {name: base[name].shape for name in config.trained} | buffer_shapes(captured, config)
    found = read_tensors(folder, expected)
    return assembled(captured, adapters, found)


def onto(captured: Program, program: Program) -> Program:
    """Another capture of a program's model under the program's adapters, with its tensors.

    Raises CheckpointError where the capture lacks a site.
    """
    captured = untie(captured, untied(program))

    def moved(adapter: Adapter) -> Adapter:
        names = [site.name for site in adapter.sites]
        return replace(adapter, sites=sites_named(captured, adapter.method, names, program.source))

    return assembled(captured, tuple(map(moved, program.adapters)), state(program))


def assembled(captured: Program, adapters: tuple[Adapter, ...], found: Mapping[str, torch.Tensor]) -> Program:
    """The captured program under adapters whose tensors are given by qualified name, along with values of the model's
    own parameters, which train, and buffers; tensors that are not saved are drawn."""
    declared = {path: tensor for adapter in adapters for path, tensor in adapter.declared().items()}
    device, statistics = captured.home.device, buffers(captured)
    own = {
        name: nn.Parameter(value.to(device), requires_grad=name not in declared or declared[name].trainable)
        for name, value in found.items()
        if name not in statistics
    }
    dtype = next(value.dtype for name, value in own.items() if name in declared)
    drawn = {path: tensor for path, tensor in declared.items() if not tensor.saved}
    own |= {
        path: nn.Parameter(tensor.init(tensor.shape, torch.Generator()).to(device, dtype), requires_grad=False)
        for path, tensor in drawn.items()
    }
    result = generate(captured, adapters, own, dtype)
    set_buffers(result, found)
    history = (*captured.history, *(adapter.name for adapter in adapters))
    return replace(result, history=history)


def read_adapter(captured: Program, item: Entry, folder: Path, known: Sequence[Method] = ()) -> Adapter:
    """known: methods that need no registry."""

    def read(spelled: Mapping[str, Any]) -> Method:
        return next((method for method in known if spell(method) == spelled), None) or registry.read_method(spelled)

    try:
        method = read(item.method)
        variants = tuple((site, read(spelled)) for site, spelled in item.variants.items())
    except SubgraphPeftError as error:
        raise CheckpointError(
            f"{folder}: {error} A method of your own is found once its package registers it in the "
            f"entry-point group {registry.GROUP}; or make the rewrite again and pass that program: "
            "sp.load(adapted, folder)."
        ) from error
    if not is_name(item.name):
        raise CheckpointError(f"{folder}: the adapter's name {item.name!r} is no identifier.")
    return Adapter(item.name, method, sites_named(captured, method, item.sites, folder), variants=variants)


def sites_named(captured: Program, method: Method, names: Sequence[str], where: object) -> tuple[Site, ...]:
    """Raises CheckpointError, which starts with `where`, for a name that is no site."""
    by_name = {site.name: site for site in candidates(captured, method)}
    if missing := [name for name in names if name not in by_name]:
        close = ", ".join(nearest(missing[0], by_name))
        raise CheckpointError(
            f"{where}: the program has no site {missing[0]} ({len(missing)} missing). Nearest: {close}."
        )
    return tuple(by_name[name] for name in names)
