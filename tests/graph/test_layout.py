"""Layouts: one reading of a stored weight, on tensors and as nodes, and its inverse."""

import pytest
import torch
from torch import fx

from subgraph_peft.graph.layout import MATRIX, TRANSPOSED, Layout, convolution, transposed_convolution, whole

LAYOUTS = {
    "plain": (MATRIX, (3, 5)),
    "conv1d_of_transformers": (TRANSPOSED, (5, 3)),
    "convolution": (convolution(2), (4, 3, 2, 5)),
    "transposed_convolution": (transposed_convolution(1, 1), (4, 6, 3)),
    "grouped_transposed_convolution": (transposed_convolution(2, 2), (4, 3, 2, 5)),
    "stack": (Layout((1,), (2,), stack=0), (2, 3, 5)),
    "stack_transposed": (Layout((2,), (1,), stack=0), (2, 5, 3)),
    "stack_between": (Layout((0,), (2,), stack=1), (3, 2, 5)),
    "whole": (whole((1, 4, 6)), (1, 4, 6)),
}


@pytest.mark.parametrize(("layout", "shape"), LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_and_nodes_are_read_and_written_alike(layout, shape):
    W = torch.randn(shape, dtype=torch.float64)
    graph = fx.Graph()
    stored = graph.placeholder("W")

    def emit(target, args, term):
        return graph.call_function(target, args)

    matrix = layout.emit_matrix(stored, shape, emit, "W")
    graph.output((matrix, layout.emit_stored(matrix, shape, emit, "W")))
    read, back = fx.GraphModule({}, graph)(W)
    assert torch.equal(read, layout.matrix(W)) and read.shape == layout.matrix_shape(shape)
    assert torch.equal(back, W) and torch.equal(layout.stored(read, shape), W)
    assert layout.stored(read, shape).is_contiguous()


def test_rows_and_columns_are_those_that_the_operators_contract():
    W, x = torch.randn(4, 3, 2, 5, dtype=torch.float64), torch.randn(1, 3, 2, 5, dtype=torch.float64)
    given = torch.nn.functional.conv2d(x, W).flatten()
    torch.testing.assert_close(convolution(2).matrix(W) @ x.flatten(), given)
    W, x = torch.randn(4, 3, 1, dtype=torch.float64), torch.randn(1, 4, 1, dtype=torch.float64)
    layout = transposed_convolution(1, 2)
    given = torch.nn.functional.conv_transpose1d(x, W, groups=2).reshape(2, -1)
    each = layout.matrix(W).reshape(2, 3, 2)
    torch.testing.assert_close(torch.einsum("goi,gi->go", each, x.reshape(2, 2)), given)
