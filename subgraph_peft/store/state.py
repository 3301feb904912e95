"""What a program adds to its base or changed in it, and how its base is told from others."""

import hashlib
from collections.abc import Mapping, Sequence

import torch

from ..base.hashes import sample
from ..compiler.rewrite import resolve_ties
from ..program.program import Program
from ..program.sites import find


def state(program: Program) -> dict[str, torch.Tensor]:
    """What the program adds to its base or changed in it, by qualified name."""
    own = dict(program.tensors())
    paths = [path for a in program.adapters for path, tensor in a.declared().items() if tensor.saved]
    return {name: own[name] for name in (*paths, *trained(program), *written(program))}


def buffers(program: Program) -> dict[str, torch.Tensor]:
    """Buffers of the state dict."""
    own = dict(program.module.named_buffers(remove_duplicate=False))
    return {name: own[name] for name in program.module.state_dict() if name in own}


def written(program: Program) -> list[str]:
    """Buffers that training has written, such as the statistics of batch norm."""
    base = dict(program.captured.module.named_buffers(remove_duplicate=False))
    return sorted(name for name, value in buffers(program).items() if not torch.equal(value.cpu(), base[name].cpu()))


def trained(program: Program) -> list[str]:
    """Parameters of the model itself that train."""
    base = dict(program.captured.module.named_parameters())
    return sorted(name for name, _ in program.parameters(trainable=True) if name in base)


def untied(program: Program) -> list[str]:
    """Weights that were tied until adapters rewrote them."""
    return sorted(site.name for adapter in program.adapters for site in adapter.sites if site.ties)


def untie(captured: Program, names: Sequence[str]) -> Program:
    return resolve_ties(captured, [site for site in find(captured) if site.name in names], "untie")


def fingerprint(program: Program, without: Sequence[str]) -> str:
    """Hash of the captured parameters: names, shapes, and samples of their values.

    without: parameters that the adapter's file replaces, such as a head that was drawn anew
    """
    hashed = hashlib.sha256()
    for name, value in sorted(program.captured.module.named_parameters(remove_duplicate=False)):
        hashed.update(f"{name}{list(value.shape)}".encode())
        if not value.is_meta and name not in without:
            hashed.update(sample(value))
    return hashed.hexdigest()


def set_buffers(program: Program, found: Mapping[str, torch.Tensor]) -> None:
    """Those in the file from there, the others as they were captured."""
    base = dict(program.captured.module.named_buffers(remove_duplicate=False))
    for name, value in buffers(program).items():
        value.copy_(found.get(name, base[name]))
