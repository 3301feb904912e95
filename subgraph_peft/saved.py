"""Programs and modules as one safetensors file: tensors under their own names, graph and adapters as JSON in its
header. Nothing is unpickled."""

import importlib
import inspect
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save, save_file
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import registry
from .checkpoint import assembled, buffers, entry, read_adapter, trained
from .checkpointing import Checkpointing
from .errors import CheckpointError, SubgraphPeftError
from .files import replacing
from .fold import FoldReport, SiteFold
from .generate import base_of
from .method import spell
from .module import GraphModel, Home, attach, build
from .portable import decoded, encoded, graph_json, graph_of
from .program import Program
from .signature import Signature

HEADER, FORMAT = "subgraph_peft", 1
Tensors = dict[str, torch.Tensor]


def write(program: Program, path: str | os.PathLike) -> None:
    """Write `program` to one file: its graph, its weights under their own names, its adapters, its example inputs.

    Raises CheckpointError for a program on the meta device, an adapter whose method is not registered, what has no
    written form, and a folder that cannot be written to.
    """
    tensors, text = program_parts(program)
    with replacing(path, CheckpointError) as temporary:
        save_file(tensors, temporary, metadata={HEADER: text})


def read(path: str | os.PathLike, device: str | torch.device | None = None) -> Program:
    """The program in a file that `Program.write` wrote, on one device (by default the one it was on).

    The source model is not needed, and transformers only where outputs are of its types. Outputs are bit-equal,
    dimensions that varied vary, and the program can be rewritten, trained, folded and exported.

    Raises CheckpointError for a damaged or foreign file, a type or operator that this process does not know, and a
    method that is not registered.
    """
    try:
        with safe_open(Path(path), framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER)
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing or damaged: {error}.") from error
    if text is None:
        raise CheckpointError(f"{path} holds no program: it was not written by Program.write.")
    return program_of(tensors, text, Path(path), device)


def program_bytes(program: Program) -> bytes:
    tensors, text = program_parts(program)
    return save(tensors, {HEADER: text})


def program_from(data: bytes) -> Program:
    return program_of(copies(data), header(data), Path("this pickled program"), None)


def module_bytes(module: GraphModel) -> bytes:
    tensors: Tensors = {}
    text = json.dumps(module_part(module, tensors))
    return save(tensors, {HEADER: text})


def module_from(data: bytes) -> GraphModel:
    """A module that was pickled. Where it has constants that equations give from adapters' tensors, it refuses to load
    a state dict: they would not be computed anew."""
    module = module_of(json.loads(header(data)), copies(data), None)

    def refuse(loaded: GraphModel, *_: Any) -> None:
        raise CheckpointError(
            f"This {type(loaded).__name__} was unpickled without the equations that compute {min(loaded.computed)} "
            "from its adapters. Load the state dict before pickling, or move the program: program.write, sp.read."
        )

    if module.computed:
        module.register_load_state_dict_pre_hook(refuse)
    return module


def copies(data: bytes) -> Tensors:
    """Aligned in memory, as those of a model are: kernels round by alignment."""
    return {name: tensor.clone() for name, tensor in load(data).items()}


def header(data: bytes) -> str:
    """The metadata of a safetensors file in memory: its header follows 8 bytes that hold the header's length."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][HEADER]


def program_parts(program: Program) -> tuple[Tensors, str]:
    for adapter in program.adapters:
        check_registered(adapter.name, [adapter.method, *(method for _, method in adapter.variants)])
    tensors: Tensors = {}
    base = base_of(program)
    if program.base is not None:
        for name, value in buffers(base).items():
            value.copy_(program.base.module.get_buffer(name))
    leaves, example = pytree.tree_flatten(dict(program.example))
    own = dict(program.module.tensors())
    paths = [path for a in program.adapters for path, tensor in a.declared().items() if tensor.saved]
    changed = {*paths, *trained(program), *buffers(program)} if program.adapters else set()
    changed = [name for name in own if name in changed]
    described = {
        "format": FORMAT,
        "source": program.source,
        "history": program.history,
        "ties": [sorted(group) for group in program.ties],
        "module": module_part(base.module, tensors),
        "adapters": [entry(adapter) for adapter in program.adapters],
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
    described = json.loads(text)
    if described.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {described.get('format')}; this version reads format {FORMAT}.")
    module = module_of(described["module"], tensors, device)
    leaves = [
        tensors[f"example:{i}"].to(module.home.device) if f"example:{i}" in tensors else decoded(leaf)
        for i, leaf in enumerate(described["leaves"])
    ]
    example = pytree.tree_unflatten(leaves, spec_of(described["example"]))
    program = Program(module, example, described["source"], tuple(map(frozenset, described["ties"])))
    if described["adapters"]:
        adapters = tuple(read_adapter(program, item, path) for item in described["adapters"])
        program = assembled(program, adapters, {name: tensors[f"adapters:{name}"] for name in described["changed"]})
    for name, parameter in program.module.named_parameters():
        parameter.requires_grad_(name in described["requires_grad"])
    program.module.train(described["training"])
    folded = described["folded"] and fold_report(described["folded"])
    return replace(program, history=tuple(described["history"]), folded=folded)


def check_registered(name: str, methods: list[Any]) -> None:
    for method in methods:
        try:
            if registry.read(spell(method)) == method:
                continue
        except SubgraphPeftError:
            pass
        raise CheckpointError(
            f"The adapter {name!r} is of {type(method).__name__}, which nothing would find when it is read: register "
            f"it in the entry-point group {registry.GROUP}. A module alone, pickle.dumps(program.module), needs none."
        )


def fold_report(written: dict[str, Any]) -> FoldReport:
    sites = {name: SiteFold(**kept) for name, kept in written["sites"].items()}
    dtype, remaining = decoded(written["dtype"]), tuple(written["remaining"])
    return FoldReport(**{**written, "dtype": dtype, "sites": sites, "remaining": remaining})


def module_part(module: GraphModel, tensors: Tensors) -> dict[str, Any]:
    """A module as JSON; its tensors go into `tensors`, tied ones once."""
    first: dict[int, str] = {}
    saved = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in module.tensors():
        if first.setdefault(id(value), name) == name:
            tensors[name] = stored(name, value)
    config = getattr(module, "config", None)
    return {
        "class": type(module).__name__,
        "graphs": [graph_json(graph) for graph in module.graphs()],
        "parts": {
            name: part_json(child) for name, child in module.named_children() if isinstance(child, fx.GraphModule)
        },
        "signature": signature_json(module.signature),
        "home": encoded(tuple(module.home)),
        "origin": encoded(tuple(module.origin)),
        "devices": sorted({str(value.device) for _, value in module.tensors()}),
        "tensors": {name: first[id(value)] for name, value in module.tensors()},
        "parameters": {name: value.requires_grad for name, value in parameters.items()},
        "volatile": [name for name, _ in module.tensors() if name not in saved],
        "computed": sorted(module.computed),
        "training": module.training,
        "blocks": list(module.block_paths),
        "padding": module.padding,
        "checkpointing": module.checkpointing and encoded(tuple(module.checkpointing)),
        "config": config.to_json_string(use_diff=False) if hasattr(config, "model_type") else None,
    }


def module_of(written: Mapping[str, Any], tensors: Tensors, device: str | torch.device | None) -> GraphModel:
    home, origin = (Home(*decoded(written[key])) for key in ("home", "origin"))
    device = home.device if device is None else torch.device(device)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f'The program was on {device}: {error}. Read it with device="cpu".') from error
    devices = dict.fromkeys(written["devices"], device)
    own = [graph_of(graph, devices) for graph in written["graphs"]]
    placed = {first: tensors[first].to(device) for first in set(written["tensors"].values())}
    for name, requires_grad in written["parameters"].items():
        first = written["tensors"][name]
        if not isinstance(placed[first], nn.Parameter):
            placed[first] = nn.Parameter(placed[first], requires_grad=requires_grad)
    held = {name: part_of(part, devices) for name, part in written["parts"].items()}
    held |= {name: placed[first] for name, first in written["tensors"].items()}
    module = build(
        signature_of(written["signature"]), own[0], own[1] if len(own) > 1 else None, held, set(written["volatile"]),
        Home(device, home.dtype), written["class"], config_of(written["config"]),
        written["checkpointing"] and Checkpointing(*decoded(written["checkpointing"])), written["padding"],
    )  # fmt: skip
    module.origin, module.computed = origin, frozenset(written["computed"])
    if written["blocks"]:
        module.block_paths = tuple(written["blocks"])
        module.make_runners()
    return module.train(written["training"])


def stored(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as safetensors takes it: on the CPU, contiguous, alone in its memory."""
    if tensor.is_meta:
        raise CheckpointError(f"{name} is on the meta device and has no values to write; load the model first.")
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()


def part_json(part: fx.GraphModule) -> dict[str, Any]:
    """The body of a higher-order operator, such as a branch of torch.cond."""
    if held := next((name for name, _ in (*part.named_parameters(), *part.named_buffers())), None):
        raise CheckpointError(f"A region of the graph holds a tensor of its own, {held}, and cannot be written.")
    inner = {name: part_json(child) for name, child in part.named_children()}
    return {"graph": graph_json(part.graph), "parts": inner}


def part_of(written: Mapping[str, Any], devices: Mapping[str, torch.device]) -> fx.GraphModule:
    root = nn.Module()
    for name, part in written["parts"].items():
        attach(root, name, part_of(part, devices))
    return fx.GraphModule(root, graph_of(written["graph"], devices))


def signature_json(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": {name: spec_text(spec) for name, spec in signature.inputs.items()},
        "constants": [[index, encoded(value)] for index, value in signature.constants.items()],
        "parameters": [[p.name, p.kind.name, *default_json(p.default)] for p in signature.parameters],
        "output": spec_text(signature.output),
    }


def default_json(default: Any) -> list[Any]:
    """[] without one; None in place of an object that has no written form, which no captured argument is."""
    if default is inspect.Parameter.empty:
        return []
    try:
        return [encoded(default)]
    except CheckpointError:
        return [None]


def signature_of(written: Mapping[str, Any]) -> Signature:
    return Signature(
        inputs={name: spec_of(text) for name, text in written["inputs"].items()},
        constants={index: decoded(value) for index, value in written["constants"]},
        parameters=tuple(
            inspect.Parameter(
                name,
                getattr(inspect.Parameter, kind),
                default=decoded(default[0]) if default else inspect.Parameter.empty,
            )
            for name, kind, *default in written["parameters"]
        ),
        output=spec_of(written["output"]),
    )


def spec_text(spec: pytree.TreeSpec) -> str:
    try:
        return pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError) as error:
        raise CheckpointError(
            f"The structure {spec} cannot be written: {error} Register its type with "
            "torch.utils._pytree.register_pytree_node and a serialized_type_name."
        ) from error


def spec_of(text: str) -> pytree.TreeSpec:
    """Types of transformers are imported; others have to be known already."""
    types = re.findall(r'"type": "([\w.]+)"', text)
    try:
        for name in types:
            if name.startswith("transformers."):
                importlib.import_module(name.rpartition(".")[0])
        return pytree.treespec_loads(text)
    except (ImportError, NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"The program takes or returns {', '.join(sorted(set(types)))}: {error}. Install or import what defines "
            "these types before reading it."
        ) from error


def config_of(text: str | None) -> Any:
    """The model's config, where transformers is there and knows it."""
    if text is None:
        return None
    try:
        from transformers import CONFIG_MAPPING

        values = json.loads(text)
        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except (ImportError, KeyError):
        return None
