"""Graphs that other tools made: exported programs, their files, and GraphModules with the modes baked in."""

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from ..base.borrowed import ORIGINAL_NAMES, OpOverload, pytree, schema_of
from ..base.compare import equal
from ..base.errors import CaptureError, CaptureWarning, VersionError
from ..base.patches import silenced, weights_only
from ..graph.nodes import aten, bodies, every_node, is_random, mode_argument, operator_name
from ..graph.operators import argument, set_argument
from ..graph.signature import export_arguments
from ..program.program import Program
from ..program.runners import renew
from .assemble import assemble
from .contexts import prepared, seeded, unwritten
from .diagnostics import check_model
from .examples import example_of
from .flat import readable

# layer of torch.nn -> the tensors that its operators read under these argument names
LAYERS = re.compile(r"torch\.nn\.modules\.(linear\.Linear|conv\.|batchnorm\.|normalization\.|sparse\.Embedding)")
ROLES = ("weight", "bias", "running_mean", "running_var")


def load(path: str | os.PathLike) -> ExportedProgram:
    """Read a file of torch.export.save. Nothing in it is unpickled beyond tensors. Raises CaptureError."""
    if not os.path.isfile(path):
        raise CaptureError(f"{path} is no file: capture takes a model, an ExportedProgram or a file of one.")
    try:
        with weights_only(), silenced():  # torch.export.load falls back to unpickling anything
            return torch.export.load(path)
    except VersionError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{path} cannot be read as an exported program: {type(error).__name__}: "
            f"{next(iter(str(error).strip().splitlines()), '')}\n  It takes a file that torch.export.save wrote, in a "
            "version of torch that this one reads; where the model returns a type of its own, import its library first."
        ) from error


def from_exported(exported: ExportedProgram, example_inputs: Any, dynamic: Any, verify: bool) -> Program:
    """The program of an ExportedProgram, in the mode that it was traced in."""
    if dynamic is not None:
        raise CaptureError(
            "The dimensions of an ExportedProgram vary as it was exported: give dynamic_shapes to torch.export.export."
        )
    if exported.example_inputs is None and example_inputs is None:
        raise CaptureError(
            "This ExportedProgram carries no example inputs: pass them, capture(program, example_inputs), or export it "
            "again with torch.export.export."
        )
    reference = readable(exported)[0].module(check_guards=False)
    check_model(reference)
    program = assemble(exported, inputs=None if example_inputs is None else {})
    if example_inputs is not None:
        program.example.update(example_of(program.module, example_inputs))
    training = settle(program)
    if verify:
        leaves = program.signature.flatten(program.example)
        args, kwargs = pytree.tree_unflatten(leaves, exported.call_spec.in_spec)
        verify_traced(program, reference, args, kwargs, training)
    return program


def from_graph(module: fx.GraphModule, exported: ExportedProgram, inputs: dict[str, Any], verify: bool) -> Program:
    """The program of a GraphModule, whose modes another tool's trace may have baked in."""
    program = assemble(exported, module, inputs, original_names(exported, module))
    training = settle(program)
    if verify:
        args, kwargs = export_arguments(module.forward, inputs)
        with prepared(module, training):
            verify_traced(program, module, args, kwargs, training)
    program.module.train(training and module.training)
    return program


def settle(program: Program) -> bool:
    """Give an imported program its training form and put it into the mode that it was traced in: True for training,
    also where the graph does not tell. Warns of what the other mode cannot have."""
    inner = [getattr(program.module, path) for path, _ in bodies(program.graph, program.module)]
    nodes = [*program.graph.nodes, *(node for body in inner for node in every_node(body))]
    training = not traced_in_eval(nodes)
    if not training:
        switched = to_training(nodes)
        for body in (part for outer in inner for part in outer.modules() if isinstance(part, fx.GraphModule)):
            body.recompile()
        warnings.warn(
            f"{program.source} was traced in eval mode: train() switches on the {switched} dropout and batch norm "
            "operators that the trace kept, and no dropout that it removed (in attention, in decomposed layers, "
            "stochastic depth). Export the model in train mode to train it with them.",
            CaptureWarning,
            stacklevel=4,
        )
    random = [n.name for n in nodes if is_random(n) and mode_argument(n) is None]
    if random:
        warnings.warn(
            f"{program.source} draws random numbers at {', '.join(random[:5])} in eval mode too: the trace does not "
            "say whether they belong to training alone. Capture the model itself, or export it before decompositions.",
            CaptureWarning,
            stacklevel=4,
        )
    renew(program.module)
    program.module.train(training)
    return training


def traced_in_eval(nodes: Iterable[fx.Node]) -> bool:
    """Whether a graph shows layers that eval mode switched off, and none that is on."""
    modes = [argument(node, name) for node in nodes if (name := mode_argument(node))]
    off = any(mode is False for mode in modes) or any(map(is_removed, nodes))
    return off and not any(mode is not False and mode != 0.0 for mode in modes)


def is_removed(node: fx.Node) -> bool:
    """What decomposition leaves of a dropout layer in eval mode: a copy."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return node.target is aten.clone.default and bool(stack) and "torch.nn.modules.dropout." in str(stack[-1][1])


def to_training(nodes: Iterable[fx.Node]) -> int:
    """Switch on what eval mode switched off, in place. Returns how many operators."""
    off = [(node, name) for node in nodes if (name := mode_argument(node)) and name != "dropout_p"]
    for node, name in off:
        set_argument(node, name, True)
    return len(off)


def verify_traced(
    program: Program, reference: nn.Module, args: tuple, kwargs: Mapping[str, Any], training: bool
) -> None:
    """Compare the program with what was traced, in the mode of the trace, under one seed. Raises CaptureError."""
    home = program.home.device
    if home.type == "meta":
        return
    args, kwargs = pytree.tree_map_only(torch.Tensor, torch.clone, (args, dict(kwargs)))
    outputs = []
    for module, run in (
        (reference, lambda: reference(*args, **kwargs)),
        (program.module, lambda: program.run(training=training)),
    ):
        with seeded(home), unwritten(module), torch.no_grad():
            outputs.append(pytree.tree_leaves(run()))
    if not equal(*outputs):
        raise CaptureError(
            f"The graph of {program.source} does not reproduce what was traced on the example inputs. Capture the "
            "model itself; capture(verify=False) takes the graph as it is."
        )


def original_names(exported: ExportedProgram, module: fx.GraphModule) -> dict[str, str]:
    """Tensor of a GraphModule that dynamo made -> its name in the model that was traced, where that can be told: from
    dynamo's own table, else from the layer of torch.nn that reads it and as what. Strips the root from module paths."""
    known = dict(module.meta.get(ORIGINAL_NAMES, {}))
    own = {n for n, _ in (*module.named_parameters(remove_duplicate=False), *module.named_buffers())}
    signature = exported.graph_signature
    lifted = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    for node in exported.graph.nodes:
        stack = node.meta.get("nn_module_stack", {})
        node.meta["nn_module_stack"] = stack = {k: (module_path(p), cls) for k, (p, cls) in stack.items()}
        path, cls = next(reversed(stack.values()), ("", ""))
        if path and LAYERS.match(str(cls)):
            for role, operand in roles(node):
                if operand.name in lifted:
                    known.setdefault(lifted[operand.name], f"{path}.{role}")
    found = {name: original for name, original in known.items() if name in own and name != original}
    taken = own - set(found)
    unique = {o for o in found.values() if list(found.values()).count(o) == 1 and o not in taken}
    return {name: original for name, original in found.items() if original in unique}


def roles(node: fx.Node) -> Iterator[tuple[str, fx.Node]]:
    """(name in the layer, node) of the operands of a layer's operator that are its tensors."""
    if not isinstance(node.target, OpOverload):
        return
    names = dict(zip((a.name for a in schema_of(node.target).arguments), node.args, strict=False))
    if operator_name(node) == "addmm":
        names = {"bias": names.get("self"), "weight": names.get("mat2")}
    elif operator_name(node) == "mm":
        names = {"weight": names.get("mat2")}
    counted = names.get("self")
    if isinstance(counted, fx.Node) and counted.op == "placeholder" and not counted.meta["val"].is_floating_point():
        yield "num_batches_tracked", counted
    for role in ROLES:
        operand = names.get(role)
        while isinstance(operand, fx.Node) and operand.target in (aten.t.default, aten.permute.default):
            operand = operand.args[0]
        if isinstance(operand, fx.Node):
            yield role, operand


def module_path(path: str) -> str:
    """`L['self'].encoder.layer[0]` -> `encoder.layer.0`."""
    path = re.sub(r"^L\['\w+'\]\.?", "", str(path))
    return re.sub(r"\.?\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path.replace("._modules", "")).lstrip(".")
