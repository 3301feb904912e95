"""Rows of data: a JSON Lines or CSV file, a set of the `datasets` library, or a factory."""

import csv
import importlib.util
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.errors import ConfigError, first_line, suggestion
from ..base.patches import importable
from .models import imported

SUFFIXES = (".jsonl", ".csv")


@dataclass(frozen=True)
class Row:
    """values by column, and where they stand ("train.jsonl:17") for messages"""

    values: Mapping[str, Any]
    where: str

    def __getitem__(self, column: str) -> Any:
        if column not in self.values:
            columns = ", ".join(map(str, self.values))
            close = suggestion(column, map(str, self.values))
            raise ConfigError(f"{self.where}: there is no column {column!r}.{close} The columns are {columns}.")
        return self.values[column]

    def text(self, column: str) -> str:
        value = self[column]
        if not isinstance(value, str):
            raise ConfigError(f"{self.where}: column {column!r} holds {value!r}; text is needed.")
        return value


def read_rows(source: str, split: str, arguments: Mapping[str, Any]) -> list[Row]:
    """The rows of `source`: a file by its suffix, "module:function" by its colon, a `datasets` name otherwise.

    split:      of a `datasets` name that does not carry its own ("glue/sst2@validation")
    arguments:  of a factory, and of datasets.load_dataset

    Raises ConfigError with the file and line of what cannot be read.
    """
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES:
        rows = list(read_file(path))
    elif path.is_file():
        raise ConfigError(f"{path} is neither {' nor '.join(SUFFIXES)}: convert it, or read it in a 'module:function'.")
    elif ":" in source.partition("@")[0]:
        with importable():
            made = imported(source, arguments)(**arguments)
        rows = list(number(source, made))
    else:
        rows = list(number(source, read_dataset(source, split, arguments)))
    if not rows:
        raise ConfigError(f"{source} has no rows.")
    return rows


def read_file(path: Path) -> Iterator[Row]:
    reader = read_json_lines if path.suffix == ".jsonl" else read_csv
    try:
        yield from reader(path)
    except FileNotFoundError as error:
        raise ConfigError(f"There is no file {path.absolute()}.") from error
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error.reason} at byte {error.start}.") from error


def read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for line, text in enumerate(file, 1):
            if not text.strip():
                continue
            try:
                values = json.loads(text)
            except json.JSONDecodeError as error:
                raise ConfigError(f"{path}:{line}: not JSON: {error.msg} at column {error.colno}.") from error
            if not isinstance(values, dict):
                raise ConfigError(f"{path}:{line}: a line holds an object of columns, not {text.strip()[:40]}.")
            yield Row(values, f"{path}:{line}")


def read_csv(path: Path) -> Iterator[Row]:
    """Comma-separated, with a header; numbers are read as such where a whole column of labels is made of them."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        try:
            for values in reader:
                where = f"{path}:{reader.line_num}"
                if None in values or None in values.values():
                    found = len(values) + len(values.get(None) or [None]) - 1 - list(values.values()).count(None)
                    raise ConfigError(f"{where}: {found} fields; the header has {len(reader.fieldnames)}.")
                yield Row(values, where)
        except csv.Error as error:
            raise ConfigError(f"{path}:{reader.reader.line_num}: not CSV: {error}.") from error


def read_dataset(source: str, split: str, arguments: Mapping[str, Any]) -> Iterable[Any]:
    if importlib.util.find_spec("datasets") is None:
        raise ConfigError(
            f"{source!r} is neither a {' nor a '.join(SUFFIXES)} file nor 'module:function', so it is a name of the "
            "datasets library, which is not installed: pip install 'subgraph-peft[datasets]'."
        )
    import datasets

    name, _, own_split = source.partition("@")
    try:
        return datasets.load_dataset(name, split=own_split or split, **arguments)
    except Exception as error:
        what = f"The data set {source!r} cannot be loaded"
        raise ConfigError(f"{what}: {type(error).__name__}: {first_line(error)}") from error


def number(source: str, rows: Any) -> Iterator[Row]:
    """Rows of an iterable or of a map-style dataset."""
    if not isinstance(rows, Iterable):
        if not (hasattr(rows, "__getitem__") and hasattr(rows, "__len__")):
            raise ConfigError(f"{source!r} gives {type(rows).__name__}; rows are an iterable or a dataset of dicts.")
        rows = map(rows.__getitem__, range(len(rows)))
    for index, values in enumerate(rows):
        if not isinstance(values, Mapping):
            raise ConfigError(f"{source!r}, row {index}: a row is a dict, not {type(values).__name__}.")
        yield Row(dict(values), f"{source}, row {index}")
