"""Compare an ONNX file, in onnxruntime, with what torch computes."""

import os
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import onnxruntime
import torch
from torch import nn

from subgraph_peft.base.errors import ExportError
from subgraph_peft.graph.rewriter import META
from subgraph_peft.program.program import Program

from ..serving.adapters import Adapters
from ..serving.cached import PRESENT
from .reference import Case, cases_of, module_reference, program_reference
from .report import Drift, Verification
from .runtime import dtype_of, provider, run, session

BOUND = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
QUANTIZED = {8: 5e-2, 4: 5e-1}  # by bits
QUANTIZE = f"{META}.quantize"  # metadata of a file: bits of its weights


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
    return compare(opened, cases_of(opened, expected), bound, slots)


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
            if name.startswith(f"{PRESENT}.") and name not in expected:
                continue  # of a cache, which the program has not
            wanted = expected.get(name)
            wanted = wanted(tensor) if callable(wanted) else wanted
            if not isinstance(wanted, torch.Tensor):
                given = ", ".join(name for name, value in expected.items() if isinstance(value, torch.Tensor))
                raise ExportError(f"The file gives {name!r}, torch gives {given}.")
            found = difference(wanted.cpu(), tensor)
            drift[name] = max(found, drift.get(name, found), key=lambda d: d.relative)
    verification = Verification(provider(opened), tuple(shapes), drift, bound)
    check_drift(verification)
    return verification


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


def check_drift(verification: Verification) -> None:
    over = {name: drift for name, drift in verification.drift.items() if drift.exceeds(verification.bound)}
    if not over:
        return
    name, drift = max(over.items(), key=lambda item: item[1].relative)
    raise ExportError(
        f"onnxruntime ({verification.provider}) differs from torch: {name} by {drift.absolute:.1e}, "
        f"{drift.relative:.1e} of its largest value, where {verification.bound:.0e} is allowed ({len(over)} of "
        f"{len(verification.drift)} outputs are over). If the model amplifies rounding that much, pass a larger bound."
    )
