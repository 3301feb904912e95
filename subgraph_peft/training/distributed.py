"""Data parallel training without a wrapper: what trains starts alike and has its gradients averaged once a step.

The trained tensors are few and small, so that one all-reduce of each dtype, after the last backward pass of a step,
costs less than hooks on every parameter would.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import fx

from ..base.borrowed import OpOverload
from ..base.errors import TrainError
from ..base.hashes import sampled
from ..base.processes import host, world
from ..graph.nodes import viewed, written_arguments
from ..graph.operators import argument, schema
from ..program.internals import internals
from ..program.module import GraphModel
from ..program.program import Program


@torch.no_grad()
def start(program: Program) -> None:
    """Give every process the adapters, trained parameters and buffers of rank 0. The base is only compared.

    Raises TrainError, in all processes, where the programs differ in anything but values that are given.
    """
    if world() == 1:
        return
    base = {name for name, _ in program.captured.module.named_parameters()}
    given = {
        name: tensor
        for name, tensor in program.tensors()
        if name not in base or not isinstance(tensor, torch.nn.Parameter) or tensor.requires_grad
    }
    told: list[Mapping[str, str]] = [{}] * world()
    dist.all_gather_object(told, {n: identity(t, n not in given) for n, t in program.tensors()})
    for process, theirs in enumerate(told):
        if differing := [name for name in {**told[0], **theirs} if told[0].get(name) != theirs.get(name)]:
            raise TrainError(
                f"{differing[0]} is not the same in processes 0 and {process} ({len(differing)} tensors differ): load "
                "the same weights in all of them, or draw them from the same seed (torch.manual_seed)."
            )
    for tensors in by_kind(given.values()).values():
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        flat = flat if flat.is_cuda else flat.to(host())
        dist.broadcast(flat, 0)
        spread(flat, tensors)


def identity(tensor: torch.Tensor, values: bool) -> str:
    """Shape and dtype, and a hash of evenly spread values."""
    text = f"{list(tensor.shape)} {tensor.dtype}"
    return f"{text} {sampled(tensor)}" if values else text


@torch.no_grad()
def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Replace every gradient by its mean over the processes, in place.

    parameters: the same ones in the same order everywhere. A process in which one of them has no gradient counts as
                zero; where none has one, it stays without. A device is waited for only in such a process
    """
    if world() == 1:
        return
    for own in by_kind(parameters).values():
        missing = [index for index, parameter in enumerate(own) if parameter.grad is None]
        flags = own[0].new_ones(len(own))
        for index in missing:
            flags[index], own[index].grad = 0, torch.zeros_like(own[index])
        flat = torch.cat([*(parameter.grad.flatten() for parameter in own), flags])
        dist.all_reduce(flat)
        flat /= world()
        spread(flat, [parameter.grad for parameter in own])
        for index, met in zip(missing, flat[-len(own) :][missing].tolist() if missing else (), strict=True):
            if not met:
                own[index].grad = None


@torch.no_grad()
def average_statistics(module: GraphModel, names: Sequence[str]) -> None:
    """Replace buffers by their mean over the processes, in place."""
    if world() > 1 and names:
        for own in by_kind(map(module.get_buffer, names)).values():
            flat = torch.cat([tensor.flatten() for tensor in own])
            dist.all_reduce(flat)
            spread(flat / world(), own)


def statistics(module: GraphModel) -> list[str]:
    """Floating-point buffers that a training step writes, such as the running mean of batch norm."""
    found: dict[str, None] = {}
    for node in internals(module).graph.nodes:
        norm = isinstance(node.target, OpOverload) and "running_mean" in schema(node.target)
        read = [argument(node, name) for name in ("running_mean", "running_var")] if norm else []
        for source in map(viewed, (*(value for value in read if isinstance(value, fx.Node)), *written_arguments(node))):
            if source.op == "get_attr":
                found[str(source.target)] = None
    buffers = dict(module.named_buffers())
    return [name for name in found if name in buffers and buffers[name].is_floating_point()]


def by_kind(tensors: Iterable[torch.Tensor]) -> dict[tuple[torch.dtype, torch.device], list[torch.Tensor]]:
    """Tensors that fit into one flat buffer, in their order."""
    kinds: dict[tuple[torch.dtype, torch.device], list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    return kinds


def spread(flat: torch.Tensor, tensors: Sequence[torch.Tensor]) -> None:
    """Write a flat buffer back to the tensors that it was made of; what is left at its end is not theirs."""
    at = 0
    for tensor in tensors:
        tensor.copy_(flat[at : at + tensor.numel()].view_as(tensor))
        at += tensor.numel()
