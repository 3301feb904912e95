"""A float32 model in half precision: weights cast when they are written, what overflows or is rounded badly kept."""

from collections.abc import Iterable, Iterator

import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.traversal import RecursiveGraphIterator

from .walk import bodies, graph_values
from .weights import converted, values

FLOAT = ir.DataType.FLOAT
DTYPES = {torch.float32: FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16}

ANGLES = {"Cos", "Sin"}  # and what computes them from positions: those beyond 2048 are no float16
ALONE = {"Pow", "Exp", "Log", "Softplus", "Range", "CumSum"}
REDUCTIONS = {
    "ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSumExp", "ReduceMax", "ReduceMin",
}  # fmt: skip
CARRIED = {  # on the way to x / √mean
    "Add", "Sub", "Mul", "Div", "Sqrt", "Reciprocal", "Neg", "Max", "Min", "Clip", "Identity", "Reshape", "Expand",
    "Squeeze", "Unsqueeze", "Transpose",
}  # fmt: skip
LAYERS = {"Gemm", "Conv", "ConvTranspose", "Gather", "LayerNormalization", "GroupNormalization", "LSTM", "GRU", "RNN"}
INTEGERS = {ir.DataType.INT64, ir.DataType.INT32}
ALWAYS_FLOAT = {"Resize": (1, 2)}


def narrow(model: ir.Model, dtype: torch.dtype) -> None:
    """Compute the float32 part of `model` in `dtype`, float16 or bfloat16, in place.

    Inputs, outputs and weights are of that dtype. Means, sums, powers, exponentials, the angles of rotary embeddings
    and what is rounded to integers stay in float32, and what joins a mean with the values that it is the mean of, or
    adds a number that the dtype does not have; norms and softmax that are one operator accumulate in float32.
    """
    target = DTYPES[dtype]
    passes.ShapeInferencePass()(model)
    drop_casts(model.graph)
    wide = in_float32(model.graph, dtype)
    made = {value for value in everything(model.graph) if value.dtype is FLOAT}
    held: dict[ir.Value, ir.Value] = {}
    for value in made:
        if value.producer() not in wide:
            value.dtype = target
    for node in list(RecursiveGraphIterator(model.graph)):
        retarget(node, target, wide)
        for index, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, target) or value.dtype is FLOAT and value not in made:
                continue
            wanted = FLOAT if node in wide or index in ALWAYS_FLOAT.get(node.op_type, ()) else target
            if wanted is not value.dtype:
                if value not in held:
                    held[value] = copy(model.graph, value) if value.is_initializer() else cast(value, wanted)
                node.replace_input_with(index, held[value])
    for value in model.graph.initializers.values():
        if value.dtype is target and value.const_value.dtype is FLOAT:
            value.const_value = converted(value.const_value, target, value.name)
    for graph in (model.graph, *bodies(model.graph)):
        finish(graph, target)
    passes.RemoveUnusedNodesPass()(model)


def drop_casts(graph: ir.Graph) -> None:
    """Casts from float32 to float32, which would hide what computes a mean's values."""
    for node in list(graph):
        changes_nothing = node.op_type == "Cast" and node.inputs[0].dtype is node.outputs[0].dtype is FLOAT
        if changes_nothing and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def everything(graph: ir.Graph) -> Iterator[ir.Value]:
    yield from graph_values(graph)
    for body in bodies(graph):
        yield from (*body.inputs, *body.initializers.values())


def floats(found: Iterable[ir.Value | None]) -> list[ir.Value]:
    return [value for value in found if value is not None and value.dtype is FLOAT]


def in_float32(graph: ir.Graph, dtype: torch.dtype) -> set[ir.Node]:
    """The nodes that stay in float32."""
    wide: set[ir.Node] = set()
    means: set[ir.Node] = set()  # nodes whose result is a mean, or comes from means alone
    for node in RecursiveGraphIterator(graph):
        if not floats((*node.inputs, *node.outputs)):
            continue
        varying = [value.producer() for value in floats(node.inputs) if not value.is_initializer()]
        if node.op_type in REDUCTIONS:
            means.add(node)
            squares = (producer for producer in varying if producer is not None and producer.op_type == "Mul")
            wide.update(squares)
        elif node.op_type in CARRIED and means.intersection(varying):
            wide.add(node)
            if means.issuperset(varying):
                means.add(node)
        if node.op_type in ALONE | REDUCTIONS or adds_what_vanishes(node, dtype):
            wide.add(node)
        if node.op_type in ANGLES or node.op_type == "Cast" and node.outputs[0].dtype in INTEGERS:
            wide.update(cone(node))
    return wide


def adds_what_vanishes(node: ir.Node, dtype: torch.dtype) -> bool:
    """A number such as the 1e-10 that keeps a logarithm finite."""
    numbers = [value.const_value for value in floats(node.inputs) if value.is_initializer()]
    small = [values(number) for number in numbers if node.op_type in CARRIED and number.size == 1]
    return any(number.item() != 0 and number.to(dtype).item() == 0 for number in small)


def cone(node: ir.Node) -> set[ir.Node]:
    """`node` and what computes its float inputs, from the last layers on."""
    found, open_ = {node}, [node]
    while open_:
        for value in floats(open_.pop().inputs):
            producer = value.producer()
            if producer is not None and producer not in found and not is_layer(producer):
                found.add(producer)
                open_.append(producer)
    return found


def is_layer(node: ir.Node) -> bool:
    """Whether it has weights, as the products of positions and frequencies do not."""
    return node.op_type in LAYERS or node.op_type == "MatMul" and any(map(is_matrix, node.inputs))


def is_matrix(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None and producer.op_type == "Transpose":
        return is_matrix(producer.inputs[0])
    return value.is_initializer() and sum(size != 1 for size in value.shape) > 1


def retarget(node: ir.Node, target: ir.DataType, wide: set[ir.Node]) -> None:
    """Give a node that makes floats by an attribute those of its result's dtype."""
    if node in wide:
        return
    for name in ("to", "dtype"):
        if name in node.attributes and node.attributes[name].value == FLOAT:
            node.attributes[name] = ir.AttrInt64(name, target)
    value = node.attributes.get("value")
    if value is not None and value.type is ir.AttributeType.TENSOR and value.value.dtype is FLOAT:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(converted(value.value, target, node.name).numpy()))


def cast(value: ir.Value, to: ir.DataType) -> ir.Value:
    """`value` in another dtype, by a node right behind the one that makes it."""
    node = ir.node("Cast", [value], {"to": to}, name=f"{value.name}_{to.name.lower()}")
    result = node.outputs[0]
    result.name, result.dtype, result.shape = node.name, to, value.shape
    if value.producer() is not None:
        value.producer().append(node)
    elif len(value.graph):
        value.graph.insert_before(value.graph[0], node)
    else:
        value.graph.append(node)
    return result


def copy(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """The initializer in float32, for nodes that stay in it, beside the narrow one."""
    name = f"{value.name}_float"
    made = ir.Value(name=name, shape=value.shape, type=ir.TensorType(FLOAT), const_value=value.const_value)
    graph.register_initializer(made)
    return made


def finish(graph: ir.Graph, target: ir.DataType) -> None:
    """Outputs that were computed in float32, in `target` under their names."""
    for index, value in enumerate(graph.outputs):
        if value.dtype is FLOAT and value.producer() is not None:
            name = value.name
            value.name = f"{name}_float"
            graph.outputs[index] = cast(value, target)
            graph.outputs[index].name = name
