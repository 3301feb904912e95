"""Capture a model with torch.export: one graph for training and evaluation, dynamic in batch and length."""

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from ..base.borrowed import is_of_vmap, pytree, uncompiled
from ..base.compare import equal
from ..base.errors import CaptureError, CaptureWarning
from ..base.patches import alone, silenced, uncollected, watched
from ..graph.edit import writes
from ..graph.nodes import attributes, every_node, fixed_size
from ..graph.sequence.padding import Padding
from ..graph.signature import export_arguments
from ..program.calls import add_guards
from ..program.checkpointing import keep_checkpointing, uncheckpointed
from ..program.internals import internals
from ..program.kernels import promise
from ..program.program import Program
from ..program.runners import renew, specialise
from ..program.tree import attach
from . import foreign_graphs
from .assemble import assemble
from .backward import check_backward
from .contexts import apart, prepared, seeded, spelled_out, unwritten
from .diagnostics import check_model, refused
from .examples import dynamic_dimensions, example_of, widen
from .flat import flat
from .normalise import inline_regions
from .recurrent import Whole


@alone()
def capture(
    model: nn.Module | ExportedProgram | str | os.PathLike,
    example_inputs: Any = None,
    *,
    dynamic: Mapping[str, Iterable[int]] | None = None,
    verify: bool = True,
    padding: Padding | None = None,
) -> Program:
    """Capture `model` as a Program.

    model:           an nn.Module; a graph that another tool made of one: an fx.GraphModule (torch.fx, torch._dynamo),
                     an ExportedProgram, with or without decompositions, or a file of torch.export.save
    example_inputs:  a tensor, a tuple, a dict or a BatchEncoding, as the model would be called in training;
                     with labels, the loss is part of the graph. An ExportedProgram has its own
    dynamic:         argument name -> the dimensions that vary. By default dimensions 0 and 1 of integer and boolean
                     inputs and of three-dimensional floating-point ones, dimension 0 of all others
    verify:          compare the graph with the model on the example inputs, in eval mode; a graph that another tool
                     made, in the mode that it was traced in
    padding:         "right" promises attention masks that are ones and then zeros, see `promise`

    The model itself is left as it was: parameters are shared in memory but frozen, buffers are copied.
    Key-value caches are not captured; layers that transformers checkpoints stay checkpointed. A module that
    torch.compile wraps is captured without the wrapper. A graph traced in eval mode starts in eval mode; train()
    switches on the dropout and batch norm operators that it still has. A model on the meta device can be captured,
    listed and rewritten, not run in training. A capture changes torch for the whole process while it lasts, and is for
    one thread at a time: another thread's waits.

    Raises CaptureError for what torch.export cannot capture, with the line of the model's source. Warns
    (CaptureWarning) for a dimension that turned out to be fixed, for a graph that was traced in eval mode, and for
    checkpointing that the model does itself, which the graph has not.
    """
    if isinstance(model, (str, os.PathLike)):
        model = foreign_graphs.load(model)
    if isinstance(model, ExportedProgram):
        return promise(foreign_graphs.from_exported(model, example_inputs, dynamic, verify), padding)
    if not isinstance(model, nn.Module):
        raise CaptureError(
            f"capture takes an nn.Module, an ExportedProgram or a file of one, not {type(model).__name__}."
        )
    if example_inputs is None:
        raise CaptureError("capture needs example inputs: capture(model, example_inputs).")
    model = uncompiled(model)
    check_model(model)
    inputs = example_of(model, example_inputs)
    ranges = dynamic_dimensions(inputs, dynamic)
    inputs = widen(inputs, ranges)
    with prepared(model, training=True), uncheckpointed(model), apart(model), watched() as (calls, functions):
        exported, ranges = export(model, inputs, ranges, explicit=dynamic is not None)
    if isinstance(model, fx.GraphModule):
        return promise(foreign_graphs.from_graph(model, exported, inputs, verify), padding)
    program = assemble(exported, model, inputs)
    if verify and program.home.device.type != "meta":
        program = check_eval(program, model, inputs, ranges)
    check_backward(program, model, inputs, functions, verify)
    keep_checkpointing(program.module, model, calls)
    program.module.train(model.training)
    return promise(program, padding)


def export(
    model: nn.Module, inputs: dict[str, Any], ranges: dict[str, Any], explicit: bool
) -> tuple[ExportedProgram, dict[str, Any]]:
    """torch.export with every asked dimension dynamic; else with those that can be, and a warning for the others.

    Returns the exported program and the dimensions that vary in it.
    """
    args, kwargs = export_arguments(model.forward, inputs)

    def attempt(kind: Any) -> ExportedProgram:
        shapes = {
            n: pytree.tree_map(lambda dims: dict.fromkeys(sorted(dims), kind) or None, r) for n, r in ranges.items()
        }
        # a trace that fails inside a region leaves the region's gradient mode
        with torch.enable_grad(), silenced(), uncollected(), Whole(), spelled_out(model, inputs):
            return without_vmap(torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False))

    def run() -> Any:
        with torch.no_grad(), seeded(torch.device("cpu")), unwritten(model):
            return model(*pytree.tree_map_only(torch.Tensor, torch.clone, args), **kwargs)

    try:
        return attempt(Dim.DYNAMIC), ranges
    except Exception as first:
        if explicit:
            raise refused(type(model).__name__, first, run) from first
        try:
            exported = attempt(Dim.AUTO)
        except Exception as second:
            raise refused(type(model).__name__, second, run) from second
    fixed = list(specialised(exported, inputs, ranges))
    for name, dimension, size in fixed:
        message = f"{type(model).__name__}: dimension {dimension} of {name!r} is fixed to {size} in the captured graph."
        warnings.warn(message, CaptureWarning, stacklevel=4)
    return exported, {
        name: pytree.tree_map(lambda dims: dims - {d for n, d, _ in fixed if n == name}, r)  # noqa: B023
        for name, r in ranges.items()
    }


def without_vmap(exported: ExportedProgram) -> ExportedProgram:
    """The batched operators that a vmap stands for in place of its own nodes, which live on state of the process."""
    if not any(is_of_vmap(node.target) for node in every_node(exported.graph_module)):
        return exported
    inline_regions(exported.graph_module)  # decompositions forget what is under no_grad
    return exported.run_decompositions({})


def specialised(
    exported: ExportedProgram, inputs: dict[str, Any], ranges: dict[str, Any]
) -> Iterator[tuple[str, int, int]]:
    """(input, dimension, size) of every dimension that was asked to vary and does not."""
    placeholders = [n for n in exported.graph.nodes if n.name in exported.graph_signature.user_inputs]
    wanted = [
        (name, dims)
        for name in inputs
        for dims in pytree.tree_leaves(ranges[name], is_leaf=lambda x: isinstance(x, frozenset))
    ]
    for node, (name, dims) in zip(placeholders, wanted, strict=False):
        for dimension in sorted(dims):
            size = fixed_size(node.meta["val"].shape[dimension])
            if size is not None:
                yield name, dimension, size


def check_eval(program: Program, model: nn.Module, inputs: dict[str, Any], ranges: dict[str, Any]) -> Program:
    """Compare eval mode with the model; where the switched training graph differs, capture eval mode on its own."""
    home = program.home.device

    def eager() -> Any:
        args, kwargs = export_arguments(model.forward, pytree.tree_map_only(torch.Tensor, torch.clone, inputs))
        return model(*args, **kwargs)

    def same(expected: list) -> bool:
        return equal(expected, outputs(lambda: program.run(inputs)))

    def outputs(run: Callable[[], Any]) -> list:
        with seeded(home), unwritten(model, program.module), torch.no_grad():
            return pytree.tree_leaves(run())

    with prepared(model, training=False):
        expected = outputs(eager)
        if same(expected) and not writes(specialise(program.module, training=False)):
            return program
        with apart(model):
            second, _ = export(model, inputs, ranges, explicit=False)
    if second.call_spec.out_spec != program.signature.output:
        raise CaptureError(
            f"{type(model).__name__} gives other outputs in eval mode ({second.call_spec.out_spec}) than in training "
            f"({program.signature.output}): turn off the option of its config that adds them."
        )
    add_guards(program.module, second)
    found = flat(second)
    named = (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))
    shared = {name for several in named for name, _ in several}
    for path, node in list(attributes(found.graph)):
        if path not in shared:  # a constant, or the body of an operator, of this graph alone
            node.target = f"eval_{path}"
            attach(program.module, node.target, found.read(path), persistent=False)
    internals(program.module).eval_graph = found.graph
    renew(program.module)
    if not same(expected):
        raise CaptureError(
            f"The captured graph of {type(model).__name__} does not reproduce the model in eval mode on the example "
            "inputs. The model probably keeps state in Python between calls; capture(verify=False) takes it as it is."
        )
    return program
