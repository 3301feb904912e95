"""A file, a set of files or a folder appears as a whole or not at all."""

import ast
import os
import shutil
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerState

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.base import files
from subgraph_peft.passes import LoRA
from subgraph_peft.store.merged_folder import save_merged
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
    with (
        pytest.raises(sp.ExportError, match=r"cannot be written: .*directory"),
        files.replacing_set(folder / "a.json", sp.ExportError) as new,
    ):
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


def test_modes_are_so_whatever_wrote_the_file(tmp_path, programs):
    """safetensors writes for the owner alone."""
    captured, adapted, _ = programs
    former = os.umask(0o022)
    try:
        sp.save(adapted, tmp_path / "own")
        export.to_peft(adapted, tmp_path / "peft")
        sp.write(adapted, tmp_path / "program")
        save_merged(captured, None, None, tmp_path / "merged")
        with files.replacing_folder(tmp_path / "folder", sp.ExportError) as made:
            (made / "inner").mkdir()
            save_file({"x": torch.zeros(1)}, made / "inner" / "x")
        (tmp_path / "folder" / "inner" / "x").chmod(0o640)
        with files.replacing_folder(tmp_path / "folder", sp.ExportError) as made:
            (made / "inner").mkdir()
            save_file({"x": torch.zeros(1)}, made / "inner" / "x")
    finally:
        os.umask(former)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert len(modes) == 7 and modes.pop("x") == 0o640 and set(modes.values()) == {0o644}


def test_a_set_takes_the_place_of_symbolic_links(tmp_path, programs):
    """As in a cache of downloads: the link is replaced, what it names stays."""
    captured, first, second = programs
    sp.save(first, folder := tmp_path / "snapshot")
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        path.rename(tmp_path / "blobs" / path.name)
        path.symlink_to(f"../blobs/{path.name}")
    sp.save(second, folder)
    assert torch.equal(sp.load(captured, folder).run(), second.run())
    assert torch.equal(sp.load(captured, tmp_path / "blobs").run(), first.run())


@pytest.mark.parametrize("exchange", [True, False])
def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path, monkeypatch, exchange):
    if not exchange:
        monkeypatch.setattr(files, "exchanged", lambda one, other: False)
    put(tmp_path / "disk", OLD)
    (tmp_path / "link").symlink_to("disk")
    with files.replacing_folder(tmp_path / "link", sp.ExportError, earlier=["*"]) as new:
        (new / "a.json").write_bytes(b"new a")
    assert contents(tmp_path / "disk") == {"a.json": b"new a"} and (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link"]


@pytest.mark.parametrize("name", ["", ".", "/", "x" * 300])
def test_what_names_no_file_and_no_folder_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sp.ExportError, match="is a folder; name a file|too long"):
        files.write_text(name, "…", sp.ExportError)
    with pytest.raises(sp.ExportError, match="name a folder|too long"), files.replacing_folder(name, sp.ExportError):
        pass
    assert not list(tmp_path.iterdir())


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
        resume.write_checkpoint(
            folder, program, optimizer, sp.schedule(program, optimizer), TrainerState(), {"kind": kind}
        )

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


def test_two_processes_may_end_the_same_write(tmp_path):
    """Each finds the other's work done at every step, whichever is first."""
    put(folder := tmp_path / "out", OLD)
    for _ in stops(lambda: write_new(folder), "killed after", lambda: put(folder, OLD)):
        if not (journal := folder / ".a.json.commit").exists():
            continue
        files.apply(journal, folder)
        files.apply(journal, folder)  # the reader that comes second
        assert contents(folder) == NEW


def write_new(folder: Path) -> None:
    with files.replacing_set(folder / "a.json", sp.ExportError) as new:
        for name, data in NEW.items():
            (new / name).write_bytes(data)
