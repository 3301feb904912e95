"""Nodes that torch.onnx or onnxscript cannot take, in a form that they can."""

import operator

from torch import fx

from subgraph_peft.graph.nodes import aten, fixed_size
from subgraph_peft.graph.operators import argument
from subgraph_peft.graph.rewriter import Rewriter

END = 2**63 - 1


def legalise(graph: fx.Graph) -> None:
    """In place: floats minus integer tensors, and parts of a length that varies."""
    rewrite = Rewriter(graph)
    for node in graph.find_nodes(op="call_function", target=aten.rsub.Scalar):
        cast_operand(rewrite, node)
    for target in (aten.chunk.default, aten.split.Tensor):
        for node in graph.find_nodes(op="call_function", target=target):
            slice_parts(rewrite, node)


def cast_operand(rewrite: Rewriter, node: fx.Node) -> None:
    """`1.0 - mask`: cast `mask` first, where torch.onnx finds no operator."""
    operand, dtype = node.args[0], node.meta["val"].dtype
    if operand.meta["val"].dtype != dtype:
        cast = rewrite.add(aten.to.dtype, (operand, dtype), like=node)
        cast.meta["val"] = operand.meta["val"].to(dtype)
        node.replace_input_with(operand, cast)


def slice_parts(rewrite: Rewriter, node: fx.Node) -> None:
    """The parts as slices, where the length varies: onnxscript cannot fold the sequence that torch.onnx writes."""
    x, part = node.args[:2]
    dim = argument(node, "dim")
    if fixed_size(x.meta["val"].shape[dim]) is not None:
        return

    def emit(target: object, *args: object) -> fx.Node:
        return rewrite.add(target, args, like=node)

    if node.target is aten.chunk.default:
        longer = emit(operator.add, emit(aten.sym_size.int, x, dim), part - 1)
        part = emit(operator.floordiv, longer, part)
    for user in list(node.users):
        index = user.args[1]
        start = emit(operator.mul, part, index)
        end = emit(operator.mul, part, index + 1) if index + 1 < len(node.meta["val"]) else END
        rewrite.replace(user, emit(aten.slice.Tensor, x, dim, start, end))
    rewrite.graph.erase_node(node)
