"""One form for one thing: operators that decompositions left, written as the ones they came from."""

import operator
from collections.abc import Callable

import torch
from torch import fx

from ..graph.nodes import aten
from ..graph.operators import Kind, arguments, is_a, operand, operator_text, permutation


def batch_norm(*arguments: object) -> tuple:
    return aten.batch_norm.default, (*arguments, True)


def batch_norm_inference(x: object, w: object, b: object, mean: object, var: object, *rest: object) -> tuple:
    return aten.batch_norm.default, (x, w, b, mean, var, False, *rest, True)


# operator with several results, of which the first is the layer's -> (the layer's operator, its arguments)
LAYERS: dict[str, Callable[..., tuple]] = {
    "native_dropout": lambda x, p, train: (aten.dropout.default, (x, p, train is not False)),
    "native_layer_norm": lambda *arguments: (aten.layer_norm.default, arguments),
    "_native_batch_norm_legit_functional": batch_norm,
    "_native_batch_norm_legit": batch_norm,
    "native_batch_norm": batch_norm,
    "cudnn_batch_norm": batch_norm,
    "_native_batch_norm_legit_no_training": batch_norm_inference,
}
CONVOLUTIONS = {
    (3, False): aten.conv1d.default, (4, False): aten.conv2d.default, (5, False): aten.conv3d.default,
    (3, True): aten.conv_transpose1d.default, (4, True): aten.conv_transpose2d.input,
    (5, True): aten.conv_transpose3d.input,
}  # fmt: skip


def recompose(graph: fx.Graph) -> None:
    """Dropout, layer norm, batch norm, convolutions, and products with an expanded matrix. In place; equal results.

    A batch norm writes its running statistics itself, where a functional graph writes them at its end: autograd would
    find what it saved changed.
    """
    for node in list(graph.nodes):
        if operator_text(node.target) in LAYERS:
            layer(graph, node)
        elif node.target is aten.convolution.default:
            convolution(node)
        elif node.target is aten.bmm.default:
            product(node)


def layer(graph: fx.Graph, node: fx.Node) -> None:
    results = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    statistics = {3: node.args[3], 4: node.args[4]} if is_functional(node) else {}
    unknown = [at for at, result in results.items() if at not in (0, *statistics) and result.users]
    if unknown or 0 not in results:
        return
    first = results.pop(0)
    target, args = LAYERS[operator_text(node.target)](*arguments(node))
    with graph.inserting_before(node):
        written = graph.call_function(target, args)
    written.meta = dict(first.meta)
    first.replace_all_uses_with(written)
    for at, result in results.items():
        for user in list(result.users):
            if user.target is aten.copy_.default and user.args[1] is result:
                graph.erase_node(user)
        if at in statistics:
            result.replace_all_uses_with(statistics[at])
        graph.erase_node(result)
    graph.erase_node(first)
    graph.erase_node(node)


def is_functional(node: fx.Node) -> bool:
    return operator_text(node.target) == "_native_batch_norm_legit_functional"


def convolution(node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    target = CONVOLUTIONS.get((x.meta["val"].ndim, transposed))
    if target is not None:
        node.target = target
        middle = (output_padding, groups, dilation) if transposed else (dilation, groups)
        node.args = (x, weight, bias, stride, padding, *middle)


def product(node: fx.Node) -> None:
    """x [b, n, k] times b copies of one matrix [k, m]: the product with the matrix."""
    x, copies = node.args
    matrix = copies
    while is_a(matrix, Kind.SAME | Kind.RESHAPE) and same_matrices(matrix, operand(matrix)):
        matrix = operand(matrix)
    source = operand(matrix) if is_a(matrix, Kind.BROADCAST) else None
    if source is not None and same_matrices(matrix, source) and source.meta["val"].ndim == 2:
        transposed = is_a(source, Kind.TRANSPOSE) and permutation(source) == (1, 0)
        node.target = aten.linear.default if transposed else aten.matmul.default
        node.args = (x, operand(source) if transposed else source)


def same_matrices(a: fx.Node, b: fx.Node) -> bool:
    shapes = [node.meta["val"].shape for node in (a, b) if isinstance(node.meta.get("val"), torch.Tensor)]
    return len(shapes) == 2 and min(map(len, shapes)) > 1 and str(shapes[0][-2:]) == str(shapes[1][-2:])
