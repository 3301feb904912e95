"""Pickling of captured modules: as the bytes of a safetensors file, with the module as JSON in its header."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ..base.errors import CheckpointError, SubgraphPeftError
from ..base.schema import read_as
from .internals import internals
from .module import GraphModel
from .module_file import ModuleFile, Tensors, module_of, module_part

HEADER = "subgraph_peft"


def module_bytes(module: GraphModel) -> bytes:
    tensors: Tensors = {}
    text = json.dumps(module_part(module, tensors))
    return save(tensors, {HEADER: text})


def module_from(data: bytes) -> GraphModel:
    """A module that was pickled. Where it has constants that equations give from adapters' tensors, it refuses to load
    a state dict: they would not be computed anew."""
    with reading(Path("this pickled module")):
        tensors = copies(data)
        module = module_of(read_as(ModuleFile, header(data), "its header"), tensors, None)

    computed = internals(module).computed

    def refuse(loaded: GraphModel, *_: Any) -> None:
        raise CheckpointError(
            f"This {type(loaded).__name__} was unpickled without the equations that compute {min(computed)} from its "
            "adapters. Load the state dict before pickling, or move the program: sp.write, sp.read."
        )

    if computed:
        module.register_load_state_dict_pre_hook(refuse)
    return module


def copies(data: bytes) -> Tensors:
    """Aligned in memory, as those of a model are: kernels round by alignment."""
    try:
        return {name: tensor.clone() for name, tensor in load(data).items()}
    except SafetensorError as error:
        raise CheckpointError(f"It is damaged: {error}.") from error


def header(data: bytes) -> str:
    """The metadata of a safetensors file in memory that was loaded: its header follows 8 bytes that hold its length."""
    text = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {}).get(HEADER)
    if text is None:
        raise CheckpointError("It was not written by this package.")
    return text


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of what is read name the file; those of our own code stay what they are."""
    try:
        yield
    except SubgraphPeftError as error:
        raise CheckpointError(f"{path}: {error}") from error


GraphModel.__reduce__ = lambda module: (module_from, (module_bytes(module),))  # its written form is made here
