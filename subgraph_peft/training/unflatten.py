"""The program as a tree of modules that compute: what FSDP2 and checkpoint wrappers take, and the way back."""

import copy
from collections.abc import Sequence

import torch
from torch import fx, nn

from ..base.borrowed import get
from ..base.errors import CaptureError
from ..graph.partition import chosen, cut, within
from ..program.internals import internals
from ..program.module import GraphModel
from ..program.program import Program
from ..program.runners import renew


def unflatten(program: Program, where: str | Sequence[str] | None = None) -> GraphModel:
    """A module that computes what `program.module` does, in which every chosen module is one that is called.

    where:  patterns over module paths; by default the repeated layers (`model.layers.0`, …)

    It has the signature, the output type and the state dict of `program.module`. Its trained parameters are the
    program's own Parameter objects; frozen ones and buffers are objects of their own over the same memory. A block is
    the submodule at its path, so that `fully_shard(view.get_submodule(path))` and checkpoint wrappers apply; the paths
    are `view.block_paths`. Blocks are called by the module around them, with what it computed for them.

    Raises SelectorError where a pattern matches no module, CaptureError for a parameter that blocks share.
    """
    module = program.module
    blocks = chosen(program.graph, where)
    for graph in program.graphs():
        check_reads(module, graph, blocks)
    check_ties(module, blocks)
    memo: dict[int, torch.Tensor] = {}
    for _, tensor in program.tensors():
        trained = isinstance(tensor, nn.Parameter) and tensor.requires_grad
        frozen = nn.Parameter(tensor.detach(), False) if isinstance(tensor, nn.Parameter) else tensor.detach()
        memo.setdefault(id(tensor), tensor if trained else frozen)
    view = copy.deepcopy(module, memo)
    internals(view).block_paths = blocks
    renew(view)
    return view


def take(program: Program, view: nn.Module) -> Program:
    """Read what training changed in `view` into `program`, in place: adapters, trained parameters, buffers. Returns it.

    Shards of FSDP2 are gathered, which every process has to take part in. Nothing changes unless everything fits.

    Raises CaptureError for a module that is no view of this program.
    """
    from torch.distributed.tensor import DTensor

    base = dict(program.captured.module.named_parameters(remove_duplicate=False))
    tensors = [*view.named_parameters(remove_duplicate=False), *view.named_buffers(remove_duplicate=False)]
    prefix = get("torch.distributed.algorithms._checkpoint.checkpoint_wrapper:_CHECKPOINT_PREFIX")
    theirs = {name.replace(prefix, ""): tensor for name, tensor in tensors}
    changed: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, own in program.tensors():
        held = theirs.get(name)
        if held is None or (held.shape, held.dtype) != (own.shape, own.dtype):
            shown = "no such tensor" if held is None else f"{list(held.shape)} {held.dtype}"
            raise CaptureError(
                f"The module is no view of this program: {name} is {list(own.shape)} {own.dtype} in the program, and "
                f"{shown} in the module. take() wants what sp.unflatten(program) returned."
            )
        if held is not own and (name not in base or held.requires_grad or own.requires_grad):
            changed.append((own, held))
    for own, held in changed:
        full = held.full_tensor() if isinstance(held, DTensor) else held
        own.data = full.detach().to(program.home.device, copy=True)
    return program


def check_reads(module: GraphModel, graph: fx.Graph, blocks: Sequence[str]) -> None:
    """Raises CaptureError where a parameter of a block is read outside of it, where FSDP2 would show its shard."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for piece in cut(graph, blocks, "train"):
        for node in piece.graph.find_nodes(op="get_attr"):
            name = f"{piece.path}.{node.target}".lstrip(".")
            owner = innermost(name, blocks)
            if name in parameters and owner != piece.path:
                reader = next(iter(node.users)).name
                raise CaptureError(
                    f"{name} is a parameter of the block {owner} and is read outside of it, by {reader} in "
                    f"{piece.path or 'the model'}. Leave {owner} out, or choose a module around both."
                )


def check_ties(module: GraphModel, blocks: Sequence[str]) -> None:
    """Raises CaptureError where one parameter has names in several blocks, of which FSDP2 would make several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    for first, *others in names.values():
        for other in others:
            if innermost(first, blocks) != innermost(other, blocks):
                owner = innermost(first, blocks) or innermost(other, blocks)
                raise CaptureError(
                    f"{first} and {other} are one parameter, which cannot be in several blocks. Leave {owner} out, or "
                    "choose a module around both."
                )


def innermost(name: str, blocks: Sequence[str]) -> str:
    """The block that holds a tensor, "" for the model itself."""
    return max((block for block in blocks if within(name, block)), key=len, default="")
