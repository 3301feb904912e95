"""Parameters of the model itself beside an adapter: modules_to_save, and the biases that `bias` trains."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from subgraph_peft.adapter import Adapter, targets
from subgraph_peft.checkpoint import trained, written
from subgraph_peft.errors import CheckpointError, MethodError
from subgraph_peft.program import Program

from .folder import MODULES, Slot
from .form import Form
from .options import Options
from .targets import modules

BASE = "base_layer."
# ending of a model's class -> peft's task type, and the modules that the type saves
TASKS = {
    "ForCausalLM": "CAUSAL_LM", "LMHeadModel": "CAUSAL_LM", "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS", "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS", "Model": "FEATURE_EXTRACTION",
}  # fmt: skip
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


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


def read(captured: Program, form: Form, options: Options, adapted: Collection[str], keys: Collection[str]) -> Beside:
    """adapted: modules that have an adapter; keys: of the file. Raises CheckpointError."""
    state = captured.module.state_dict()
    saved = chosen(captured, options)
    names = [name for name in state if inside(name, saved)]
    slots = {name: Slot(f"{form.prefix}{name}", tuple(state[name].shape)) for name in names}
    which = getattr(options, "bias", "none")
    biases = [name for name in state if name.rpartition(".")[2] == "bias" and name not in slots]
    if which == form.only:
        biases = [name for name in biases if owner(name) in adapted]
    for name in biases if which != "none" else ():
        slots[name] = Slot(key_of(name, adapted), tuple(state[name].shape))
    copies = {
        name: Slot(key_of(name, adapted), tuple(value.shape))
        for name, value in captured.module.tensors()
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
    own = dict(captured.module.tensors())
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
    held = dict(program.module.tensors())
    values = {name: held[name].detach() for name in (*trained(program), *written(program))}
    names = {adapter.name for adapter in adapters}
    for target in targets(program.adapters):
        rewriting = {adapter.name for adapter, _ in target.chain}
        if target.part == "bias" and rewriting <= names:
            values[target.name] = target.evaluate(held)
        elif target.part == "bias" and rewriting & names:
            raise MethodError(
                f"{target.name} is rewritten by {' and '.join(sorted(rewriting))}, which a peft folder cannot hold at "
                "once. Use program.save(folder)."
            )
    return values


@dataclass(frozen=True)
class Saved:
    """Keys of the configuration and tensors by key for the model's own tensors; `more` names those that peft saves and
    trains with them, which hold the base's values."""

    config: Mapping[str, Any]
    tensors: Mapping[str, torch.Tensor]
    more: Sequence[str]


def write(program: Program, form: Form, values: Mapping[str, torch.Tensor], adapted: Collection[str]) -> Saved:
    """`values` as modules_to_save and, under modules that have an adapter, as `bias`. A task type that brings heads is
    given where they are saved. Raises MethodError."""
    base = program.captured.module.state_dict()
    biases = {name for name in base if name.rpartition(".")[2] == "bias"}
    under = {name for name in values if owner(name) in adapted}
    if lost := sorted(under if form.only is None else under - biases):
        raise MethodError(
            f"{lost[0]} is trained in full beside an adapter at its module, which a peft folder ({form.peft_type}) "
            "cannot hold. Use program.save(folder)."
        )
    saved = {owner(name) for name in values if name not in biases}
    loose = {name for name in biases if owner(name) not in saved}
    rest = {name for name in values if name in loose}
    which, kept = "none", set()
    if form.only and rest and rest == loose:
        which, kept = "all", loose
    elif under:
        which, kept = form.only, {name for name in loose if owner(name) in adapted}
    saved |= {owner(name) for name in rest - kept}
    task, heads = task_of(program)
    if form.needs_task:
        saved |= set(heads)
        if task is None:
            raise MethodError(f"peft puts no virtual tokens before a {program.source}. Use program.save(folder).")
    elif not all(any(within(module, [head]) == head for module in saved) for head in heads):
        task, heads = None, []
    saved = {within(module, heads) for module in saved}
    kept = {name for name in kept if not inside(name, saved)}
    names = [name for name in base if inside(name, saved)]
    tensors = {f"{form.prefix}{name}": values.get(name, base[name]) for name in names}
    tensors |= {key_of(name, adapted): values.get(name, base[name]) for name in kept}
    config = {"task_type": task, "modules_to_save": sorted(saved) or None, **({"bias": which} if form.only else {})}
    return Saved(config, tensors, sorted({*names, *kept} - set(values)))


def inside(name: str, found: Collection[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in found)


def within(module: str, heads: Collection[str]) -> str:
    """The head that a module is part of, or the module."""
    return next((head for head in heads if f"{module}.".startswith(f"{head}.")), module)


def task_of(program: Program) -> tuple[str | None, list[str]]:
    """(peft's task type, the heads that it always saves, whole)"""
    task = next((task for ending, task in TASKS.items() if program.source.endswith(ending)), None)
    named = HEADS.get(task, ())
    return task, outermost([module for module in modules(program.captured) if named and module.endswith(named)])
