"""Promises about inputs, by which attention goes to a faster kernel: every call checks them.

Made with `Program.promise`, or with the `padding` of `capture`.
"""

import copy
import warnings
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import fx

from .entry import MASK, sizes
from .errors import CaptureError, CaptureWarning
from .graphs import aten

if TYPE_CHECKING:
    from .program import Program

Padding = Literal["right"]
BROKEN = "attention_mask is not padded on the right: every row has to be ones and then zeros"


def promise(program: "Program", padding: Padding | None) -> "Program":
    """See `Program.promise`."""
    from .kernels import kernels

    if padding not in (None, "right"):
        raise CaptureError(f'padding is "right" or None, not {padding!r}.')
    if padding == program.module.padding:
        return program
    if padding and not padding_masks(program.graph):
        names = ", ".join(node.name for node in program.graph.find_nodes(op="placeholder"))
        raise CaptureError(f"{program.source} has no attention_mask [batch, length] to promise anything of ({names}).")
    module = copy.deepcopy(program.module, {id(tensor): tensor for _, tensor in program.module.tensors()})
    module.padding = padding
    module.renew()
    promised = replace(program, module=module)
    if padding and not any(call.promise for call in kernels(promised)):
        warnings.warn(
            f'padding="{padding}" changes no attention of {program.source}; sp.kernels(program) says why.',
            CaptureWarning,
            stacklevel=4,
        )
    return promised


def padding_masks(graph: fx.Graph) -> list[fx.Node]:
    """The inputs [batch, length] that tell tokens from padding."""
    named = (n for n in graph.find_nodes(op="placeholder") if n.name == MASK or n.name.endswith(f"_{MASK}"))
    return [node for node in named if len(sizes(node)) == 2 and not node.meta["val"].is_floating_point()]


def watch(graph: fx.Graph, names: Collection[str]) -> None:
    """Check these inputs before anything is computed. In place."""
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(inputs[-1].next if inputs else None):
        for node in inputs:
            if node.name in names:
                graph.call_function(check_right, (node,))


def check_right(mask: torch.Tensor) -> None:
    """Raises CaptureError where a row of `mask` [batch, length] is not ones and then zeros.

    Compiled code cannot look at values before it goes on: there the device asserts it, and the error is a RuntimeError.
    """
    right = ((mask == 0) | (mask == 1)).all() & (mask[:, 1:] <= mask[:, :-1]).all()
    if torch.compiler.is_compiling():
        aten._assert_async.msg(right, BROKEN)
    elif not mask.is_meta and not right:
        raise CaptureError(
            f'{BROKEN}, as padding="right" promises. Pad on the right, or take the promise back: program.promise(None).'
        )
