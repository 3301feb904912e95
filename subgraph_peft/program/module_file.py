"""Modules as JSON, and back: graphs, signature and state; tensors are kept beside the JSON, by name."""

import importlib
import inspect
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Annotated, Any

import torch
from pydantic import ConfigDict, Field, RootModel
from torch import fx, nn

from ..base.borrowed import pytree
from ..base.errors import CaptureWarning, CheckpointError
from ..base.schema import Schema, read_as
from ..graph.guards import guards_of
from ..graph.legal import is_name
from ..graph.portable import GraphFile, check_path, decoded, encoded, field, graph_json, graph_of
from ..graph.sequence.padding import Padding
from ..graph.signature import CALL, UNKNOWN, Signature
from .internals import Checkpointing, Home, internals
from .module import GraphModel, build
from .runners import renew
from .tree import attach, named_tensors

Tensors = dict[str, torch.Tensor]
KINDS = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD", "VAR_POSITIONAL", "KEYWORD_ONLY")


class PartFile(Schema):
    """The body of a higher-order operator, and those within it."""

    graph: GraphFile
    parts: "dict[str, PartFile]"


class SignatureFile(Schema):
    """inputs and output as structures; constants: (leaf index, value); parameters: (name, kind) and its default"""

    inputs: dict[str, str]
    constants: tuple[tuple[int, Any], ...]
    parameters: tuple[tuple[str, str] | tuple[str, str, Any], ...]
    output: str
    guards: tuple[str, ...]


class ModuleFile(Schema):
    """tensors: name -> the first name of the same tensor; others as in `Internals`"""

    called: str = Field(alias="class")
    graphs: Annotated[tuple[GraphFile, ...], Field(min_length=1, max_length=2)]
    parts: dict[str, PartFile]
    signature: SignatureFile
    home: Any
    origin: Any
    devices: tuple[str, ...]
    tensors: dict[str, str]
    parameters: dict[str, bool]
    volatile: tuple[str, ...]
    computed: tuple[str, ...]
    training: bool
    blocks: tuple[str, ...]
    padding: Padding | None
    without: tuple[str, ...]
    checkpointing: Any
    config: str | None


class ConfigFile(Schema):
    """A config of transformers, which knows the fields."""

    model_config = ConfigDict(extra="allow")

    model_type: str


class SpecFile(Schema):
    """A structure as torch writes it."""

    type: str | None
    context: Any
    children_spec: "tuple[SpecFile, ...]"


class StructureFile(RootModel[tuple[int, SpecFile]]):
    """(version, structure)"""


def module_part(module: GraphModel, tensors: Tensors) -> dict[str, Any]:
    """A module as JSON; its tensors go into `tensors`, tied ones once."""
    first: dict[int, str] = {}
    saved = module.state_dict(keep_vars=True)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for name, value in named_tensors(module):
        if first.setdefault(id(value), name) == name:
            tensors[name] = stored(name, value)
    own, config = internals(module), vars(module).get("config")
    parts = {name: child for name, child in module.named_children() if isinstance(child, fx.GraphModule)}
    held = {name for name, _ in named_tensors(module)} | set(parts)
    return {
        "class": type(module).__name__,
        "graphs": [graph_json(graph, held) for graph in own.graphs()],
        "parts": {name: part_json(part) for name, part in parts.items()},
        "signature": signature_json(own.signature),
        "home": encoded(tuple(own.home)),
        "origin": encoded(tuple(own.origin)),
        "devices": sorted({str(value.device) for _, value in named_tensors(module)}),
        "tensors": {name: first[id(value)] for name, value in named_tensors(module)},
        "parameters": {name: value.requires_grad for name, value in parameters.items()},
        "volatile": [name for name, _ in named_tensors(module) if name not in saved],
        "computed": sorted(own.computed),
        "training": module.training,
        "blocks": list(own.block_paths),
        "padding": own.padding,
        "without": sorted(own.without),
        "checkpointing": own.checkpointing and encoded(tuple(own.checkpointing)),
        "config": config.to_json_string(use_diff=False) if hasattr(config, "model_type") else None,
    }


def module_of(written: ModuleFile, tensors: Tensors, device: str | torch.device | None) -> GraphModel:
    """Raises CheckpointError for what is no module; the code that it becomes is made of checked names alone."""
    home, origin = home_of("home", written.home), home_of("origin", written.origin)
    device = home.device if device is None else torch.device(device)
    try:
        device = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f'The program was on {device}: {error}. Read it with device="cpu".') from error
    devices = dict.fromkeys(written.devices, device)
    again = checkpointing_of(written.checkpointing)
    for path in (*written.tensors, *written.parts, *written.blocks, *(again.paths if again else ())):
        check_path(path)
    check_tensors(written, tensors)
    if not is_name(written.called):
        raise CheckpointError(f"The class of the module is called {written.called!r}, which is no identifier.")
    rebuilt = [graph_of(graph, {*written.tensors, *written.parts}, devices) for graph in written.graphs]
    placed = {first: tensors[first].to(device) for first in set(written.tensors.values())}
    for name, requires_grad in written.parameters.items():
        first = written.tensors[name]
        if not isinstance(placed[first], nn.Parameter):
            placed[first] = nn.Parameter(placed[first], requires_grad=requires_grad)
    held = {name: part_of(part, devices) for name, part in written.parts.items()}
    held |= {name: placed[first] for name, first in written.tensors.items()}
    module = build(
        signature_of(written.signature), rebuilt[0], rebuilt[1] if len(rebuilt) > 1 else None, held,
        set(written.volatile), Home(device, home.dtype), written.called, config_of(written.config),
        again, written.padding, frozenset(written.without),
    )  # fmt: skip
    own = internals(module)
    own.origin, own.computed = origin, frozenset(written.computed)
    if written.blocks:
        own.block_paths = written.blocks
        renew(module)
    return module.train(written.training)


def home_of(name: str, written: Any) -> Home:
    match field(name, written):
        case (torch.device() as device, torch.dtype() as dtype):
            return Home(device, dtype)
    raise CheckpointError(f"The field {name!r} is {written!r}, which is no device and dtype.")


def checkpointing_of(written: Any) -> Checkpointing | None:
    match field("checkpointing", written):
        case None:
            return None
        case (tuple() as paths, dict() as options) if all(isinstance(name, str) for name in options):
            return Checkpointing(paths, options)
    raise CheckpointError(f"The field 'checkpointing' is {written!r}, which is no paths and options.")


def check_tensors(written: ModuleFile, tensors: Tensors) -> None:
    """Every tensor that the module names is in the file."""
    if missing := set(written.tensors.values()) - set(tensors):
        raise CheckpointError(f"The field 'tensors' names {min(missing)}, which the file does not hold.")
    for name in ("parameters", "volatile"):
        if missing := set(getattr(written, name)) - set(written.tensors):
            raise CheckpointError(f"The field {name!r} names {min(missing)}, which is no tensor of the module.")


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
    return {"graph": graph_json(part.graph, inner), "parts": inner}


def part_of(written: PartFile, devices: Mapping[str, torch.device]) -> fx.GraphModule:
    root = nn.Module()
    for name, part in written.parts.items():
        check_path(name)
        attach(root, name, part_of(part, devices))
    return fx.GraphModule(root, graph_of(written.graph, written.parts, devices))


def signature_json(signature: Signature) -> dict[str, Any]:
    return {
        "inputs": {name: spec_text(spec) for name, spec in signature.inputs.items()},
        "constants": [[index, encoded(value)] for index, value in signature.constants.items()],
        "parameters": [[p.name, p.kind.name, *default_json(p.default)] for p in signature.parameters],
        "output": spec_text(signature.output),
        "guards": list(signature.guards),
    }


def default_json(default: Any) -> list[Any]:
    """[] without one; None in place of an object that has no written form, which no captured argument is."""
    if default is inspect.Parameter.empty:
        return []
    try:
        return [encoded(default)]
    except CheckpointError:
        return [None]


def signature_of(written: SignatureFile) -> Signature:
    names = [name for name, *_ in written.parameters]
    for name, kind, *_ in written.parameters:
        if not is_name(name) or name in ("self", CALL, UNKNOWN) or names.count(name) > 1 or kind not in KINDS:
            raise CheckpointError(f"The signature has a parameter {name!r} ({kind}), which no function can have.")
    guards = guards_of(written.guards, written.inputs)
    if len(guards) < len(written.guards):
        raise CheckpointError(
            f"The conditions {sorted(set(written['guards']) - set(guards))} are none over input sizes."
        )
    return Signature(
        inputs={name: spec_of(text) for name, text in written.inputs.items()},
        constants={index: decoded(value) for index, value in written.constants},
        parameters=tuple(
            inspect.Parameter(
                name,
                getattr(inspect.Parameter, kind),
                default=decoded(default[0]) if default else inspect.Parameter.empty,
            )
            for name, kind, *default in written.parameters
        ),
        output=spec_of(written.output),
        guards=guards,
    )


def spec_text(spec: pytree.TreeSpec) -> str:
    try:
        text = pytree.treespec_dumps(spec)
    except (NotImplementedError, TypeError) as error:
        raise CheckpointError(
            f"The structure {spec} cannot be written: {error} Register its type with "
            "torch.utils._pytree.register_pytree_node and a serialized_type_name."
        ) from error
    spec_types(text)
    return text


def spec_of(text: str) -> pytree.TreeSpec:
    """Types of transformers are imported; others have to be known already."""
    types = spec_types(text)
    try:
        for name in types:
            if name.startswith("transformers."):
                importlib.import_module(name.rpartition(".")[0])
        return pytree.treespec_loads(text)
    except (ImportError, NotImplementedError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"The program takes or returns {', '.join(sorted(types))}: {error}. Install or import what defines "
            "these types before reading it."
        ) from error


def spec_types(text: str) -> set[str]:
    """The types in a structure. Raises CheckpointError for one that would import what its keys name: a defaultdict, or
    a member of an enumeration as a key."""

    def refuse(_: Any) -> None:
        raise CheckpointError(f"The structure {text} has an enumeration among its keys, which no file can hold.")

    def walk(spec: SpecFile) -> Iterator[str]:
        if spec.type == "collections.defaultdict":
            raise CheckpointError(f"The structure {text} has a defaultdict, which no file can hold: use a dict.")
        if spec.type is not None:
            yield spec.type
            if isinstance(spec.context, str):
                with suppress(ValueError):
                    json.loads(spec.context, object_hook=refuse)
        for child in spec.children_spec:
            yield from walk(child)

    return set(walk(read_as(StructureFile, text, f"The structure {text[:80]!r}").root[1]))


def config_of(text: str | None) -> Any:
    """The model's config. Warns, and gives None, where transformers is not there or does not know its type."""
    if text is None:
        return None
    values = read_as(ConfigFile, text, "The field 'config'").model_dump()
    try:
        from transformers import CONFIG_MAPPING

        return CONFIG_MAPPING[values["model_type"]].from_dict(values)
    except (ImportError, KeyError) as error:
        warnings.warn(
            f"The module is read without its config, of type {values.get('model_type')!r}: "
            + (f"{error}." if isinstance(error, ImportError) else "this version of transformers does not know it."),
            CaptureWarning,
            stacklevel=5,
        )
        return None
