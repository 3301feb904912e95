"""Where models come from: a transformers name or folder, a folder inside an installed package, or a factory."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator
from torch import nn

from .errors import ConfigError, nearest

Task = Literal[
    "sequence-classification", "token-classification", "question-answering", "multiple-choice", "image-classification",
    "causal-lm", "masked-lm", "seq2seq-lm", "feature-extraction",
]  # fmt: skip
CLASSES: Mapping[str, str] = {
    "sequence-classification": "AutoModelForSequenceClassification",
    "token-classification": "AutoModelForTokenClassification",
    "question-answering": "AutoModelForQuestionAnswering",
    "multiple-choice": "AutoModelForMultipleChoice",
    "image-classification": "AutoModelForImageClassification",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "feature-extraction": "AutoModel",
}
LABELLED = ("sequence-classification", "token-classification", "image-classification")


class ModelSpec(BaseModel):
    """One of `transformers`, `package`, `factory`, and what it needs.

    transformers: a model's name on the hub, or a folder (which is read without any network)
    package:      an installed Python package that holds the model in `folder`
    factory:      "module:function", called with `arguments`; gives a model or (model, tokenizer). Modules of the current
                  directory can be named too
    task:         which head: see CLASSES
    num_labels:   classes of a classification head (1: regression); by default as many as the data's labels
    tokenizer:    name or folder of the tokenizer, where it is not the model's own
    dtype:        of the weights; "auto" keeps what is stored
    kwargs:       further arguments of from_pretrained
    seed:         of tensors that the stored model lacks, such as a new head
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformers: str | None = None
    package: str | None = None
    folder: str = "."
    factory: str | None = None
    arguments: dict[str, Any] = Field(default_factory=dict)
    task: Task = "feature-extraction"
    num_labels: PositiveInt | None = None
    tokenizer: str | None = None
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "float32"
    attn_implementation: str | None = None
    kwargs: dict[str, Any] = Field(default_factory=dict)
    seed: int = 0

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSpec":
        named = [name for name in ("transformers", "package", "factory") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"give one of transformers, package and factory; {' and '.join(named) or 'none'} was given")
        return self


@dataclass(frozen=True)
class LoadedModel:
    """fresh: names of the parameters that the stored model lacked and that are newly drawn (a new head)."""

    model: nn.Module
    tokenizer: Any | None
    fresh: tuple[str, ...] = ()


def load_model(spec: ModelSpec, labels: Sequence[str] = ()) -> LoadedModel:
    """The model that `spec` names, in eval mode, on the CPU.

    labels: class names of the data; they size and name a classification head whose `num_labels` is not given

    Raises ConfigError, with what was looked for and where.
    """
    if spec.factory:
        return from_factory(spec)
    source, local = location(spec)
    tokenizer = load_tokenizer(spec)
    import transformers

    loader = getattr(transformers, CLASSES[spec.task])
    with quiet(), torch.random.fork_rng(), naming_failure(source, local):
        torch.manual_seed(spec.seed)
        options = {"dtype": spec.dtype, **head(spec, labels), **spec.kwargs}
        if spec.attn_implementation:
            options["attn_implementation"] = spec.attn_implementation
        model, report = loader.from_pretrained(source, local_files_only=local, output_loading_info=True, **options)
    share_padding(model, tokenizer)
    return LoadedModel(model, tokenizer, tuple(sorted(report["missing_keys"])))


def head(spec: ModelSpec, labels: Sequence[str]) -> dict[str, Any]:
    """Configuration of a classification head."""
    if spec.task not in LABELLED:
        if spec.num_labels:
            raise ConfigError(f"num_labels has no meaning for the task {spec.task}; it belongs to {', '.join(LABELLED)}.")
        return {}
    if spec.num_labels and labels and spec.num_labels != len(labels):
        raise ConfigError(f"num_labels is {spec.num_labels}, but the data has {len(labels)} labels: {', '.join(labels)}.")
    if labels:
        return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return {"num_labels": spec.num_labels} if spec.num_labels else {}


def load_tokenizer(spec: ModelSpec) -> Any | None:
    """The tokenizer beside the model, or the one named; None where the model has none or comes from a factory."""
    if spec.factory and not spec.tokenizer:
        return None
    source, local = (spec.tokenizer, Path(spec.tokenizer).expanduser().is_dir()) if spec.tokenizer else location(spec)
    if not spec.tokenizer and local and not any(map((Path(source) / "x").with_name, TOKENIZER_FILES), ):
        return None
    from transformers import AutoTokenizer

    with quiet(), naming_failure(source, local):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
