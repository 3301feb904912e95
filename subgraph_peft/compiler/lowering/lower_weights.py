"""Lower what rewrites a weight or a bias: φ(W) at every call of the weight, or as a whole."""

from dataclasses import replace

import torch
from torch import fx

from ...base.errors import MethodError
from ...graph.uses import Use, uses
from ...method.equation import Equation, Operand
from .distribute import Distribution
from .equation_values import Values
from .lower import Lowering, equation_of
from .op_forms import OpForm, form_class, views_of


def lower_weight(lowering: Lowering, weight: fx.Node) -> None:
    """x φ(W)ᵀ at each use of W [out, in] where every operator that reads it has a form; else φ(W) in the place of W."""
    found = [(use, form_class(lowering.site, use)) for use in uses(weight)]
    if all(form for _, form in found):
        lower_at_uses(lowering, weight, found)
    else:
        lower_as_a_whole(lowering, weight)


def lower_at_uses(lowering: Lowering, weight: fx.Node, found: list[tuple[Use, type[OpForm]]]) -> None:
    """At each use, x φ(W)ᵀ + b in the place of x Wᵀ + b: x […, in], result […, out]."""
    known: dict[tuple, Values] = {}
    first = min(use.node for use, _ in found)
    done: dict[fx.Node, fx.Node] = {}
    for use, form in found:
        use = replace(use, x=done.get(use.x, use.x))  # the result of a use before it, W(W(x))
        views = views_of(lowering.site, use)
        if views not in known:
            known[views] = values(lowering, weight_equation(lowering, views), weight, first)
        emit = lowering.emitter(use.node)
        dtype = use.node.meta["val"].dtype
        made = form(lowering.site, use, emit)
        result = Distribution(known[views], made, emit, views, dtype, lowering.dropout).run()
        use.node.replace_all_uses_with(result)
        done[use.node] = result
        result.meta.setdefault("val", use.node.meta["val"])
    for use, _ in found:  # not before: values of another view are emitted in front of the first
        lowering.graph.erase_node(use.node)


def lower_as_a_whole(lowering: Lowering, weight: fx.Node) -> None:
    """φ(W), stored as W is, in the place of W for all its readers; computed each step."""
    site = lowering.site
    if dropping := [adapter for adapter, rate in lowering.dropout.items() if rate]:
        raise MethodError(
            f"{dropping[0]} at {site.name}: the op takes the weight as a whole, so that there is no "
            "operand to drop. Rewrite this site by itself, with dropout=0."
        )
    users, before = readers_of(weight)
    equation = weight_equation(lowering)
    own = values(lowering, equation, weight, before)
    kind = "grouped convolution" if site.groups > 1 else ", ".join(sorted({c.operator for c in site.calls}))
    own.note(f"the op form ({kind}) takes the weight as a whole")
    matrix = own.held_in(equation.result, lowering.base_dtype)
    emit, adapter = lowering.emitter(before), equation.adapter(equation.result)
    whole = site.layout.emit_stored(
        matrix, site.shape, lambda target, args, term: emit(target, args, term, adapter), "weight"
    )
    whole.meta["val"] = weight.meta["val"]
    for user in users:
        user.replace_input_with(weight, whole)


def lower_bias(lowering: Lowering, bias: fx.Node) -> None:
    """φ(b) [out] in the place of b for all its readers."""
    equation = equation_of(lowering.target, {"b": tuple(bias.meta["val"].shape)}, without=lowering.without)
    users, before = readers_of(bias)
    result = values(lowering, equation, bias, before).held_in(equation.result, lowering.base_dtype)
    for user in users:
        user.replace_input_with(bias, result)


def readers_of(parameter: fx.Node) -> tuple[list[fx.Node], fx.Node]:
    """The readers of a parameter, and the first of them in the graph."""
    return list(parameter.users), min(parameter.users)


def weight_equation(lowering: Lowering, views: tuple[tuple, ...] = ()) -> Equation:
    shape = lowering.site.out_features, lowering.site.in_features
    return equation_of(lowering.target, {"W": shape}, views, lowering.without)


def values(lowering: Lowering, equation: Equation, parameter: fx.Node, before: fx.Node) -> Values:
    """Values of the equation, emitted before `before`; W or b is read from `parameter`."""
    target, site = lowering.target, lowering.site
    emit = lowering.emitter(before)
    is_weight = target.part == "weight"
    full_size = equation.numel(equation.result) if is_weight else 0

    def operand(which: Operand) -> fx.Node:
        adapter, tensor = which
        if adapter:
            node = lowering.reader(target.path(adapter, tensor))
            node.meta["dtype"] = lowering.adapter_dtype
            return node
        node = parameter
        if tensor == "W":
            node = site.layout.emit_matrix(
                parameter, site.shape, lambda target, args, term: emit(target, args, term, ""), "W"
            )
        node.meta["dtype"] = lowering.base_dtype
        return node

    def hoisted(node: fx.Node) -> fx.Node:
        held = lowering.reader(lowering.hoist(target, equation, node))
        full = full_size and equation.numel(node) >= full_size
        wide = torch.promote_types(torch.float32, lowering.base_dtype)
        held.meta["dtype"] = lowering.base_dtype if full else wide
        return held

    return Values(
        equation, emit, operand, hoisted, torch.promote_types(torch.float32, lowering.adapter_dtype), full_size,
        lowering.lowered, lowering.nonlinear, site.stack if is_weight else 0, target.shared,
    )  # fmt: skip
