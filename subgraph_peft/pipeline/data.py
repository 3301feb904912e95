"""Data for training: rows of text become token ids and labels, batches are padded."""

import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch.utils.data import Dataset

from ..base.errors import ConfigError
from ..program.label_shift import IGNORED
from ..training.collation import Collate, Item, Padding
from ..training.tasks import TASKS
from .rows import Row, read_rows

LONGEST = 512


class DataSpec(BaseModel):
    """Where the rows are, and which columns hold what. Rows without any text in them are taken as finished inputs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str = Field(
        description="rows to train on: a .jsonl or .csv file, module:function, or a name of the datasets library, with "
        "a split as in glue@train where it is not the usual one"
    )
    eval: str | None = Field(None, description="rows to evaluate on, written alike")
    test: str | None = Field(None, description="rows for a last evaluation, written alike")
    arguments: dict[str, Any] = Field(default_factory=dict, description="of factories and of datasets.load_dataset")
    text: str = Field("text", description="column of the input")
    text_pair: str | None = Field(None, description="column of its second part: pairs are encoded together")
    completion: str | None = Field(
        None,
        description="column of what follows `text` after `separator`, for causal language models; the loss is on it "
        "alone",
    )
    separator: str = Field("\n", description="between `text` and `completion`")
    label: str = Field(
        "label",
        description="column of the label: whole numbers are class numbers, names are numbered in alphabetical order",
    )
    labels: tuple[str, ...] = Field((), description="names of the classes, in the order of their numbers")
    regression: bool = Field(False, description="labels are real numbers")
    max_length: PositiveInt | None = Field(
        None, description="in tokens; by default the tokenizer's own limit, at most 512. A prompt is cut on the left"
    )
    limit: PositiveInt | None = Field(None, description="at most so many rows of each set, drawn with the seed")
    eval_share: float = Field(
        0.1,
        ge=0,
        lt=1,
        description="without `eval`, this share of the distinct texts of `train` is set aside; 0 for none",
    )
    seed: int = Field(0, description="of what is drawn from the rows")


class Examples(Dataset):
    """Model inputs, one dict of lists, numbers or tensors an example."""

    def __init__(self, items: Sequence[Item]):
        self.items = list(items)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Item:
        return self.items[index]

    @cached_property
    def digest(self) -> str:
        """Hash of the contents: what tells two runs on different data apart."""
        digest = hashlib.sha256()
        for item in self.items:
            digest.update(json.dumps(item, default=lambda t: torch.as_tensor(t).tolist(), sort_keys=True).encode())
        return digest.hexdigest()


@dataclass(frozen=True)
class Data:
    """labels:  names of the classes by number; the name of the column for regression; none for language models
    metrics: what `evaluate` reports for such data; None leaves it to the form of the labels
    """

    train: Examples
    eval: Examples | None
    test: Examples | None
    labels: tuple[str, ...]
    collate: Collate
    metrics: tuple[str, ...] | None = None


def load_data(spec: DataSpec, tokenizer: Any | None, task: str = "sequence-classification") -> Data:
    """Read, number the labels, set an evaluation share aside, encode.

    Raises ConfigError with the file and line where a row is at fault, and the columns there are where one is missing.
    """
    sets = {
        name: read_rows(source, split, spec.arguments)
        for name, split in (("train", "train"), ("eval", "validation"), ("test", "test"))
        if (source := getattr(spec, name)) is not None
    }
    finished = not any(isinstance(value, str) for value in sets["train"][0].values.values())
    if not finished:
        sets["train"][0].text(spec.text)
    names, numbering = (), {}
    if TASKS[task].text == "class" and spec.regression:
        names = (spec.label,)
    elif TASKS[task].text == "class" and not finished:
        names, numbering = number_labels(spec, [row for rows in sets.values() for row in rows])
    if "eval" not in sets and spec.eval_share:
        sets["train"], sets["eval"] = set_aside(sets["train"], spec)
    if spec.limit:
        draw = random.Random(spec.seed)
        sets = {name: [rows[i] for i in sorted(draw.sample(range(len(rows)), min(spec.limit, len(rows))))]
                for name, rows in sets.items()}  # fmt: skip
    encoded = {
        name: Examples([dict(r.values) for r in rows] if finished else encode(spec, rows, tokenizer, task, numbering))
        for name, rows in sets.items()
    }
    collate, metrics = Padding(tokenizer), TASKS[task].metrics
    return Data(encoded["train"], encoded.get("eval"), encoded.get("test"), names, collate, metrics)


def number_labels(spec: DataSpec, rows: Sequence[Row]) -> tuple[tuple[str, ...], dict[str, int]]:
    """(class names, label as the data spells it -> number), over every row of every set: `limit` changes nothing."""
    seen: dict[str, Row] = {}
    for row in rows:
        label = row[spec.label]
        if not isinstance(label, (str, int, float)):
            raise ConfigError(f"{row.where}: column {spec.label!r} holds {label!r}; a label is a name or a number.")
        seen.setdefault(spelled(label), row)
    numbers = {label: number for label in seen if (number := as_number(label)) is not None}
    numeric = len(numbers) == len(seen)
    for label, number in numbers.items():
        if numeric and number != int(number):
            raise ConfigError(f"{seen[label].where}: {label} is no class; for real numbers set regression: true.")
    if spec.labels:
        names = spec.labels
        by_number = numeric and not set(seen) <= set(names)
        numbering = {str(i) if by_number else name: i for i, name in enumerate(names)}
    elif numeric:
        low, high = int(min(numbers.values())), int(max(numbers.values()))
        names = tuple(str(number) for number in (range(high + 1) if low >= 0 else sorted(map(int, numbers.values()))))
        numbering = {name: i for i, name in enumerate(names)}
    else:
        names = tuple(sorted(seen))
        numbering = {name: i for i, name in enumerate(names)}
    if (unknown := next((label for label in seen if label not in numbering), None)) is not None:
        raise ConfigError(f"{seen[unknown].where}: label {unknown!r} is not among labels: {', '.join(names)}.")
    return names, numbering


def as_number(value: Any) -> float | None:
    """A finite number, or None."""
    try:
        number = float(value)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def spelled(value: Any) -> str:
    """One spelling for 1, 1.0, True and "1"."""
    number = as_number(value)
    return str(int(number)) if number is not None and number == int(number) else str(value)


def set_aside(rows: list[Row], spec: DataSpec) -> tuple[list[Row], list[Row]]:
    """(train, eval): a share of the distinct inputs, so that no text stands on both sides."""

    def key(row: Row) -> tuple:
        return tuple(json.dumps(row.values.get(c), default=str) for c in (spec.text, spec.text_pair) if c)

    keys = sorted({key(row) for row in rows}) if spec.text in rows[0].values else []
    if not keys:
        chosen = set(random.Random(spec.seed).sample(range(len(rows)), share(len(rows), spec)))
        return [r for i, r in enumerate(rows) if i not in chosen], [r for i, r in enumerate(rows) if i in chosen]
    held = set(random.Random(spec.seed).sample(keys, share(len(keys), spec)))
    return [row for row in rows if key(row) not in held], [row for row in rows if key(row) in held]


def share(count: int, spec: DataSpec) -> int:
    if count < 2:
        raise ConfigError(f"{spec.train} has one text; none can be set aside for evaluation: set eval_share: 0.")
    return min(count - 1, max(1, round(count * spec.eval_share)))


def encode(
    spec: DataSpec, rows: Sequence[Row], tokenizer: Any | None, task: str, numbering: Mapping[str, int]
) -> list[Item]:
    """Examples of rows of text, as the task has them."""
    if tokenizer is None:
        raise ConfigError("The rows hold text, but the model has no tokenizer: name one with its `tokenizer` option.")
    if (kind := TASKS[task].text) is None:
        encoded = " and ".join(name for name, other in TASKS.items() if other.text)
        raise ConfigError(f"Text is encoded for {encoded}; {task} needs finished inputs.")
    return list(ENCODERS[kind](spec, rows, tokenizer, numbering))


def classes(spec: DataSpec, rows: Sequence[Row], tokenizer: Any, numbering: Mapping[str, int]) -> Iterator[Item]:
    """Token ids of a text or of a pair of them, with a class number or a real number."""
    texts = [row.text(spec.text) for row in rows]
    pairs = [row.text(spec.text_pair) for row in rows] if spec.text_pair else None
    encoded = tokenizer(texts, pairs, truncation=True, max_length=length_limit(spec, tokenizer))
    for i, row in enumerate(rows):
        label = real(row, spec.label) if spec.regression else numbering[spelled(row[spec.label])]
        yield {**{key: encoded[key][i] for key in encoded}, "labels": label}


def length_limit(spec: DataSpec, tokenizer: Any) -> int:
    if spec.max_length is None:
        return min(tokenizer.model_max_length, LONGEST)
    if spec.max_length > tokenizer.model_max_length:
        raise ConfigError(f"max_length is {spec.max_length}; the tokenizer's limit is {tokenizer.model_max_length}.")
    return spec.max_length


def real(row: Row, column: str) -> float:
    number = as_number(row[column]) if isinstance(row[column], (str, int, float)) else None
    if number is None:
        raise ConfigError(f"{row.where}: column {column!r} holds {row[column]!r}; a finite number is needed.")
    return number


def completions(spec: DataSpec, rows: Sequence[Row], tokenizer: Any, numbering: Mapping[str, int]) -> Iterator[Item]:
    """Token ids of text + separator + completion + end, with labels on the completion and its end alone."""
    texts, limit = [row.text(spec.text) for row in rows], length_limit(spec, tokenizer)
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if spec.completion:
        prompts = tokenizer([text + spec.separator for text in texts])["input_ids"]
        answers = tokenizer([row.text(spec.completion) for row in rows], add_special_tokens=False)["input_ids"]
    else:
        prompts, answers = [[] for _ in texts], tokenizer(list(texts))["input_ids"]
    for row, prompt, answer in zip(rows, prompts, answers, strict=True):
        answer = (answer + end)[: limit - 1 if spec.completion else limit]
        prompt = prompt[max(0, len(prompt) + len(answer) - limit) :]
        labels = [IGNORED] * len(prompt) + answer
        if all(label == IGNORED for label in labels[1:]):
            raise ConfigError(f"{row.where}: no token is left to predict.")
        yield {"input_ids": prompt + answer, "attention_mask": [1] * len(labels), "labels": labels}


ENCODERS = {"class": classes, "completion": completions}
