"""Lower the adapters of one site into a graph: its calls, its weight, its bias, its output."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from .adapter import Adapter, identifier
from .distribute import Distribution, Lowered, Values
from .equation import Equation, Operand, describe, trace
from .errors import MethodError
from .forms import form_class
from .graphs import aten
from .sites import Site, calls_of

META = "subgraph_peft"


def chain_of(adapters: Sequence[Adapter], part: str) -> tuple[tuple[str, Any], ...]:
    """(adapter name, method) of those adapters that define `part`, in order of application."""
    return tuple((a.name, a.method) for a in adapters if a.method.defines(part))


def equation_of(adapters: Sequence[Adapter], part: str, site: Site, operands: Mapping[str, tuple[int, ...]]) -> Equation:
    chain = chain_of(adapters, part)
    specs = {
        adapter.name: {n: (t.shape, t.trainable) for n, t in adapter.method.tensors(site).items()}
        for adapter in adapters
        if adapter.method.defines(part)
    }
    return trace(chain, part, tuple(operands.items()), describe(specs))


class SiteLowering:
    """Rewrites everything that reads one site in one graph.

    hoist: (equation node, part) -> name of the buffer that holds a constant of the equation
    """

    def __init__(
        self,
        graph: fx.Graph,
        site: Site,
        adapters: Sequence[Adapter],
        dtypes: tuple[torch.dtype, torch.dtype],
        hoist: Callable[[Site, str, Equation, fx.Node], str],
    ):
        self.graph, self.site, self.adapters = graph, site, adapters
        self.base_dtype, self.adapter_dtype = dtypes
        self.hoist = hoist
        self.lowered = Lowered()
        self.prefix = identifier(site.owner if site.name.endswith((".weight", ".bias")) else site.name)
        self.tensors: dict[str, fx.Node] = {}

    def run(self) -> Lowered:
        by_name = {node.name: node for node in self.graph.nodes}
        weight = next((n for n in self.graph.find_nodes(op="get_attr") if n.target == self.site.name), None)
        if weight is None:
            return self.lowered
        if self.site.kind == "bias":
            self.bias(weight)
            return self.lowered
        if self.site.bias and chain_of(self.adapters, "bias"):
            self.bias(next(n for n in self.graph.find_nodes(op="get_attr") if n.target == self.site.bias))
        found = [call for call, _ in calls_of(weight)]
        calls = [by_name[call.node] for call in found]
        forms = {call.node: form_class(self.site, call.form) for call in found}
        factored = all(forms.values())
        inputs = {call: forms[call.name](self.site, call, self.never).x for call in calls} if factored else {}
        results = {call: call for call in calls}
        if chain_of(self.adapters, "weight"):
            if factored:
                results = self.weight_at_calls(weight, calls, forms)
            else:
                self.weight_itself(weight)
        if chain_of(self.adapters, "output"):
            if not factored:
                raise MethodError(f"{self.site.name} ({self.site.kind}) has no single input and output to rewrite.")
            for call in calls:
                self.output(call, inputs[call], results[call])
        return self.lowered

    def never(self, *_: object) -> fx.Node:
        raise AssertionError("the form of a call is only read here")

    # emission

    def emitter(self, before: fx.Node, like: fx.Node) -> Callable[..., fx.Node]:
        def emit(target: Any, args: tuple, term: str, adapter: str, kwargs: Mapping | None = None) -> fx.Node:
            name = "_".join(part for part in (self.prefix, adapter, identifier(term)) if part)
            with self.graph.inserting_before(before):
                node = self.graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
            node.meta = {k: v for k, v in like.meta.items() if k in ("nn_module_stack", "stack_trace")}
            node.meta["custom"] = {META: {"site": self.site.name, "adapter": adapter or "base", "term": term}}
            self.lowered.nodes.append(node.name)
            return node

        return emit

    def reader(self, path: str) -> fx.Node:
        """The get_attr node of a tensor, at the top of the graph."""
        if path not in self.tensors:
            first = next(iter(self.graph.nodes))
            found = next((n for n in self.graph.find_nodes(op="get_attr") if n.target == path), None)
            if found is None:
                with self.graph.inserting_before(first):
                    found = self.graph.create_node("get_attr", path, name=identifier(path))
            self.tensors[path] = found
        return self.tensors[path]

    def values(self, equation: Equation, part: str, target: fx.Node, before: fx.Node, full_size: int) -> Values:
        """Values of the equation, emitted before `before`; W or b is read from `target`."""
        emit = self.emitter(before, before)
        adapters = {adapter.name: adapter for adapter in self.adapters}

        def operand(which: Operand) -> fx.Node:
            adapter, tensor = which
            if adapter:
                node = self.reader(adapters[adapter].path(self.site, tensor))
                node.meta["dtype"] = self.adapter_dtype
                return node
            node = target
            if tensor == "W":
                if self.site.transposed:
                    node = emit(aten.t.default, (target,), "W", "")
                elif len(self.site.shape) > 2:
                    node = emit(aten.reshape.default, (target, [self.site.shape[0], -1]), "W", "")
            node.meta["dtype"] = self.base_dtype
            return node

        def hoisted(node: fx.Node) -> fx.Node:
            held = self.reader(self.hoist(self.site, part, equation, node))
            full = equation.numel(node) >= full_size
            held.meta["dtype"] = self.base_dtype if full else self.adapter_dtype
            return held

        return Values(equation, emit, operand, hoisted, self.adapter_dtype, full_size, self.lowered)

    # rewrites

    def weight_at_calls(self, weight: fx.Node, calls: list[fx.Node], forms: dict) -> dict[fx.Node, fx.Node]:
        shape = (self.site.out_features, self.site.in_features)
        equation = equation_of(self.adapters, "weight", self.site, {"W": shape})
        dropout = {adapter.name: adapter.method.activation_dropout for adapter in self.adapters}
        values = self.values(equation, "weight", weight, calls[0], shape[0] * shape[1])
        results = {}
        for call in calls:
            emit = self.emitter(call, call)
            form = forms[call.name](self.site, call, emit)
            dtype = call.meta["val"].dtype
            result = Distribution(values, form, emit, weight, dtype, dropout).run()
            call.replace_all_uses_with(result)
            results[call] = result
            self.graph.erase_node(call)
        return results

    def weight_itself(self, weight: fx.Node) -> None:
        shape = (self.site.out_features, self.site.in_features)
        equation = equation_of(self.adapters, "weight", self.site, {"W": shape})
        users = list(weight.users)
        before = next(node for node in self.graph.nodes if node in weight.users)
        values = self.values(equation, "weight", weight, before, shape[0] * shape[1])
        kind = "grouped convolution" if self.site.groups > 1 else ", ".join(sorted({c.operator for c in self.site.calls}))
        values.note(f"the op form ({kind}) takes the weight as a whole")
        matrix = values.held_in(equation.result, self.base_dtype)
        emit, adapter = self.emitter(before, before), equation.adapter(equation.result)
        if self.site.transposed:
            matrix = emit(aten.t.default, (matrix,), "weight", adapter)
        elif len(self.site.shape) > 2:
            matrix = emit(aten.reshape.default, (matrix, list(self.site.shape)), "weight", adapter)
        for user in users:
            user.replace_input_with(weight, matrix)

    def bias(self, bias: fx.Node) -> None:
        shape = tuple(bias.meta["val"].shape)
        equation = equation_of(self.adapters, "bias", self.site, {"b": shape})
        users = list(bias.users)
        before = next(node for node in self.graph.nodes if node in bias.users)
        values = self.values(equation, "bias", bias, before, shape[0] + 1)
        result = values.held_in(equation.result, self.base_dtype)
        for user in users:
            user.replace_input_with(bias, result)

    def output(self, call: fx.Node, x: fx.Node, y: fx.Node) -> None:
        shapes = [(*range(2, 2 + len(x.meta["val"].shape) - 1), width) for width in (self.site.in_features, self.site.out_features)]
        equation = equation_of(self.adapters, "output", self.site, {"x": shapes[0], "y": shapes[1]})
        after = y.next
        emit, adapters = self.emitter(after, y), {adapter.name: adapter for adapter in self.adapters}
        dtype = call.meta["val"].dtype
        mapped: dict[fx.Node, Any] = {}
        users = list(y.users)
        for node in equation.graph.nodes:
            if node.op == "placeholder":
                adapter, tensor = equation.operands[node]
                if not adapter:
                    mapped[node] = x if tensor == "x" else y
                elif node.users:
                    mapped[node] = self.reader(adapters[adapter].path(self.site, tensor))
                    if self.adapter_dtype != dtype:
                        mapped[node] = emit(aten.to.dtype, (mapped[node], dtype), f"{tensor}_cast", adapter)
                self.count_output(equation, node)
            elif node.op == "call_function":
                args = fx.node.map_arg(node.args, mapped.__getitem__)
                kwargs = fx.node.map_arg(node.kwargs, mapped.__getitem__)
                mapped[node] = emit(node.target, args, self.term(equation, node), equation.adapter(node), kwargs)
        result = mapped[equation.result]
        for user in users:
            user.replace_input_with(y, result)

    def count_output(self, equation: Equation, node: fx.Node) -> None:
        if equation.operands[node][0] and len(equation.shape(node)) == 2:
            self.lowered.per_token += 2 * equation.numel(node)

    @staticmethod
    def term(equation: Equation, node: fx.Node) -> str:
        """A linear layer by the name of its weight; anything else by its operator."""
        if node.target is aten.linear.default and node.args[1] in equation.operands:
            return equation.term(node.args[1])
        return equation.term(node)

