"""An onnxruntime session whose inputs and outputs stay on the device, launched as a CUDA graph for each shape."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnxruntime
import torch
from onnx_ir import DataType
from onnx_ir.tensor_adapters import from_torch_dtype, to_torch_dtype

from subgraph_peft.errors import ExportError

from .adapters import LoadedAdapter, together
from .runtime import CUDA, first_line, provider, session


@dataclass
class Binding:
    """Buffers of one shape: inputs are copied into place, outputs are overwritten by the next run. Tensors of adapters
    are bound as they lie, since onnxruntime ignores adapters of run options here."""

    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    bound: onnxruntime.IOBinding
    options: onnxruntime.RunOptions
    adapters: Sequence[LoadedAdapter]


class BoundSession:
    """run(inputs) gives the outputs by name, tensors on the device that the next run with these shapes overwrites.

        run = export.BoundSession("model.onnx")
        logits = run({"input_ids": ids, "attention_mask": mask})["logits"]

    path:        an ONNX file
    cuda_graph:  on CUDA, record each shape at its first calls and launch the recording from then on; possible where all
                 of the model runs on the device. Few shapes: each keeps its buffers

    On the CPU provider it runs as any session. Raises ExportError for inputs that the file does not take.
    """

    def __init__(self, path: str | os.PathLike, *, cuda_graph: bool = True):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        options = {} if self.stream is None else {"user_compute_stream": str(self.stream.cuda_stream)}
        self.opened = session(path, enable_cuda_graph="1" if cuda_graph else "0", **options)
        self.device = torch.device("cuda", torch.cuda.current_device()) if self.on_cuda else torch.device("cpu")
        self.bindings: dict[tuple, Binding] = {}

    @property
    def on_cuda(self) -> bool:
        return provider(self.opened) == CUDA

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[LoadedAdapter] = ()
    ) -> dict[str, torch.Tensor]:
        """adapters: from `export.Adapters(run.opened).load(path)`, active for this run"""
        key = (*((name, *tensor.shape) for name, tensor in sorted(inputs.items())), *map(id, adapters))
        if key not in self.bindings:
            self.bindings[key] = self.bind(inputs, adapters)
        binding = self.bindings[key]
        with torch.cuda.stream(self.stream):
            if self.stream is not None:
                self.stream.wait_stream(torch.cuda.default_stream())
            for name, buffer in binding.inputs.items():
                buffer.copy_(inputs[name], non_blocking=True)
        self.run(binding)
        return binding.outputs

    def run(self, binding: Binding) -> None:
        try:
            self.opened.run_with_iobinding(binding.bound, binding.options)
        except Exception as error:
            raise ExportError(
                f"onnxruntime ({provider(self.opened)}) cannot run the model: {first_line(error)}"
            ) from error

    def bind(self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[LoadedAdapter]) -> Binding:
        taken = {value.name: dtype_of(value) for value in self.opened.get_inputs()}
        if missing := [name for name in taken if name not in inputs]:
            raise ExportError(f"The file takes {', '.join(taken)}; {', '.join(missing)} is not given.")
        held = {name: inputs[name].to(self.device, dtype, copy=True).contiguous() for name, dtype in taken.items()}
        bound = self.opened.io_binding()
        for name, tensor in held.items():
            bound.bind_input(name, *place(tensor))
        for name, value in together(adapters).items():
            bound.bind_ortvalue_input(name, value)
        for value in self.opened.get_outputs():
            bound.bind_output(value.name, self.device.type, self.device.index or 0)
        self.run(Binding(held, {}, bound, self.options(-1), adapters))  # for the sizes of its outputs
        binding = Binding(held, {}, bound, self.options(len(self.bindings) + 1), adapters)
        for value, found in zip(self.opened.get_outputs(), bound.get_outputs(), strict=True):
            binding.outputs[value.name] = torch.empty(found.shape(), dtype=dtype_of(value), device=self.device)
        bound.clear_binding_outputs()
        for name, tensor in binding.outputs.items():
            bound.bind_output(name, *place(tensor))
        return binding

    def options(self, graph: int) -> onnxruntime.RunOptions:
        """graph: number of the recording, -1 for none"""
        options = onnxruntime.RunOptions()
        if self.on_cuda:
            options.add_run_config_entry("gpu_graph_id", str(graph))
        return options


def place(tensor: torch.Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
    """Device, its number, dtype, shape and address, as `bind_input` takes them."""
    return (
        tensor.device.type,
        tensor.device.index or 0,
        int(from_torch_dtype(tensor.dtype)),
        tuple(tensor.shape),
        tensor.data_ptr(),
    )


def dtype_of(value: onnxruntime.NodeArg) -> torch.dtype:
    """`tensor(float16)` -> torch.float16"""
    name = value.type.removeprefix("tensor(").removesuffix(")").upper()
    return to_torch_dtype(DataType[name])
