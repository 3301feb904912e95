"""Programs as one safetensors file: tensors under their own names, graph and adapters as JSON in its header. Nothing is
unpickled, and nothing that a file says runs: names and operators are checked before code is made of them."""

import copyreg
import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file

from ..base.borrowed import pytree
from ..base.errors import CheckpointError, SubgraphPeftError
from ..base.files import replacing
from ..base.schema import Schema, read_as
from ..compiler.generate import base_of
from ..graph.portable import encoded, field
from ..method import registry
from ..method.method import spell
from ..program.internals import internals
from ..program.module_file import ModuleFile, Tensors, module_of, module_part, spec_of, spec_text, stored
from ..program.pickling import HEADER, copies, header, reading
from ..program.program import Program
from ..program.records import FoldReport, SiteFold
from .adapter_file import Entry, adapter_json, assembled, read_adapter
from .state import buffers, trained

FORMAT = 1


class SiteFile(Schema):
    relative_delta: float
    retained: float


class FoldFile(Schema):
    """A FoldReport."""

    dtype: Any
    sites: dict[str, SiteFile]
    output_error: float | None
    merged: dict[str, Any]
    remaining: tuple[str, ...]


class ProgramFile(Schema):
    """The header: the captured module, adapters as in adapter.json, and the names of the tensors that are not the
    module's own. `example` is a structure, `leaves` its values that are no tensors."""

    format: Literal[1]
    source: str
    history: tuple[str, ...]
    ties: tuple[tuple[str, ...], ...]
    module: ModuleFile
    adapters: tuple[Entry, ...]
    changed: tuple[str, ...]
    requires_grad: tuple[str, ...]
    training: bool
    folded: FoldFile | None
    example: str
    leaves: tuple[Any, ...]


def write(program: Program, path: str | os.PathLike) -> None:
    """Write `program` to one file: its graph, its weights under their own names, its adapters, its example inputs.

    Raises CheckpointError for a program on the meta device, an adapter whose method is not registered, what has no
    written form, and a folder that cannot be written to.
    """
    tensors, text = program_parts(program)
    with replacing(path, CheckpointError) as temporary:
        save_file(tensors, temporary, metadata={HEADER: text})


def read(path: str | os.PathLike, device: str | torch.device | None = None) -> Program:
    """The program in a file that `write` wrote, on one device (by default the one it was on).

    The source model is not needed, and transformers only where outputs are of its types. Outputs are bit-equal,
    dimensions that varied vary, and the program can be rewritten, trained, folded and exported.

    Raises CheckpointError for a damaged or foreign file, one that would run more than operators on tensors, a type or
    operator that this process does not know, and a method that is not registered.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from error
    if text is None:
        raise CheckpointError(f"{path} holds no program: it was not written by sp.write.")
    return program_of(tensors, text, Path(path), device)


def program_bytes(program: Program) -> bytes:
    tensors, text = program_parts(program)
    return save(tensors, {HEADER: text})


def program_from(data: bytes) -> Program:
    return program_of(copies(data), header(data), Path("this pickled program"), None)


def program_parts(program: Program) -> tuple[Tensors, str]:
    for adapter in program.adapters:
        check_registered(adapter.name, [adapter.method, *(method for _, method in adapter.variants)])
    tensors: Tensors = {}
    base = base_of(program)
    if program.base is not None:
        for name, value in buffers(base).items():
            value.copy_(program.base.module.get_buffer(name))
    leaves, example = pytree.tree_flatten(dict(program.example))
    own = dict(program.tensors())
    paths = [path for a in program.adapters for path, tensor in a.declared().items() if tensor.saved]
    changed = {*paths, *trained(program), *buffers(program)} if program.adapters else set()
    changed = [name for name in own if name in changed]
    described = {
        "format": FORMAT,
        "source": program.source,
        "history": program.history,
        "ties": [sorted(group) for group in program.ties],
        "module": module_part(base.module, tensors),
        "adapters": [adapter_json(adapter).model_dump(mode="json") for adapter in program.adapters],
        "changed": changed,
        "requires_grad": [name for name, p in program.module.named_parameters() if p.requires_grad],
        "training": program.module.training,
        "folded": program.folded and {**asdict(program.folded), "dtype": encoded(program.folded.dtype)},
        "example": spec_text(example),
        "leaves": [None if isinstance(leaf, torch.Tensor) else encoded(leaf) for leaf in leaves],
    }
    tensors |= {f"adapters:{name}": stored(name, own[name]) for name in changed}
    tensors |= {
        f"example:{i}": stored(f"example input {i}", leaf)
        for i, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
    }
    return tensors, json.dumps(described)


def program_of(tensors: Tensors, text: str, path: Path, device: str | torch.device | None) -> Program:
    described = read_as(ProgramFile, text, path)
    with reading(path):
        if missing := {f"adapters:{name}" for name in described.changed} - set(tensors):
            raise CheckpointError(f"The field 'changed' names {min(missing)}, which the file does not hold.")
        module = module_of(described.module, tensors, device)
        home = internals(module).home.device
        leaves = [
            tensors[f"example:{i}"].to(home) if f"example:{i}" in tensors else field("leaves", leaf)
            for i, leaf in enumerate(described.leaves)
        ]
        structure = spec_of(described.example)
        if structure.num_leaves != len(leaves):
            raise CheckpointError(f"The field 'leaves' has {len(leaves)} values for {structure.num_leaves} places.")
        folded = described.folded and fold_report(described.folded)
    program = Program(
        module, pytree.tree_unflatten(leaves, structure), described.source, tuple(map(frozenset, described.ties))
    )
    if described.adapters:
        adapters = tuple(read_adapter(program, item, path) for item in described.adapters)
        program = assembled(program, adapters, {name: tensors[f"adapters:{name}"] for name in described.changed})
    for name, parameter in program.module.named_parameters():
        parameter.requires_grad_(name in described.requires_grad)
    program.module.train(described.training)
    return replace(program, history=described.history, folded=folded)


def check_registered(name: str, methods: list[Any]) -> None:
    for method in methods:
        spelled = spell(method)
        try:
            found = spell(registry.read_method(spelled))
            problem = "" if found == spelled else f"{found} would be read in place of {spelled}."
        except SubgraphPeftError as error:
            found, problem = error, str(error)
        if problem:
            raise CheckpointError(
                f"The adapter {name!r} is of {type(method).__name__}, which nothing would find when it is read: "
                f"{problem} A method of your own: register it in the entry-point group {registry.GROUP}. A module "
                "alone, pickle.dumps(program.module), needs none."
            ) from (found if isinstance(found, Exception) else None)


def fold_report(written: FoldFile) -> FoldReport:
    if not isinstance(dtype := field("folded.dtype", written.dtype), torch.dtype):
        raise CheckpointError(f"The field 'folded.dtype' is {written.dtype!r}, which is no dtype.")
    sites = {name: SiteFold(site.relative_delta, site.retained) for name, site in written.sites.items()}
    return FoldReport(dtype, sites, written.output_error, written.merged, written.remaining)


copyreg.pickle(Program, lambda program: (program_from, (program_bytes(program),)))
