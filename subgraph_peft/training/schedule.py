"""Schedules: what methods do after optimiser steps. They count steps of the optimiser and nothing else."""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import Any

import torch

from ..base.borrowed import version_of
from ..base.errors import CheckpointError, MethodError
from ..compiler.constants import refresh
from ..graph.site import Site
from ..method.adapter import Adapter, targets
from ..method.method import Layer, Method
from ..method.steps import SiteStep, Step
from ..program.program import Program


class Schedule:
    """Runs `Method.schedule` of every adapter after each step of an optimiser, in whatever loop.

    An optimiser step that a gradient scaler skips does not count; gradients are unscaled when it does not.
    """

    def __init__(self, program: Program, optimizer: torch.optim.Optimizer, total_steps: int | None = None):
        self.program, self.total, self.number = program, total_steps, 0
        self.adapters = [(a, layer, site_steps(program, a, layer)) for a in program.adapters for layer in scheduled(a)]
        for adapter, layer, _ in self.adapters:
            if total_steps is None:
                raise MethodError(
                    f"{adapter.name}: {layer.name} follows a schedule over the whole run: pass total_steps, the number "
                    "of optimiser steps, to sp.schedule(program, optimizer, total_steps)."
                )
            layer.check_schedule(total_steps)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in program.parameters(trainable=True):
            if id(parameter) not in held:
                raise MethodError(f"{name} trains, but this optimiser does not hold it: pass program.parameters' own.")
        written = [tensor for _, _, sites in self.adapters for entry in sites for tensor in entry.tensors.values()]
        self.feeding = [t for t in written if not t.requires_grad] if program.constants else []
        self.hook = optimizer.register_step_post_hook(self.stepped)

    def stepped(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """A fused optimiser's step is called for gradients that a scaler found infinite, and changes nothing."""
        if not getattr(optimizer, "found_inf", 0):
            self.advance()

    @torch.no_grad()
    def advance(self) -> None:
        """One optimiser step has been taken."""
        self.number += 1
        before = [version_of(tensor) for tensor in self.feeding]
        for _, layer, sites in self.adapters:
            layer.schedule(Step(self.number, self.total, sites))
        if before != [version_of(tensor) for tensor in self.feeding]:
            refresh(self.program.module, self.program.constants)

    def remove(self) -> None:
        """Stop following the optimiser."""
        self.hook.remove()

    def places(self) -> dict[str, SiteStep]:
        """Sites by the name under which their state is saved."""
        found = ((f"{a.name}.{layer.name}", sites) for a, layer, sites in self.adapters)
        return {f"{name}.{entry.site.name}": entry for name, sites in found for entry in sites}

    def state_dict(self) -> dict[str, Any]:
        """{"number": steps taken, "tensors": {name: tensor}}"""
        tensors = {f"{p}.{name}": value for p, entry in self.places().items() for name, value in entry.state.items()}
        return {"number": self.number, "tensors": tensors}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a state of the same program. Raises CheckpointError for one that does not fit."""
        places = self.places()
        found: dict[str, dict[str, torch.Tensor]] = {place: {} for place in places}
        for path, value in state["tensors"].items():
            place, _, name = path.rpartition(".")
            if place not in places:
                raise CheckpointError(f"The schedule's state has {path}, which this program has no place for.")
            found[place][name] = value
        self.number = state["number"]
        device = self.program.home.device
        for place, entry in places.items():
            entry.state = {name: value.to(device) for name, value in found[place].items()}


def schedule(program: Program, optimizer: torch.optim.Optimizer, total_steps: int | None = None) -> Schedule:
    """Let methods with a schedule follow the steps of `optimizer`, `total_steps` in all."""
    return Schedule(program, optimizer, total_steps)


def scheduled(adapter: Adapter) -> list[Method]:
    return [layer for layer in adapter.method.layers() if layer.defines("schedule")]


def site_steps(program: Program, adapter: Adapter, layer: Method) -> list[SiteStep]:
    """The scheduling layer at every site, or part of one, with the options that it has there."""

    def beneath(site: Site, parts: Sequence[slice]) -> Callable[[], torch.Tensor]:
        """The weight under the adapters that come before this one."""

        def weight() -> torch.Tensor:
            earlier = program.adapters[: program.adapters.index(adapter) + 1]
            target = next(t for t in targets(earlier) if t.part in ("weight", "bias") and t.name == site.name)
            rest = tuple((a, s) for a, s in target.chain if a is not adapter)
            found = type(target)(target.part, target.name, target.site, rest).evaluate(dict(program.tensors()))
            own = program.module.get_parameter(next(iter(adapter.paths(site).values())))
            return reduce(lambda matrix, rows: matrix[rows], parts, found).to(own.device)  # a sharded base is elsewhere

        return weight

    return [
        SiteStep(found.site, found.method, held(program, adapter, site, found), beneath(site, found.rows))
        for site in adapter.sites
        for found in adapter.at(site).layers_at(site)
        if found.method.name == layer.name
    ]


def held(program: Program, adapter: Adapter, site: Site, layer: Layer) -> dict[str, torch.nn.Parameter]:
    """A layer's tensors by its own names, shared ones included."""
    names = {**layer.names, **{name: name for name in adapter.shared}}
    return {name: program.module.get_parameter(adapter.path(site, outer)) for name, outer in names.items()}
