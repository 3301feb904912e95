"""Which modules an adapter_config.json means, by peft's rules, and the shortest names that mean given ones."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from subgraph_peft.base.errors import CheckpointError, nearest
from subgraph_peft.graph.site import Site
from subgraph_peft.program.program import Program
from subgraph_peft.program.sites import find

from .options import ModuleOptions

ALL_LINEAR = "all-linear"


def modules(captured: Program) -> list[str]:
    """Paths of all modules that hold a tensor, and of those above them."""
    found: dict[str, None] = {}
    for name, _ in captured.tensors():
        parts = name.split(".")[:-1]
        found |= dict.fromkeys(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return list(found)


def targeted(captured: Program, options: ModuleOptions, present: Callable[[str], bool]) -> tuple[Site, ...]:
    """The weight sites of the modules that `options` mean, in the graph's order.

    present: whether the file has tensors of a module. It decides about output heads under "all-linear", which peft
             leaves out where it knows them

    Raises CheckpointError for a module without a weight in the graph, and where nothing is meant.
    """
    sites = {site.owner: site for site in find(captured) if site.name.endswith(".weight") and len(site.shape) > 1}
    if isinstance(options.target_modules, str) and options.target_modules.lower() == ALL_LINEAR:
        linear = [m for m, site in sites.items() if site.kind in ("linear", "addmm") and not left_out(options, m)]
        meant = [module for module in linear if present(module) or not sites[module].head]
    else:
        meant = [module for module in modules(captured) if means(options, module)]
    if not meant:
        close = ", ".join(nearest(str(options.target_modules), sites))
        raise CheckpointError(f"target_modules {options.target_modules!r} mean no module. Nearest: {close}.")
    if unknown := [module for module in meant if module not in sites]:
        raise CheckpointError(
            f"target_modules mean {', '.join(unknown[:3])}, where the captured graph uses no weight. Capture the model "
            "with outputs that need it, or leave it out of target_modules."
        )
    return tuple(site for module, site in sites.items() if module in meant)


def listed(names: Iterable[str], module: str) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def left_out(options: ModuleOptions, module: str) -> bool:
    """Whether exclude_modules or modules_to_save keep a module from being a target."""
    excluded = options.exclude_modules or []
    if re.fullmatch(excluded, module) if isinstance(excluded, str) else listed(excluded, module):
        return True
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in options.modules_to_save or [])


def means(options: ModuleOptions, module: str) -> bool:
    """Whether a module is a target (peft's check_target_module_exists)."""
    targets = options.target_modules
    if left_out(options, module):
        return False
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    if module in targets:
        return True
    return listed(targets, module) and in_layers(options, module)


def in_layers(options: ModuleOptions, module: str) -> bool:
    wanted = options.layers_to_transform
    if wanted is None or wanted == []:
        return True
    named = options.layers_pattern or []
    named = [named] if isinstance(named, str) else named
    patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in named] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
    return found is not None and int(found[1]) in ([wanted] if isinstance(wanted, int) else wanted)


def pattern_of(patterns: Mapping[str, Any], module: str) -> str | None:
    """The key of a rank_pattern or alpha_pattern that a module falls under: the first that matches."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


def shortest(wanted: Sequence[str], captured: Program) -> list[str] | str:
    """target_modules that mean the modules `wanted` and no others: the shortest endings of their paths, or a regular
    expression where a path is the ending of another one."""
    others = {ending for module in set(modules(captured)) - set(wanted) for ending in endings(module)}
    if not others.isdisjoint(wanted):
        return exactly(wanted)
    chosen: dict[str, None] = {}
    for module in sorted(wanted, key=lambda module: (module.count("."), module)):
        if not listed(chosen, module):
            chosen[next(ending for ending in endings(module) if ending not in others)] = None
    return sorted(chosen)


def exactly(wanted: Iterable[str]) -> str:
    """The regular expression of these paths and no others."""
    return "|".join(map(re.escape, sorted(wanted)))


def endings(module: str) -> list[str]:
    """`a.b.c` -> `c`, `b.c`, `a.b.c`"""
    parts = module.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]
