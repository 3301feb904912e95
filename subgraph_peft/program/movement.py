"""Movement of a captured module between devices and dtypes: the literals of its graphs follow its tensors."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..base.errors import CaptureError, CaptureWarning
from ..graph import edit
from ..graph.edit import Moves
from .internals import Home, internals
from .runners import renew
from .tree import attach, named_tensors


def move(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], apply: Callable[[], Any]) -> None:
    """Do `apply`, which applies `fn` to every tensor; tied tensors stay tied. Raises CaptureError, before anything
    moves, for a dtype that would narrow a value."""
    own, moves = internals(module), moves_of(module, fn)
    ties: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        ties.setdefault(id(parameter), []).append(name)
    lost = unsaved(module) if own.home.device.type == "meta" else []
    apply()
    for first, *others in ties.values():
        for other in others:
            attach(module, other, module.get_parameter(first))
    follow(module, moves)
    if lost and own.home.device.type != "meta":
        warnings.warn(
            f"{type(module).__name__} left the meta device, where tensors have no values, and its state dict does "
            f"not hold {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}. Set them from a loaded model.",
            CaptureWarning,
            stacklevel=5,
        )


def follow(module: nn.Module, moves: Moves) -> None:
    """Let the literals of the graphs follow tensors that have moved."""
    own = internals(module)
    own.home = Home(*(moves[literal] for literal in own.home))
    if moves := {literal: moved for literal, moved in moves.items() if moved != literal}:
        for graph in own.graphs():
            edit.move(graph, moves)
        for body in (part for part in module.modules() if isinstance(part, fx.GraphModule)):
            edit.move(body.graph, moves)
            body.recompile()
        renew(module)
        if own.recompute and own.home.device.type != "meta" and any(isinstance(m, torch.dtype) for m in moves):
            own.recompute(module)


def moves_of(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> Moves:
    """What `fn` makes of every device, and of every floating-point dtype, that the module holds."""
    home = internals(module).home
    moves: dict[Any, Any] = {}
    probed: set[Home] = set()
    for name, held in [*named_tensors(module), ("", torch.empty(0, device=home.device, dtype=home.dtype))]:
        if (kind := Home(held.device, held.dtype)) in probed:
            continue
        probed.add(kind)
        moved = fn(torch.empty(0, device=held.device, dtype=held.dtype))
        moves[held.device] = moved.device
        if held.is_floating_point():
            moves[held.dtype] = moved.dtype
            if torch.promote_types(moved.dtype, held.dtype) != moved.dtype:
                raise CaptureError(
                    f"{name or type(module).__name__} holds {held.dtype} values, which {moved.dtype} would narrow. "
                    f"Convert the model first (model.to({moved.dtype})), capture it again, and pass "
                    f"dtype={moved.dtype} to rewrite for its adapters. A move to a device alone is .to(device)."
                )
    return moves


def unsaved(module: nn.Module) -> list[str]:
    """Buffers that the state dict does not hold and no equation computes."""
    held = {*module.state_dict(keep_vars=True), *internals(module).computed}
    return [name for name, _ in module.named_buffers(remove_duplicate=False) if name not in held]
