"""A model and its weights appear together, or the files that were there stay."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from subgraph_peft.errors import ExportError

PROTOBUF_LIMIT = 2**31
ROOM_FOR_THE_GRAPH = 2**26


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is gone when the block ends, however it ends. Raises ExportError."""
    if target.is_dir():
        raise ExportError(f"{target} is a folder; name a file in it, such as {target / 'model.onnx'}.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder:
            yield Path(folder)
    except OSError as error:
        reason = f"{error.strerror or error}" + (f" ({error.filename})" if error.filename else "")
        advice = "Choose another folder, or make room on the disk."
        raise ExportError(f"{target} cannot be written: {reason}. {advice}") from error


def data_name(target: Path) -> str:
    return f"{target.name}.data"


def write(model: ir.Model, path: Path, external: bool) -> None:
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


def place(folder: Path, target: Path) -> None:
    """Move the files in `folder` to where `target` goes, the model last; a failure in between brings the former ones
    back.

    Data of a former model goes when the new one has none.
    """
    staged_model = folder / target.name
    new = sorted(file.name for file in folder.iterdir() if file != staged_model)
    former = Path(tempfile.mkdtemp(dir=folder, prefix="former"))
    names = sorted({*new, data_name(target)})
    try:
        for name in names:
            if (target.parent / name).exists():
                os.replace(target.parent / name, former / name)
            if name in new:
                os.replace(folder / name, target.parent / name)
        os.replace(staged_model, target)
    except BaseException:
        if staged_model.exists():
            for name in names:
                if name in new and not (folder / name).exists():
                    os.replace(target.parent / name, folder / name)
                if (former / name).exists():
                    os.replace(former / name, target.parent / name)
        raise
