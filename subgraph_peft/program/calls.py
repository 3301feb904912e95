"""One call of a captured module: its inputs checked, given to the runner of its mode, outputs in the model's type."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..base.borrowed import guard_code
from ..base.errors import CaptureError, TrainError
from ..graph.guards import compile_guards, guards_of, refusal
from .internals import internals
from .runners import make_runner


def call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    """The module's outputs on inputs by argument name.

    An input that was captured may be left out; outputs that need it are then None (a loss without labels).
    """
    own, flat = internals(module), checked(module, inputs)
    missing = frozenset(name for name, value in zip(own.signature.input_names(), flat, strict=True) if value is None)
    if torch.compiler.is_compiling():
        module._subgraph_prepare(*missing)  # before `runners` is read, which a trace reads once
    elif (module.training, missing) not in own.runners:
        make_runner(module, (module.training, missing))
    return own.signature.unflatten(own.runners[module.training, missing](module, *flat))


def checked(module: nn.Module, inputs: Mapping[str, Any]) -> list[Any]:
    """The leaves of inputs that the graph can take, None where one is missing."""
    own = internals(module)
    flat = own.signature.flatten(inputs)
    if (broken := own.broken_guard(inputs)) >= 0:
        raise refusal(own.signature.guards[broken])
    if own.home.device.type == "meta" and any(p.is_meta for p in module.parameters()):  # torch.func replaces them
        check_meta(module, flat)
    return flat


def check_meta(module: nn.Module, flat: list[Any]) -> None:
    """On the meta device shapes can be had, of inputs there, and no training."""
    if any(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in flat):
        raise CaptureError("The module is on the meta device and has no weights: capture the loaded model.")
    if module.training and torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        raise TrainError("A module on the meta device has no weights to train; capture the loaded model.")


def add_guards(module: nn.Module, exported: torch.export.ExportedProgram) -> None:
    """Check the conditions of another trace of the model too."""
    own = internals(module)
    added = guards_of(guard_code(exported), own.signature.inputs)
    guards = tuple(dict.fromkeys((*own.signature.guards, *added)))
    own.signature = replace(own.signature, guards=guards)
    own.broken_guard = compile_guards(guards)
