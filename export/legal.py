"""Nodes that torch.onnx or onnxscript cannot take, in a form that they can."""

import operator

from torch import fx

from subgraph_peft.graphs import aten, fixed_size

END = 2**63 - 1


def legalise(graph: fx.Graph) -> None:
    """In place: floats minus integer tensors, and parts of a length that varies."""
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        cast_operand(graph, node)
    for target in (aten.chunk.default, aten.split.Tensor):
        for node in graph.find_nodes(op="call_function", target=target):
            slice_parts(graph, node)


def cast_operand(graph: fx.Graph, node: fx.Node) -> None:
    """`1.0 - mask`: cast `mask` first, where torch.onnx finds no operator."""
    operand, dtype = node.args[0], node.meta["val"].dtype
    if operand.meta["val"].dtype != dtype:
        with graph.inserting_before(node):
            cast = graph.call_function(aten.to.dtype, (operand, dtype))
        cast.meta = {**node.meta, "val": operand.meta["val"].to(dtype)}
        node.replace_input_with(operand, cast)


def slice_parts(graph: fx.Graph, node: fx.Node) -> None:
    """The parts as slices, where the length varies: onnxscript cannot fold the sequence that torch.onnx writes."""
    x, part = node.args[:2]
    dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    if fixed_size(x.meta["val"].shape[dim]) is not None:
        return

    def emit(target: object, *args: object) -> fx.Node:
        made = graph.call_function(target, args)
        made.meta = {key: value for key, value in node.meta.items() if key != "val"}
        return made

    with graph.inserting_before(node):
        if node.target is aten.chunk.default:
            longer = emit(operator.add, emit(aten.sym_size.int, x, dim), part - 1)
            part = emit(operator.floordiv, longer, part)
        for user in list(node.users):
            index = user.args[1]
            start = emit(operator.mul, part, index)
            end = emit(operator.mul, part, index + 1) if index + 1 < len(node.meta["val"]) else END
            sliced = emit(aten.slice.Tensor, x, dim, start, end)
            sliced.meta["val"] = user.meta["val"]
            user.replace_all_uses_with(sliced)
            graph.erase_node(user)
    graph.erase_node(node)
