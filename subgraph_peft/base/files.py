"""The one writer: a file, files that belong together, or a folder appear as a whole or not at all.

What is written stands beside its target under a hidden name and is synced before it takes the target's place, so that a
process or a machine that stops at any point leaves the former content or the new one:

a file      by one rename
a folder    by one exchange of names (Linux); elsewhere by two renames, and `settle` ends what stopped in between
a set       of files under names that others expect, in a folder that may hold more: by a journal. The new files, and
            links to the former ones, stand in a folder `.<name>.commit`; from the rename that gives it this name, the
            set is the new one. Each file is moved in turn; where that stops, `settle`, which every reader and writer
            of sets calls first, moves the rest. An error on the way turns the journal into `.<name>.undo`, and the
            former files come back.

A new file has the mode that the user's umask says, one that replaces another has the other's.
"""

import ctypes
import json
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import SubgraphPeftError

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip
COMMIT, UNDO, FORMER = ".commit", ".undo", ".former"
NEW, OLD, LIST = "new", "old", "files.json"  # of a journal: new files, former files, the names that the set loses
EXCHANGE, HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of renameat2(2)


@contextmanager
def replacing(path: str | os.PathLike, error: type[SubgraphPeftError]) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not.

    Raises `error` where the folder cannot be made or written to.
    """
    target = Path(path)
    temporary: Path | None = None
    with written(target, error):
        if target.is_dir():
            raise error(f"{target} is a folder; name a file in it.")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = hidden(target, target.suffix)
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            fresh = mode_of(temporary)
            yield temporary
            set_mode(temporary, target, fresh)
            sync(temporary)
            os.replace(temporary, target)
            sync(target.parent)
        finally:
            if temporary is not None:
                temporary.unlink(missing_ok=True)


@contextmanager
def replacing_set(
    path: str | os.PathLike, error: type[SubgraphPeftError], *, gone: Iterable[str] = ()
) -> Iterator[Path]:
    """An empty folder: the files that the block writes into it appear together in the folder of `path`, the set's main
    file, when the block ends well; those called `gone` that it does not write go. Whatever fails, the former stay.

    Raises `error` where the folder cannot be made or written to.
    """
    target = Path(path)
    with written(target, error):
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target) as journal:
            (journal / NEW).mkdir()
            (journal / OLD).mkdir()
            yield journal / NEW
            settle(target, error)
            prepare(journal, target.parent, gone)
            commit = marked(target, COMMIT)
            os.rename(journal, commit)
            try:
                sync(target.parent)
                apply(commit, target.parent)
            except BaseException:
                if commit.exists():  # its name is what a reader goes by: from here on, back to the former files
                    os.rename(commit, marked(target, UNDO))
                    undo(marked(target, UNDO), target.parent)
                raise


@contextmanager
def replacing_folder(
    path: str | os.PathLike,
    error: type[SubgraphPeftError],
    *,
    inputs: Iterable[Path] = (),
    earlier: Iterable[str] = (),
) -> Iterator[Path]:
    """An empty temporary folder beside `path`, which takes its place when the block ends well. Whatever fails, the
    former folder stays.

    inputs:   what the block reads, which the former folder may not hold
    earlier:  patterns of the files that an earlier run may have left in it, beside those that are written now

    Raises `error` where the folder cannot be made or written to, and where a former one holds anything else.
    """
    with written(Path(path), error):
        target = linked(Path(path))
        if target.is_file() or not target.name:
            raise error(f"{target} is {'a file' if target.name else 'no name of a folder'}; name a folder.")
        for read in inputs:
            if read.resolve().is_relative_to(target.resolve()):
                raise error(f"{read} is read here, and {target} would be replaced; name a new folder.")
        target.parent.mkdir(parents=True, exist_ok=True)
        with scratch(target) as folder:
            yield folder
            check_former(target, folder, error, earlier)
            settle(target, error)
            set_modes(folder, target)
            set_mode(folder, target, mode_of(folder))
            sync_tree(folder)
            take_place(folder, target)
            sync(target.parent)


def settle(path: str | os.PathLike, error: type[SubgraphPeftError]) -> None:
    """End a write of the set whose main file is `path`, or of the folder, that was stopped on the way: as the new one,
    or, where it had failed, as the former one. Raises `error` where that cannot be done."""
    target = Path(path)
    try:
        if (commit := marked(target, COMMIT)).is_dir():
            apply(commit, target.parent)
        if (failed := marked(target, UNDO)).is_dir():
            undo(failed, target.parent)
        if (former := marked(linked(target), FORMER)).is_dir() and not target.exists():
            os.rename(former, linked(target))
    except OSError as failure:
        reason = failure.strerror or failure
        raise error(
            f"A write of {target} was stopped on the way and cannot be ended here: {reason}. Make its folder writable."
        ) from failure


def prepare(journal: Path, folder: Path, gone: Iterable[str]) -> None:
    """Everything that ending the write either way needs, in the journal and synced."""
    new = sorted(file.name for file in (journal / NEW).iterdir())
    set_modes(journal / NEW, folder)
    for name in sorted({*new, *gone}):
        if (former := folder / name).is_file():
            link(former, journal / OLD / name)
    lost = sorted(set(gone) - set(new))
    (journal / LIST).write_text(json.dumps({"new": new, "gone": lost}), encoding="utf-8")
    sync_tree(journal)


def apply(journal: Path, folder: Path) -> None:
    """The new files to their places; may have been done in part before."""
    listed = listing(journal)
    for name in listed["new"]:
        with suppress(FileNotFoundError):  # moved before, or by another process that ends the same write
            os.replace(journal / NEW / name, folder / name)
    for name in listed["gone"]:
        (folder / name).unlink(missing_ok=True)
    sync(folder)
    discard(journal)


def undo(journal: Path, folder: Path) -> None:
    """The former files back to their places; may have been done in part before."""
    listed = listing(journal)
    for name in (*listed["new"], *listed["gone"]):
        if (former := journal / OLD / name).exists():
            link(former, back := journal / f"{name}.back")  # the first link stays: this may stop and start again
            os.replace(back, folder / name)
        elif (folder / name).is_file():
            (folder / name).unlink()
    sync(folder)
    discard(journal)


def listing(journal: Path) -> dict[str, list[str]]:
    """The names that a journal is about; none where another process has just ended the write."""
    try:
        return json.loads((journal / LIST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if journal.exists():
            raise
        return {"new": [], "gone": []}


def discard(journal: Path) -> None:
    """A journal that says nothing any more: under a name that no reader looks for, then piece by piece."""
    aside = hidden(journal)
    with suppress(FileNotFoundError):  # another process was first
        os.rename(journal, aside)
    shutil.rmtree(aside, ignore_errors=True)


def linked(folder: Path) -> Path:
    """The folder itself, where a symbolic link names it."""
    return folder.resolve() if folder.is_symlink() else folder


def take_place(folder: Path, target: Path) -> None:
    """`folder` under the name of `target`; a former folder there is left under that of `folder`."""
    if not target.exists():
        os.rename(folder, target)
    elif not exchanged(folder, target):
        former = marked(target, FORMER)
        shutil.rmtree(former, ignore_errors=True)
        os.rename(target, former)
        try:
            os.rename(folder, target)
        except BaseException:
            if not target.exists():
                os.rename(former, target)
            raise
        os.rename(former, folder)


def exchanged(one: Path, other: Path) -> bool:
    """Exchange two names at once, where the system and the file system can."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if os.name == "posix" else None
    return renameat2 is not None and renameat2(HERE, os.fsencode(one), HERE, os.fsencode(other), EXCHANGE) == 0


def link(source: Path, target: Path) -> None:
    """A second name of a file, of its own and not of a symbolic link; a copy where the file system has no such."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copy2(source, target)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def set_mode(new: Path, former: Path, fresh: int) -> None:
    """The former one's mode, or that of a fresh one, which what wrote it may have narrowed, as safetensors does."""
    wanted = mode_of(former) if former.exists() else fresh
    if mode_of(new) != wanted:
        new.chmod(wanted)


def set_modes(folder: Path, former: Path) -> None:
    """The modes of all in a fresh folder, from those of a former one and of the folder itself."""
    fresh = mode_of(folder)
    for path in folder.rglob("*"):
        set_mode(path, former / path.relative_to(folder), fresh if path.is_dir() else fresh & 0o666)


def sync(path: Path) -> None:
    """To the disk, with its name; a folder where the system can."""
    folder = path.is_dir()
    if folder and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError:
        if not folder:  # of folders some file systems cannot, and need not
            raise
    finally:
        os.close(handle)


def sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        sync(path)


@contextmanager
def scratch(target: Path) -> Iterator[Path]:
    """A folder beside `target` that is gone when the block ends, however it ends."""
    folder = hidden(target)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def hidden(target: Path, suffix: str = "") -> Path:
    """A name beside `target` that nothing has."""
    return target.with_name(f".{target.name.lstrip('.')}.{secrets.token_hex(6)}{suffix}")


def marked(target: Path, mark: str) -> Path:
    return target.with_name(f".{target.name}{mark}")


@contextmanager
def written(target: Path, error: type[SubgraphPeftError]) -> Iterator[None]:
    """Turns what the system says of a write into `error`."""
    try:
        yield
    except (OSError, SafetensorError) as failure:
        named = getattr(failure, "filename", None)
        own = named is None or str(target) in str(named) or f".{target.name}." in str(named)
        reason = f"{getattr(failure, 'strerror', None) or failure}" + ("" if own else f" ({named})")
        advice = "Choose another folder, or make room on the disk."
        raise error(f"{target} cannot be written: {reason}. {advice}") from failure


def check_former(target: Path, new: Path, error: type[SubgraphPeftError], earlier: Iterable[str]) -> None:
    """Raises `error` where `target` is a folder with anything in it that would be lost with it."""
    lost = list(others(target, new, tuple(earlier))) if target.is_dir() else []
    if lost:
        named = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise error(f"{target} is a folder with other files, which would be lost: {named}. Name a new folder.")


def others(former: Path, new: Path, earlier: tuple[str, ...]) -> Iterator[str]:
    """What a former folder holds that the new one does not, and that is no file of an earlier run."""
    for path in sorted(former.iterdir()):
        if path.is_dir():
            inner = new / path.name
            yield from (f"{path.name}/{name}" for name in (others(path, inner, ()) if inner.is_dir() else [""]))
        elif not (new / path.name).is_file() and not any(fnmatchcase(path.name, pattern) for pattern in earlier):
            yield path.name


def write_text(path: str | os.PathLike, text: str, error: type[SubgraphPeftError]) -> None:
    with replacing(path, error) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike, value: Any, error: type[SubgraphPeftError], default: Callable | None = None
) -> None:
    write_text(path, json.dumps(value, indent=2, default=default) + "\n", error)
