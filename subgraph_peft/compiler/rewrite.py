"""Rewrite a program by a method: choose sites, make tensors, generate the training graph from the captured one."""

import os
import warnings
from collections.abc import Sequence, Set
from dataclasses import replace
from typing import Literal, get_args

import torch
from torch import fx, nn

from ..base import patterns as patterns_
from ..base.borrowed import pytree
from ..base.errors import CaptureWarning, MethodError, SelectorError, first_line, nearest
from ..graph.legal import is_name, is_path
from ..graph.nodes import aten, backward_slice, flat_outputs
from ..graph.site import Site
from ..method.adapter import PARTS, Adapter, identifier
from ..method.method import Method
from ..method.row_block_method import RowBlocks
from ..program.program import Program
from ..program.selectors import Selection, Where, describe, select
from .budget import choose
from .generate import base_of, generate, rebuild
from .initial_values import first_values
from .per_site_options import Patterns, variants
from .places import candidates, unusable, what

Tied = Literal["refuse", "untie"]


def rewrite(
    program: Program,
    method: Method,
    where: Where = "*",
    *,
    exclude: str | Sequence[str] = (),
    kinds: Sequence[str] | None = None,
    name: str | None = None,
    trainable: str | Sequence[str] = (),
    tied: Tied = "refuse",
    patterns: Patterns | None = None,
    budget: str | float | None = None,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    cache: str | os.PathLike | None = None,
) -> Program:
    """φ(W) at every site that `where` selects. Returns a new Program; `program` stays as it is.

    where, exclude, kinds:  see `select`; a path is a module's or a weight's
    name:       of the adapter (default: the method's, numbered when taken)
    trainable:  parameters of the model to train beside it, such as a new head ("classifier"), by name or module
    tied:       a weight that is tied to another: "refuse" it, or "untie" it (it gets memory of its own)
    patterns:   other options at some sites: {"*.query": {"r": 16, "alpha": 32}}
    budget:     of trained numbers, as "0.02%" of the model's, a share below 1 or a count: chooses the rank `r` or, for
                a method without one, the sites
    dtype:      of the adapter's tensors; float32 by default, float64 in a float64 model
    seed:       of the starting values; every site draws from a generator of its own
    cache:      folder in which to keep what a method computes from the weights (decompositions), by their content, and
                to find it again: see `Cache`

    Raises SelectorError, MethodError.
    """
    check_arguments(program, method, tied)
    captured = base_of(program)
    trained = named_parameters(captured, trainable) | {n for n, p in program.parameters(trainable=True)}
    selection, whole = choose_sites(captured, method, where, exclude, kinds, trained)
    adapter = make_adapter(program, method, selection, whole, name, patterns or {}, budget)
    check_stacks(adapter)
    captured = resolve_ties(captured, adapter.sites, tied)
    dtype = adapter_dtype(program, dtype)
    if clash := trained & {site.name for a in program.adapters for site in a.sites if site.kind != "sequence"}:
        raise MethodError(
            f"{sorted(clash)[0]} has an adapter already and cannot be trained in full beside it; "
            "leave it out of `trainable`."
        )
    added = first_values(program, adapter, captured.home, dtype, seed, cache)
    kept = values_to_keep(program, trained, dtype)
    result = generate(captured, (*program.adapters, adapter), {**kept, **added}, dtype)
    if method.defines("embeddings") or method.defines("keys_values"):
        check_example(result, adapter)
    warn_of_detached(result, adapter)
    return replace(result, history=(*program.history, adapter.name))


def choose_sites(
    captured: Program, method: Method, where: Where, exclude: str | Sequence[str], kinds: Sequence[str] | None,
    trained: Set[str],
) -> tuple[Selection, set[str]]:  # fmt: skip
    """What is selected, and the names of those sites among it that are trained in full and so get no adapter."""
    everything = candidates(captured, method)
    if not everything:
        raise MethodError(f"{method.name} rewrites {what(method)}; {captured.source} has none.")
    try:
        selection = select(everything, where, exclude, kinds)
    except SelectorError as error:
        if why := unusable(captured, method, where):
            raise SelectorError(f"{error} {why}") from None
        raise
    whole = {site.name for site in selection.sites if site.name in trained and site.kind != "sequence"}
    if len(whole) == len(selection.sites):
        raise SelectorError(
            f"Every site that {describe(where)} selects is trained in full: {selection.sites[0].name} …"
        )
    return selection, whole


def make_adapter(
    program: Program, method: Method, selection: Selection, whole: Set[str], name: str | None, patterns: Patterns,
    budget: str | float | None,
) -> Adapter:  # fmt: skip
    """The method at the sites of a selection but for those trained as a `whole`, within a budget if there is one."""
    taken = {adapter.name for adapter in program.adapters}
    sites = tuple(site for site in selection.sites if site.name not in whole)
    left_out = (
        *((site.name, reason) for site, reason in selection.left_out),
        *((site.name, "trained in full") for site in selection.sites if site.name in whole),
    )

    def make(method: Method, sites: Sequence[Site]) -> Adapter:
        own = dict(variants(method, patterns, selection.sites))
        own |= {s.name: at_blocks(own.get(s.name, method), s, selection.blocks[s.name]) for s in sites
                if s.name in selection.blocks}  # fmt: skip
        names = {site.name for site in sites}
        own = tuple((site, changed) for site, changed in own.items() if site in names)
        return Adapter(unique(name or method.name, taken), method, tuple(sites), left_out, own)

    if budget is None:
        return make(method, sites)
    adapter, text = choose(budget, program.counts()[1], method, sites, make)
    over = [(site.name, "over the budget") for site in sites if not adapter.on(site.name)]
    return replace(adapter, left_out=(*left_out, *over), chosen=text)


def values_to_keep(program: Program, trained: Set[str], dtype: torch.dtype) -> dict[str, nn.Parameter]:
    """Copies of what the program has beside its base: trained parameters, tensors of adapters, and what is `trained` in
    full from now on, in `dtype`."""
    tensors = dict(program.tensors())
    paths = [n for n, _ in program.parameters(trainable=True)]
    paths += [path for adapter in program.adapters for _, _, path in adapter.all_paths()]
    kept = {path: tensors[path].detach().clone() for path in dict.fromkeys(paths)}
    for path in trained & set(tensors):
        kept.setdefault(path, tensors[path].detach().to(dtype, copy=True))
    return {n: nn.Parameter(v, requires_grad=tensors[n].requires_grad or n in trained) for n, v in kept.items()}


def check_stacks(adapter: Adapter) -> None:
    """Raises MethodError where a schedule, which decides about one matrix a site, meets a stack of them."""
    for site in adapter.sites:
        if site.stack and any(layer.defines("schedule") for layer in adapter.at(site).layers()):
            raise MethodError(
                f"{adapter.name} at {site.name}: its schedule decides about one matrix a site, and this weight holds "
                f"{site.stack} (experts). Exclude it, or rewrite it by a method without a schedule."
            )


def warn_of_detached(program: Program, adapter: Adapter) -> None:
    """Warns of sites whose tensors no gradient reaches: what they give is detached on every way to an output."""
    outputs = [node for node in flat_outputs(program.graph) if isinstance(node, fx.Node)]
    reached = set().union(
        *(backward_slice(node, through=lambda n: n.target is not aten.detach.default) for node in outputs)
    )
    names = {str(node.target) for node in reached if node.op == "get_attr"}
    lost = [s.name for s in adapter.sites if not names.intersection(adapter.paths(s).values())]
    if lost:
        warnings.warn(
            f"{adapter.name} gets no gradient at {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}: the model "
            "detaches what these weights compute (torch.no_grad, .detach()). Exclude them.",
            CaptureWarning,
            stacklevel=3,
        )


def at_blocks(method: Method, site: Site, only: Sequence[str]) -> Method:
    """The method at some row blocks of a fused weight."""
    names, sizes = zip(*((name, stop - start) for name, start, stop in site.blocks), strict=True)
    return RowBlocks(of=method, only=tuple(only), names=names, sizes=sizes)


def check_arguments(program: Program, method: Method, tied: Tied) -> None:
    if not isinstance(program, Program):
        raise MethodError(f"rewrite takes a captured program, sp.capture(model, inputs), not {type(program).__name__}.")
    if not isinstance(method, Method):
        shown = method.__name__ if isinstance(method, type) else repr(method)
        raise MethodError(f"rewrite takes a method with its options, such as LoRA(r=8), not {shown}.")
    if tied not in get_args(Tied):
        raise MethodError(f"tied is one of {', '.join(get_args(Tied))}, not {tied!r}.")
    if not any(map(method.defines, PARTS)):
        raise MethodError(f"{type(method).__name__} defines none of {', '.join(PARTS)}.")


def check_example(program: Program, adapter: Adapter) -> None:
    """Raises MethodError where a graph with more positions does not run on the example inputs, or gives other shapes
    than the captured one."""
    if program.home.device.type == "meta":
        return
    config = vars(program.module).get("config")
    rows = getattr(config, "max_position_embeddings", getattr(config, "n_positions", None))
    full = f" (positions end at {rows})" if rows else ""
    try:
        after, before = pytree.tree_leaves(program.run()), pytree.tree_leaves(program.captured.run())
    except Exception as error:
        raise MethodError(
            f"{adapter.name}: {program.source} does not run on the example inputs with more positions: "
            f"{type(error).__name__}: {first_line(error)} If its table of positions is full{full}, use fewer virtual "
            "positions or capture it with shorter example inputs."
        ) from error
    shapes = [[tuple(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor)] for leaves in (before, after)]
    if shapes[0] != shapes[1]:
        raise MethodError(f"{adapter.name}: the outputs of {program.source} change from {shapes[0]} to {shapes[1]}.")


def adapter_dtype(program: Program, wanted: torch.dtype | None) -> torch.dtype:
    """One dtype for all adapters of a program."""
    own = {
        p.dtype for a in program.adapters for _, _, path in a.all_paths() for p in [program.module.get_parameter(path)]
    }
    if wanted and own and own != {wanted}:
        raise MethodError(f"The adapters of this program are {own.pop()}; one of {wanted} cannot join them.")
    return wanted or (own.pop() if own else torch.promote_types(torch.float32, program.captured.home.dtype))


def unique(name: str, taken: set[str]) -> str:
    """A name for an adapter, which its file will be read by. Raises MethodError where it can name nothing in code."""
    name, number = identifier(name), 2
    if not (is_name(name) and is_path(name)):
        raise MethodError(f"No adapter can be called {name!r}: name= takes an identifier of Python that is no keyword.")
    if name not in taken:
        return name
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"


def resolve_ties(captured: Program, sites: Sequence[Site], tied: Tied) -> Program:
    """The captured program with the selected tied weights given memory of their own, or an error."""
    names = [site.name for site in sites if site.ties]
    if not names:
        return captured
    if tied == "refuse":
        site = next(s for s in sites if s.ties)
        raise SelectorError(
            f"{site.name} is tied to {', '.join(site.ties)}: rewriting it would change both. Exclude it, or pass "
            f'tied="untie" to give {site.name} memory of its own and leave {site.ties[0]} as it is.'
        )
    tensors = dict(captured.tensors())
    for name in names:
        tensors[name] = nn.Parameter(tensors[name].detach().clone(), requires_grad=False)
    ties = tuple(rest for group in captured.ties if len(rest := group - set(names)) > 1)
    module, before = rebuild(captured, tensors), captured.before or captured
    return replace(captured, module=module, ties=ties, before=before, history=(*captured.history, "untie"))


def named_parameters(program: Program, wanted: str | Sequence[str]) -> set[str]:
    """Parameters that the patterns name, by their own path or that of a module above them."""
    found: set[str] = set()
    names = [n for n, _ in program.module.named_parameters(remove_duplicate=False)]
    for pattern in patterns_.patterns(wanted):
        matched = {n for n in names if pattern.match(ancestors(n)) != "no"}
        if not matched:
            owners = {path for n in names for path in ancestors(n)}
            raise SelectorError(
                f"trainable {pattern.text!r} matches no parameter. Nearest: {', '.join(nearest(pattern.body, owners))}."
            )
        found |= matched
    for name in found:
        if group := next((g for g in program.ties if name in g), None):
            raise SelectorError(f"{name} is tied to {', '.join(sorted(group - {name}))}; it cannot be trained alone.")
    return found


def ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]
