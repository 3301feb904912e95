"""Translations of recurrent layers: one ONNX operator a layer, whatever the length."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from onnxscript import opset18 as op

# operator -> its name in ONNX, torch's gates in ONNX's order, further attributes
OPERATORS: dict[str, tuple[str, tuple[int, ...], dict[str, Any]]] = {
    "lstm": ("LSTM", (0, 3, 1, 2), {}),
    "gru": ("GRU", (1, 0, 2), {"linear_before_reset": 1}),
    "rnn_tanh": ("RNN", (0,), {"activations": "Tanh"}),
    "rnn_relu": ("RNN", (0,), {"activations": "Relu"}),
}


def layers(
    name: str, x: Any, states: Sequence[Any], params: Sequence[Any], biases: bool, count: int, both: bool, swap: bool
) -> tuple[Any, ...]:
    """(outputs, last states …) of `count` layers, in `both` directions, batch first where `swap`."""
    operator, order, attributes = OPERATORS[name]
    directions, width = 2 if both else 1, states[0].shape[2]
    if any(state.shape[2] != width for state in states):
        raise ValueError("an LSTM with a projection (proj_size) has no ONNX operator")
    if "activations" in attributes:
        attributes = {"activations": [attributes["activations"]] * directions}
    attributes = {**attributes, "direction": "bidirectional" if both else "forward", "hidden_size": width}

    def gates(weight: Any, *columns: int) -> Any:
        """[gates · width, …] to [1, gates · width, …], in ONNX's order."""
        blocks = op.Reshape(weight, op.Constant(value_ints=[len(order), width, *columns]))
        ordered = op.Gather(blocks, op.Constant(value_ints=list(order)), axis=0)
        return op.Reshape(ordered, op.Constant(value_ints=[1, len(order) * width, *columns]))

    x = op.Transpose(x, perm=[1, 0, 2]) if swap else x
    each, last = 4 if biases else 2, [[] for _ in states]
    for layer in range(count):
        at = layer * directions
        own = [params[(at + d) * each : (at + d + 1) * each] for d in range(directions)]
        weights = [op.Concat(*[gates(p[i], -1) for p in own], axis=0) for i in (0, 1)]
        bias = op.Concat(*[op.Concat(gates(p[2]), gates(p[3]), axis=1) for p in own], axis=0) if biases else None
        rows = [op.Constant(value_ints=[n]) for n in (at, at + directions, 0)]
        start = [op.Slice(state, *rows) for state in states]
        y, *ends = getattr(op, operator)(x, *weights, bias, None, *start, **attributes)
        x = op.Reshape(op.Transpose(y, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        for found, end in zip(last, ends, strict=True):
            found.append(end)
    return op.Transpose(x, perm=[1, 0, 2]) if swap else x, *(op.Concat(*found, axis=0) for found in last)


def lstm(
    input: Any, hx: Sequence[Any], params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float,
    train: bool, bidirectional: bool, batch_first: bool,
) -> Any:  # fmt: skip
    return layers("lstm", input, hx, params, has_biases, num_layers, bidirectional, batch_first)


def one_state(name: str) -> Callable:
    def translation(
        input: Any, hx: Any, params: Sequence[Any], has_biases: bool, num_layers: int, dropout: float, train: bool,
        bidirectional: bool, batch_first: bool,
    ) -> Any:  # fmt: skip
        return layers(name, input, [hx], params, has_biases, num_layers, bidirectional, batch_first)

    return translation


def recurrent() -> dict[Any, Callable]:
    """Operator -> its translation. The operators are those that stand for torch's in a trace."""
    own = {name: lstm if name == "lstm" else one_state(name) for name in OPERATORS}
    return {getattr(torch.ops.subgraph_peft, name).default: translation for name, translation in own.items()}
