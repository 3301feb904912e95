"""A model's file, and its weights where one file cannot hold them."""

from pathlib import Path

import onnx_ir as ir

from subgraph_peft.base.errors import ExportError

PROTOBUF_LIMIT = 2**31
ROOM_FOR_THE_GRAPH = 2**26


def data_name(target: Path) -> str:
    return f"{target.name}.data"


def write_model(model: ir.Model, path: Path, external: bool) -> None:
    """`path`; and `<name>.data` with the weights, where one file cannot hold them or `external` asks for it."""
    path.with_name(data_name(path)).unlink(missing_ok=True)  # of a form that was written to be checked
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    apart = external or size > PROTOBUF_LIMIT - ROOM_FOR_THE_GRAPH
    try:
        ir.save(model, path, external_data=data_name(path) if apart else None)
    except ir.serde.SerdeError as error:
        if found := cause(error):
            raise found from error
        raise


def cause(error: BaseException | None) -> ExportError | OSError | None:
    """What a weight raised when it was computed, where that is what failed."""
    while error is not None and not isinstance(error, (ExportError, OSError)):
        error = error.__cause__
    return error
