"""Recurrent layers as one node of any length: torch.export runs their steps to see shapes, which fixes the length."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from ..base.borrowed import schema_of
from ..graph.nodes import aten

LAYERS = {name: getattr(aten, name).input for name in ("lstm", "gru", "rnn_tanh", "rnn_relu")}
library = torch.library.Library("subgraph_peft", "DEF")


class Whole(TorchFunctionMode):
    """While it is entered, recurrent layers are called through operators of our own, that know their shapes."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        over_steps = len(args) > 3 and isinstance(args[3], bool)  # not over a packed sequence
        return (OWN.get(function, function) if over_steps else function)(*args, **kwargs or {})


def restore(root: fx.GraphModule) -> None:
    """Torch's operators in place of our own, in the bodies of operators too."""
    for part in root.modules():
        found = [node for node in part.graph.nodes if node.target in TORCH] if isinstance(part, fx.GraphModule) else []
        for node in found:
            node.target = TORCH[node.target]
        if found and part is not root:
            part.recompile()


def shapes(
    input: torch.Tensor,
    hx: torch.Tensor | Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    """Empty results: outputs [length, batch, directions · width] (the first two swapped if `batch_first`), then the
    last states, [layers · directions, batch, width] each."""
    states = [hx] if isinstance(hx, torch.Tensor) else hx
    length, batch = input.shape[:2][:: -1 if batch_first else 1]
    output = input.new_empty(length, batch, states[0].shape[2] * (2 if bidirectional else 1))
    return output.transpose(0, 1) if batch_first else output, *(state.new_empty(state.shape) for state in states)


for name, operator in LAYERS.items():
    library.define(name + str(schema_of(operator)).removeprefix(f"aten::{name}.input"))
    library.impl(name, operator, "CompositeExplicitAutograd")
    torch.library.register_fake(f"subgraph_peft::{name}", shapes, lib=library)

TORCH = {getattr(torch.ops.subgraph_peft, name).default: operator for name, operator in LAYERS.items()}
OWN = {call: own for own, operator in TORCH.items() for call in (operator, getattr(torch, own.overloadpacket.__name__))}
