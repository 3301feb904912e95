"""Write a program as ONNX: translate, store, compare with torch in onnxruntime, and only then let the file appear."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import onnx_ir as ir

from subgraph_peft.errors import ExportError
from subgraph_peft.fold import folds
from subgraph_peft.guards import between
from subgraph_peft.program import Program

from .files import place, staged, write
from .inference import Inference, inference
from .report import ExportReport, Verification
from .runtime import session
from .translate import translate
from .verification import compare, program_reference


def to_onnx(
    program: Program,
    path: str | os.PathLike,
    *,
    outputs: Sequence[str] | None = None,
    opset: int | None = None,
    bound: float | None = None,
    example: Mapping[str, Any] | None = None,
    external_data: bool = False,
) -> ExportReport:
    """Write `program`, in eval mode, to the ONNX file `path`.

    outputs:        names of the outputs to keep; all but the loss by default. Inputs that only others need, such as
                    labels, are not in the file
    opset:          of the file; torch's own choice by default
    bound:          see `verify`
    example:        inputs to trace and compare with; the program's own by default
    external_data:  keep the weights in `<path>.data` even where one file can hold them (up to 2 GiB)

    Inputs and outputs have the names of the model's arguments and results, weights their qualified names. Dimensions
    that vary in the program vary in the file. Adapters that were not folded stay as nodes.

    The file appears once onnxruntime has reproduced the program's outputs at two sizes of every dynamic dimension.
    Raises ExportError where it does not, where an operator has no translation or kernel, and where the folder cannot be
    written; then, and on an interrupt, whatever was at `path` is still there.
    """
    target = Path(path)
    program.need_values("export", ExportError)
    with staged(target) as folder:
        reference = program_reference(program, example)
        cut = inference(program, outputs)
        model = translate(program, cut, reference.example, opset)
        write(model, folder / target.name, external_data)
        try:
            verification = compare(session(folder / target.name), reference, bound)
        except ExportError as error:
            raise ExportError(f"{error} {target} was not written.") from error
        place(folder, target)
    return report(program, cut, model, target, verification)


def report(program: Program, cut: Inference, model: ir.Model, target: Path, verification: Verification) -> ExportReport:
    files = [file for file in (target, target.with_name(f"{target.name}.data")) if file.exists()]
    return ExportReport(
        **{field.name: getattr(verification, field.name) for field in fields(Verification)},
        path=str(target),
        files=tuple(file.name for file in files),
        bytes=sum(file.stat().st_size for file in files),
        nodes=len(model.graph),
        opset=model.opset_imports[""],
        inputs={value.name: shape_of(value) for value in model.graph.inputs},
        outputs={value.name: shape_of(value) for value in model.graph.outputs},
        fixed=cut.fixed,
        holds=between(program.module.signature.guards, [value.name for value in model.graph.inputs]),
        left_out=cut.left_out,
        unmerged=tuple(adapter.name for adapter in program.adapters if folds(program, adapter)),
        remaining=tuple(adapter.name for adapter in program.adapters if not folds(program, adapter)),
    )


def shape_of(value: ir.Value) -> tuple[int | str, ...]:
    return tuple(size if isinstance(size, int) else str(size.value) for size in value.shape)
