"""Rewrite a program by a method: choose sites, make tensors, generate the training graph from the captured one."""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import fx, nn

from . import graphs
from .adapter import Adapter, identifier
from .distribute import Lowered
from .equation import Equation
from .errors import MethodError, SelectorError, nearest
from .lower import META, SiteLowering, chain_of
from .method import Method, initial
from .module import Home, attach, build
from .program import Program
from .selectors import Where, patterns, select
from .sites import Site, find

Tied = Literal["refuse", "untie"]


@dataclass(frozen=True)
class Constant:
    """A value that no trainable tensor changes: computed when the rewrite is made, read from a buffer."""

    site: Site
    part: str
    equation: Equation
    node: fx.Node


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
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Program:
    """φ(W) at every site that `where` selects. Returns a new Program; `program` stays as it is.

    where, exclude, kinds:  see `select`; a path is a module's or a weight's
    name:       of the adapter (default: the method's, numbered when taken)
    trainable:  parameters of the model to train beside it, such as a new head ("classifier"), by name or module
    tied:       a weight that is tied to another: "refuse" it, or "untie" it (it gets memory of its own)
    dtype:      of the adapter's tensors; float32 by default, float64 in a float64 model
    seed:       of the starting values; every site draws from a generator of its own

    Raises SelectorError, MethodError.
    """
    captured = program.captured
    candidates = [site for site in find(captured) if (site.kind == "bias") == is_bias_method(method)]
    if not candidates:
        raise MethodError(f"{method.name} rewrites {'biases' if is_bias_method(method) else 'weights'}; {captured.source} has none.")
    selection = select(candidates, where, exclude, kinds)
    captured = resolve_ties(captured, selection.sites, tied)
    home = captured.module.home
    dtype = dtype or torch.promote_types(torch.float32, home.dtype)
    taken = {adapter.name for adapter in program.adapters}
    adapter = Adapter(
        name=unique(name or method.name, taken),
        method=method,
        sites=selection.sites,
        left_out=tuple((site.name, reason) for site, reason in selection.left_out),
    )
    tensors = dict(program.module.tensors())
    trained = named_parameters(captured, trainable)
    if clash := trained & {site.name for a in (*program.adapters, adapter) for site in a.sites}:
        raise MethodError(f"{sorted(clash)[0]} cannot be trained in full and through an adapter; exclude it from one of them.")
    added: dict[str, nn.Parameter] = {}
    with torch.no_grad():
        for site in adapter.sites:
            W = current_weight(program, site, tensors)
            generator = torch.Generator().manual_seed((seed << 32) + zlib.crc32(site.name.encode()))
            for tensor, (declared, value) in initial(method, site, W, generator).items():
                value = value.detach().to(device=home.device, dtype=dtype, copy=True).contiguous()
                added[adapter.path(site, tensor)] = nn.Parameter(value, requires_grad=declared.trainable)
    kept = {n: p.detach().clone() for n, p in program.parameters(trainable=True)}
    kept |= {path: tensors[path].detach().clone() for a in program.adapters for _, _, path in a.all_paths() if path not in kept}
    for path in trained:
        kept.setdefault(path, tensors[path].detach().to(dtype, copy=True))
    old = {n: nn.Parameter(v, requires_grad=tensors[n].requires_grad or n in trained) for n, v in kept.items()}
    result = generate(captured, (*program.adapters, adapter), {**old, **added}, dtype)
    return replace(result, history=(*program.history, adapter.name))


def is_bias_method(method: Method) -> bool:
    return method.defines("bias") and not method.defines("weight")


def unique(name: str, taken: set[str]) -> str:
    name, number = identifier(name), 2
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
    tensors = dict(captured.module.tensors())
    for name in names:
        tensors[name] = nn.Parameter(tensors[name].detach().clone(), requires_grad=False)
    ties = tuple(rest for group in captured.ties if len(rest := group - set(names)) > 1)
    return replace(captured, module=rebuild(captured, tensors), ties=ties, history=(*captured.history, "untie"))


def named_parameters(program: Program, wanted: str | Sequence[str]) -> set[str]:
    """Parameters that the patterns name, by their own path or that of a module above them."""
    found: set[str] = set()
    names = [n for n, _ in program.module.named_parameters(remove_duplicate=False)]
    for pattern in patterns(wanted):
        matched = {n for n in names if pattern.match(ancestors(n)) != "no"}
        if not matched:
            owners = {path for n in names for path in ancestors(n)}
            raise SelectorError(f"trainable {pattern.text!r} matches no parameter. Nearest: {', '.join(nearest(pattern.body, owners))}.")
        found |= matched
    for name in found:
        if group := next((g for g in program.ties if name in g), None):
            raise SelectorError(f"{name} is tied to {', '.join(sorted(group - {name}))}; it cannot be trained alone.")
    return found


def ancestors(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(len(parts), 0, -1)]


def current_weight(program: Program, site: Site, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The matrix φ(W) under the adapters that are there already (the bias for a bias site), float32 or wider."""
    part = "bias" if site.kind == "bias" else "weight"
    return evaluate(program.adapters, part, site, site.name, tensors, torch.float32)


def evaluate(
    adapters: Sequence[Adapter],
    part: str,
    site: Site,
    name: str,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> torch.Tensor:
    """φₙ(…φ₁(W)) of the tensor `name` at a site, computed in `dtype` or wider; a matrix [out, in] or a bias."""
    stored = tensors[name].detach()
    value = stored.to(torch.promote_types(dtype, stored.dtype))
    value = site.matrix(value) if part == "weight" else value
    for adapter in adapters:
        if adapter.on(site.name) and adapter.method.defines(part):
            given = {t: tensors[path].detach().to(value.dtype) for t, path in adapter.paths(site).items()}
            value = adapter.method.evaluate(part, value, tensors=given)
    return value


def generate(captured: Program, adapters: tuple[Adapter, ...], own: Mapping[str, nn.Parameter], dtype: torch.dtype) -> Program:
    """The program of `captured` under `adapters`: every graph rewritten anew from the captured one.

    own: the adapters' tensors and the trained parameters of the model, by qualified name
    """
    base = dict(captured.module.tensors())
    tensors = {**base, **own}
    by_site: dict[str, list[Adapter]] = {}
    sites: dict[str, Site] = {}
    for adapter in adapters:
        for site in adapter.sites:
            by_site.setdefault(site.name, []).append(adapter)
            sites[site.name] = site
    constants: dict[str, Constant] = {}

    def hoist(site: Site, part: str, equation: Equation, node: fx.Node) -> str:
        adapter = equation.adapter(node) or by_site[site.name][0].name
        known = {c.node: name for name, c in constants.items() if c.site is site and c.part == part}
        if node not in known:
            path = f"{site.name}_{adapter}.constant_{len([c for c in constants.values() if c.site is site])}"
            constants[path] = Constant(site, part, equation, node)
            known[node] = path
        return known[node]

    lowered: dict[str, Lowered] = {}
    rewritten = []
    for graph in captured.module.graphs():
        graph, _ = graphs.clone(graph)
        cast_trained(graph, own, base)
        for name, its_adapters in by_site.items():
            lowering = SiteLowering(graph, sites[name], its_adapters, (captured.module.home.dtype, dtype), hoist)
            outcome = lowering.run()
            lowered.setdefault(name, outcome)
        graphs.sweep(graph)
        rewritten.append(graph)
    module = rebuild(captured, tensors, *rewritten)
    program = replace(captured, module=module, adapters=adapters, base=captured, lowered=lowered, constants=constants)
    refresh(program)
    return program


def cast_trained(graph: fx.Graph, own: Mapping[str, nn.Parameter], base: Mapping[str, torch.Tensor]) -> None:
    """A parameter of the model that trains in a wider dtype is cast to the model's where it is read."""
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in own and name in base and own[name].dtype != base[name].dtype:
            users = list(node.users)
            with graph.inserting_before(node.next):
                cast = graph.call_function(graphs.aten.to.dtype, (node, base[name].dtype))
            cast.meta = {"val": node.meta["val"], "custom": {META: {"site": name, "adapter": "trainable", "term": "cast"}}}
            for user in users:
                user.replace_input_with(node, cast)


def rebuild(captured: Program, tensors: Mapping[str, Any], *rewritten: fx.Graph) -> nn.Module:
    """A module like the captured one, with these tensors and graphs."""
    source = captured.module
    training, eval_graph = [*(rewritten or source.graphs()), None][:2]
    saved = set(source.state_dict(keep_vars=True))
    volatile = {name for name, _ in source.named_buffers(remove_duplicate=False) if name not in saved}
    tensors = {**tensors, **{name: child for name, child in source.named_children() if isinstance(child, fx.GraphModule)}}
    module = build(
        source.signature, training, eval_graph, tensors, volatile, Home(*source.home), type(source).__name__,
        config=getattr(source, "config", None),
    )  # fmt: skip
    return module.train(source.training)


@torch.no_grad()
def refresh(program: Program) -> None:
    """Compute the constants of the equations from the tensors as they are now."""
    tensors = dict(program.module.tensors())
    for path, constant in program.constants.items():
        site, equation = constant.site, constant.equation
        name = site.bias if constant.part == "bias" and site.kind != "bias" else site.name
        stored = tensors[name].detach()
        wide = torch.promote_types(torch.float32, stored.dtype)

        def value(node: fx.Node, site: Site = site, equation: Equation = equation, stored=stored, wide=wide) -> torch.Tensor:
            adapter, tensor = equation.operands[node]
            if not adapter:
                return site.matrix(stored.to(wide)) if tensor == "W" else stored.to(wide)
            return tensors[f"{site.name}_{adapter}.{tensor}"].detach().to(wide)

        result = run_to(constant.node, value)
        full = constant.part == "weight" and result.numel() >= site.out_features * site.in_features
        buffer = result.to(stored.dtype if full else wide).contiguous()
        attach(program.module, path, buffer, persistent=False)


def run_to(node: fx.Node, leaf: Any) -> torch.Tensor:
    """The value of a node of an equation, given those of its leaves."""
    memo: dict[fx.Node, torch.Tensor] = {}

    def of(current: fx.Node) -> torch.Tensor:
        if current not in memo:
            if current.op == "placeholder":
                memo[current] = leaf(current)
            else:
                memo[current] = current.target(*fx.node.map_arg(current.args, of), **fx.node.map_arg(current.kwargs, of))
        return memo[current]

    return of(node)


__all__ = ["rewrite", "generate", "evaluate", "refresh", "chain_of"]
