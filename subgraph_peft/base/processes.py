"""The processes that torchrun or accelerate launch started: how they meet, who writes, and who tells of an error.

Each has a GPU of its own (the one of its LOCAL_RANK), or the CPU. Without a launcher there is one process, of rank 0.
"""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from .errors import ConfigError, SubgraphPeftError

T = TypeVar("T")
FAILED = "subgraph_peft/failed"  # a key of the store that the launcher keeps


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def launched() -> bool:
    """Whether a launcher started this process."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()


def join() -> bool:
    """Meet the other processes, if a launcher started this one and it has not met them. Returns whether it has now.

    Tensors on a GPU go through NCCL, those on the CPU through gloo. Raises ConfigError for a process without a GPU.
    """
    if dist.is_initialized() or not launched():
        return False
    local, device = int(os.environ["LOCAL_RANK"]), None
    if torch.cuda.is_available():
        if local >= (count := torch.cuda.device_count()):
            raise ConfigError(
                f"Process {local} of this machine has no GPU: torch finds {count}. Start at most {count} "
                'processes (--nproc_per_node), or set CUDA_VISIBLE_DEVICES="" to train on the CPU.'
            )
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl" if device else "gloo", device_id=device)
    return True


def host() -> torch.device:
    """Where what is on no GPU is exchanged: the CPU, so that no GPU is waited for, if the group can do that."""
    return torch.device("cpu" if "cpu:" in dist.get_backend_config() else "cuda")


def agreed(value: int) -> int:
    """The largest of the processes' values."""
    if world() == 1:
        return value
    held = torch.tensor(value, device=host())
    dist.all_reduce(held, dist.ReduceOp.MAX)
    return int(held)


def on_first(action: Callable[[], T]) -> T:
    """What `action` gives, or the error of this package that it raises, for every process; only rank 0 calls it.

    The others wait. What it gives is pickled.
    """
    if world() == 1:
        return action()
    told: list[Any] = [None, None]
    if rank() == 0:
        try:
            told[0] = action()
        except SubgraphPeftError as error:
            told[1] = error
    dist.broadcast_object_list(told, 0)
    if told[1] is not None:
        raise told[1]
    return told[0]


@contextmanager
def processes() -> Iterator[bool]:
    """The block as one of the launched processes; gives whether it is the one that prints.

    An error goes through in the first process that fails. The others, which may fail only because that one is gone,
    exit with its code and without a word.
    """
    made = join()
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])) if made else None
    with warnings.catch_warnings():
        if rank():
            warnings.simplefilter("ignore")
        try:
            yield rank() == 0
            if made:
                dist.barrier()
                dist.destroy_process_group()
        except (Exception, KeyboardInterrupt) as error:
            if store is not None and not is_first(store):
                raise SystemExit(130 if isinstance(error, KeyboardInterrupt) else 1) from None
            raise


def is_first(store: dist.Store) -> bool:
    """Whether no other process has told of an error. Where the store is gone, it went with the one that has."""
    try:
        return store.add(f"{FAILED}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1
    except RuntimeError:
        return False
