"""Weights of matrix products in 8 or 4 bits, by onnxruntime's own tool."""

import onnx_ir as ir

from subgraph_peft.base.borrowed import get
from subgraph_peft.base.errors import ExportError
from subgraph_peft.base.patches import root_logger_kept

BLOCK = 32  # so many inputs of an output share a scale and a zero point
PRODUCT = "MatMulNBits"
QUANTIZER = "onnxruntime.quantization.matmul_nbits_quantizer"
CONFIG, TOOL = "DefaultWeightOnlyQuantConfig", "MatMulNBitsQuantizer"


def quantize(model: ir.Model, bits: int) -> ir.Model:
    """The model, laid out, with its products by weights as MatMulNBits, every weight rounded to one of 2^bits levels.

    bits: 4 or 8. Embeddings, norms, tied heads, weights with slots and products of activations stay as they are
    Raises ExportError where nothing can be quantised.
    """
    with root_logger_kept():
        make_config, make_tool = (get(f"{QUANTIZER}:{name}") for name in (CONFIG, TOOL))
    config = make_config(block_size=BLOCK, is_symmetric=False, bits=bits)
    tool = make_tool(ir.to_proto(model), algo_config=config)
    tool.process()
    result = ir.from_proto(tool.model.model)
    if all(node.op_type != PRODUCT for node in result.graph):
        raise ExportError("The model has no product by a weight that onnxruntime quantises; leave out quantize.")
    return result
