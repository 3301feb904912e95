"""What torch computes, to compare an ONNX file with: a program or a module, and inputs of several sizes."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import onnxruntime
import torch
from torch import nn

from subgraph_peft.base.borrowed import pytree
from subgraph_peft.base.errors import CaptureError, ExportError, first_line
from subgraph_peft.graph.signature import Signature
from subgraph_peft.program.kernels import promise
from subgraph_peft.program.program import Program
from subgraph_peft.program.tree import home_of

from ..serving.cached import PAST
from .axes import Axes, other_sizes, resize, sizes_of
from .inference import axes_of, flat_example
from .runtime import dtype_of

Case = tuple[Mapping[str, torch.Tensor], Mapping[str, Any]]


@dataclass(frozen=True)
class Reference:
    """What torch computes: `call` takes tensors by name; `axes` are the dimensions of `example` that may vary."""

    call: Callable[[Mapping[str, torch.Tensor]], Any]
    example: Mapping[str, torch.Tensor]
    axes: Axes
    dtype: torch.dtype

    def outputs(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """Leaves of the result by name, None for what was not computed."""
        leaves, spec = pytree.tree_flatten(self.call(inputs))
        return dict(zip(Signature({}, {}, (), spec).output_names(), leaves, strict=True))

    def cases(self, feeds: Sequence[str]) -> list[Case]:
        """(inputs, what torch computes) at the sizes of the example, and at other ones of the inputs `feeds`: shorter,
        or longer where the values of an input are positions in a dimension that is then too short for them, or where
        the program is the model at some sizes only."""
        if missing := [name for name in feeds if name not in self.example]:
            raise ExportError(
                f"The file takes {', '.join(feeds)}; {', '.join(missing)} is not among the example inputs."
            )
        sizes = sizes_of(self.axes, self.example)
        varying = {axis: sizes[axis] for name in feeds for axis in self.axes.get(name, {}).values()}

        def case(at: Mapping[str, int]) -> Case:
            inputs = resize(self.example, self.axes, at)
            given = {name: inputs[name] for name in feeds}
            with full_precision():
                return given, self.outputs(given)

        found = [case(sizes)]
        if not varying:
            return found
        longer = ({axis: size + 1 for axis, size in varying.items()}, {a: 2 * size for a, size in varying.items()})
        refused: list[Exception] = []
        for others in (other_sizes(varying), *longer):
            try:
                return [*found, case({**sizes, **others})]
            except (IndexError, RuntimeError, CaptureError) as error:
                refused.append(error)
        raise ExportError(
            "The program runs at the sizes of its example alone "
            f"({', '.join(f'{axis} = {size}' for axis, size in varying.items())}); at others it says: "
            f"{first_line(refused[0])} Capture it with dynamic={{}} if they are fixed."
        ) from refused[0]


def program_reference(program: Program, example: Mapping[str, Any] | None = None) -> Reference:
    """The program, without what it was promised, called with the arguments of which it is given a tensor. Outputs that
    need others, as a loss needs labels, are None then."""
    program = promise(program, None)
    example = program.at_home(program.example if example is None else example)
    signature = program.signature

    def call(inputs: Mapping[str, torch.Tensor]) -> Any:
        leaves = zip(signature.input_names(), signature.flatten(example), strict=True)
        given = {}
        for argument, spec in signature.inputs.items():
            own = [next(leaves) for _ in range(spec.num_leaves)]
            if argument in example and any(n in inputs or not isinstance(leaf, torch.Tensor) for n, leaf in own):
                given[argument] = pytree.tree_unflatten([inputs.get(name, leaf) for name, leaf in own], spec)
        return program.run(given)

    return Reference(call, flat_example(program, example), axes_of(program), program.home.dtype)


def module_reference(module: nn.Module, example: Mapping[str, Any], opened: onnxruntime.InferenceSession) -> Reference:
    home = home_of(dict(module.named_parameters()))
    axes = {v.name: {d: size for d, size in enumerate(v.shape) if isinstance(size, str)} for v in opened.get_inputs()}

    def call(inputs: Mapping[str, torch.Tensor]) -> Any:
        training = module.training
        try:
            with torch.no_grad():
                return module.eval()(**{name: tensor.to(home.device) for name, tensor in inputs.items()})
        finally:
            module.train(training)

    taken = {name: tensor for name, tensor in example.items() if name in axes}
    return Reference(call, taken, axes, home.dtype)


def cases_of(opened: onnxruntime.InferenceSession, reference: Reference) -> list[Case]:
    """What a file is compared at: a decoder with a cache at prompts without padding, in its last logits."""
    inputs = {value.name: value for value in opened.get_inputs()}
    past = [value for name, value in inputs.items() if name.startswith(f"{PAST}.")]
    if not past or "input_ids" not in reference.example:
        return reference.cases(list(inputs))
    known = {name: tensor for name, tensor in reference.example.items() if name in ("input_ids", "attention_mask")}
    seen = {name: torch.ones_like(tensor) for name, tensor in known.items() if name == "attention_mask"}
    plain = replace(reference, example={**reference.example, **seen})
    kept = next(value.shape[1] for value in opened.get_outputs() if value.name == "logits")

    def prompt(given: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> Case:
        ids = given["input_ids"]
        places = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        fed = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": places}
        fed |= {v.name: torch.zeros(len(ids), v.shape[1], 0, v.shape[3], dtype=dtype_of(v)) for v in past}
        logits = expected["logits"][:, -kept:] if isinstance(kept, int) else expected["logits"]
        return {name: fed[name] for name in inputs}, {"logits": logits}

    return [prompt(*case) for case in plain.cases([*known])]


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products in float32 on the GPU, as `session` asks of onnxruntime; torch runs convolutions in TF32."""
    backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision
