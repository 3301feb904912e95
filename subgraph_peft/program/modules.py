"""Modules as places in a graph: the nodes of one call of a module, its input and its result."""

from collections.abc import Callable, Iterator

import torch
from torch import fx

from ..base.errors import MethodError
from ..graph.nodes import fixed_size, operator_name
from ..graph.partition import Region, regions
from ..graph.site import Call, Site
from .program import Program
from .sites import find


def module_sites(program: Program) -> Iterator[Site]:
    """Every module that computes a result from one activation and is not itself the layer of a weight."""
    graph = program.captured.graphs()[0]
    layers = {site.owner for site in find(program) if len(site.shape) > 1}
    for path, calls in regions(graph).items():
        if not path or path in layers:
            continue
        found = [pair(region) for region in calls.values()]
        if None in found:
            continue
        x, y = found[0]
        shape = tuple(fixed_size(node.meta["val"].shape[-1]) for node in (y, x))
        if None in shape:
            continue
        yield Site(
            name=path,
            kind="module",
            shape=shape,
            dtype=y.meta["val"].dtype,
            calls=tuple(Call(result.name, "module", operator_name(result)) for _, result in found),
        )


def unfit(program: Program, wanted: Callable[[str], bool]) -> str | None:
    """Why a module is no place, if one is among those whose path is wanted."""
    for path, calls in regions(program.captured.graphs()[0]).items():
        if path and wanted(path):
            try:
                for region in calls.values():
                    ends(region, path)
            except MethodError as error:
                return str(error)
    return None


def pair(region: Region) -> tuple[fx.Node, fx.Node] | None:
    """(x, y) of one call: its one result y, and the activation x with y's leading dimensions that it reads first."""
    ys = results(region)
    if len(ys) != 1:
        return None
    leading = leading_sizes(ys[0])
    for node in region:
        for source in node.all_input_nodes:
            outside = source not in region and source.op != "get_attr" and is_activation(source)
            if outside and leading_sizes(source) == leading:
                return source, ys[0]
    return None


def ends(region: Region, path: str) -> tuple[fx.Node, fx.Node]:
    """The `pair` of one call. Raises MethodError where there is none."""
    if found := pair(region):
        return found
    ys = results(region)
    if len(ys) != 1:
        names = ", ".join(node.name for node in ys) or "none"
        raise MethodError(f"The module {path} has no single result to rewrite (found: {names}).")
    leading = ", ".join(leading_sizes(ys[0]))
    raise MethodError(f"The module {path} reads no activation of its result's leading dimensions [{leading}].")


def results(region: Region) -> list[fx.Node]:
    return [n for n in region if is_activation(n) and any(user not in region for user in n.users)]


def leading_sizes(node: fx.Node) -> list[str]:
    return [str(size) for size in node.meta["val"].shape[:-1]]


def is_activation(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim > 1


def again(graph: fx.Graph, x: fx.Node, y: fx.Node, value: fx.Node, emit: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """y computed once more from `value` in place of x: copies of the nodes that lead from x to y.

    emit: (node) -> a copy of the node, whose arguments are then set
    """
    between: set[fx.Node] = {x}
    for node in graph.nodes:
        if between.intersection(node.all_input_nodes):
            between.add(node)
        if node is y:
            break
    needed, stack = set(), [y]
    while stack:
        node = stack.pop()
        if node in between and node not in needed and node is not x:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    copies: dict[fx.Node, fx.Node] = {x: value}
    for node in [n for n in graph.nodes if n in needed]:
        copy = emit(node)
        copy.args = fx.node.map_arg(node.args, lambda n: copies.get(n, n))
        copy.kwargs = fx.node.map_arg(node.kwargs, lambda n: copies.get(n, n))
        copy.meta |= {key: node.meta[key] for key in ("val",) if key in node.meta}
        copies[node] = copy
    return copies[y]
