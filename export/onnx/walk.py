"""What an ONNX graph holds, the bodies of its branches and loops included."""

from collections.abc import Iterator

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator


def graph_values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Inputs and initializers of the graph, and the results of all nodes."""
    yield from (*graph.inputs, *graph.initializers.values())
    for node in RecursiveGraphIterator(graph):
        yield from node.outputs


def bodies(graph: ir.Graph) -> list[ir.Graph]:
    attributes = (a for node in RecursiveGraphIterator(graph) for a in node.attributes.values())
    return [attribute.as_graph() for attribute in attributes if attribute.type is ir.AttributeType.GRAPH]
