"""torch.compile as training uses it: one full graph, whose backward pass computes again what is cheap."""

from collections.abc import Callable
from typing import Any

import torch
from torch._functorch import config


def compiled(function: Callable, memory_budget: float = 1.0) -> Callable:
    """`function` under torch.compile(fullgraph=True); sizes that turn out to vary become symbols.

    What is pointwise is computed again in the backward pass where that saves memory, also what a matrix product then
    reads: on a Llama a quarter of the activations for 1 to 2 % of the time.

    memory_budget: share of the activations that may be kept; below 1 the compiler also computes products again,
                   cheapest first (0: all but the inputs)
    """
    run = torch.compile(function, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        with config.patch(ban_recompute_materialized_backward=False, activation_memory_budget=memory_budget):
            return run(*args, **kwargs)

    return call
