"""Write a program's adapters as an `.onnx_adapter` file for the slots of an ONNX model."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path

import onnxruntime
import torch
from torch import nn

from subgraph_peft.base.borrowed import get
from subgraph_peft.base.errors import ExportError, first_line
from subgraph_peft.base.files import replacing
from subgraph_peft.compiler.generate import rebuild
from subgraph_peft.program.program import Program
from subgraph_peft.store.state import fingerprint

from ..onnx.reference import cases_of, program_reference
from ..onnx.report import Verification
from ..onnx.slots import MERGED, A, B, captured_values, rewritten_sites, version, weights_of
from ..onnx.verification import bound_of, compare
from .adapters import Adapters
from .updates import Updates, updates


@dataclass(frozen=True)
class AdapterReport(Verification):
    """An adapter file and its verification.

    ranks:  r by weight                        errors: ‖ΔW − (A B)ᵀ‖ / ‖ΔW‖ by weight
    whole:  tensors that it replaces
    """

    path: str
    bytes: int
    ranks: Mapping[str, int]
    errors: Mapping[str, float]
    whole: tuple[str, ...]

    def rows(self) -> list[tuple[str, str]]:
        worst = max(self.errors, key=self.errors.get, default="")
        rows = [
            ("file", self.path),
            ("bytes", f"{self.bytes:,}"),
            ("weights", str(len(self.ranks))),
            ("ranks", ", ".join(map(str, sorted(set(self.ranks.values()))))),
            ("replaces", ", ".join(self.whole)),
            ("largest relative error", worst and f"{self.errors[worst]:.2e} of the update of {worst}"),
        ]
        return [*((what, value) for what, value in rows if value), *super().rows()]


def to_adapter(
    program: Program,
    path: str | os.PathLike,
    model: str | os.PathLike | onnxruntime.InferenceSession,
    *,
    rank: int | None = None,
    tolerance: float = 0.01,
    bound: float | None = None,
) -> AdapterReport:
    """Write what `program` adds to its base as the onnxruntime adapter `path`, for the slots of `model` in their dtype.

    model:     an ONNX file that `to_onnx(…, slots=…)` wrote of the same base, or a session on it
    rank:      at most that of each weight's update (default: its own, exactly)
    tolerance: the largest relative error ‖ΔW − (A B)ᵀ‖ / ‖ΔW‖ of any weight
    bound:     see `verify`

    The file appears once onnxruntime has reproduced the program with it; a truncated one, the base with the truncated
    updates. Raises ExportError for another base and for what has no slot, MethodError for an update of full rank and an
    error above the tolerance.
    """
    program.need_values("write", ExportError)
    adapters = Adapters(model)
    sites = dict(rewritten_sites(program))
    update = updates(program, rank, tolerance)
    if not update.values:
        raise ExportError("The program has no adapters to write; a folded program has them in its weights.")
    whole = tuple(name for name in adapters.slots if not name.endswith((A, B, MERGED)))
    if missing := [name for name in update.values if adapters.slot(name) is None]:
        raise ExportError(
            f"The model has no slot for {', '.join(weights_of(missing))}. Export one from this program "
            "(to_onnx(program, …, slots=True)), or fold the adapter into plain weights."
        )
    if fingerprint(program, whole) != adapters.identity:
        raise ExportError(
            f"The model's base is not the one that {program.source} was captured with: their weights differ. Export a "
            "model with slots from this program's base."
        )
    values = adapters.fitted(update.values)
    reference = program_reference(program if rank is None else truncated(program, update, sites))
    bound = bound_of(adapters.session, reference.dtype) if bound is None else bound
    verification = compare(adapters.session, cases_of(adapters.session, reference), bound, adapters.held(values))
    target = Path(path)
    with replacing(target, ExportError) as temporary:
        store(values, adapters.identity, temporary)
        adapters.load(temporary)
    return AdapterReport(
        **{field.name: getattr(verification, field.name) for field in fields(Verification)},
        path=str(target),
        bytes=target.stat().st_size,
        ranks=update.ranks,
        errors=update.errors,
        whole=tuple(name for name in values if name in whole),
    )


def store(values: Mapping[str, onnxruntime.OrtValue], identity: str, path: Path) -> None:
    made = get("onnxruntime:AdapterFormat")()
    made.set_model_version(version(identity))
    made.set_parameters(dict(values))
    try:
        made.export_adapter(os.fspath(path))
    except Exception as error:
        raise ExportError(f"onnxruntime cannot write {path.name}: {first_line(error)}") from error


def truncated(program: Program, update: Updates, sites: Mapping) -> Program:
    """The base with W + (A B)ᵀ and the replaced tensors."""
    base = captured_values(program)
    tensors = dict(base.tensors())
    for name, site in sites.items():
        W = tensors[name].detach()
        delta = (update.values[name + A] @ update.values[name + B]).mT
        tensors[name] = nn.Parameter(W + site.stored(delta).to(W), requires_grad=False)
    for name in set(tensors).intersection(update.values):
        kind = nn.Parameter if isinstance(tensors[name], nn.Parameter) else torch.Tensor.clone
        tensors[name] = kind(update.values[name].detach().to(tensors[name]))
    return replace(base, module=rebuild(base, tensors))
