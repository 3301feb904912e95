"""One form for one thing: operators that decompositions left, written as the ones they came from."""

import operator
from collections.abc import Callable

import torch
from torch import fx

from .graphs import aten

TRANSPOSES = {aten.t.default, aten.permute.default, aten.transpose.int}  # of a matrix: they can but swap its axes
RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.clone.default}


def batch_norm(*arguments: object) -> tuple:
    return aten.batch_norm.default, (*arguments, True)


def batch_norm_inference(x: object, w: object, b: object, mean: object, var: object, *rest: object) -> tuple:
    return aten.batch_norm.default, (x, w, b, mean, var, False, *rest, True)


# operator with several results, of which the first is the layer's -> (the layer's operator, its arguments)
LAYERS: dict[object, Callable[..., tuple]] = {
    aten.native_dropout.default: lambda x, p, train: (aten.dropout.default, (x, p, train is not False)),
    aten.native_layer_norm.default: lambda *arguments: (aten.layer_norm.default, arguments),
    aten._native_batch_norm_legit_functional.default: batch_norm,
    aten._native_batch_norm_legit.default: batch_norm,
    aten.native_batch_norm.default: batch_norm,
    aten.cudnn_batch_norm.default: batch_norm,
    aten._native_batch_norm_legit_no_training.default: batch_norm_inference,
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
        if node.target in LAYERS:
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
    target, arguments = LAYERS[node.target](*node.args)
    with graph.inserting_before(node):
        written = graph.call_function(target, arguments)
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
    return node.target is aten._native_batch_norm_legit_functional.default


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
    while matrix.target in RESHAPES and same_matrices(matrix, matrix.args[0]):
        matrix = matrix.args[0]
    source = matrix.args[0] if matrix.target is aten.expand.default else None
    if source is not None and same_matrices(matrix, source) and source.meta["val"].ndim == 2:
        transposed = source.target in TRANSPOSES
        node.target = aten.linear.default if transposed else aten.matmul.default
        node.args = (x, source.args[0] if transposed else source)


def same_matrices(a: fx.Node, b: fx.Node) -> bool:
    shapes = [node.meta["val"].shape for node in (a, b) if isinstance(node.meta.get("val"), torch.Tensor)]
    return len(shapes) == 2 and min(map(len, shapes)) > 1 and str(shapes[0][-2:]) == str(shapes[1][-2:])
