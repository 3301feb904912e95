"""Pickling of captured modules: as the bytes of a safetensors file, with the module as JSON in its header."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from ..base.errors import CheckpointError, SubgraphPeftError
from .internals import internals
from .module import GraphModel
from .module_file import Tensors, module_of, module_part

HEADER = "subgraph_peft"


def module_bytes(module: GraphModel) -> bytes:
    tensors: Tensors = {}
    text = json.dumps(module_part(module, tensors))
    return save(tensors, {HEADER: text})


def module_from(data: bytes) -> GraphModel:
    """A module that was pickled. Where it has constants that equations give from adapters' tensors, it refuses to load
    a state dict: they would not be computed anew."""
    with reading(Path("this pickled module")):
        module = module_of(json.loads(header(data)), copies(data), None)

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
    return {name: tensor.clone() for name, tensor in load(data).items()}


def header(data: bytes) -> str:
    """The metadata of a safetensors file in memory: its header follows 8 bytes that hold the header's length."""
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"][HEADER]


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors name the file."""
    try:
        yield
    except (SubgraphPeftError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        what = ": " if isinstance(error, SubgraphPeftError) else f" is damaged: {type(error).__name__}: "
        raise CheckpointError(f"{path}{what}{error}") from error


GraphModel.__reduce__ = lambda module: (module_from, (module_bytes(module),))  # its written form is made here
