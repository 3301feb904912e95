"""Parameters of the model itself beside an adapter: modules_to_save, and the biases that `bias` trains."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from subgraph_peft.base.errors import CheckpointError, MethodError
from subgraph_peft.method.adapter import Adapter, targets
from subgraph_peft.program.program import Program
from subgraph_peft.store.state import trained, written
from subgraph_peft.training.tasks import TASKS, task_of

from .folder import MODULES, Slot
from .form import PeftForm
from .options import Options
from .targets import modules

BASE = "base_layer."


@dataclass(frozen=True)
class Beside:
    """What a folder has of the model's own tensors.

    slots:   places of parameters and buffers that the adapter brings, by qualified name
    copies:  places of base weights that the file may repeat but not change
    ignored: keys of copies that peft itself does not use
    """

    slots: Mapping[str, Slot]
    copies: Mapping[str, Slot]
    ignored: Collection[str]


def read_beside(
    captured: Program, form: PeftForm, options: Options, adapted: Collection[str], keys: Collection[str]
) -> Beside:
    """adapted: modules that have an adapter; keys: of the file. Raises CheckpointError."""
    state = captured.module.state_dict()
    saved = chosen(captured, options)
    names = [name for name in state if inside(name, saved)]
    slots = {name: Slot(f"{form.prefix}{name}", tuple(state[name].shape)) for name in names}
    if tied := next((name for name in names for group in captured.ties if name in group), None):
        raise CheckpointError(
            f"modules_to_save mean {owner(tied)}, whose weight is tied to another; a tied weight is not trained here. "
            "Load the model with tie_word_embeddings=False, which gives each its own, and capture that."
        )
    which = getattr(options, "bias", "none")
    biases = [name for name in state if name.rpartition(".")[2] == "bias" and name not in slots]
    if which == form.only:
        biases = [name for name in biases if owner(name) in adapted]
    for name in biases if which != "none" else ():
        slots[name] = Slot(key_of(name, adapted), tuple(state[name].shape))
    copies = {
        name: Slot(key_of(name, adapted), tuple(value.shape))
        for name, value in captured.tensors()
        if name not in slots and key_of(name, adapted) in keys and name.endswith(".weight")
    }
    unused = tuple(
        f"{form.prefix}{module}.{part}." for module in saved for part in ("original_module", "modules_to_save")
    )
    return Beside(slots, copies, [key for key in keys if unused and key.startswith(unused)])


def chosen(captured: Program, options: Options) -> list[str]:
    """Modules that modules_to_save mean, outermost only; peft takes any ending of a path."""
    named = options.modules_to_save or []
    found = [module for module in modules(captured) if module.endswith(tuple(named))]
    if named and not found:
        raise CheckpointError(f"modules_to_save {named} mean no module of {captured.source}.")
    return outermost(found)


def outermost(found: Sequence[str]) -> list[str]:
    return [module for module in found if not inside(module, found)]


def owner(name: str) -> str:
    return name.rpartition(".")[0]


def key_of(name: str, adapted: Collection[str]) -> str:
    """A parameter's key: under a module that has an adapter, the module itself is `base_layer`."""
    module, _, leaf = name.rpartition(".")
    return f"{MODULES}{module}.{BASE if module in adapted else ''}{leaf}"


def check_copies(captured: Program, beside: Beside, tensors: Mapping[str, torch.Tensor], where: str) -> None:
    """Raises CheckpointError where a base weight in the file is another one than the program's."""
    own = dict(captured.tensors())
    for name, slot in beside.copies.items():
        value, stored = own[name], tensors[slot.key]
        if stored.shape != value.shape or not torch.equal(stored.to(value), value):
            raise CheckpointError(
                f"{where} holds {name} {list(stored.shape)}, and it is not the program's {list(value.shape)}: the "
                "adapter was trained on another base, or one with more tokens. Load that model."
            )


def own_values(program: Program, adapters: Sequence[Adapter]) -> dict[str, torch.Tensor]:
    """Values of the model's own tensors that are not the base's, by name: trained parameters, statistics that training
    wrote, and biases under `adapters`. Raises MethodError for a bias that other adapters rewrite too."""
    held = dict(program.tensors())
    values = {name: held[name].detach() for name in (*trained(program), *written(program))}
    names = {adapter.name for adapter in adapters}
    for target in targets(program.adapters):
        rewriting = {adapter.name for adapter, _ in target.chain}
        if target.part == "bias" and rewriting <= names:
            values[target.name] = target.evaluate(held)
        elif target.part == "bias" and rewriting & names:
            raise MethodError(
                f"{target.name} is rewritten by {' and '.join(sorted(rewriting))}, which a peft folder cannot hold at "
                "once. Use sp.save(program, folder)."
            )
    return values


@dataclass(frozen=True)
class Saved:
    """Keys of the configuration and tensors by key for the model's own tensors; `more` names those that peft saves and
    trains with them, which hold the base's values."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    more: Sequence[str]


def write_beside(
    program: Program, form: PeftForm, values: Mapping[str, torch.Tensor], adapted: Collection[str]
) -> Saved:
    """`values` as modules_to_save and, under the modules `adapted`, as `bias`. Raises MethodError."""
    base = program.captured.module.state_dict()
    biases = {name for name in base if name.rpartition(".")[2] == "bias"}
    saved = {owner(name) for name in values if name not in biases}
    which, kept = bias_option(form, set(values), {name for name in biases if owner(name) not in saved}, adapted)
    saved |= {owner(name) for name in values if name in biases - kept}
    task, heads = type_of(program, form, saved, adapted)
    saved |= set(heads)
    saved = {module for module in modules(program.captured) if saved and module.endswith(tuple(saved))}
    if clash := next((module for module in sorted(adapted) if inside(f"{module}.", saved)), None):
        raise MethodError(
            f"{clash} has an adapter, and peft ({form.peft_type}) would save it whole among modules_to_save "
            f"{sorted(outermost(sorted(saved)))}. Use sp.save(program, folder)."
        )
    names = [name for name in base if inside(name, saved)]
    kept -= set(names)
    tensors = {f"{form.prefix}{name}": values.get(name, base[name]) for name in names}
    tensors |= {key_of(name, adapted): values.get(name, base[name]) for name in kept}
    config = {"task_type": task, "modules_to_save": outermost(sorted(saved)) or None}
    more = sorted({*names, *kept} - set(values))
    return Saved(config | ({"bias": which} if form.only else {}), tensors, more)


def bias_option(
    form: PeftForm, trained: Collection[str], biases: Collection[str], adapted: Collection[str]
) -> tuple[str, set[str]]:
    """(the value of `bias`, the biases that it saves)"""
    under = {name for name in biases if owner(name) in adapted}
    if form.only and biases and biases <= trained:
        return "all", set(biases)
    return (form.only, under) if form.only and under & trained else ("none", set())


def inside(name: str, found: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in found)


def type_of(
    program: Program, form: PeftForm, saved: Collection[str], adapted: Collection[str]
) -> tuple[str | None, list[str]]:
    """(peft's task type, the heads that it always saves, whole). A type that brings heads is given where they are saved
    anyway, or where the adapter acts by its type. Raises MethodError."""
    config = vars(program.module).get("config")
    known = TASKS.get(task_of(program.source, getattr(config, "is_encoder_decoder", False)))
    task, named = (known.peft, known.saved) if known else (None, ())
    if form.needs_task and task in (None, "SEQ_2_SEQ_LM"):
        raise MethodError(f"peft puts no virtual tokens before a {program.source}. Use sp.save(program, folder).")
    heads = outermost([module for module in modules(program.captured) if named and module.endswith(named)])
    whole = all(any(inside(f"{module}.", [head]) for module in saved) for head in heads)
    if form.needs_task or (whole and not any(inside(f"{module}.", heads) for module in adapted)):
        return task, heads
    return None, []
