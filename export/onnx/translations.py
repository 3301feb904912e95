"""Translations of operators that torch.onnx has none for, or a wrong one."""

from collections.abc import Callable, Sequence
from typing import Any

from onnxscript import opset18 as op

from subgraph_peft.graph.nodes import aten
from subgraph_peft.graph.operators import TABLE, Kind, found

from .recurrent import recurrent

INT64, LARGEST = 7, 2**63 - 1


def grouped_mm(self: Any, mat2: Any, offs: Any, bias: Any = None, out_dtype: Any = None) -> Any:
    """Rows [n, in] sorted by group, weights [groups, in, out], ends [groups] (the row after each group's last) to
    [n, out]: each group's rows times its own weight."""
    if bias is not None or out_dtype is not None:
        raise ValueError("grouped_mm with a bias or another dtype has no translation")
    ends, axis = op.Cast(offs, to=7), op.Constant(value_ints=[0])
    products, start = [], axis
    for group in range(mat2.shape[0]):
        end = op.Gather(ends, op.Constant(value_ints=[group]))
        weight = op.Gather(mat2, op.Constant(value_int=group))
        products.append(op.MatMul(op.Slice(self, start, end, axis), weight))
        start = end
    return op.Concat(*products, axis=0)


def embedding_bag(
    weight: Any, indices: Any, offsets: Any, scale_grad_by_freq: bool = False, mode: int = 0, sparse: bool = False,
    per_sample_weights: Any = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Any:  # fmt: skip
    """Rows of `weight` at `indices` [n], those from one offset to the next put together: their sum (mode 0), mean or
    maximum. torch's own translation loops over the bags, and crashes onnxruntime where it takes the mean."""
    first, last = op.Constant(value_ints=[0]), op.Constant(value_ints=[-1])
    indices, starts = op.Cast(indices, to=INT64), op.Cast(offsets, to=INT64)
    if include_last_offset:
        starts = op.Slice(starts, first, last)
    count = op.Shape(indices)
    ends = op.Concat(op.Slice(starts, op.Constant(value_ints=[1]), op.Constant(value_ints=[LARGEST])), count, axis=0)
    at = op.Range(op.Constant(value_int=0), op.Squeeze(count), op.Constant(value_int=1))
    column = op.Constant(value_ints=[1])
    inside = op.And(
        op.GreaterOrEqual(at, op.Unsqueeze(starts, column)), op.Less(at, op.Unsqueeze(ends, column))
    )  # [bags, n]
    if padding_idx is not None and padding_idx >= 0:
        inside = op.And(inside, op.Not(op.Equal(indices, op.Constant(value_int=padding_idx))))
    rows, member = op.Gather(weight, indices), op.CastLike(inside, weight)
    size = op.ReduceSum(member, column, keepdims=1)
    if mode == 2:
        lowest = op.CastLike(op.Constant(value_float=float("-inf")), weight)
        each = op.Where(op.Unsqueeze(inside, op.Constant(value_ints=[2])), op.Unsqueeze(rows, first), lowest)
        result = op.ReduceMax(each, column, keepdims=0)
        zero = op.CastLike(op.Constant(value_float=0.0), weight)
        return op.Where(op.Greater(size, zero), result, zero), first, first, first
    scaled = member if per_sample_weights is None else op.Mul(member, per_sample_weights)
    result = op.MatMul(scaled, rows)
    if mode == 1:
        result = op.Div(result, op.Max(size, op.CastLike(op.Constant(value_float=1.0), weight)))
    return result, first, first, first


def conv3d(
    input: Any, weight: Any, bias: Any = None, stride: Sequence[int] = (1, 1, 1), padding: Sequence[int] = (0, 0, 0),
    dilation: Sequence[int] = (1, 1, 1), groups: int = 1,
) -> Any:  # fmt: skip
    """torch's own translation gives a convolution without a bias one of a wrong shape."""
    inputs = (input, weight) if bias is None else (input, weight, bias)
    spatial = {"strides": list(stride), "dilations": list(dilation), "pads": [*padding, *padding]}
    return op.Conv(*inputs, group=groups, **spatial)


def translations() -> dict[Any, Callable]:
    """Operator -> its translation, for `torch.onnx.export(custom_translation_table=…)`."""
    table: dict[Any, Callable] = {
        **dict.fromkeys(found(*TABLE[Kind.GROUPED].split()), grouped_mm),
        aten.embedding_bag.padding_idx: embedding_bag,
        aten.embedding_bag.default: embedding_bag,
        aten.conv3d.default: conv3d,
        **recurrent(),
    }
    return table
