"""Files and folders that appear whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import SubgraphPeftError

TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
)  # fmt: skip


@contextmanager
def replacing(path: str | os.PathLike, error: type[SubgraphPeftError]) -> Iterator[Path]:
    """A temporary path beside `path`, moved onto it when the block ends well and removed when it does not.

    Raises `error` where the folder cannot be made or written to.
    """
    target = Path(path)
    temporary: Path | None = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=target.suffix)
        os.close(handle)
        temporary = Path(name)
        yield temporary
        temporary.chmod(0o644)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as failure:
        raise unwritten(target, error, failure) from failure
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(
    path: str | os.PathLike,
    error: type[SubgraphPeftError],
    *,
    inputs: Iterable[Path] = (),
    earlier: Iterable[str] = (),
) -> Iterator[Path]:
    """An empty temporary folder beside `path`, which takes its place when the block ends well. Whatever fails, the
    former folder stays or comes back.

    inputs:   what the block reads, which the former folder may not hold
    earlier:  patterns of the files that an earlier run may have left in it, beside those that are written now

    Raises `error` where the folder cannot be made or written to, and where a former one holds anything else.
    """
    target = Path(path)
    if target.is_file():
        raise error(f"{target} is a file; name a folder.")
    for read in inputs:
        if read.resolve().is_relative_to(target.resolve()):
            raise error(f"{read} is read here, and {target} would be replaced; name a new folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            folder, former = Path(scratch) / "new", Path(scratch) / "former"
            folder.mkdir()
            yield folder
            check_former(target, folder, error, earlier)
            try:
                if target.exists():
                    target.rename(former)
                folder.rename(target)
            except BaseException:
                if former.exists() and not target.exists():
                    former.rename(target)
                raise
    except (OSError, SafetensorError) as failure:
        raise unwritten(target, error, failure) from failure


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


def unwritten(target: Path, error: type[SubgraphPeftError], failure: Exception) -> SubgraphPeftError:
    reason = getattr(failure, "strerror", None) or failure
    return error(f"{target} cannot be written: {reason}. Choose another folder or free space.")


def write_text(path: str | os.PathLike, text: str, error: type[SubgraphPeftError]) -> None:
    with replacing(path, error) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(
    path: str | os.PathLike, value: Any, error: type[SubgraphPeftError], default: Callable | None = None
) -> None:
    write_text(path, json.dumps(value, indent=2, default=default) + "\n", error)
