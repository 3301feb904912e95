"""Training with the frozen base spread over the GPUs (FSDP2), and with all that trains whole on each of them."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from ..base.errors import ConfigError, SelectorError
from ..base.processes import world
from ..graph.partition import outermost
from ..program.internals import internals
from ..program.module import GraphModel
from ..program.movement import follow
from ..program.program import Program
from ..program.tree import container
from .schedule import scheduled
from .unflatten import unflatten


@contextmanager
def sharded(program: Program, device: torch.device) -> Iterator[GraphModel]:
    """A view that trains on `device` what `program` trains, and holds a share of its frozen parameters there.

    Its blocks, the repeated layers, gather their parameters when they compute. What training changes (trained
    parameters, buffers) is the program's own tensors, on `device` until the context ends: optimiser, clipping and
    checkpoints work on the program as if nothing were sharded. All else of the program stays where it is, and its
    module is not to be run meanwhile.

    Raises ConfigError without processes, for a model without repeated layers, and for a schedule that writes what the
    graph holds as constants; CaptureError for parameters that layers share.
    """
    check_shardable(program)
    home = program.home
    try:
        view = unflatten(program)
    except SelectorError as error:
        raise ConfigError(f"shard spreads the repeated layers of a model, and this one has none: {error}") from error
    own = own_tensors(program)
    try:
        for name, tensor in own.items():
            tensor.data = tensor.data.to(device)
            put(view, name, tensor)
        for name in program.constants:  # some are as large as their weight
            put(view, name, nn.Parameter(view.get_buffer(name), False))
        follow(view, {home.device: device, home.dtype: home.dtype})
        scalars = {parameter for parameter in view.parameters() if not parameter.requires_grad and not parameter.ndim}
        for parameter in scalars:
            parameter.data = parameter.data.to(device)
        whole = {tensor for tensor in own.values() if isinstance(tensor, nn.Parameter)} | scalars
        mesh = init_device_mesh(device.type, (world(),))
        for path in outermost(internals(view).block_paths):
            fully_shard(view.get_submodule(path), mesh=mesh, ignored_params=whole)
        yield fully_shard(view, mesh=mesh, ignored_params=whole)
    finally:
        for tensor in own.values():
            tensor.data = tensor.data.to(home.device)


def check_shardable(program: Program) -> None:
    if not dist.is_initialized():
        raise ConfigError(
            "shard spreads the base over processes, and there is one without a launcher: start the run with "
            "torchrun --nproc_per_node=GPUS or accelerate launch."
        )
    for adapter in program.adapters:
        for layer in scheduled(adapter):
            if program.constants and any(not tensor.trainable for tensor in adapter.declared().values()):
                raise ConfigError(
                    f"{adapter.name}: the schedule of {layer.name} reads whole weights and changes what the graph "
                    "holds as constants, of which a process has a share only. Train it without shard."
                )


def own_tensors(program: Program) -> dict[str, torch.Tensor]:
    """What training reads whole or writes, by name: trained parameters, tensors under a schedule, buffers."""
    written = {path for adapter in program.adapters if scheduled(adapter) for path in adapter.declared()}
    return {
        name: tensor
        for name, tensor in program.tensors()
        if name not in program.constants
        and (not isinstance(tensor, nn.Parameter) or tensor.requires_grad or name in written)
    }


def put(view: GraphModel, name: str, tensor: torch.Tensor) -> None:
    """Set a parameter or buffer, which may turn from the one into the other."""
    path, _, leaf = name.rpartition(".")
    module = container(view, path.split(".") if path else ())
    setattr(module, leaf, tensor)


def held_bytes(module: nn.Module) -> int:
    """Bytes that this process holds of what does not train, shards counted as such."""
    frozen = (tensor for tensor in (*module.parameters(), *module.buffers()) if not tensor.requires_grad)
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in frozen)
    return sum(tensor.numel() * tensor.element_size() for tensor in local)
