"""Lower what rewrites activations: the result of a layer or a module, virtual positions, keys and values."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import fx

from ...base.errors import MethodError
from ...graph.nodes import aten
from ...graph.partition import regions
from ...graph.rewriter import copied
from ...graph.sequence.attention import attentions
from ...graph.sequence.token_embedding import embedding_entry
from ...graph.uses import uses
from ...method.equation import Equation
from ...method.method import AGAIN
from ...program.modules import again, ends
from .lower import Lowering, equation_of
from .op_forms import form_class
from .prefix import Prefix
from .virtual_positions import Extension


def lower_output(lowering: Lowering, weight: fx.Node) -> None:
    """f(x, y) in the place of y = x Wᵀ + b at each use of W: x […, in], y and f(x, y) […, out]."""
    site = lowering.site
    done: dict[fx.Node, fx.Node] = {}
    for use in list(uses(weight)):  # `f` adds uses of the weight
        form = form_class(site, use)
        if form is None or form.features != -1 or site.stack:
            raise MethodError(
                f"{site.name} ({site.kind}) has no result to rewrite: it would need a single input and "
                "output with the features in the last dimension."
            )
        done[use.node] = lower_result(lowering, use.node, done.get(use.x, use.x))


def lower_module(lowering: Lowering) -> None:
    """f(x, y) in the place of the result y of each call of a module, whose first activation is x."""
    for region in regions(lowering.graph).get(lowering.site.name, {}).values():
        x, y = ends(region, lowering.site.name)
        lower_result(lowering, y, x)


def lower_result(lowering: Lowering, y: fx.Node, x: fx.Node) -> fx.Node:
    """f(x, y) […, out] in the place of y […, out], with x […, in]."""
    leading = tuple(range(2, 1 + len(x.meta["val"].shape)))
    shapes = {"x": (*leading, lowering.site.in_features), "y": (*leading, lowering.site.out_features)}
    equation = equation_of(lowering.target, shapes, without=lowering.without)
    users, emit = list(y.users), lowering.emitter(y.next, like=y)
    plain = emitted(equation, emit)

    def once_more(node: fx.Node) -> fx.Node:
        return emit(node.target, (), f"again_{node.name}", equation.adapter(equation.result))

    def emit_node(node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
        return again(lowering.graph, x, y, args[0], once_more) if node.target is AGAIN else plain(node, args, kwargs)

    held = {node: operand(lowering, equation, node, x, y, emit) for node in equation.operands if node.users}
    result = copied(equation.graph, held, emit_node)[equation.result]
    result.meta["val"] = y.meta["val"]
    for user in users:
        user.replace_input_with(y, result)
    return result


def operand(
    lowering: Lowering, equation: Equation, node: fx.Node, x: fx.Node, y: fx.Node, emit: Callable[..., fx.Node]
) -> fx.Node:  # fmt: skip
    """x, y, or a tensor of an adapter in the dtype of y."""
    adapter, tensor = equation.operands[node]
    if tensor == "x" and not adapter and not x.meta["val"].is_floating_point():
        names = ", ".join(a.name for a, _ in lowering.target.chain)
        raise MethodError(f"{names} at {lowering.site.name} reads the input, which is no activation but indices here.")
    if not adapter:
        return x if tensor == "x" else y
    if len(equation.shape(node)) == 2:
        lowering.lowered.per_token += 2 * equation.numel(node)
    held, dtype = lowering.reader(lowering.target.path(adapter, tensor)), y.meta["val"].dtype
    return held if lowering.adapter_dtype == dtype else emit(aten.to.dtype, (held, dtype), f"{tensor}_cast", adapter)


def emitted(equation: Equation, emit: Callable[..., fx.Node]) -> Callable[[fx.Node, tuple, Mapping], fx.Node]:
    """How an operator of an equation is emitted: as its term, which of a product with a tensor is the tensor."""

    def emit_node(node: fx.Node, args: tuple, kwargs: Mapping) -> fx.Node:
        tensor = node.target is aten.linear.default and node.args[1] in equation.operands
        return emit(node.target, args, equation.term(node.args[1] if tensor else node), equation.adapter(node), kwargs)

    return emit_node


def lower_embeddings(lowering: Lowering) -> None:
    """P [n, d] in front of the first real token of every row of the embedded sequence [batch, length, d]."""
    embedded = embedding_entry(lowering.graph).embedded
    lengths, (virtual,) = virtual_positions(lowering, embedded, ("virtual",), (lowering.site.out_features,))
    Extension(lowering.graph, sum(lengths.values()), lowering.emitter_of_chain, lowering.device).run(virtual)


def lower_keys_values(lowering: Lowering) -> None:
    """K and V [n, heads, width] in front of the keys and values of one attention."""
    site, target = lowering.site, lowering.target
    attention = attentions(lowering.graph)[site.name]
    lengths, (keys, values) = virtual_positions(lowering, attention, ("keys", "values"), site.shape)
    moved = sum(lengths[adapter.name] for adapter, at in target.chain if adapter.at(at).moves_positions)
    prefix = Prefix(lowering.graph, site.name, lowering.emitter_of_chain, lowering.device)
    prefix.run(keys, values, sum(lengths.values()), moved)


def virtual_positions(
    lowering: Lowering, like: fx.Node, names: tuple[str, ...], width: tuple[int, ...]
) -> tuple[dict[str, int], list[fx.Node]]:
    """(adapter -> n, the named results [n, *width] of its equation, joined along n with a later adapter's in
    front), in the dtype of `like`, at the top of the graph."""
    emit = lowering.emitter(next(node for node in lowering.graph.nodes if node.op == "call_function"), like)
    lengths: dict[str, int] = {}
    parts: list[list[fx.Node]] = []
    for adapter, site in reversed(lowering.target.chain):
        alone = replace(lowering.target, chain=((adapter, site),))
        equation = equation_of(alone, {}, without=lowering.without)
        shapes = [equation.shape(node) for node in equation.results]
        lengths[adapter.name] = shapes[0][0]
        if shapes != [(lengths[adapter.name], *width)] * len(names):
            raise MethodError(
                f"{alone.part} of {adapter.name} gives {' and '.join(map(str, map(list, shapes)))} at "
                f"{site.name}, not {' and '.join([f'[n, {str(list(width))[1:]}'] * len(names))}."
            )
        held = {n: lowering.reader(adapter.path(site, t)) for n, (_, t) in equation.operands.items() if n.users}
        made = copied(equation.graph, held, emitted(equation, emit))
        parts.append([made[node] for node in equation.results])
    last = lowering.target.chain[-1][0].name
    joined = list(parts[0])
    if len(parts) > 1:
        joined = [emit(aten.cat.default, (list(several),), "joined", last) for several in zip(*parts, strict=True)]
    dtype: torch.dtype = like.meta["val"].dtype
    stored = dtype == lowering.adapter_dtype
    return lengths, [
        node if stored and node.op == "get_attr" else emit(aten.to.dtype, (node, dtype), name, last)
        for node, name in zip(joined, names, strict=True)
    ]
