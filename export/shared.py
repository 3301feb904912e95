"""An eager model over a program's tensors: weights are shared, not copied, and the model itself stays as it is."""

import copy

import torch
from torch import nn

from subgraph_peft.base.borrowed import uncompiled
from subgraph_peft.base.errors import ExportError
from subgraph_peft.program.program import Program
from subgraph_peft.store.merged_folder import set_parameter


def over(program: Program, model: nn.Module) -> nn.Module:
    """A copy of `model`, in eval mode, whose parameters and buffers are those of `program`, captured from it.

    Raises ExportError for a program that still has adapters, and for another model than the captured one.
    """
    if program.adapters:
        names = ", ".join(adapter.name for adapter in program.adapters)
        raise ExportError(
            f"The program still has adapters ({names}): fold it first, sp.fold(program). Those that do not fold, such "
            "as prefixes, prompts and bottlenecks, have no place in a model that generates from a cache."
        )
    program.need_values("export", ExportError)
    model = uncompiled(model)
    own = dict(program.tensors())
    theirs = dict(model.named_parameters(remove_duplicate=False))
    for name, value in theirs.items():
        if name not in own or own[name].shape != value.shape:
            raise ExportError(
                f"The program ({program.source}) has no {name} {list(value.shape)}: give the model it comes from."
            )
    tensors = {**theirs, **dict(model.named_buffers(remove_duplicate=False))}
    twin = copy.deepcopy(model, {id(tensor): own[name] for name, tensor in tensors.items() if name in own})
    for name in untied(theirs, own):
        set_parameter(twin, name, own[name])
    if hasattr(twin, "config"):
        twin.config.dtype = program.home.dtype
    return twin.eval()


def untied(theirs: dict[str, nn.Parameter], own: dict[str, torch.Tensor]) -> list[str]:
    """Names of what is one tensor in the model and, in the program, another than under its last name."""
    last = {id(value): name for name, value in theirs.items()}
    return [name for name, value in theirs.items() if own[name] is not own[last[id(value)]]]
