"""Optimising passes of a program, switched on and off by their names."""

from collections.abc import Mapping
from dataclasses import replace

from ..base.errors import ConfigError, suggestion
from ..graph.passes import optimisations
from ..program.internals import internals
from ..program.program import Program
from .generate import base_of, generate, rebuild


def check_switches(switches: Mapping[str, object]) -> None:
    known = optimisations()
    for name, value in switches.items():
        if name not in known:
            names = ", ".join(known)
            raise ConfigError(f"optimise: unknown option {name!r}.{suggestion(name, known)} Options: {names}.")
        if not isinstance(value, bool):
            raise ConfigError(f"optimise: option {name!r} is true or false, not {value!r}.")


def optimise(program: Program, **switches: bool) -> Program:
    """The same program, sharing the memory of its parameters, with optimising passes switched: `siblings=False`.

    Passes that are not named stay as they are. Raises ConfigError for a name that no pass has.
    """
    check_switches(switches)
    on = {name for name, value in switches.items() if value}
    without = (internals(program.module).without - on) | (switches.keys() - on)
    if without == internals(program.module).without:
        return program
    captured = base_of(program)
    captured = replace(captured, module=rebuild(captured, dict(captured.tensors()), without=without))
    if not program.adapters:
        return captured
    tensors = dict(program.tensors())
    declared = [path for adapter in program.adapters for _, _, path in adapter.all_paths()]
    own = {n: tensors[n] for n in (*(n for n, _ in program.parameters(trainable=True)), *declared)}
    result = generate(captured, program.adapters, own, tensors[declared[0]].dtype)
    result.module.train(program.module.training)
    return replace(result, history=program.history, folded=program.folded)
