"""A model for onnxruntime: attention, norms, activations and rotary embeddings as its own fused operators."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile

import onnx_ir as ir
from onnx_ir.passes import common as passes

from subgraph_peft.base.borrowed import get, gone
from subgraph_peft.base.patches import masks_kept

from .weights import joined, transposed

MICROSOFT = "com.microsoft"


def lay_out(model: ir.Model) -> None:
    """Store weights [in, out], as matrix products read them, in place; a tied one stays as it is. Gemm becomes product
    and sum, which is what rules and tools look for."""
    for node in list(model.graph):
        if node.op_type == "Gemm":
            split(node)
    for node in list(model.graph):
        if node.op_type == "Transpose" and alone(node.inputs[0]) and not node.outputs[0].is_graph_output():
            (weight,) = node.inputs
            store(node, transposed(weight.const_value, node.attributes["perm"].as_ints()), f"{weight.name}.T")


def split(node: ir.Node) -> None:
    """α x Wᵀ + β b by a transpose, a product and a sum, where α and β are 1."""
    options = {name: attribute.value for name, attribute in node.attributes.items()}
    if options.get("alpha", 1.0) != 1.0 or options.get("beta", 1.0) != 1.0 or options.get("transA"):
        return
    x, weight, *bias = node.inputs
    result, made = node.outputs[0], []
    if options.get("transB"):
        made.append(ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{node.name}_Transpose"))
        weight = made[-1].outputs[0]
        weight.shape, weight.type = ir.Shape([*node.inputs[1].shape][::-1]), node.inputs[1].type
    made.append(ir.node("MatMul", [x, weight], name=f"{node.name}_MatMul"))
    if bias and bias[0] is not None:
        made[-1].outputs[0].shape, made[-1].outputs[0].type = result.shape, result.type
        made.append(ir.node("Add", [made[-1].outputs[0], bias[0]], name=node.name))
    for new in made[:-1]:
        new.outputs[0].name = new.name
    made[-1].metadata_props.update(node.metadata_props)
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], made, [result], made[-1].outputs)


def fuse(model: ir.Model) -> dict[str, int]:
    """Rewrite a model that is laid out, in place, by onnxscript's rules for onnxruntime.

    Returns operator of onnxruntime's own -> count.

    Weights that go side by side on the way are stored so, put together when they are written.
    """
    with set_aside(model.graph), masks_kept():
        get("onnxscript.rewriter.ort_fusions:optimize_for_ort")(model)
    if any(node.op_type == "GroupQueryAttention" for node in model.graph):
        raise gone("onnxscript.rewriter.ort_fusions.gqa:gqa_rules.rules", "is not what fuses GroupQueryAttention")
    repeat_positions(model.graph)
    for node in list(model.graph):
        if node.op_type == "Concat":
            sum_once(node)
    for node in list(model.graph):
        if node.op_type == "Concat" and all(map(alone, node.inputs)):
            parts = [value.const_value for value in node.inputs]
            store(node, joined(parts, node.attributes["axis"].as_int()), common([v.name for v in node.inputs]))
    passes.RemoveUnusedNodesPass()(model)
    return dict(Counter(node.op_type for node in model.graph if node.domain == MICROSOFT))


def repeat_positions(graph: ir.Graph) -> None:
    """Positions [1, length] of rotary embeddings, which the sequences of a batch share, repeated for each of them:
    onnxruntime asks for as many."""
    repeated: dict[ir.Value, ir.Value] = {}
    for node in [node for node in graph if node.op_type == "RotaryEmbedding" and node.domain == MICROSOFT]:
        x, positions = node.inputs[:2]
        if positions.shape is None or len(positions.shape) != 2 or positions.shape[0] != 1:
            continue
        if positions not in repeated:
            batch = ir.node("Shape", [x], {"start": 0, "end": 1})
            length = ir.node("Shape", [positions], {"start": 1, "end": 2})
            sizes = ir.node("Concat", [batch.outputs[0], length.outputs[0]], {"axis": 0})
            expand = ir.node("Expand", [positions, sizes.outputs[0]])
            for index, made in enumerate((batch, length, sizes, expand)):
                made.outputs[0].name = f"{positions.name}_repeated_{index}"
                graph.insert_before(node, made)
            repeated[positions] = expand.outputs[0]
        node.replace_input_with(1, repeated[positions])


def sum_once(node: ir.Node) -> None:
    """Concat(W₁ + U₁, W₂ + U₂, …) as Concat(W₁, W₂, …) + Concat(U₁, U₂, …), for weights W."""
    sums = [value.producer() for value in node.inputs]
    if not all(part is not None and part.op_type == "Add" and is_update(part) for part in sums):
        return
    axis = {"axis": node.attributes["axis"].as_int()}
    sides = [ir.node("Concat", [part.inputs[i] for part in sums], axis) for i in (0, 1)]
    total = ir.node("Add", [side.outputs[0] for side in sides], name=node.name)
    old = [node, *sums]
    ir.convenience.replace_nodes_and_values(node.graph, node, old, [*sides, total], node.outputs, total.outputs)


def is_update(node: ir.Node) -> bool:
    """A sum of a weight that nothing else reads and of another tensor of its shape, for one reader."""
    weight, update = node.inputs
    return alone(weight) and weight.shape == update.shape and len(node.outputs[0].uses()) == 1


def alone(value: ir.Value | None) -> bool:
    """An initializer that one node reads."""
    return value is not None and value.is_initializer() and len(value.uses()) == 1


def store(node: ir.Node, tensor: ir.TensorProtocol, name: str) -> None:
    """Put an initializer in place of what `node` computes."""
    result, graph = node.outputs[0], node.graph
    while name in graph.initializers:
        name += "_"
    made = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(made)
    result.replace_all_uses_with(made)
    graph.remove(node, safe=True)
    for value in [*graph.initializers.values()]:
        if value is not made and not value.uses() and not value.is_graph_output():
            del graph.initializers[value.name]


def is_tied(node: ir.Node) -> bool:
    """A weight that others read too, transposed inside the graph."""
    (weight,) = node.inputs
    return weight is not None and weight.is_initializer() and not node.outputs[0].is_graph_output()


@contextmanager
def set_aside(graph: ir.Graph) -> Iterator[None]:
    """Transposed tied weights are inputs meanwhile, so that no rule computes and stores them a second time."""
    nodes = [node for node in graph if node.op_type == "Transpose" and is_tied(node)]
    weights = [node.inputs[0] for node in nodes]
    stands = []
    for node in nodes:
        result = node.outputs[0]
        stands.append(ir.Value(name=f"{result.name}_", shape=result.shape, type=result.type))
        graph.inputs.append(stands[-1])
        result.replace_all_uses_with(stands[-1])
        graph.remove(node)
    try:
        yield
    finally:
        for node, weight, stand in zip(nodes, weights, stands, strict=True):
            graph.inputs.remove(stand)
            graph.initializers.setdefault(weight.name, weight)
            stand.replace_all_uses_with(node.outputs[0])
            graph.insert_before(graph[0], node)


def common(names: Sequence[str]) -> str:
    """`a.{query,key,value}.weight` of names that differ in the middle."""

    def same(letters: tuple[str, ...]) -> bool:
        return len(set(letters)) == 1

    start = len([*takewhile(same, zip(*names, strict=False))])
    end = len([*takewhile(same, zip(*(name[start:][::-1] for name in names), strict=False))])
    middles = [name[start : len(name) - end] for name in names]
    return f"{names[0][:start]}{{{','.join(middles)}}}{names[0][len(names[0]) - end :] if end else ''}"
