"""Weights of an ONNX model that are computed from the program's own when they are written: no second copy is held."""

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, to_torch_dtype

from subgraph_peft.base.errors import ExportError

MASK = 1e30  # at least this is what hides positions, not a weight


class Computed(ir.LazyTensor):
    """Values that `compute` gives each time they are asked for."""

    def __init__(self, compute: Callable[[], torch.Tensor], dtype: ir.DataType, shape: Sequence[int]):
        super().__init__(lambda: TorchTensor(compute()), dtype=dtype, shape=ir.Shape(shape))
        self.compute = compute


def values(tensor: ir.TensorProtocol) -> torch.Tensor:
    """As torch holds them, without a copy where it does."""
    if isinstance(tensor, Computed):
        return tensor.compute()
    if isinstance(tensor, TorchTensor):
        return tensor.raw.detach()
    if tensor.dtype == ir.DataType.BFLOAT16:  # of which torch takes no numpy array
        return torch.from_numpy(np.array(tensor.numpy()).view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(tensor.numpy()))


def transposed(tensor: ir.TensorProtocol, order: Sequence[int]) -> Computed:
    shape = [tensor.shape[axis] for axis in order]
    return Computed(lambda: values(tensor).permute(*order), tensor.dtype, shape)


def joined(tensors: Sequence[ir.TensorProtocol], axis: int) -> Computed:
    shape = list(tensors[0].shape)
    shape[axis] = sum(tensor.shape[axis] for tensor in tensors)
    return Computed(lambda: torch.cat([values(tensor) for tensor in tensors], axis), tensors[0].dtype, shape)


def converted(tensor: ir.TensorProtocol, dtype: ir.DataType, name: str) -> Computed:
    """In another dtype. Numbers of a mask's size are clamped to the dtype's range; raises ExportError, when it is
    computed, for a weight beyond it."""

    def compute() -> torch.Tensor:
        wide, target = values(tensor), to_torch_dtype(dtype)
        limit = torch.finfo(target).max
        narrow = wide.to(target)
        beyond = narrow.isinf() & ~wide.isinf()
        if not beyond.any():
            return narrow
        if wide.numel() > 1 and wide[beyond].abs().min() < MASK:
            raise ExportError(
                f"{name} holds {wide[beyond].abs().max().item():.3g}, beyond the largest {dtype.name.lower()} "
                f"({limit:.0f}). Export it in {'bfloat16 or ' if target is torch.float16 else ''}float32."
            )
        return torch.where(beyond, wide.sign() * limit, wide).to(target)

    return Computed(compute, dtype, tensor.shape.numpy())
