"""Sites: the weight parameters of a program, with every place that uses them."""

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..base.text import Table, grouped
from ..graph.layout import MATRIX, Layout, turned, whole
from ..graph.nodes import flat_outputs, operator_name
from ..graph.operators import LAYERS, SHAPED, Kind, is_a, operand
from ..graph.row_blocks import blocks_of
from ..graph.site import VECTORS, Call, Site
from ..graph.uses import Use, uses

if TYPE_CHECKING:
    from .program import Program


class SiteTable(tuple[Site, ...]):
    """Sites that print as a table.

    unread:  parameters of two or more dimensions that are no sites, since no output depends on them
    unowned: tensors that operators take as weights, but that are no parameters
    """

    unread: tuple[str, ...] = ()
    unowned: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = str(site_table(self))
        unread = (f"no site: {name} (no output depends on it)" for name in self.unread)
        unowned = (f"no site: {name} (a constant or a buffer, not a parameter)" for name in self.unowned)
        return "\n".join([text, *unread, *unowned])


def site_table(sites: Iterable[Site]) -> Table:
    """One row a site, alike layers together."""
    columns = ["module", ">sites", "form", "layout", "shape", ">out", ">in", ">calls", "bias", "note"]
    return Table("Sites", columns, grouped(map(site_cells, sites))).without_empty()


def site_cells(site: Site) -> tuple[str, ...]:
    notes = [f"tied to {', '.join(site.ties)}"] if site.ties else []
    notes += ["output head"] if site.head else []
    notes += [", ".join(sorted({call.operator for call in site.calls}))] if site.kind == "other" else []
    notes += [f"{site.groups} groups"] if site.groups > 1 else []
    notes += [f"{site.stack} experts"] if site.stack else []
    notes += [f"blocks {', '.join(name for name, _, _ in site.blocks)}"] if site.blocks else []
    return (
        site.name, site.kind, site.layout_text, "×".join(map(str, site.shape)), str(site.out_features),
        str(site.in_features), str(len(site.calls)), "yes" if site.bias else "", "; ".join(notes),
    )  # fmt: skip


def sites(program: "Program") -> SiteTable:
    """Every weight of two or more dimensions in the captured graph."""
    table = SiteTable(s for s in find(program) if s.kind not in VECTORS)
    listed = {name for site in table for name in (site.name, *site.ties)}
    parameters = program.captured.module.named_parameters()
    table.unread = tuple(name for name, p in parameters if p.ndim > 1 and name not in listed)
    table.unowned = tuple(unowned(program.captured))
    return table


def unowned(captured: "Program") -> Iterator[str]:
    """Floating-point tensors of two or more dimensions, not parameters, that an operator takes as its weight."""
    own = dict(captured.module.named_parameters(remove_duplicate=False))
    for node in captured.graphs()[0].find_nodes(op="get_attr"):
        value = node.meta.get("val")
        if str(node.target) in own or not isinstance(value, torch.Tensor):
            continue
        is_weight = any(is_a(use.node, LAYERS) and use.layout for use in uses(node))
        if value.ndim > 1 and value.is_floating_point() and is_weight:
            yield str(node.target)


def find(program: "Program") -> Iterator[Site]:
    """Every parameter of the captured graph: weights first, then vectors (biases, norm scales)."""
    captured = program.captured
    tensors = dict(captured.tensors())
    graph = captured.graphs()[0]
    vectors: list[Site] = []
    for node in graph.find_nodes(op="get_attr"):
        name, tensor = str(node.target), tensors.get(str(node.target))
        if not isinstance(tensor, torch.nn.Parameter) or not node.users:
            continue
        ties = tuple(sorted(other for group in captured.ties if name in group for other in group - {name}))
        common = {"name": name, "shape": tuple(tensor.shape), "dtype": tensor.dtype, "ties": ties}
        if tensor.ndim == 1:
            kind = "bias" if is_bias(node) else "scale"
            calls = tuple(Call(user.name, kind, operator_name(user)) for user in node.users)
            vectors.append(Site(kind=kind, calls=calls, **common))
        elif tensor.ndim >= 2:
            yield weight_site(graph, list(uses(node)), common)
    yield from vectors


def weight_site(graph: fx.Graph, found: Sequence[Use], common: dict) -> Site:
    """The site of a weight, from all its uses."""
    name, shape = common["name"], common["shape"]
    layout = layout_of(found)
    forms = list(dict.fromkeys(use.form for use in found))
    if len(forms) == 1 and (layout or forms[0] != "other"):
        kind = forms[0]
    else:
        kind = "other" if layout is None else "embedding" if "embedding" in forms else "matmul"
    if kind == "linear" and name.endswith("in_proj_weight"):
        kind = "packed"
    biases = {bias_name(use.bias) for use in found}
    site = Site(
        kind=kind,
        calls=tuple(Call(use.node.name, use.form, operator_name(use.node)) for use in found),
        bias=biases.pop() if len(biases) == 1 else None,
        head=is_head(graph, [use.node for use in found]),
        groups=max((use.groups for use in found), default=1),
        layout=layout or (whole(shape) if len(shape) > 2 else MATRIX),
        **common,
    )
    return replace(site, blocks=blocks_of(site, found))


def layout_of(found: Sequence[Use]) -> Layout | None:
    """The one layout of all uses, up to a transpose, or None where they disagree or one takes the weight whole."""
    first = found[0].layout if found else None
    if first is None or any(use.layout not in (first, turned(first)) for use in found):
        return None
    return first


def bias_name(node: fx.Node | None) -> str | None:
    return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None


def is_bias(node: fx.Node) -> bool:
    return str(node.target).rpartition(".")[2].endswith("bias")


def is_head(graph: fx.Graph, calls: Sequence[fx.Node]) -> bool:
    """Whether a call's result is an output of the graph, or in one, however it is laid out there."""
    outputs = set(flat_outputs(graph))
    found: set[fx.Node] = set()
    frontier = [node for node in calls if not is_a(node, Kind.LOOKUP)]
    while frontier:
        node = frontier.pop()
        found.add(node)
        frontier.extend(user for user in node.users if user not in found and lays_out(user, node))
    return not found.isdisjoint(outputs)


def lays_out(user: fx.Node, node: fx.Node) -> bool:
    """Whether the value of `user` is made of the entries of `node`."""
    if user.target is operator.getitem:
        return is_a(node, Kind.SPLIT | Kind.UNBIND)
    if not is_a(user, SHAPED):
        return False
    shown = operand(user)
    return node in shown if isinstance(shown, (list, tuple)) else shown is node
