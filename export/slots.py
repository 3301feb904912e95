"""Slots: inputs of an ONNX file with default values, through which an adapter changes the base at run time.

    y = x Wᵀ + b + (x A) B        A [in, r], B [r, out], by default of rank 0

A weight W has the slot `<W>.lora_A` and `<W>.lora_B`; the method's scale is in B. A tensor that an adapter replaces as
a whole, such as a trained head or a bias, is an input under its own name, by default the base's value.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx

from subgraph_peft.adapter import identifier, targets
from subgraph_peft.errors import ExportError
from subgraph_peft.fold import folds
from subgraph_peft.forms import is_matrix
from subgraph_peft.generate import base_of
from subgraph_peft.graphs import aten
from subgraph_peft.lower import META
from subgraph_peft.normalise import attribute
from subgraph_peft.program import Program
from subgraph_peft.rewrite import resolve_ties
from subgraph_peft.selectors import Where, select
from subgraph_peft.sites import VECTORS, Site, find
from subgraph_peft.uses import Use, uses

from .inference import STAMP, Inference
from .weights import converted

A, B = ".lora_A", ".lora_B"
IDENTITY = f"{META}.identity"
SAMPLE_RANK = 2
FORMS = ("linear", "addmm", "matmul", "embedding")


@dataclass(frozen=True)
class Slots:
    """base:   the captured program, with the values it was captured with
    sites:  weights with a pair A, B
    whole:  names of the tensors that an adapter replaces
    """

    base: Program | None = None
    sites: tuple[Site, ...] = ()
    whole: tuple[str, ...] = ()

    def open(self, cut: Inference) -> Inference:
        """The cut with an input for every tensor that an adapter replaces, and a pair at every site. Raises ExportError
        for one that the cut does not read."""
        graph, samples = cut.module.graph, {}
        read = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
        if lost := [name for name in (*(site.name for site in self.sites), *self.whole) if name not in read]:
            raise ExportError(
                f"{', '.join(lost[:3])}: no output in the file reads what an adapter changes there. Export the outputs "
                "that do (outputs=[…]), or leave it out of the adapter."
            )
        for site in self.sites:
            samples |= pair(graph, read[site.name], site)
        for name in self.whole:
            held = new_input(graph, name)
            held.meta = dict(read[name].meta)
            read[name].replace_all_uses_with(held)
            graph.erase_node(read[name])
            samples[name] = attribute(cut.module, name).detach()
        ranks = {n: {int(n.endswith(A)): f"{n[: -len(A)]}.rank"} for n in samples if n not in self.whole}
        shapes = {name: sample.shape for name, sample in samples.items()}
        return replace(cut, inputs={**cut.inputs, **shapes}, axes={**cut.axes, **ranks}, samples=samples)

    @contextmanager
    def defaults(self, model: ir.Model, cut: Inference) -> Iterator[None]:
        """The model with default values in the block: rank 0, and the base's own tensors."""
        inputs = [value for value in model.graph.inputs if value.name in cut.samples]
        for value in inputs:
            held = cut.samples[value.name]
            if value.name not in self.whole:
                held = held.narrow(int(value.name.endswith(A)), 0, 0)
            value.const_value = converted(TorchTensor(held), value.dtype, value.name)
            model.graph.register_initializer(value)
        try:
            yield
        finally:
            for value in inputs:
                del model.graph.initializers[value.name]
                value.const_value = None


NONE = Slots()


def slots_of(program: Program, wanted: bool | Where) -> Slots:
    """The slots of what the program's adapters change, and of the weights that `wanted` selects.

    Raises SelectorError, and ExportError for an adapter that changes no weight, and for a weight that can have no slot.
    """
    sites = dict(rewritten_sites(program))
    base = captured_values(program)
    whole = tuple(replaced(program))
    if wanted is not True:
        weights = [site for site in find(base) if site.kind not in VECTORS]
        chosen = select(weights, wanted).sites
        resolve_ties(base, chosen, "refuse")
        for site in chosen:
            check(site)
        sites |= {site.name: site for site in chosen if site.name not in whole}
    if not sites and not whole:
        raise ExportError(
            f"{program.source} has no adapters whose weights would get slots. Name weights, such as "
            "slots='*.{query,value}', or rewrite the program first; a folded program has its adapters in its weights."
        )
    return Slots(base, tuple(sites.values()), whole)


def check(site: Site) -> None:
    """Raises ExportError for a weight to whose calls no product can be added."""
    forms = {call.form: call.operator for call in site.calls}
    others = [operator for form, operator in forms.items() if form not in FORMS]
    if others or site.stack or not is_matrix(site.layout):
        raise ExportError(
            f"{site.name} has no slot: {', '.join(others or forms.values())} does not apply it as x Wᵀ. Leave it out, "
            "or fold its adapter into the weight."
        )


def rewritten_sites(program: Program) -> Iterator[tuple[str, Site]]:
    for target in targets(program.adapters):
        if target.part not in ("weight", "bias") or not all(folds(program, adapter) for adapter, _ in target.chain):
            names = ", ".join(adapter.name for adapter, _ in target.chain)
            raise ExportError(
                f"{names} at {target.name} does not fold into a weight, so that it has no slot. Export the program "
                "without slots=: its nodes stay in the graph."
            )
        if target.part == "weight":
            check(target.site)
            yield target.name, target.site


def replaced(program: Program) -> Iterator[str]:
    """Tensors of the model that the program replaces: those it trains in full, biases that adapters rewrite, and
    buffers that training has written."""
    held, captured = dict(program.module.tensors()), program.captured.module
    trained = {name for name, _ in program.parameters(trainable=True)}
    biases = {target.name for target in targets(program.adapters) if target.part == "bias"}
    for name, _ in captured.named_parameters():
        if program.base is not None and name in trained | biases:
            yield name
    for name, tensor in captured.named_buffers():
        if tensor.is_floating_point() and not torch.equal(held[name].to(tensor), tensor):
            yield name


def captured_values(program: Program) -> Program:
    """The captured program where `program` is now, in its dtype, with the values it was captured with."""
    base = base_of(program)
    if base is not program:
        held = dict(base.module.named_buffers())
        for name, buffer in program.captured.module.named_buffers():
            held[name].copy_(buffer)
    return base


def weights_of(slots: Iterable[str]) -> tuple[str, ...]:
    """The tensors that slots change, each once."""
    return tuple(dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in slots))


def version(identity: str) -> int:
    """The identity in the 31 bits of an adapter file's `model_version`."""
    return int(identity, 16) >> (4 * len(identity) - 31)


def new_input(graph: fx.Graph, name: str) -> fx.Node:
    """A further placeholder, after the others."""
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        return graph.placeholder(identifier(name))


def pair(graph: fx.Graph, weight: fx.Node, site: Site) -> Mapping[str, torch.Tensor]:
    """Adds (x A) B to every call of a weight, in place. Returns sample values of A and B."""
    value = weight.meta["val"]
    sizes = {A: (site.in_features, SAMPLE_RANK), B: (SAMPLE_RANK, site.out_features)}
    factors = [new_input(graph, site.name + end) for end in sizes]
    done: dict[fx.Node, fx.Node] = {}
    for use in list(uses(weight)):
        Call(graph, site, replace(use, x=done.get(use.x, use.x)), value.dtype).add(*factors, done)
    return {site.name + end: torch.zeros(size, dtype=value.dtype, device=value.device) for end, size in sizes.items()}


class Call:
    """One call of a weight, to which (x A) B is added: with the rows and columns it reads, or with Bᵀ and Aᵀ where it
    reads Wᵀ. A bias is added last where it is an operator of its own in ONNX, so that what follows fuses with it."""

    def __init__(self, graph: fx.Graph, site: Site, use: Use, dtype: torch.dtype):
        self.graph, self.site, self.use, self.dtype = graph, site, use, dtype
        self.before = use.node.next

    def emit(self, target: object, args: tuple, term: str) -> fx.Node:
        node = self.use.node
        with self.graph.inserting_before(self.before):
            made = self.graph.call_function(target, args)
        made.meta = {key: value for key, value in node.meta.items() if key in ("nn_module_stack", "stack_trace")}
        custom = {META: {"site": self.site.name, "adapter": "slot", "term": term}}
        made.meta["custom"] = {**custom, STAMP: f"{node.name}_slot_{term}"}
        return made

    def add(self, A: fx.Node, B: fx.Node, done: dict[fx.Node, fx.Node]) -> None:
        node, use = self.use.node, self.use
        first, second = self.seen(A, B)
        if use.form == "embedding":
            picked = [use.x] if node.target is aten.index.Tensor else use.x
            low = self.emit(node.target, (first, picked), "A")
        else:
            low = self.emit(aten.matmul.default, (use.x, first), "A")
        update = self.emit(aten.matmul.default, (low, second), "B")
        users = list(node.users)
        bias = use.bias if node.target is aten.linear.default and node.meta["val"].ndim > 2 else None
        if bias is not None:
            node.args = node.args[:2]
        total = self.emit(aten.add.Tensor, (node, update), "sum")
        if bias is not None:
            total = self.emit(aten.add.Tensor, (total, bias), "bias")
        total.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, total)
        done[node] = total

    def seen(self, A: fx.Node, B: fx.Node) -> tuple[fx.Node, fx.Node]:
        """The factors of what the call sees of Wᵀ, in the dtype it sees."""
        for dim, start, stop in self.use.view.cuts:
            if dim in self.site.layout.out:
                B = self.emit(aten.slice.Tensor, (B, 1, start, stop), "B_part")
            else:
                A = self.emit(aten.slice.Tensor, (A, 0, start, stop), "A_part")
        if self.use.layout != self.site.layout:
            A, B = (self.emit(aten.t.default, (factor,), f"{name}_t") for factor, name in ((B, "B"), (A, "A")))
        dtype = self.use.node.meta["val"].dtype
        if dtype != self.dtype:
            A, B = (self.emit(aten.to.dtype, (f, dtype), f"{name}_cast") for f, name in ((A, "A"), (B, "B")))
        return A, B
