"""Weights of matrix products in 8 or 4 bits, by onnxruntime's own tool."""

import logging

import onnx_ir as ir

from subgraph_peft.errors import ExportError

BLOCK = 32  # so many inputs of an output share a scale and a zero point
PRODUCT = "MatMulNBits"


def quantize(model: ir.Model, bits: int) -> ir.Model:
    """The model, laid out, with its products by weights as MatMulNBits, every weight rounded to one of 2^bits levels.

    bits: 4 or 8. Embeddings, norms, tied heads, weights with slots and products of activations stay as they are
    Raises ExportError where nothing can be quantised.
    """
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        from onnxruntime.quantization.matmul_nbits_quantizer import DefaultWeightOnlyQuantConfig, MatMulNBitsQuantizer
    finally:
        root.handlers[:], root.level = handlers, level  # which the import sets
    config = DefaultWeightOnlyQuantConfig(block_size=BLOCK, is_symmetric=False, bits=bits)
    tool = MatMulNBitsQuantizer(ir.to_proto(model), algo_config=config)
    tool.process()
    result = ir.from_proto(tool.model.model)
    if all(node.op_type != PRODUCT for node in result.graph):
        raise ExportError("The model has no product by a weight that onnxruntime quantises; leave out quantize.")
    return result
