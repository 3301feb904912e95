"""Files and folders that appear whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import SubgraphPeftError


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
def replacing_folder(path: str | os.PathLike, error: type[SubgraphPeftError]) -> Iterator[Path]:
    """An empty temporary folder beside `path`, which takes its place when the block ends well. Whatever fails, the
    former folder stays or comes back.

    Raises `error` where the folder cannot be made or written to.
    """
    target = Path(path)
    if target.is_file():
        raise error(f"{target} is a file; name a folder.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
            folder, former = Path(scratch) / "new", Path(scratch) / "former"
            folder.mkdir()
            yield folder
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
