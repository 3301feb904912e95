"""Padding: the masks of a graph that tell tokens from padding, and the check of what is promised about them."""

from collections.abc import Collection
from typing import Literal

import torch
from torch import fx

from ...base.errors import CaptureError
from ..nodes import aten, sizes
from ..rewriter import Rewriter

MASK = "attention_mask"
Padding = Literal["right"]
BROKEN = "attention_mask is not padded on the right: every row has to be ones and then zeros"


def padding_masks(graph: fx.Graph) -> list[fx.Node]:
    """The inputs [batch, length] that tell tokens from padding."""
    named = (n for n in graph.find_nodes(op="placeholder") if n.name == MASK or n.name.endswith(f"_{MASK}"))
    return [node for node in named if len(sizes(node)) == 2 and not node.meta["val"].is_floating_point()]


def watch(graph: fx.Graph, names: Collection[str]) -> None:
    """Check these inputs before anything is computed. In place."""
    inputs = graph.find_nodes(op="placeholder")
    rewrite = Rewriter(graph)
    for node in inputs:
        if node.name in names:
            rewrite.add(check_right, (node,), like=node, before=inputs[-1].next, name="check_right")


def check_right(mask: torch.Tensor) -> None:
    """Raises CaptureError where a row of `mask` [batch, length] is not ones and then zeros.

    Compiled code cannot look at values before it goes on: there the device asserts it, and the error is a RuntimeError.
    """
    right = ((mask == 0) | (mask == 1)).all() & (mask[:, 1:] <= mask[:, :-1]).all()
    if torch.compiler.is_compiling():
        aten._assert_async.msg(right, BROKEN)
    elif not mask.is_meta and not right:
        raise CaptureError(
            f'{BROKEN}, as padding="right" promises. Pad on the right, or take the promise back: '
            "sp.promise(program, padding=None)."
        )
