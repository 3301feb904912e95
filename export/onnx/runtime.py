"""onnxruntime: the best provider there is, torch tensors in and out, errors that say what to do."""

import contextlib
import io
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
from onnx_ir.tensor_adapters import to_torch_dtype

from subgraph_peft.base.borrowed import get
from subgraph_peft.base.errors import ExportError, first_line
from subgraph_peft.base.files import settle

CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
FATAL = 4
HALVES = (torch.float16, torch.bfloat16)
NO_KERNEL = r"Could not find an implementation for (?P<operator>\w+)\(\d+\) node with name '(?P<node>[^']*)'"
NO_DTYPE = r"Type '[^']*' of input .* of operator \((?P<operator>\w+)\) in node \((?P<node>[^)]*)\) is invalid"


def session(path: str | os.PathLike, on: str | None = None, **cuda: str) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the provider `on` ("CPUExecutionProvider", …); by default on the CUDA provider where
    torch sees a GPU, else on the CPU provider.

    cuda: further options of the CUDA provider

    Float32 products are computed in float32 on the GPU too, not in TF32. Raises ExportError.
    """
    settle(path, ExportError)
    if not Path(path).is_file():
        raise ExportError(f"There is no ONNX file {path}.")
    available = [p for p in onnxruntime.get_available_providers() if p != CUDA or torch.cuda.is_available()]
    if on is not None and on not in available:
        raise ExportError(f"{on} cannot be used here; those that can: {', '.join(available)}.")
    wanted = [CPU] if on in (None, CPU) else [on, CPU]
    if on in (None, CUDA) and CUDA in available:
        with contextlib.redirect_stdout(io.StringIO()):
            get("onnxruntime:preload_dlls")()
        device = torch.cuda.current_device()
        named = {"device_id": str(device)} if device else {}  # it warns where one is named
        wanted = [(CUDA, {"use_tf32": "0", **named, **cuda}), CPU]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    try:
        opened = onnxruntime.InferenceSession(os.fspath(path), options, providers=wanted)
    except Exception as error:
        raise unusable(path, error) from error
    if len(wanted) > 1 and provider(opened) == CPU:
        message = "onnxruntime cannot load its CUDA provider and runs on the CPU; its CUDA has to match torch's."
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    return opened


def provider(opened: onnxruntime.InferenceSession) -> str:
    return opened.get_providers()[0]


def device_of(opened: onnxruntime.InferenceSession) -> torch.device:
    """Where a session that was just opened computes."""
    return torch.device("cuda", torch.cuda.current_device()) if provider(opened) == CUDA else torch.device("cpu")


def run(
    opened: onnxruntime.InferenceSession,
    inputs: Mapping[str, torch.Tensor],
    slots: Mapping[str, onnxruntime.OrtValue] = MappingProxyType({}),
) -> dict[str, torch.Tensor]:
    """Outputs by name, on the CPU, with `slots` in place of default values. Raises ExportError for inputs that the file
    does not take or cannot be run on."""
    names = [value.name for value in opened.get_outputs()]
    narrow = {value.name: dtype for value in opened.get_inputs() if (dtype := dtype_of(value)) in HALVES}
    fed = {n: t.to(narrow[n]) if n in narrow and t.is_floating_point() else t for n, t in inputs.items()}
    try:
        values = {name: value_of(tensor) for name, tensor in fed.items()}
        results = opened.run_with_ort_values(names, {**values, **slots}, run_options(opened))
    except Exception as error:
        shapes = ", ".join(f"{name}{list(tensor.shape)}" for name, tensor in inputs.items())
        message = f"onnxruntime ({provider(opened)}) cannot run the model on {shapes}: {first_line(error)}"
        raise ExportError(message) from error
    return {name: tensor_of(value) for name, value in zip(names, results, strict=True)}


def run_options(opened: onnxruntime.InferenceSession, graph: int = -1) -> onnxruntime.RunOptions:
    """graph: number of the CUDA graph to record or launch, -1 for none; a session that records gives no results else"""
    options = onnxruntime.RunOptions()
    if provider(opened) == CUDA:
        options.add_run_config_entry("gpu_graph_id", str(graph))
    return options


def dtype_of(value: onnxruntime.NodeArg) -> torch.dtype:
    """`tensor(float16)` -> torch.float16"""
    name = value.type.removeprefix("tensor(").removesuffix(")").upper()
    return to_torch_dtype(ir.DataType[name])


def value_of(tensor: torch.Tensor, device: torch.device | None = None) -> onnxruntime.OrtValue:
    """A value of onnxruntime's; on `device`, where that is a GPU, in the tensor's memory there."""
    if device is not None and device.type == "cuda":
        tensor = tensor.detach().to(device).contiguous()
        torch.cuda.current_stream(device).synchronize()
        return onnxruntime.OrtValue.from_dlpack(tensor)
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype is torch.bfloat16:
        bits = tensor.view(torch.uint16).numpy()
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, onnx.TensorProto.BFLOAT16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(tensor.numpy())


def tensor_of(value: onnxruntime.OrtValue) -> torch.Tensor:
    """A copy: the memory of `value` is onnxruntime's. numpy has no bfloat16."""
    if value.data_type() == "tensor(bfloat16)":
        return torch.from_dlpack(value).clone()
    return torch.from_numpy(np.array(value.numpy()))


def unusable(path: str | os.PathLike, error: Exception) -> ExportError:
    if found := cut_short(path):
        return found
    for pattern in (NO_KERNEL, NO_DTYPE):
        if found := re.search(pattern, str(error)):
            where = f" (node {found['node']})" if found["node"] else ""
            return ExportError(
                f"onnxruntime has no {found['operator']} kernel for {weight_dtype(path)}{where} on this machine. "
                "Write it in float32 or float16: leave out dtype=, or convert a 16-bit model (model.float()) before it "
                "is captured; its adapters fold into float32 by default. For bfloat16 CUDA has kernels, the CPU none."
            )
    name = Path(path).name
    return ExportError(f"onnxruntime cannot open {name}: {first_line(error).replace(os.fspath(path), name)}")


def cut_short(path: str | os.PathLike) -> ExportError | None:
    """Of a file whose external data end before a weight does."""
    with contextlib.suppress(Exception):  # a damaged model, of which onnxruntime's own error says more
        for tensor in (value.const_value for value in ir.load(path).graph.initializers.values()):
            if isinstance(tensor, ir.ExternalTensor):
                needed, held = (tensor.offset or 0) + tensor.nbytes, os.path.getsize(tensor.path)
                if needed > held:
                    return ExportError(
                        f"The weights of {Path(path).name} are cut short: {tensor.name} ends at byte {needed:,}, the "
                        f"file of external data holds {held:,}. Copy it again, or export again."
                    )
    return None


def weight_dtype(path: str | os.PathLike) -> str:
    """The dtype that holds most of the model's weights, as torch spells it."""
    sizes: dict[str, int] = {}
    for value in ir.load(path).graph.initializers.values():
        name = value.dtype.name.lower()
        sizes[name] = sizes.get(name, 0) + value.const_value.size
    largest = max(sizes, key=sizes.__getitem__, default="this dtype")
    return {"float": "float32", "double": "float64"}.get(largest, largest)
