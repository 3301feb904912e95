"""What a captured module holds: tensors and modules by qualified name, in a tree of blocks."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from ..base.errors import CaptureError
from ..graph.partition import Block
from .internals import Home


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every parameter and buffer by qualified name, tied names included."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def attach(module: nn.Module, path: str, held: torch.Tensor | nn.Module, persistent: bool = True) -> None:
    """Set `module.<path>`, making containers on the way. Raises CaptureError for a name that no child of an nn.Module
    can have, such as one of its methods'."""
    *parents, leaf = path.split(".")
    try:
        owner = container(module, parents)
        if isinstance(held, nn.Parameter):
            owner.register_parameter(leaf, held)
        elif isinstance(held, nn.Module):
            owner.add_module(leaf, held)
        else:
            owner.register_buffer(leaf, held, persistent=persistent)
    except KeyError as error:
        raise CaptureError(
            f"{path}: an nn.Module cannot hold what has this name ({error.args[0]}). Give the model's another name."
        ) from error


def container(module: nn.Module, path: Sequence[str]) -> nn.Module:
    """The module at a path; a Block is made where there is none."""
    for name in path:
        if not isinstance(getattr(module, name, None), nn.Module):
            module.add_module(name, Block())
        module = getattr(module, name)
    return module


def home_of(tensors: Mapping[str, torch.Tensor]) -> Home:
    """Device and dtype of the first floating-point parameter (else tensor)."""
    floating = [t for t in tensors.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    first = next((t for t in floating if isinstance(t, nn.Parameter)), floating[0] if floating else torch.empty(0))
    return Home(first.device, first.dtype)
