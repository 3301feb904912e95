"""Write a program's adapters as a peft folder."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from subgraph_peft.base.errors import CheckpointError, MethodError
from subgraph_peft.compiler.fold import check_finite
from subgraph_peft.method.adapter import Adapter
from subgraph_peft.program.program import Program

from ..pieces import pieces
from . import beside
from .folder import write_folder
from .forms import FORMS, OWN
from .lowrank import lora_pieces
from .own import written_own


@dataclass(frozen=True)
class PeftReport:
    """What was written.

    peft_type: as in the configuration; `for_peft` is False for a method that peft does not have: only this package
               reads that folder
    sites:     modules or parameters with an adapter
    errors:    ‖ΔW − s B A‖ / ‖ΔW‖ of every weight, where an update was written as a plain LoRA
    more:      the model's own tensors that peft saves and trains with those that were trained
    """

    folder: Path
    peft_type: str
    for_peft: bool
    sites: int
    errors: Mapping[str, float] = field(default_factory=dict)
    more: Sequence[str] = ()

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        found = [("folder", str(self.folder)), ("type", self.peft_type), ("sites", str(self.sites))]
        if not self.for_peft:
            found.append(("peft", "has no such method: this package alone reads the folder"))
        if self.errors:
            worst = max(self.errors, key=self.errors.get)
            found.append(("largest relative error", f"{self.errors[worst]:.2e} of the update of {worst}"))
        if self.more:
            found.append(("saved with the base's values", ", ".join(self.more)))
        return found


def to_peft(
    program: Program, folder: str | os.PathLike, *, as_lora: bool = False, rank: int | None = None,
    tolerance: float = 0.01,
) -> PeftReport:  # fmt: skip
    """Write `adapter_config.json` and `adapter_model.safetensors`, which `peft.PeftModel.from_pretrained` loads.

    PiSSA is written as the LoRA of rank 2r that it is on the original weights; P-tuning and a projected prefix as the
    virtual tokens that they evaluate to. A method that peft does not have is written in the same two files under its
    own name, which `from_peft` alone reads.

    as_lora:   write the whole update of every weight as a plain LoRA, whatever made it
    rank:      at most that of this LoRA (default: the update's own, exactly)
    tolerance: the largest relative error ‖ΔW − s B A‖ / ‖ΔW‖ of any weight

    Raises MethodError for what peft's layout cannot hold, CheckpointError where the folder cannot be written.
    """
    if not program.adapters:
        raise CheckpointError("The program has no adapters to write; a folded program is saved as plain weights.")
    if rank is not None and not as_lora:
        raise MethodError("rank= belongs to as_lora=True: adapters are written with the ranks that they have.")
    check_finite(program)
    folder = Path(folder)
    main = [adapter for adapter in program.adapters if not biases_alone(adapter)] or list(program.adapters)
    errors: dict[str, float] = {}
    if as_lora:
        found, errors = lora_pieces(program, rank, tolerance)
        values = beside.own_values(program, program.adapters)
        if not found:
            raise MethodError("No adapter of the program rewrites a weight: there is nothing to write as a LoRA.")
    else:
        found = pieces(program, tuple(main))
        values = beside.own_values(program, [adapter for adapter in program.adapters if adapter not in main])
    form = next((form for form in FORMS.values() if all(form.takes(piece.method) for piece in found)), OWN)
    if form is OWN:
        config, tensors = written_own(program, single(main))
    else:
        config, tensors = form.written(program.captured, found)
        config["peft_type"] = form.peft_type
    saved = beside.write_beside(program, form, values, {piece.site.owner for piece in found})
    config = {**about(program), **config, **saved.config}
    write_folder(folder, config, {**tensors, **saved.tensors})
    return PeftReport(folder, config["peft_type"], form is not OWN, len(found), errors, saved.more)


def biases_alone(adapter: Adapter) -> bool:
    parts = ("weight", "output", "embeddings", "keys_values")
    return adapter.method.defines("bias") and not any(map(adapter.method.defines, parts))


def single(adapters: Sequence[Adapter]) -> Adapter:
    if len(adapters) > 1:
        raise MethodError(
            f"A peft folder holds one adapter; the program has {', '.join(a.name for a in adapters)}. "
            "sp.save(program, folder) holds any number, and as_lora=True writes the sum of their updates."
        )
    return adapters[0]


def about(program: Program) -> dict[str, Any]:
    """Keys that every configuration has."""
    config = vars(program.module).get("config")
    return {
        "base_model_name_or_path": getattr(config, "name_or_path", None) or None,
        "inference_mode": True,
        "revision": None,
    }
