"""Compare an ONNX file, in onnxruntime, with what torch computes."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import onnxruntime
import torch
from torch import nn
from torch.utils import _pytree as pytree

from subgraph_peft.errors import CaptureError, ExportError
from subgraph_peft.lower import META
from subgraph_peft.module import home_of
from subgraph_peft.program import Program
from subgraph_peft.signature import Signature

from .adapters import Adapters
from .axes import Axes, other_sizes, resize, sizes_of
from .inference import axes_of, flat_example
from .report import Drift, Verification
from .runtime import dtype_of, provider, run, session

BOUND = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
QUANTIZED = {8: 5e-2, 4: 5e-1}  # by bits
QUANTIZE = f"{META}.quantize"  # metadata of a file: bits of its weights

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
        for others in (other_sizes(varying), *longer):
            try:
                return [*found, case({**sizes, **others})]
            except (IndexError, RuntimeError, CaptureError):
                continue
        raise ExportError(
            "The program runs at the sizes of its example alone "
            f"({', '.join(f'{axis} = {size}' for axis, size in varying.items())}); "
            "capture it with dynamic={} if they are fixed."
        )


def verify(
    path: str | os.PathLike,
    reference: Program | nn.Module,
    example: Mapping[str, Any] | None = None,
    *,
    bound: float | None = None,
    adapter: str | os.PathLike | None = None,
) -> Verification:
    """Run the ONNX file at `path` and `reference` on the same inputs, at two sizes of every dynamic dimension.

    reference:  a Program, or an eager module whose arguments and outputs have the file's names
    example:    inputs by name; a Program brings its own. The second size is one shorter, cropped from these
    bound:      on the largest difference of each output, relative to its largest value: by default 1e-4
                for float32, 1e-6 for float64, 1e-2 for float16, 5e-2 for bfloat16 and 8-bit weights, 0.5 for 4-bit
                ones, whichever of both sides is coarser. Other outputs have to be equal
    adapter:    an adapter file in the model's slots

    Raises ExportError where the file cannot be run, takes other inputs, or differs by more than the bound, and for an
    adapter that does not fit.
    """
    opened = session(path)
    if isinstance(reference, Program):
        expected = program_reference(reference, example)
    elif example is None:
        kind = type(reference).__name__
        raise ExportError(f"verify needs example inputs to run a {kind}: verify(path, model, example).")
    else:
        expected = module_reference(reference, example, opened)
    bound = bound_of(opened, expected.dtype) if bound is None else bound
    slots = Adapters(opened).load(adapter).values if adapter else {}
    return compare(opened, expected.cases(inputs_of(opened)), bound, slots)


def program_reference(program: Program, example: Mapping[str, Any] | None = None) -> Reference:
    """The program, without what it was promised, called with the arguments of which it is given a tensor. Outputs that
    need others, as a loss needs labels, are None then."""
    program = program.promise(None)
    example = program.at_home(program.example if example is None else example)
    signature = program.module.signature

    def call(inputs: Mapping[str, torch.Tensor]) -> Any:
        leaves = zip(signature.input_names(), signature.flatten(example), strict=True)
        given = {}
        for argument, spec in signature.inputs.items():
            own = [next(leaves) for _ in range(spec.num_leaves)]
            if argument in example and any(n in inputs or not isinstance(leaf, torch.Tensor) for n, leaf in own):
                given[argument] = pytree.tree_unflatten([inputs.get(name, leaf) for name, leaf in own], spec)
        return program.run(given)

    return Reference(call, flat_example(program, example), axes_of(program), program.module.home.dtype)


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


def inputs_of(opened: onnxruntime.InferenceSession) -> list[str]:
    return [value.name for value in opened.get_inputs()]


def bound_of(opened: onnxruntime.InferenceSession, dtype: torch.dtype) -> float:
    """What the drift of a file from a program in `dtype` is held to by default."""
    held = {dtype_of(value) for value in opened.get_outputs()}
    bits = int(opened.get_modelmeta().custom_metadata_map.get(QUANTIZE, 0))
    coarse = max(BOUND.get(other, 0.0) for other in held)
    return max(BOUND.get(dtype, BOUND[torch.float32]), coarse, QUANTIZED.get(bits, 0.0))


def compare(
    opened: onnxruntime.InferenceSession,
    cases: Iterable[Case],
    bound: float,
    slots: Mapping[str, onnxruntime.OrtValue] = MappingProxyType({}),
) -> Verification:
    """Raises ExportError where any output drifts by more than `bound`, with `slots` in place of default values."""
    drift: dict[str, Drift] = {}
    shapes = []
    for inputs, expected in cases:
        shapes.append({name: tuple(tensor.shape) for name, tensor in inputs.items()})
        for name, tensor in run(opened, inputs, slots).items():
            wanted = expected.get(name)
            wanted = wanted(tensor) if callable(wanted) else wanted
            if not isinstance(wanted, torch.Tensor):
                given = ", ".join(name for name, value in expected.items() if isinstance(value, torch.Tensor))
                raise ExportError(f"The file gives {name!r}, torch gives {given}.")
            found = difference(wanted.cpu(), tensor)
            drift[name] = max(found, drift.get(name, found), key=lambda d: d.relative)
    verification = Verification(provider(opened), tuple(shapes), drift, bound)
    check(verification)
    return verification


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


def difference(expected: torch.Tensor, actual: torch.Tensor) -> Drift:
    """Infinite where shapes or kinds differ, or the places of non-finite values, and where exact values do."""
    worst = Drift(float("inf"), float("inf"), float("inf"))
    floats = expected.is_floating_point() and actual.is_floating_point()
    if expected.shape != actual.shape or not floats and expected.dtype != actual.dtype:
        return worst
    if not floats:
        return Drift(0.0, 0.0) if torch.equal(expected, actual) else worst
    expected, actual = expected.double(), actual.double()
    finite = expected.isfinite()
    if not torch.allclose(expected[~finite], actual[~finite], equal_nan=True) or not actual[finite].isfinite().all():
        return worst
    if not finite.any():
        return Drift(0.0, 0.0)
    apart = (expected - actual)[finite].abs()
    absolute, scale = apart.max().item(), expected[finite].abs().max().item()
    return Drift(absolute, absolute / scale if scale else absolute, apart.mean().item())


def check(verification: Verification) -> None:
    over = {name: drift for name, drift in verification.drift.items() if drift.exceeds(verification.bound)}
    if not over:
        return
    name, drift = max(over.items(), key=lambda item: item[1].relative)
    raise ExportError(
        f"onnxruntime ({verification.provider}) differs from torch: {name} by {drift.absolute:.1e}, "
        f"{drift.relative:.1e} of its largest value, where {verification.bound:.0e} is allowed ({len(over)} of "
        f"{len(verification.drift)} outputs are over). If the model amplifies rounding that much, pass a larger bound."
    )
