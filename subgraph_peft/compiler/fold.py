"""Fold adapters into plain weights: functional, all or nothing, checked, and honest about what the dtype keeps."""

from dataclasses import replace

import torch
from torch import nn

from ..base.borrowed import pytree
from ..base.compare import difference
from ..base.errors import FoldError
from ..base.text import Table
from ..method.adapter import Adapter, targets
from ..method.method import spell
from ..program.program import Program
from ..program.records import FoldReport, SiteFold
from .generate import base_of, generate, rebuild

OUTPUT_BOUND = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}


def fold(program: Program, *, dtype: torch.dtype | None = None, retain: float = 0.9, verify: bool = True) -> Program:
    """W ← φ(W) for every adapter that folds; the result is the captured graph with new weights.

    dtype:   of the folded program; by default float32, or the model's own where that is wider. A model captured in a
             16-bit dtype becomes a float32 model unless its own dtype is asked for
    retain:  the least share of each site's update that the dtype has to keep
    verify:  compare outputs with the unfolded program on the example inputs

    `program` is left as it is. A program without foldable adapters is returned itself.
    Raises FoldError for non-finite tensors, lost updates and differing outputs.
    """
    folding = [a for a in program.adapters if folds(program, a)]
    of_base = {name for name, _ in program.captured.parameters()}
    trained = [name for name, _ in program.parameters(trainable=True) if name in of_base]
    if not folding and not trained:
        return program
    home = program.home
    program.need_values("fold", FoldError)
    dtype = dtype or torch.promote_types(torch.float32, home.dtype)
    if torch.promote_types(dtype, home.dtype) != dtype:
        raise FoldError(
            f"{program.source} is in {home.dtype}; a fold into {dtype} would narrow every weight. "
            f"Convert the model to {dtype} before it is captured, or fold into {home.dtype}."
        )
    check_finite(program)
    base = base_of(program) if dtype == home.dtype else widened(base_of(program), dtype)
    tensors, report = fold_values(program, folding, trained, dict(base.tensors()))
    check_retained(report, dtype, retain)
    result = replace(base, module=rebuild(base, tensors))
    remaining = tuple(a for a in program.adapters if a not in folding)
    if remaining:
        held = dict(program.tensors())
        wide = next(iter(held[path].dtype for a in remaining for _, _, path in a.all_paths()))
        own = {path: nn.Parameter(held[path].detach().clone()) for a in remaining for _, _, path in a.all_paths()}
        result = generate(result, remaining, own, wide)
        result.module.requires_grad_(False)
    result.module.eval()
    error = check_fold(program, result, dtype) if verify else None
    summary = FoldReport(
        dtype, report, error, {a.name: spell(a.method) for a in folding}, tuple(a.name for a in remaining)
    )
    before = program.captured.before or program.captured
    return replace(result, folded=summary, before=before, history=(*program.history, "fold"))


def fold_values(
    program: Program, folding: list[Adapter], trained: list[str], base: dict[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], dict[str, SiteFold]]:
    """(tensors of the base with φ(W) and what was `trained` in full in their dtype, what each folded weight kept)"""
    held, tensors = dict(program.tensors()), dict(base)
    for name in trained:
        tensors[name] = nn.Parameter(held[name].detach().to(tensors[name].dtype, copy=True), requires_grad=False)
    report: dict[str, SiteFold] = {}
    with torch.no_grad():
        for target in targets(folding):
            name, original = target.name, held[target.name].detach()
            value = target.evaluate(held)
            value = target.site.stored(value) if target.part == "weight" else value
            stored = value.to(tensors[name].dtype)
            if not torch.isfinite(stored).all():
                raise FoldError(f"Folding {name} gives values that are not finite in {stored.dtype}.")
            report[name] = kept(original.to(value.dtype), value, stored.to(value.dtype))
            tensors[name] = nn.Parameter(stored, requires_grad=False)
    return tensors, report


def check_retained(report: dict[str, SiteFold], dtype: torch.dtype, retain: float) -> None:
    """Raises FoldError where the dtype keeps too little of an update."""
    lost = {name: entry for name, entry in report.items() if entry.retained < retain}
    if lost:
        name, entry = min(lost.items(), key=lambda item: item[1].retained)
        raise FoldError(
            f"Folding into {dtype} keeps only {entry.retained:.0%} of the update of {name} (‖ΔW‖/‖W‖ = "
            f"{entry.relative_delta:.2%}; {len(lost)} of {len(report)} sites are under {retain:.0%}). Fold into "
            f"torch.float32, or accept the loss with retain={max(0.0, entry.retained - 0.01):.2f}."
        )


def check_fold(program: Program, folded: Program, dtype: torch.dtype) -> float:
    """The difference of their outputs on the example inputs. Raises FoldError where it is no rounding."""
    bound = OUTPUT_BOUND[program.home.dtype]
    error = compare(program, folded)
    if not error <= bound and dtype != program.home.dtype:
        error = compare(unfolded_in(dtype, program), folded)
    if not error <= bound:
        raise FoldError(
            f"The folded program differs from the unfolded one by {error:.2e} of the largest output on the example "
            "inputs. This is a defect of the equation or of the rewrite; verify=False folds anyway."
        )
    return error


def folds(program: Program, adapter: Adapter) -> bool:
    """Whether an adapter folds: one above a weight method that does not has to stay with it."""
    chains = [target.chain for target in targets(program.adapters) if target.part == "weight"]
    beneath = [a for chain in chains if adapter in (own := [a for a, _ in chain]) for a in own[: own.index(adapter)]]
    return adapter.method.foldable() and all(a.method.foldable() for a in beneath)


def unfolded_in(dtype: torch.dtype, program: Program) -> Program:
    """The program in a wider dtype. What rounding decides in the narrow one, such as which expert takes a token, is
    then decided alike in both."""
    own = {
        path: p for a in program.adapters for _, _, path in a.all_paths() for p in [program.module.get_parameter(path)]
    }
    trained = {n: p for n, p in program.parameters(trainable=True)}
    adapters = next((p.dtype for p in own.values()), dtype)
    return generate(widened(base_of(program), dtype), program.adapters, {**trained, **own}, adapters)


def widened(base: Program, dtype: torch.dtype) -> Program:
    """A copy in a wider dtype."""
    return replace(base, module=rebuild(base, dict(base.tensors())).to(dtype))


def check_finite(program: Program) -> None:
    for adapter in program.adapters:
        for site, tensor, path in adapter.all_paths():
            value = program.module.get_parameter(path)
            if not torch.isfinite(value).all():
                bad = int((~torch.isfinite(value)).sum())
                raise FoldError(
                    f"{adapter.name}.{tensor} at {site.name} holds {bad} values that are not finite: the training "
                    "diverged. Go back to an earlier checkpoint, or train with a smaller learning rate."
                )


def kept(original: torch.Tensor, target: torch.Tensor, stored: torch.Tensor) -> SiteFold:
    delta, size = torch.linalg.vector_norm(target - original).item(), torch.linalg.vector_norm(original).item()
    if delta <= torch.finfo(target.dtype).eps * size:
        return SiteFold(delta / size if size else 0.0, 1.0)
    lost = torch.linalg.vector_norm(stored - target).item()
    return SiteFold(delta / size if size else float("inf"), max(0.0, 1 - lost / delta))


def compare(before: Program, after: Program) -> float:
    """Largest difference of any floating-point output on the example inputs, relative to the largest output."""
    inputs = pytree.tree_map_only(torch.Tensor, lambda t: t, dict(before.example))
    pairs = zip(pytree.tree_leaves(before.run(inputs)), pytree.tree_leaves(after.run(inputs)), strict=True)
    return max((difference(a, b) for a, b in pairs), default=0.0)


def fold_rows(program: Program) -> list[dict[str, object]]:
    """One row a folded weight."""
    return [
        {"weight": name, "relative_delta": site.relative_delta, "retained": site.retained}
        for name, site in program.folded.sites.items()
    ]


def fold_table(program: Program) -> Table:
    """One row a folded weight."""
    report = program.folded
    rows = [
        (name.removesuffix(".weight"), f"{site.relative_delta:.3%}", f"{site.retained:.4%}")
        for name, site in report.sites.items()
    ]
    title = f"Folded into {report.dtype}; {difference_text(report)}"
    return Table(title, ["module", ">‖ΔW‖ / ‖W‖", ">delta retained"], rows)


def difference_text(report: FoldReport) -> str:
    error = report.output_error
    return "outputs not compared" if error is None else f"outputs differ by {error:.1e} of the largest"
