"""Lower one target into a graph: a weight at its calls or as a whole, a bias, the results of a site."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from .adapter import Target, identifier
from .attention import Prefix, attentions
from .distribute import Distribution
from .entry import entry
from .equation import Equation, Operand, trace
from .errors import MethodError
from .forms import Form, form_class, views_of
from .graph_passes import running
from .graphs import aten
from .method import AGAIN
from .modules import again, ends, regions
from .records import Lowered
from .rewriter import Rewriter, copied
from .sequence import Extension
from .sites import PLACES
from .uses import Use, uses
from .values import Values


def equation_of(
    target: Target, operands: Mapping[str, tuple[int, ...]], views: tuple[tuple, ...] = (),
    without: frozenset[str] = frozenset(),
) -> Equation:  # fmt: skip
    """The traced chain of a target, `without` some optimising passes; of one matrix, where the weight is a stack."""
    chain = tuple((adapter.name, adapter.at(site)) for adapter, site in target.chain)
    tensors = tuple(
        (adapter.name, tuple((name, t.shape, t.trainable) for name, t in adapter.entry_tensors(site).items()))
        for adapter, site in target.chain
    )
    return trace(chain, target.part, tuple(operands.items()), tensors, views, running("equation", without))


class Lowering:
    """Rewrites everything that reads one target in one graph, in place.

    readers: the get_attr nodes of the graph by tensor, to which it adds
    dtype:   of the adapters' tensors            device:  of constants in the graph
    hoist:   (target, equation, node) -> name of the buffer that holds a constant of the equation
    lowered: is told the nodes, the cost, and why something is dense
    without: optimising passes that are switched off
    """

    def __init__(
        self,
        graph: fx.Graph,
        readers: dict[str, fx.Node],
        target: Target,
        dtype: torch.dtype,
        device: torch.device,
        hoist: Callable[[Target, Equation, fx.Node], str],
        lowered: Lowered,
        without: frozenset[str] = frozenset(),
    ):
        self.without = without
        self.graph, self.readers, self.target, self.site = graph, readers, target, (site := target.site)
        self.base_dtype, self.adapter_dtype, self.device = site.dtype, dtype, device
        self.hoist, self.lowered = hoist, lowered
        self.prefix = identifier(site.owner if site.name.endswith((".weight", ".bias")) else site.name)
        self.dropout = {a.name: a.at(s).activation_dropout for a, s in target.chain}
        self.nonlinear = {(a.name, name): h for a, s in target.chain for name, h in a.at(s).nonlinear.items()}

    def run(self) -> None:
        whole = {"embeddings": self.embeddings, "keys_values": self.keys_values}
        if self.target.part in whole:
            whole[self.target.part]()
            return
        if self.site.kind in PLACES:
            self.module_output()
            return
        if parameter := self.readers.get(self.target.name):
            self.base_dtype = parameter.meta["val"].dtype
            {"bias": self.bias, "output": self.output, "weight": self.weight}[self.target.part](parameter)

    def weight(self, weight: fx.Node) -> None:
        found = [(use, form_class(self.site, use)) for use in uses(weight)]
        if all(form for _, form in found):
            self.weight_at_uses(weight, found)
        else:
            self.weight_as_a_whole(weight)

    def weight_equation(self, views: tuple[tuple, ...] = ()) -> Equation:
        shape = self.site.out_features, self.site.in_features
        return equation_of(self.target, {"W": shape}, views, self.without)

    def weight_at_uses(self, weight: fx.Node, found: list[tuple[Use, type[Form]]]) -> None:
        known: dict[tuple, Values] = {}
        first = min(use.node for use, _ in found)
        done: dict[fx.Node, fx.Node] = {}
        for use, form in found:
            use = replace(use, x=done.get(use.x, use.x))  # the result of a use before it, W(W(x))
            views = views_of(self.site, use)
            if views not in known:
                known[views] = self.values(self.weight_equation(views), weight, first)
            emit = self.emitter(use.node)
            dtype = use.node.meta["val"].dtype
            made = form(self.site, use, emit)
            result = Distribution(known[views], made, emit, views, dtype, self.dropout).run()
            use.node.replace_all_uses_with(result)
            done[use.node] = result
            result.meta.setdefault("val", use.node.meta["val"])
        for use, _ in found:  # not before: values of another view are emitted in front of the first
            self.graph.erase_node(use.node)

    def weight_as_a_whole(self, weight: fx.Node) -> None:
        if dropping := [adapter for adapter, rate in self.dropout.items() if rate]:
            raise MethodError(
                f"{dropping[0]} at {self.site.name}: the op takes the weight as a whole, so that there is no "
                "operand to drop. Rewrite this site by itself, with dropout=0."
            )
        users, before = self.users(weight)
        equation = self.weight_equation()
        values = self.values(equation, weight, before)
        kind = (
            "grouped convolution" if self.site.groups > 1 else ", ".join(sorted({c.operator for c in self.site.calls}))
        )
        values.note(f"the op form ({kind}) takes the weight as a whole")
        matrix = values.held_in(equation.result, self.base_dtype)
        emit, adapter = self.emitter(before), equation.adapter(equation.result)
        whole = self.site.layout.emit_stored(
            matrix, self.site.shape, lambda target, args, term: emit(target, args, term, adapter), "weight"
        )
        whole.meta["val"] = weight.meta["val"]
        for user in users:
            user.replace_input_with(weight, whole)

    def bias(self, bias: fx.Node) -> None:
        shape = tuple(bias.meta["val"].shape)
        equation = equation_of(self.target, {"b": shape}, without=self.without)
        users, before = self.users(bias)
        result = self.values(equation, bias, before).held_in(equation.result, self.base_dtype)
        for user in users:
            user.replace_input_with(bias, result)

    def output(self, weight: fx.Node) -> None:
        done: dict[fx.Node, fx.Node] = {}
        for use in list(uses(weight)):  # `f` adds uses of the weight
            form = form_class(self.site, use)
            if form is None or form.features != -1 or self.site.stack:
                raise MethodError(
                    f"{self.site.name} ({self.site.kind}) has no result to rewrite: it would need a single input and "
                    "output with the features in the last dimension."
                )
            done[use.node] = self.output_of(use.node, done.get(use.x, use.x))

    def module_output(self) -> None:
        for region in regions(self.graph).get(self.site.name, {}).values():
            x, y = ends(region, self.site.name)
            self.output_of(y, x)

    def output_of(self, y: fx.Node, x: fx.Node) -> fx.Node:
        leading = tuple(range(2, 1 + len(x.meta["val"].shape)))
        shapes = {"x": (*leading, self.site.in_features), "y": (*leading, self.site.out_features)}
        equation = equation_of(self.target, shapes, without=self.without)
        users, dtype = list(y.users), y.meta["val"].dtype
        emit = self.emitter(y.next, like=y)
        plain = emitted(equation, emit)

        def once_more(node: fx.Node) -> fx.Node:
            return emit(node.target, (), f"again_{node.name}", equation.adapter(equation.result))

        def emit_node(node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
            return again(self.graph, x, y, args[0], once_more) if node.target is AGAIN else plain(node, args, kwargs)

        held = {node: self.output_operand(equation, node, x, y, dtype, emit) for node in equation.operands}
        result = copied(equation.graph, held, emit_node)[equation.result]
        result.meta["val"] = y.meta["val"]
        for user in users:
            user.replace_input_with(y, result)
        return result

    def output_operand(
        self, equation: Equation, node: fx.Node, x: fx.Node, y: fx.Node, dtype: torch.dtype, emit: Callable
    ) -> fx.Node | None:
        adapter, tensor = equation.operands[node]
        if not node.users:
            return None
        if tensor == "x" and not adapter and not x.meta["val"].is_floating_point():
            names = ", ".join(a.name for a, _ in self.target.chain)
            raise MethodError(f"{names} at {self.site.name} reads the input, which is no activation but indices here.")
        if not adapter:
            return x if tensor == "x" else y
        if len(equation.shape(node)) == 2:
            self.lowered.per_token += 2 * equation.numel(node)
        held = self.reader(self.target.path(adapter, tensor))
        return held if self.adapter_dtype == dtype else emit(aten.to.dtype, (held, dtype), f"{tensor}_cast", adapter)

    def embeddings(self) -> None:
        lengths, (virtual,) = self.virtual(entry(self.graph).embedded, ("virtual",), (self.site.out_features,))
        Extension(self.graph, sum(lengths.values()), self.emitter_of_chain, self.device).run(virtual)

    def keys_values(self) -> None:
        attention = attentions(self.graph)[self.site.name]
        lengths, (keys, values) = self.virtual(attention, ("keys", "values"), self.site.shape)
        moved = sum(lengths[adapter.name] for adapter, site in self.target.chain if adapter.at(site).moves_positions)
        prefix = Prefix(self.graph, self.site.name, self.emitter_of_chain, self.device)
        prefix.run(keys, values, sum(lengths.values()), moved)

    def virtual(
        self, like: fx.Node, names: tuple[str, ...], width: tuple[int, ...]
    ) -> tuple[dict[str, int], list[fx.Node]]:
        """(adapter -> n, the named results [n, *width] of its equation, joined along n with a later adapter's in
        front), in the dtype of `like`, at the top of the graph."""
        emit = self.emitter(next(node for node in self.graph.nodes if node.op == "call_function"), like)
        lengths: dict[str, int] = {}
        parts: list[list[fx.Node]] = []
        for adapter, site in reversed(self.target.chain):
            equation = equation_of(replace(self.target, chain=((adapter, site),)), {}, without=self.without)
            shapes = [equation.shape(node) for node in equation.results]
            lengths[adapter.name] = shapes[0][0]
            if shapes != [(lengths[adapter.name], *width)] * len(names):
                raise MethodError(
                    f"{self.target.part} of {adapter.name} gives {' and '.join(map(str, map(list, shapes)))} at "
                    f"{site.name}, not {' and '.join([f'[n, {str(list(width))[1:]}'] * len(names))}."
                )
            held = {n: self.reader(adapter.path(site, t)) for n, (_, t) in equation.operands.items() if n.users}
            made = copied(equation.graph, held, emitted(equation, emit))
            parts.append([made[node] for node in equation.results])
        dtype, last = like.meta["val"].dtype, self.target.chain[-1][0].name
        joined = list(parts[0])
        if len(parts) > 1:
            joined = [emit(aten.cat.default, (list(several),), "joined", last) for several in zip(*parts, strict=True)]
        stored = dtype == self.adapter_dtype
        return lengths, [
            node if stored and node.op == "get_attr" else emit(aten.to.dtype, (node, dtype), name, last)
            for node, name in zip(joined, names, strict=True)
        ]

    def emitter_of_chain(self, before: fx.Node, like: fx.Node | None = None) -> Callable[..., fx.Node]:
        """An emitter of nodes that belong to the chain as a whole."""
        emit, last = self.emitter(before, like), self.target.chain[-1][0].name
        return lambda target, args, term, kwargs=None: emit(target, args, term, last, kwargs)

    def users(self, parameter: fx.Node) -> tuple[list[fx.Node], fx.Node]:
        """The readers of a parameter, and the first of them in the graph."""
        return list(parameter.users), min(parameter.users)

    def emitter(self, before: fx.Node, like: fx.Node | None = None) -> Callable[..., fx.Node]:
        """Adds nodes before `before`, named after site, adapter and term, with metadata that says so."""
        rewrite = Rewriter(self.graph)

        def emit(target: Any, args: tuple, term: str, adapter: str, kwargs: Mapping | None = None) -> fx.Node:
            name = "_".join(part for part in (self.prefix, adapter, identifier(term)) if part)
            says = {"site": self.target.name, "adapter": adapter or "base", "term": term}
            node = rewrite.add(target, args, kwargs, like=like or before, before=before, name=name, says=says)
            self.lowered.nodes.append(node.name)
            return node

        return emit

    def reader(self, path: str) -> fx.Node:
        """The get_attr node of a tensor, at the top of the graph."""
        if path not in self.readers:
            with self.graph.inserting_before(next(iter(self.graph.nodes))):
                self.readers[path] = self.graph.create_node("get_attr", path, name=identifier(path))
        return self.readers[path]

    def values(self, equation: Equation, parameter: fx.Node, before: fx.Node) -> Values:
        """Values of the equation, emitted before `before`; W or b is read from `parameter`."""
        emit = self.emitter(before)
        wide = torch.promote_types(torch.float32, self.adapter_dtype)
        full_size = equation.numel(equation.result) if self.target.part == "weight" else 0

        def operand(which: Operand) -> fx.Node:
            adapter, tensor = which
            if adapter:
                node = self.reader(self.target.path(adapter, tensor))
                node.meta["dtype"] = self.adapter_dtype
                return node
            node = parameter
            if tensor == "W":
                node = self.site.layout.emit_matrix(
                    parameter, self.site.shape, lambda target, args, term: emit(target, args, term, ""), "W"
                )
            node.meta["dtype"] = self.base_dtype
            return node

        def hoisted(node: fx.Node) -> fx.Node:
            held = self.reader(self.hoist(self.target, equation, node))
            full = full_size and equation.numel(node) >= full_size
            held.meta["dtype"] = self.base_dtype if full else torch.promote_types(torch.float32, self.base_dtype)
            return held

        stack = self.site.stack if self.target.part == "weight" else 0
        return Values(
            equation, emit, operand, hoisted, wide, full_size, self.lowered, self.nonlinear, stack,
            self.target.shared,
        )  # fmt: skip


def emitted(equation: Equation, emit: Callable[..., fx.Node]) -> Callable[[fx.Node, tuple, dict], fx.Node]:
    """How an operator of an equation is emitted: as its term, which of a product with a tensor is the tensor."""

    def emit_node(node: fx.Node, args: tuple, kwargs: dict) -> fx.Node:
        tensor = node.target is aten.linear.default and node.args[1] in equation.operands
        return emit(node.target, args, equation.term(node.args[1] if tensor else node), equation.adapter(node), kwargs)

    return emit_node
