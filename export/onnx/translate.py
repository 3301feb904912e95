"""A program's inference graph as an ONNX model: names kept, metadata carried over, shape arithmetic folded."""

import json
import re
import sys
from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import Sequential
from onnx_ir.passes import common as passes
from onnx_ir.traversal import RecursiveGraphIterator
from onnxscript.optimizer import fold_constants
from torch.export import Dim, ExportedProgram
from torch.nn.attention import SDPBackend, sdpa_kernel

from subgraph_peft.base.borrowed import FX_NODE
from subgraph_peft.base.errors import ExportError
from subgraph_peft.base.patches import quiet
from subgraph_peft.frontend.flat import readable
from subgraph_peft.frontend.recurrent import Whole
from subgraph_peft.graph.rewriter import META
from subgraph_peft.program.label_shift import label_shift
from subgraph_peft.program.program import Program
from subgraph_peft.store.adapter_file import adapter_json

from .axes import resize, sizes_of
from .inference import STAMP, Inference
from .translations import translations
from .walk import bodies, graph_values

OLDEST_OPSET = 18  # what torch translates to; it converts to older ones without names and metadata
NOISY = ("torch.onnx", "onnxscript", "onnx_ir", "onnxruntime.quantization")
NAMESPACE = "namespace"


def translate(program: Program, cut: Inference, example: Mapping[str, torch.Tensor], opset: int | None) -> ir.Model:
    """The ONNX model of `cut`. Raises ExportError, naming the operator where one has no translation."""
    if opset is not None and opset < OLDEST_OPSET:
        raise ExportError(f"Opset {opset} is too old; the oldest that can be written is {OLDEST_OPSET}.")
    with quiet(*NOISY):
        try:
            exported, aliases = readable(trace(cut, example))
        except Exception as error:
            raise refused(program, "torch.export cannot trace the graph again", error) from error
        try:
            onnx_program = torch.onnx.export(
                exported, dynamo=True, optimize=False, verbose=False, opset_version=opset,
                input_names=list(cut.inputs), custom_translation_table=translations(),
            )  # fmt: skip
        except Exception as error:
            raise refused(program, "the graph has no ONNX form", error) from error
        model = onnx_program.model
        for name, alias in aliases.items():
            if alias in model.graph.initializers:
                model.graph.initializers[alias].name = name
        if opset is not None and model.opset_imports[""] != opset:
            needed = model.opset_imports[""]
            raise ExportError(f"{program.source} cannot be written in opset {opset}; its operators need {needed}.")
        name_outputs(model, cut)
        annotate(model, onnx_program.exported_program, cut)
        simplify(model)
        name_outputs(model, cut)
    name_axes(model, cut)
    return model


def trace(cut: Inference, example: Mapping[str, torch.Tensor]) -> ExportedProgram:
    """The cut as an ExportedProgram, dynamic where the program is. Attention is traced as plain arithmetic: fused
    kernels give strides that the views of the captured graph do not fit."""
    example = {**example, **cut.samples}
    inputs = resize({name: example[name] for name in cut.inputs}, cut.axes, sizes_of(cut.axes, example))
    shapes = tuple(dict.fromkeys(cut.axes.get(name, ()), Dim.DYNAMIC) or None for name in cut.inputs)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), Whole():
        return torch.export.export(cut.module, tuple(inputs.values()), dynamic_shapes=(shapes,), strict=False)


def refused(program: Program, what: str, error: Exception) -> ExportError:
    causes = [error]
    while cause := causes[-1].__cause__:
        causes.append(cause)
    text = str(causes[-1]).strip() or type(causes[-1]).__name__
    if operators := re.findall(r"No ONNX function found for <OpOverload\(op='([\w.:]+)'", " ".join(map(str, causes))):
        return ExportError(
            f"{program.source} cannot be exported: {operators[0]} has no ONNX translation. Leave out the outputs that "
            "need it (outputs=[…]), or express it in the model by other operators and capture again."
        )
    return ExportError(
        f"{program.source} cannot be exported: {what}: {type(causes[-1]).__name__}: {text.splitlines()[0]}\n"
        "  Try fewer outputs (outputs=[…]), or capture the model with attn_implementation='eager'."
    )


def name_outputs(model: ir.Model, cut: Inference) -> None:
    for value, name in zip(model.graph.outputs, cut.outputs, strict=True):
        value.name = name


def annotate(model: ir.Model, exported: ExportedProgram, cut: Inference) -> None:
    """Name every node after the node of the captured graph that it comes from, and say which rewrite made it.

    Of several nodes that one graph node became, the last has its name, the others that and their operator's. What the
    exporter notes beside the module path (stack traces, its own node names) is dropped.
    """
    custom = {node.name: {STAMP: node.name, **node.meta.get("custom", {})} for node in exported.graph.nodes}
    origin = {node: custom.get(fx_name(node), {STAMP: "graph"}) for node in model.graph}
    last = {found[STAMP]: node for node, found in origin.items()}
    outputs = set(model.graph.outputs)
    taken = Counter([*model.graph.initializers, *cut.inputs, *cut.outputs])

    def unique(name: str) -> str:
        taken[name] += 1
        return name if taken[name] == 1 else unique(f"{name}_{taken[name] - 1}")

    for stamp, node in last.items():
        node.name = unique(stamp)
    for node, found in origin.items():
        if node is not last[found[STAMP]]:
            node.name = unique(f"{found[STAMP]}_{node.op_type}")
        for value in node.outputs:
            if value not in outputs:
                value.name = node.name if len(node.outputs) == 1 else unique(f"{node.name}_{value.index()}")
            value.metadata_props.clear()
        rewrite = found.get(META, {})
        scope = node.metadata_props.get(NAMESPACE)
        node.metadata_props.clear()
        node.metadata_props.update({f"{META}.{key}": value for key, value in rewrite.items()})
        if scope:
            node.metadata_props[NAMESPACE] = scope
    for inner in (node for body in (model.graph, *model.functions.values()) for node in RecursiveGraphIterator(body)):
        if inner not in origin:
            inner.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.graph.metadata_props.clear()


def fx_name(node: ir.Node) -> str:
    """The name in "%linear_1 : [num_users=1] = call_function[…]"."""
    found = re.match(r"%(\w+) ", node.metadata_props.get(FX_NODE, ""))
    return found.group(1) if found else ""


def simplify(model: ir.Model) -> None:
    """Passes that change neither results nor the tensors of the model, in place."""
    tensors = set(model.graph.initializers.values())
    passes.InlinePass()(model)
    fold_constants(model, should_fold=lambda node: False if tensors.intersection(node.inputs) else None)
    Sequential(
        passes.IdentityEliminationPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),
        passes.RemoveUnusedOpsetsPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.OutputFixPass(),
    )(model)
    own_outputs(model)


def own_outputs(model: ir.Model) -> None:
    """Bodies of If and Loop compute what they return: onnxruntime refuses one that returns a value from outside."""
    for body in bodies(model.graph):
        for index, value in enumerate(body.outputs):
            producer = value.producer()
            if producer is None or producer.graph is not body:
                copied = ir.node("Identity", [value])
                copied.outputs[0].shape, copied.outputs[0].type = value.shape, value.type
                body.append(copied)
                body.outputs[index] = copied.outputs[0]


def name_axes(model: ir.Model, cut: Inference) -> None:
    """Put the axis names in place of the trace's symbols, in every shape and in expressions such as `2*s31`."""
    symbols: dict[str, str] = {}
    for value in model.graph.inputs:
        for dimension, axis in cut.axes.get(value.name, {}).items():
            symbols[str(value.shape[dimension])] = axis

    def renamed(size: Any) -> Any:
        if isinstance(size, int) or size.value is None:
            return size
        return re.sub(r"[^\W\d]\w*", lambda found: symbols.get(found.group(), found.group()), str(size.value))

    for value in graph_values(model.graph):
        if value.shape is not None:
            value.shape = ir.Shape([renamed(size) for size in value.shape])


def describe(model: ir.Model, program: Program, identity: str, **options: Any) -> None:
    """Where the model comes from, for whoever finds the file."""
    model.graph.name = program.source
    versions = ("subgraph_peft", "torch", "transformers", "onnx", "onnxscript", "onnxruntime")
    facts: dict[str, Any] = {
        "source": program.source,
        "identity": identity,
        "history": list(program.history),
        "adapters": [adapter_json(adapter).model_dump(mode="json") for adapter in program.adapters],
        "versions": {name: module.__version__ for name in versions if (module := sys.modules.get(name)) is not None},
        **{name: option for name, option in options.items() if option},
    }
    if (shift := label_shift(program)) is not None:
        facts["label_shift"] = shift
    if folded := program.folded:
        facts["fold"] = {
            "dtype": str(folded.dtype),
            "adapters": folded.merged,
            "retained": {name: site.retained for name, site in folded.sites.items()},
        }
    model.metadata_props.update({f"{META}.{k}": v if isinstance(v, str) else json.dumps(v) for k, v in facts.items()})
