"""A file, a set of files or a folder appears as a whole or not at all."""

import ast
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import TrainerState

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.base import files
from subgraph_peft.passes import LoRA
from subgraph_peft.training import resume
from tests.crashes import STOPS, contents, stops

OLD = {"a.json": b"old a", "b.bin": b"old b"}
NEW = {"a.json": b"new a", "b.bin": b"new b", "c.txt": b"new c"}
ROOT = Path(__file__).parents[2]


def put(folder: Path, given: dict[str, bytes]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, data in given.items():
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("former", [{}, {**OLD, "gone": b"old"}], ids=len)
def test_a_set_is_the_former_or_the_new_one(tmp_path, how, former):
    folder, seen = tmp_path / "out", []

    def write() -> None:
        with files.replacing_set(folder / "a.json", sp.ExportError, gone=["gone"]) as new:
            for name, data in NEW.items():
                (new / name).write_bytes(data)

    for _ in stops(write, how, lambda: put(folder, {**former, "other": b"kept"})):
        files.settle(folder / "a.json", sp.ExportError)
        seen.append(contents(folder))
        assert seen[-1].pop("other") == b"kept"
    assert all(found in (former, NEW) for found in seen) and seen[-1] == NEW and seen.count(former) > 3


@pytest.mark.parametrize("how", STOPS)
def test_a_file_is_the_former_or_the_new_one(tmp_path, how):
    path, seen = tmp_path / "file", []

    def write() -> None:
        with files.replacing(path, sp.ExportError) as temporary:
            temporary.write_bytes(b"new")

    for _ in stops(write, how, lambda: path.write_bytes(b"old")):
        seen.append(path.read_bytes())
    assert set(seen) == {b"old", b"new"} and seen[-1] == b"new"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("how", STOPS)
def test_a_folder_is_the_former_or_the_new_one(tmp_path, monkeypatch, how, exchange):
    folder, seen = tmp_path / "folder", []
    if not exchange:
        monkeypatch.setattr(files, "exchanged", lambda one, other: False)

    def write() -> None:
        with files.replacing_folder(folder, sp.ExportError, earlier=["*"]) as new:
            (new / "a.json").write_bytes(b"new a")

    for _ in stops(write, how, lambda: put(folder, OLD)):
        files.settle(folder, sp.ExportError)
        seen.append(contents(folder))
    assert all(found in (OLD, {"a.json": b"new a"}) for found in seen) and seen[-1] == {"a.json": b"new a"}


def test_where_names_are_exchanged_a_reader_never_misses_the_folder(tmp_path):
    put(tmp_path / "one", OLD), put(tmp_path / "other", NEW)
    if not files.exchanged(tmp_path / "one", tmp_path / "other"):
        pytest.skip("this file system cannot exchange names")
    assert contents(tmp_path / "one") == NEW and contents(tmp_path / "other") == OLD


def test_an_error_in_the_middle_brings_the_former_files_back(tmp_path):
    put(folder := tmp_path / "out", OLD)
    (folder / "c.txt").mkdir()  # what cannot be replaced by a file
    with pytest.raises(sp.ExportError, match=r"cannot be written: .*directory"), files.replacing_set(
        folder / "a.json", sp.ExportError
    ) as new:
        for name, data in NEW.items():
            (new / name).write_bytes(data)
    (folder / "c.txt").rmdir()
    assert contents(folder) == OLD and not list(folder.glob(".*"))


def test_nothing_is_left_beside_what_was_written(tmp_path):
    put(folder := tmp_path / "out", OLD)
    with files.replacing_set(folder / "a.json", sp.ExportError, gone=["b.bin"]) as new:
        (new / "a.json").write_bytes(b"new")
    with files.replacing_folder(tmp_path / "made", sp.ExportError) as made:
        (made / "x").write_bytes(b"")
    files.write_text(tmp_path / "text", "…", sp.ExportError)
    assert contents(folder) == {"a.json": b"new"}
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.json", "made", "out", "text", "x"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_are_what_the_user_asks_for(tmp_path, umask):
    former = os.umask(umask)
    try:
        files.write_text(tmp_path / "new", "", sp.ExportError)
        with files.replacing_folder(tmp_path / "folder", sp.ExportError) as made:
            (made / "inner").write_text("")
        with files.replacing_set(tmp_path / "set", sp.ExportError) as made:
            (made / "set").write_text("")
        (tmp_path / "old").write_text("")
        (tmp_path / "old").chmod(0o640)
        files.write_text(tmp_path / "old", "…", sp.ExportError)
    finally:
        os.umask(former)
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert mode == {"new": 0o666 & ~umask, "folder": 0o777 & ~umask, "inner": 0o666 & ~umask, "set": 0o666 & ~umask,
                    "old": 0o640}  # fmt: skip


def test_a_stopped_write_that_cannot_be_ended_is_said(tmp_path, monkeypatch):
    journal = tmp_path / ".adapter.json.commit"
    journal.mkdir()
    with pytest.raises(sp.CheckpointError, match=r"adapter\.json was stopped .* cannot be ended here: No such"):
        files.settle(tmp_path / "adapter.json", sp.CheckpointError)


def test_everything_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced, order = set(), []
    monkeypatch.setattr(files, "sync", lambda path: synced.add(path.name))
    replace = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (order.append(Path(a).name in synced), replace(a, b)))
    files.write_text(tmp_path / "file", "…", sp.ExportError)
    with files.replacing_set(tmp_path / "set", sp.ExportError) as new:
        (new / "set").write_text("…"), (new / "beside").write_text("…")
    assert order == [True] * 3 and tmp_path.name in synced


def test_nothing_else_renames_files():
    """One writer: no other file of the package moves, links or renames."""
    moves = {"replace", "rename", "renames", "move", "link", "symlink"}
    for folder in ("subgraph_peft", "passes", "export"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                named = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
                if named and node.value.id in ("os", "shutil") and node.attr in moves:
                    assert path.name == "files.py", f"{path}:{node.lineno}"


@pytest.fixture(scope="module")
def programs() -> tuple[sp.Program, sp.Program, sp.Program]:
    """A captured program, and it under two adapters that differ in options and tensors."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    captured = sp.capture(model, torch.randn(3, 6))
    made = []
    for alpha in (16.0, 160.0):
        adapted = sp.rewrite(captured, LoRA(r=2, alpha=alpha), where="0")
        with torch.no_grad():
            for _, parameter in adapted.parameters(trainable=True):
                parameter.normal_()
        made.append(adapted)
    return captured, *made


@pytest.mark.parametrize("how", STOPS)
@pytest.mark.parametrize("layout", ["own", "peft"])
def test_an_adapter_is_the_former_or_the_new_one(tmp_path, programs, layout, how):
    captured, first, second = programs
    save, load = (sp.save, sp.load) if layout == "own" else (export.to_peft, export.from_peft)
    outputs = {"first": first.run(), "second": second.run()}
    save(first, tmp_path / "first")
    seen = []

    def restore() -> None:
        shutil.rmtree(tmp_path / "adapter", ignore_errors=True)
        shutil.copytree(tmp_path / "first", tmp_path / "adapter")

    for _ in stops(lambda: save(second, tmp_path / "adapter"), how, restore):
        found = load(captured, tmp_path / "adapter").run()
        seen.append(next(name for name, value in outputs.items() if torch.allclose(found, value)))
    assert seen[-1] == "second" and "first" in seen


@pytest.mark.parametrize("how", STOPS)
def test_a_training_checkpoint_of_the_same_step_is_the_former_or_the_new_one(tmp_path, programs, how):
    _, first, second = programs
    folder = tmp_path / "checkpoint-3"

    def write(program: sp.Program, kind: str) -> None:
        optimizer = torch.optim.AdamW(sp.parameter_groups(program, lr=0.1))
        resume.write(folder, program, optimizer, sp.schedule(program, optimizer), TrainerState(), {"kind": kind})

    write(first, "old")
    shutil.copytree(folder, tmp_path / "former")
    seen = []

    def restore() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "former", folder)

    for _ in stops(lambda: write(second, "new"), how, restore):
        assert resume.found(tmp_path) == [folder]
        seen.append(resume.read_run(folder)["kind"])
        torch.testing.assert_close(sp.load(first.captured, folder).run(), {"old": first, "new": second}[seen[-1]].run())
    assert seen[-1] == "new" and "old" in seen
