"""What a capture borrows of the model and gives back: modes, buffers, tied parameters, forward; and random numbers."""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn


@contextmanager
def prepared(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, without key-value cache; restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(c): c for module in modes if getattr(c := getattr(module, "config", None), "use_cache", None)}
    try:
        for config in configs.values():
            config.use_cache = False
        if isinstance(model, fx.GraphModule):  # one of torch.export refuses train()
            for module in modes:
                module.training = training
        else:
            model.train(training)
        yield
    finally:
        for config in configs.values():
            config.use_cache = True
        for module, was_training in modes.items():
            module.training = was_training


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Every place of a tied parameter holds a Parameter of its own over the same memory, so that a trace names the one
    that is read; restored afterwards. A module that stands at two places keeps one."""
    held: list[tuple[nn.Module, str, nn.Parameter]] = []
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(parameter) in seen:
                held.append((module, name, parameter))
            seen.add(id(parameter))
    try:
        for module, name, parameter in held:
            own = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
            module.register_parameter(name, own)
        yield
    finally:
        for module, name, parameter in held:
            module.register_parameter(name, parameter)


@contextmanager
def spelled_out(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """The model with a `forward` whose signature names every argument that it takes as **keywords: torch.export gives
    dynamic dimensions to named arguments alone."""
    forward = model.forward
    parameters = list(inspect.signature(forward).parameters.values())
    own = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
    added = [
        inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names if n not in {p.name for p in parameters}
    ]
    if not added:
        yield
        return

    def spelled(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    spelled.__signature__ = inspect.Signature([*own, *added])
    held = model.__dict__.get("forward")
    model.forward = spelled
    try:
        yield
    finally:
        if held is None:
            del model.forward
        else:
            model.forward = held


@contextmanager
def seeded(device: torch.device) -> Iterator[None]:
    """The same random numbers every time; the caller's go on where they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


@contextmanager
def unwritten(*modules: nn.Module) -> Iterator[None]:
    """Buffers, and tensors kept as plain attributes, as they were, whatever a forward pass writes to them."""
    held = [(b, b.detach().clone()) for module in modules for b in module.buffers() if not b.is_meta]
    plain = [(part.__dict__, dict(part.__dict__)) for module in modules for part in module.modules()]
    try:
        yield
    finally:
        for now, before in plain:
            for name in [n for n, v in now.items() if isinstance(v, torch.Tensor) and v is not before.get(n)]:
                if name in before:
                    now[name] = before[name]
                else:
                    del now[name]
        with torch.no_grad():
            for buffer, value in held:
                buffer.copy_(value)
