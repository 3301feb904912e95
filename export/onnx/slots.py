"""Slots: inputs of an ONNX file with default values, through which an adapter changes the base at run time.

    Wᵀ + A B        A [in, r], B [r, out], by default of rank 0

is read by all that reads W, so that the rest of the file is the base's. It is computed

    once a run       from the slots `<W>.lora_A` and `<W>.lora_B`, [stack, in, r] and [stack, r, out] of a stack
    once an adapter  where slots are merged on load, for the slot `<W>.merged`, [in, out] or [stack, in, out]

The method's scale is in B. A tensor that an adapter replaces as a whole, such as a trained head or a bias, is an input
under its own name, by default the base's value.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import fx

from subgraph_peft.base.errors import ExportError
from subgraph_peft.compiler.fold import folds
from subgraph_peft.compiler.generate import base_of
from subgraph_peft.compiler.rewrite import resolve_ties
from subgraph_peft.graph.layout import MATRIX, turned
from subgraph_peft.graph.nodes import aten, attribute
from subgraph_peft.graph.operators import Kind, arguments, is_a, operand
from subgraph_peft.graph.rewriter import META
from subgraph_peft.graph.site import VECTORS, Site
from subgraph_peft.graph.views import step, whole
from subgraph_peft.method.adapter import identifier, targets
from subgraph_peft.program.program import Program
from subgraph_peft.program.selectors import Where, select
from subgraph_peft.program.sites import find

from .inference import STAMP, Inference
from .weights import converted

A, B, MERGED = ".lora_A", ".lora_B", ".merged"
IDENTITY = f"{META}.identity"
SAMPLE_RANK = 2


@dataclass(frozen=True)
class Slots:
    """base:   the captured program, with the values it was captured with
    sites:  weights to which an adapter adds
    whole:  names of the tensors that an adapter replaces
    merged: whether the sum at a site is computed when an adapter is loaded
    """

    base: Program | None = None
    sites: tuple[Site, ...] = ()
    whole: tuple[str, ...] = ()
    merged: bool = False

    def open(self, cut: Inference) -> Inference:
        """The cut with an input for every tensor that an adapter replaces, and a pair at every site. Raises ExportError
        for one that the cut does not read."""
        graph, samples = cut.graph, {}
        read = {str(node.target): node for node in graph.find_nodes(op="get_attr")}
        if lost := [name for name in (*(site.name for site in self.sites), *self.whole) if name not in read]:
            raise ExportError(
                f"{', '.join(lost[:3])}: no output in the file reads what an adapter changes there. Export the outputs "
                "that do (outputs=[…]), or leave it out of the adapter."
            )
        for site in self.sites:
            base = attribute(cut.module, site.name).detach() if self.merged else None
            samples |= adapt(graph, read[site.name], site, base)
        for name in self.whole:
            held = new_input(graph, name)
            held.meta = dict(read[name].meta)
            read[name].replace_all_uses_with(held)
            graph.erase_node(read[name])
            samples[name] = attribute(cut.module, name).detach()
        ranks = {n: {rank_axis(n, s.ndim): f"{n[: -len(A)]}.rank"} for n, s in samples.items() if n.endswith((A, B))}
        shapes = {name: sample.shape for name, sample in samples.items()}
        return replace(cut, inputs={**cut.inputs, **shapes}, axes={**cut.axes, **ranks}, samples=samples)

    @contextmanager
    def defaults(self, model: ir.Model, cut: Inference) -> Iterator[None]:
        """The model with default values in the block: the base's own tensors, and rank 0."""
        inputs = [value for value in model.graph.inputs if value.name in cut.samples]
        for value in inputs:
            held = cut.samples[value.name]
            if value.name.endswith((A, B)):
                held = held.narrow(rank_axis(value.name, held.ndim), 0, 0)
            value.const_value = converted(TorchTensor(held), value.dtype, value.name)
            model.graph.register_initializer(value)
        try:
            yield
        finally:
            for value in inputs:
                del model.graph.initializers[value.name]
                value.const_value = None


NONE = Slots()


def slots_of(program: Program, wanted: bool | Where, merged: bool = False) -> Slots:
    """The slots of what the program's adapters change, and of the weights that `wanted` selects.

    Raises SelectorError, and ExportError for an adapter that changes no weight.
    """
    sites = dict(rewritten_sites(program))
    base = captured_values(program)
    whole = tuple(replaced(program))
    if wanted is not True:
        weights = [site for site in find(base) if site.kind not in VECTORS]
        chosen = select(weights, wanted).sites
        resolve_ties(base, chosen, "refuse")
        sites |= {site.name: site for site in chosen if site.name not in whole}
    if not sites and not whole:
        raise ExportError(
            f"{program.source} has no adapters whose weights would get slots. Name weights, such as "
            "slots='*.{query,value}', or rewrite the program first; a folded program has its adapters in its weights."
        )
    return Slots(base, tuple(sites.values()), whole, merged)


def rewritten_sites(program: Program) -> Iterator[tuple[str, Site]]:
    for target in targets(program.adapters):
        if target.part not in ("weight", "bias") or not all(folds(program, adapter) for adapter, _ in target.chain):
            names = ", ".join(adapter.name for adapter, _ in target.chain)
            raise ExportError(
                f"{names} at {target.name} does not fold into a weight, so that it has no slot. Export the program "
                "without slots=: its nodes stay in the graph."
            )
        if target.part == "weight":
            yield target.name, target.site


def replaced(program: Program) -> Iterator[str]:
    """Tensors of the model that the program replaces: those it trains in full, biases that adapters rewrite, and
    buffers that training has written."""
    held, captured = dict(program.tensors()), program.captured.module
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
    return tuple(dict.fromkeys(name.removesuffix(A).removesuffix(B).removesuffix(MERGED) for name in slots))


def version(identity: str) -> int:
    """The identity in the 31 bits of an adapter file's `model_version`."""
    return int(identity, 16) >> (4 * len(identity) - 31)


def new_input(graph: fx.Graph, name: str) -> fx.Node:
    """A further placeholder, after the others."""
    with graph.inserting_after(list(graph.find_nodes(op="placeholder"))[-1]):
        return graph.placeholder(identifier(name))


def rank_axis(name: str, dimensions: int) -> int:
    """Where r is in A […, in, r] or B […, r, out]."""
    return dimensions - (1 if name.endswith(A) else 2)


def adapt(graph: fx.Graph, weight: fx.Node, site: Site, base: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Puts the sum in place of a weight. Returns sample values of its slots: A and B or, where the sum comes from
    outside, the weight's value `base` as [in, out].

    A weight stored as [out, in] is summed as [in, out], in which products by it read it.
    """
    value, readers = weight.meta["val"], list(weight.users)
    before = next(node for node in graph.nodes if node in weight.users)

    def emit(target: object, args: tuple, term: str) -> fx.Node:
        with graph.inserting_before(before):
            made = graph.call_function(target, args)
        made.meta = {key: held for key, held in before.meta.items() if key in ("nn_module_stack", "stack_trace")}
        custom = {META: {"site": site.name, "adapter": "slot", "term": term}}
        made.meta["custom"] = {**custom, STAMP: f"{site.name}.{term}"}
        return made

    merged = base is not None
    if merged:
        samples = {site.name + MERGED: site.matrix(base).mT.detach()}  # a trace of a view would want its base
        update = new_input(graph, site.name + MERGED)
    else:
        depth = (site.stack,) if site.stack else ()
        sizes = {A: (*depth, site.in_features, SAMPLE_RANK), B: (*depth, SAMPLE_RANK, site.out_features)}
        like = {"dtype": value.dtype, "device": value.device}
        samples = {site.name + end: torch.zeros(size, **like) for end, size in sizes.items()}
        update = emit(aten.matmul.default, tuple(new_input(graph, name) for name in samples), "update")
    if site.layout == MATRIX:
        laid = (
            update
            if merged
            else emit(aten.add.Tensor, (emit(aten.t.default, (weight,), "transposed"), update), "adapted")
        )
        laid.meta["val"] = value.t()
        readers = [reader for reader in readers if not read_laid(reader, weight, laid)]
        stored = emit(aten.t.default, (laid,), "stored") if readers else weight
    else:
        update = turned(site.layout).emit_stored(update, site.shape, emit, "update")
        stored = update if merged else emit(aten.add.Tensor, (weight, update), "adapted")
    stored.meta["val"] = value  # which a linear that takes it as its input asks for
    for reader in readers:
        reader.replace_input_with(weight, stored)
    if not weight.users:
        graph.erase_node(weight)
    return samples


def read_laid(reader: fx.Node, weight: fx.Node, laid: fx.Node) -> bool:
    """Has a reader of a weight [out, in] read the same weight `laid` out as [in, out] instead, where it is a linear or
    a transpose; whether it is. A linear becomes a product and a sum, or one addmm, as it does in ONNX."""
    if is_a(reader, Kind.LINEAR) and operand(reader) is not weight:
        x, _, bias = arguments(reader)
        reader.kwargs = {}
        if bias is None:
            reader.target, reader.args = aten.matmul.default, (x, laid)
        elif x.meta["val"].ndim == 2:
            reader.target, reader.args = aten.addmm.default, (bias, x, laid)
        else:
            with reader.graph.inserting_before(reader):
                product = reader.graph.call_function(aten.matmul.default, (x, laid))
            product.meta = dict(reader.meta)
            reader.target, reader.args = aten.add.Tensor, (product, bias)
        return True
    seen = step(reader, weight, whole(weight.meta["val"].shape))
    if seen is not None and seen.dims == ((1,), (0,)) and not seen.cuts:
        reader.replace_all_uses_with(laid)
        reader.graph.erase_node(reader)
        return True
    return False
