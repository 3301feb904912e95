"""Capture a model with torch.export: one graph for training and evaluation, dynamic in batch and length."""

import inspect
import re
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from .compare import equal
from .errors import CaptureError, CaptureWarning
from .examples import dynamic_dimensions, example_of, first_rows, widen
from .graphs import attributes, fixed_size
from .module import build, home_of
from .normalise import attribute, normalise
from .program import Program
from .signature import Signature, export_arguments


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Any = None,
    *,
    dynamic: Mapping[str, Iterable[int]] | None = None,
    verify: bool = True,
) -> Program:
    """Capture `model` as a Program.

    model:           an nn.Module (an fx.GraphModule is one) or an ExportedProgram
    example_inputs:  a tensor, a tuple, a dict or a BatchEncoding, as the model would be called in training;
                     with labels, the loss is part of the graph
    dynamic:         argument name -> the dimensions that vary. By default dimensions 0 and 1 of integer and boolean
                     inputs and of three-dimensional floating-point ones, dimension 0 of all others
    verify:          compare the graph with the model on the example inputs, in eval mode

    The model itself is left as it was: parameters are shared in memory but frozen, buffers are copied.
    Gradient checkpointing and key-value caches are not captured.

    Raises CaptureError for what torch.export cannot capture, with the line of the model's source. Warns
    (CaptureWarning) for a dimension that turned out to be fixed.
    """
    if isinstance(model, ExportedProgram):
        return from_exported(model)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"capture takes an nn.Module or an ExportedProgram, not {type(model).__name__}.")
    if example_inputs is None:
        raise CaptureError("capture needs example inputs: capture(model, example_inputs).")
    inputs = example_of(model, example_inputs)
    ranges = dynamic_dimensions(inputs, dynamic)
    inputs = widen(inputs, ranges)
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        warnings.warn("Gradient checkpointing is not part of the captured graph.", CaptureWarning, stacklevel=2)
    with prepared(model, training=True):
        exported = export(model, inputs, ranges, explicit=dynamic is not None)
    program = assemble(exported, model, inputs)
    if verify and program.module.home.device.type != "meta":
        program = check_eval(program, model, inputs, ranges)
    program.module.train(model.training)
    return program


def from_exported(exported: ExportedProgram) -> Program:
    if exported.example_inputs is None:
        raise CaptureError("This ExportedProgram carries no example inputs; export it again with torch.export.export.")
    return assemble(exported, None, None)


@contextmanager
def prepared(model: nn.Module, training: bool) -> Iterator[None]:
    """The model in one mode, without key-value cache; restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    configs = {id(c): c for module in modes if getattr(c := getattr(module, "config", None), "use_cache", None)}
    gradients = torch.is_grad_enabled()
    try:
        for config in configs.values():
            config.use_cache = False
        model.train(training)
        yield
    finally:
        torch.set_grad_enabled(gradients)
        for config in configs.values():
            config.use_cache = True
        for module, was_training in modes.items():
            module.training = was_training


def export(model: nn.Module, inputs: dict[str, Any], ranges: dict[str, Any], explicit: bool) -> ExportedProgram:
    """torch.export with every asked dimension dynamic; else with those that can be, and a warning for the others."""
    args, kwargs = export_arguments(model.forward, inputs)

    def attempt(kind: Any) -> ExportedProgram:
        shapes = {
            n: pytree.tree_map(lambda dims: dict.fromkeys(sorted(dims), kind) or None, r) for n, r in ranges.items()
        }
        parameters = inspect.signature(model.forward).parameters
        extra = {name: shapes.pop(name) for name in list(shapes) if name not in parameters}
        keyword = next((p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD), None)
        if extra and keyword:
            shapes[keyword] = extra
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)

    try:
        return attempt(Dim.DYNAMIC)
    except Exception as first:
        if explicit:
            raise refused(model, first) from first
        try:
            exported = attempt(Dim.AUTO)
        except Exception as second:
            raise refused(model, second) from second
    for name, dimension, size in specialised(exported, inputs, ranges):
        message = f"{type(model).__name__}: dimension {dimension} of {name!r} is fixed to {size} in the captured graph."
        warnings.warn(message, CaptureWarning, stacklevel=4)
    return exported


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


def refused(model: nn.Module, error: Exception) -> CaptureError:
    """The error with the last line of the user's own code that led to it, and what to try."""
    here = {Path(torch.__file__).parent, Path(__file__).parent}
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if not any(root in Path(f.filename).parents for root in here) and not f.filename.startswith("<")
    ]
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "inside torch.export"
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    what = lines[0] if lines else type(error).__name__
    text = str(error)
    if re.search(r"data-dependent|GuardOnDataDependent|Could not guard|DynamicControlFlow|bool\(\)|\.item\(\)", text):
        advice = (
            "Control flow depends on tensor values: rewrite that line with torch.where or torch.cond, or move it out "
            "of forward."
        )
    elif re.search(r"[Cc]onstraints violated|specializ|marked as dynamic|dynamic_shapes", text):
        advice = "A dimension asked to vary cannot: pass dynamic={'input_name': [dimensions]} with those that can."
    else:
        advice = (
            "Try example inputs without labels, attn_implementation='sdpa' or 'eager', or capture the submodule that "
            "holds the weights."
        )
    return CaptureError(
        f"{type(model).__name__} cannot be captured: {type(error).__name__}: {what}\n  at {where}\n  {advice}"
    )


def assemble(exported: ExportedProgram, model: nn.Module | None, inputs: dict[str, Any] | None) -> Program:
    root = exported.module(check_guards=False)
    normalise(root)
    signature = Signature.of(exported, model.forward if model is not None else None)
    if inputs is None:
        flat = pytree.tree_leaves(exported.example_inputs)
        leaves = iter(flat)
        inputs = {
            n: pytree.tree_unflatten([next(leaves) for _ in range(s.num_leaves)], s)
            for n, s in signature.inputs.items()
        }
    tensors, volatile, ties = own_tensors(root, model)
    split_ties(root.graph, ties)
    name = type(model).__name__ if model is not None else "Model"
    module = build(
        signature, root.graph, None, tensors, volatile, home_of(tensors), name, config=getattr(model, "config", None)
    )
    return Program(module=module, example=inputs, source=name, ties=ties)


def own_tensors(root: fx.GraphModule, model: nn.Module | None) -> tuple[dict, set[str], tuple[frozenset[str], ...]]:
    """(tensors by name, names outside the state dict, groups of tied names).

    Parameters are new, frozen objects over the same memory; buffers, which training may write to, are copies.
    """
    origin = root if model is None else model
    saved = set(origin.state_dict(keep_vars=True))
    names: dict[int, list[str]] = {}
    tensors: dict[str, Any] = {}
    frozen: dict[int, nn.Parameter] = {}
    for name, parameter in origin.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
        if id(parameter) not in frozen:
            frozen[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
        tensors[name] = frozen[id(parameter)]
    for name, buffer in origin.named_buffers(remove_duplicate=False):
        tensors[name] = buffer.detach().clone()
    for path, _ in attributes(root.graph):
        if path not in tensors:
            value = attribute(root, path)
            tensors[path] = value.detach().clone() if isinstance(value, torch.Tensor) else value
    volatile = {name for name in tensors if name not in saved}
    return tensors, volatile, tuple(frozenset(group) for group in names.values() if len(group) > 1)


def split_ties(graph: fx.Graph, ties: tuple[frozenset[str], ...]) -> None:
    """torch.export reads a tied tensor under one of its names; give every use the name of the module that uses it."""
    for node in graph.find_nodes(op="get_attr"):
        group = next((g for g in ties if node.target in g), frozenset())
        for user in list(node.users):
            stack = list(user.meta.get("nn_module_stack", {}).values())
            owner = stack[-1][0].partition("@")[0] if stack else ""
            own = next((name for name in group if name.rpartition(".")[0] == owner), node.target)
            if own != node.target:
                known = next((n for n in graph.find_nodes(op="get_attr") if n.target == own), None)
                if known is None:
                    with graph.inserting_before(node):
                        known = graph.create_node("get_attr", own, name=own.replace(".", "_"))
                    known.meta = dict(node.meta)
                user.replace_input_with(node, known)


def check_eval(program: Program, model: nn.Module, inputs: dict[str, Any], ranges: dict[str, Any]) -> Program:
    """Compare eval mode with the model; where the switched training graph differs, capture eval mode on its own."""
    with prepared(model, training=False):
        few = first_rows(inputs, ranges)
        args, kwargs = export_arguments(model.forward, pytree.tree_map_only(torch.Tensor, torch.clone, few))
        with torch.no_grad():
            expected = pytree.tree_leaves(model(*args, **kwargs))
        if equal(expected, pytree.tree_leaves(program.run(few))):
            return program
        second = export(model, inputs, ranges, explicit=False)
    root = second.module(check_guards=False)
    normalise(root)
    for path, _ in attributes(root.graph):
        if path.split(".")[0] not in program.module._modules and not hasattr(program.module, path.split(".")[0]):
            raise CaptureError(f"The eval graph reads {path}, which the training graph has not.")
    split_ties(root.graph, program.ties)
    program.module.eval_graph = root.graph
    program.module.make_runners()
    if not equal(expected, pytree.tree_leaves(program.run(few))):
        raise CaptureError(
            f"The captured graph of {type(model).__name__} does not reproduce the model in eval mode on the example "
            "inputs. The model probably keeps state in Python between calls; capture(verify=False) takes it as it is."
        )
    return program
