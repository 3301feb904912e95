"""CUDA graphs: work that is recorded once and then launched as a whole."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..base.borrowed import clear_workspaces, pytree

Batch = Mapping[str, Any]


class Recorded:
    """A function of tensors as a CUDA graph: a call copies its inputs into place, launches, and copies the result out.

    The function reads and writes tensors that stay where they are, and looks at no value on the way. Random numbers go
    on from call to call as without a recording. The workspaces of its matrix products are in its own memory, since
    others, such as torch.compile's recordings, free those that are not.

    pool: memory that several recordings share, which must not run at the same time
    """

    def __init__(self, function: Callable, inputs: Batch, stream: torch.cuda.Stream, pool: Any):
        self.inputs = pytree.tree_map_only(torch.Tensor, torch.clone, dict(inputs))
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        clear_workspaces()
        torch.cuda.empty_cache()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.result = function(**self.inputs)
        clear_workspaces()

    def __call__(self, inputs: Batch) -> torch.Tensor | None:
        for name, value in inputs.items():
            for held, new in zip(pytree.tree_leaves(self.inputs[name]), pytree.tree_leaves(value), strict=True):
                if isinstance(new, torch.Tensor):
                    held.copy_(new, non_blocking=True)
        self.graph.replay()
        return None if self.result is None else self.result.clone()


def signature(inputs: Batch) -> tuple:
    """What calls have to have in common to share a recording."""
    leaves, structure = pytree.tree_flatten(dict(sorted(inputs.items())))
    kinds = ((tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
    return structure, *kinds
