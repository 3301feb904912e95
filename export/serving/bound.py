"""An onnxruntime session whose inputs and outputs stay on the device, launched as a CUDA graph for each shape."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import count

import onnxruntime
import torch
from onnx_ir.tensor_adapters import from_torch_dtype

from subgraph_peft.base.errors import ExportError, first_line

from ..onnx.runtime import CUDA, device_of, dtype_of, provider, run_options, session
from .adapters import LoadedAdapter, bind

SHAPES = 32  # whose buffers are kept


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
                 of the model runs on the device. The last 32 shapes, each with its adapters, keep their buffers

    On the CPU provider it runs as any session. Raises ExportError for inputs that the file lacks, or does not take.
    """

    def __init__(self, path: str | os.PathLike, *, cuda_graph: bool = True):
        self.stream = torch.cuda.Stream() if torch.cuda.is_available() else None
        options = {} if self.stream is None else {"user_compute_stream": str(self.stream.cuda_stream)}
        self.opened = session(path, enable_cuda_graph="1" if cuda_graph else "0", **options)
        self.device = device_of(self.opened)
        self.taken = {value.name: dtype_of(value) for value in self.opened.get_inputs()}
        self.bindings: dict[tuple, Binding] = {}
        self.numbers = count(1)

    @property
    def on_cuda(self) -> bool:
        return provider(self.opened) == CUDA

    def __call__(
        self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[LoadedAdapter] = ()
    ) -> dict[str, torch.Tensor]:
        """adapters: from `export.Adapters(run.opened).load(path)`, active for this run"""
        inputs = self.checked(inputs)
        key = (*((name, *tensor.shape) for name, tensor in inputs.items()), *map(id, adapters))
        caller = torch.cuda.current_stream(self.device) if self.on_cuda else None
        if caller:
            self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            binding = self.bindings.pop(key, None) or self.bind(inputs, adapters)
            self.bindings[key] = binding
            if len(self.bindings) > SHAPES:
                del self.bindings[next(iter(self.bindings))]
            for name, buffer in binding.inputs.items():
                buffer.copy_(inputs[name], non_blocking=True)
            self.run(binding)
        if caller:
            caller.wait_stream(self.stream)
        return binding.outputs

    def checked(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """In the file's order. Raises ExportError."""
        wrong = [f"{name} is not given" for name in self.taken if not isinstance(inputs.get(name), torch.Tensor)]
        wrong += [f"{name} is none of its inputs" for name in inputs if name not in self.taken]
        if wrong:
            raise ExportError(f"The file takes {', '.join(self.taken)}; {', '.join(wrong)}.")
        return {name: inputs[name] for name in self.taken}

    def run(self, binding: Binding) -> None:
        try:
            self.opened.run_with_iobinding(binding.bound, binding.options)
        except Exception as error:
            raise ExportError(
                f"onnxruntime ({provider(self.opened)}) cannot run the model: {first_line(error)}"
            ) from error

    def bind(self, inputs: Mapping[str, torch.Tensor], adapters: Sequence[LoadedAdapter]) -> Binding:
        held = {name: inputs[name].to(self.device, dtype, copy=True).contiguous() for name, dtype in self.taken.items()}
        bound = self.opened.io_binding()
        for name, tensor in held.items():
            bound.bind_input(name, *memory(tensor))
        bind(bound, adapters)
        for value in self.opened.get_outputs():
            bound.bind_output(value.name, self.device.type, self.device.index or 0)
        self.run(Binding(held, {}, bound, run_options(self.opened), adapters))  # for the sizes of its outputs
        binding = Binding(held, {}, bound, run_options(self.opened, next(self.numbers)), adapters)
        for value, found in zip(self.opened.get_outputs(), bound.get_outputs(), strict=True):
            binding.outputs[value.name] = torch.empty(found.shape(), dtype=dtype_of(value), device=self.device)
        bound.clear_binding_outputs()
        for name, tensor in binding.outputs.items():
            bound.bind_output(name, *memory(tensor))
        return binding


def memory(tensor: torch.Tensor, shape: Sequence[int] | None = None) -> tuple[str, int, int, tuple[int, ...], int]:
    """Device, its number, dtype, shape and address, as `bind_input` takes them.

    shape: of the part at the start of its memory, by default the tensor's
    """
    return (
        tensor.device.type,
        tensor.device.index or 0,
        int(from_torch_dtype(tensor.dtype)),
        tuple(tensor.shape if shape is None else shape),
        tensor.data_ptr(),
    )
