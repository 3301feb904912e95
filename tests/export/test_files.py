"""Files appear whole, together, or not at all."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
import pytest

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.export.onnx import exporter, files
from subgraph_peft.passes import LoRA
from tests.export.conftest import shake
from tests.models import captured


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def adapted() -> sp.Program:
    return shake(sp.rewrite(captured("mlp"), LoRA(r=2), where="first"))


def test_external_data(tmp_path):
    report = export.to_onnx(captured("mlp"), tmp_path / "model.onnx", external_data=True)
    assert report.files == ("model.onnx", "model.onnx.data")
    assert sorted(contents(tmp_path)) == sorted(report.files)
    assert report.bytes == sum(map(len, contents(tmp_path).values()))
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)
    stored = onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.initializer
    apart = {entry.value for tensor in stored for entry in tensor.external_data if entry.key == "location"}
    assert apart == {"model.onnx.data"}
    moved = tmp_path / "moved"
    moved.mkdir()
    for name in report.files:
        (tmp_path / name).rename(moved / name)
    assert export.verify(moved / "model.onnx", captured("mlp")).drift == report.drift


def test_large_weights_go_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", files.ROOM_FOR_THE_GRAPH + 1)
    assert export.to_onnx(captured("mlp"), tmp_path / "model.onnx").files == ("model.onnx", "model.onnx.data")


def test_a_model_replaces_another_with_its_data(tmp_path, adapted):
    path = tmp_path / "model.onnx"
    export.to_onnx(captured("mlp"), path, external_data=True)
    export.to_onnx(adapted, path, external_data=True)
    export.verify(path, adapted)
    export.to_onnx(captured("mlp"), path)
    assert list(contents(tmp_path)) == ["model.onnx"]
    export.verify(path, captured("mlp"))


@pytest.fixture(scope="module")
def two_files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    export.to_onnx(captured("mlp"), folder / "model.onnx", external_data=True)
    return folder


@pytest.mark.parametrize("stage", ["translate", "write_model", "compare", "written"])
def test_an_interrupt_leaves_what_was_there(two_files, monkeypatch, stage):
    before = contents(two_files)
    original = getattr(exporter, stage)

    def interrupted(*arguments, **options):
        if stage in ("write_model", "compare"):
            original(*arguments, **options)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(exporter, stage, interrupted)
    with pytest.raises(KeyboardInterrupt):
        export.to_onnx(captured("mlp"), two_files / "model.onnx", external_data=True)
    assert contents(two_files) == before


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sp.ExportError, match=r"cannot be written: File exists \(.*file\)\. Choose another folder"):
        export.to_onnx(captured("mlp"), tmp_path / "file" / "model.onnx")


def test_a_folder_as_the_path(tmp_path):
    with pytest.raises(sp.ExportError, match=r"is a folder; name a file in it, such as .*model\.onnx"):
        export.to_onnx(captured("mlp"), tmp_path)


def test_an_unwritable_folder_is_found_before_the_work(tmp_path, monkeypatch):
    def refused(*arguments, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refused)
    monkeypatch.setattr(exporter, "inference", lambda *_: pytest.fail("the folder is tried first"))
    with pytest.raises(sp.ExportError, match="cannot be written: Permission denied. Choose another folder"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx")


def test_a_full_disk(tmp_path, monkeypatch):
    (tmp_path / "model.onnx").write_bytes(b"old")

    def full(model, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.ir, "save", full)
    with pytest.raises(sp.ExportError, match="No space left on device. Choose another folder, or make room"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx")
    assert contents(tmp_path) == {"model.onnx": b"old"}


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system lets no file of this process grow beyond."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[0][1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])


@pytest.mark.parametrize("external", [True, False])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"quantize": 8}], ids=str)
def test_the_system_takes_no_more(two_files, external, options):
    before = contents(two_files)
    with files_up_to(1000), pytest.raises(sp.ExportError, match="cannot be written: File too large"):
        export.to_onnx(captured("mlp"), two_files / "model.onnx", external_data=external, **options)
    assert contents(two_files) == before


def test_missing_folders_are_made(tmp_path):
    assert Path(export.to_onnx(captured("mlp"), tmp_path / "a" / "b" / "model.onnx").path).is_file()
