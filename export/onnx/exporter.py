"""Write a program as ONNX: translate, store, compare with torch in onnxruntime, and only then let the file appear."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir
import torch

from subgraph_peft.base.errors import ExportError
from subgraph_peft.base.files import replacing_set
from subgraph_peft.base.patches import quiet
from subgraph_peft.compiler.fold import folds
from subgraph_peft.graph.guards import between
from subgraph_peft.program.program import Program
from subgraph_peft.program.selectors import Where
from subgraph_peft.store.state import fingerprint

from ..serving.adapters import Adapters
from ..serving.updates import Updates, updates
from .files import data_name, write_model
from .fuse import fuse, lay_out
from .inference import Inference, inference
from .precision import DTYPES, narrow
from .quantize import quantize as quantized
from .reference import Case, program_reference
from .report import ExportReport, Verification
from .runtime import session
from .slots import NONE, slots_of, weights_of
from .translate import describe, translate
from .verification import bound_of, compare


def to_onnx(
    program: Program,
    path: str | os.PathLike,
    *,
    outputs: Sequence[str] | None = None,
    opset: int | None = None,
    dtype: torch.dtype | str | None = None,
    optimize: bool = False,
    quantize: Literal[4, 8] | None = None,
    bound: float | None = None,
    example: Mapping[str, Any] | None = None,
    external_data: bool = False,
    beside: Sequence[Any] = (),
    slots: bool | Where = False,
    merge: Literal["run", "load"] = "run",
    also: Sequence[Case] = (),
) -> ExportReport:
    """Write `program`, in eval mode, to the ONNX file `path`.

    outputs:        names of the outputs to keep; all but the loss by default. Inputs that only others need, such as
                    labels, are not in the file
    opset:          of the file; torch's own choice by default
    dtype:          float16 or bfloat16, of a float32 program: inputs, outputs, weights and products in it, means and
                    angles in float32
    optimize:       fuse attention, norms and activations into operators that onnxruntime alone has
    quantize:       bits of the weights of matrix products; one with a slot keeps the dtype of the file
    bound:          see `verify`
    example:        inputs to trace and compare with; the program's own by default
    external_data:  keep the weights in `<path>.data` even where one file can hold them (up to 2 GiB)
    beside:         what has `save_pretrained`, such as a tokenizer and a config, written to the file's folder with it
    slots:          write the base that was captured, with inputs through which adapter files change it at run time,
                    see `to_adapter`. True: for what the program's adapters change; a selector: for these weights too
    merge:          when W + A B of a slot is computed: at every "run", by onnxruntime itself, or at the "load" of an
                    adapter, by `Adapters`: a run then costs what the base's does, an adapter the memory of its weights
    also:           further (inputs, outputs of torch), by name, that onnxruntime has to reproduce; an output may be
                    a function of what onnxruntime gives

    Inputs and outputs have the names of the model's arguments and results, weights their qualified names. Dimensions
    that vary in the program vary in the file. Adapters that were not folded stay as nodes. Weights are written one by
    one from the program's memory.

    The file appears once onnxruntime, on the provider that will serve it, has reproduced the program's outputs at two
    sizes of every dynamic dimension, before and after it was fused and quantised; with slots, the base's outputs and,
    with the program's adapters in them, the program's. Raises ExportError where it does not, where an operator has no
    translation or kernel, and where the folder cannot be written, MethodError where slots cannot hold an adapter's
    update; then, and on an interrupt, whatever was at `path` is still there.
    """
    target = Path(path)
    program.need_values("export", ExportError)
    dtype = chosen(program, dtype)
    check_options(program, target, dtype, quantize, merge)
    opened = slots_of(program, slots, merge == "load") if slots else NONE
    update = updates(program) if slots and program.adapters else None
    base = opened.base or program
    with replacing_set(target, ExportError, gone=[data_name(target)]) as folder:
        reference = program_reference(base, example)
        cut = opened.open(inference(base, outputs))
        cases = reference.cases(cut.own)
        cases += [(own_inputs(inputs, cut.own), expected) for inputs, expected in also]
        adapted = program_reference(program, example).cases(cut.own) if update else []
        model = translate(base, cut, reference.example, opset)
        if dtype is not reference.dtype:
            narrow(model, dtype)
        identity = fingerprint(base, opened.whole)

        def checked(**options: Any) -> Verification:
            describe(model, base, identity, dtype=str(dtype).removeprefix("torch."), **options)
            with opened.defaults(model, cut):
                write_model(model, folder / target.name, external_data)
            try:
                return verified(folder / target.name, reference.dtype, bound, cases, adapted, update)
            except ExportError as error:
                asked = " and ".join(f"{name}=" for name, value in options.items() if value)
                advice = f"The file without {asked} gives what torch does: leave it out. " if asked else ""
                raise ExportError(f"{error} {advice}{target} was not written.") from error

        if quantize or optimize:
            with quiet():
                lay_out(model)
        before = verification = checked()
        fused: dict[str, int] = {}
        if quantize or optimize:
            with quiet():
                model = quantized(model, quantize) if quantize else model
                fused = fuse(model) if optimize else {}
            verification = checked(optimize=optimize, quantize=quantize)
        for item in beside:
            item.save_pretrained(folder)
    return ExportReport(
        **{field.name: getattr(verification, field.name) for field in fields(Verification)},
        **written(base, cut, model, target),
        dtype=str(dtype).removeprefix("torch."),
        fused=fused,
        quantize=quantize,
        before={} if verification is before else before.drift,
        identity=identity,
        slots=weights_of(cut.samples),
    )


def check_options(program: Program, target: Path, dtype: torch.dtype, quantize: object, merge: object) -> None:
    """Raises ExportError for options that no file can have."""
    if quantize not in (None, 4, 8):
        raise ExportError(f"Weights are quantised to 4 or 8 bits, not {quantize!r}.")
    if quantize and dtype not in (torch.float32, torch.float16):
        raise ExportError(f"onnxruntime quantises float32 and float16 weights; {program.source} is in {dtype}.")
    if merge not in ("run", "load"):
        raise ExportError(f"An adapter is merged at every 'run' or on 'load', not {merge!r}.")
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file in it, such as {target / 'model.onnx'}.")


def verified(
    path: Path, dtype: torch.dtype, bound: float | None, cases: Sequence[Case], adapted: Sequence[Case],
    update: Updates | None,
) -> Verification:  # fmt: skip
    """What onnxruntime gives for the cases, and with the update in the slots for those `adapted`, beside torch.

    Raises ExportError where they differ.
    """
    running = session(path)
    allowed = bound_of(running, dtype) if bound is None else bound
    found = compare(running, cases, allowed)
    if update is None:
        return found
    adapters = Adapters(running)
    return found & compare(running, adapted, allowed, adapters.held(adapters.fitted(update.values)))


def chosen(program: Program, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype to write in. Raises ExportError for one that would widen, or that is none of the three."""
    home = program.home.dtype
    wanted = home if dtype is None else getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if wanted is home:
        return home
    if wanted not in DTYPES:
        raise ExportError(f"ONNX is written in float32, float16 or bfloat16, not {dtype}.")
    if home is not torch.float32:
        raise ExportError(
            f"{program.source} is in {home}; a file in {wanted} is written from a float32 program: capture the model "
            f"in {wanted} or float32, or fold into float32."
        )
    return wanted


def own_inputs(inputs: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The inputs of the file among those of a case of `also`. Raises ExportError."""
    if missing := [name for name in names if name not in inputs]:
        raise ExportError(
            f"A case of also= lacks {', '.join(missing)}: give every input of the file ({', '.join(names)})."
        )
    return {name: inputs[name] for name in names}


def written(program: Program, cut: Inference, model: ir.Model, target: Path) -> dict[str, Any]:
    """What an ExportReport says of the file."""
    files = [file for file in (target, target.with_name(f"{target.name}.data")) if file.exists()]
    return {
        "path": str(target),
        "files": tuple(file.name for file in files),
        "bytes": sum(file.stat().st_size for file in files),
        "nodes": len(model.graph),
        "opset": model.opset_imports[""],
        "inputs": {value.name: shape_of(value) for value in model.graph.inputs if value.name in cut.own},
        "outputs": {value.name: shape_of(value) for value in model.graph.outputs},
        "fixed": cut.fixed,
        "holds": between(program.signature.guards, cut.own),
        "left_out": cut.left_out,
        "unmerged": tuple(adapter.name for adapter in program.adapters if folds(program, adapter)),
        "remaining": tuple(adapter.name for adapter in program.adapters if not folds(program, adapter)),
    }


def shape_of(value: ir.Value) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
