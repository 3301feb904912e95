"""Where models come from: a transformers name or folder, a folder inside an installed package, or a factory."""

import importlib.util
import inspect
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

from ..base.errors import ConfigError, first_line, nearest
from ..base.patches import importable, without_progress
from ..training.tasks import CLASSIFYING, TASKS

TOKENIZER_FILES = "tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model"


class ModelSpec(BaseModel):
    """One of `transformers`, `package`, `factory`, and what it needs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    transformers: str | None = Field(
        None, description="a model's name on the hub, or a folder (which is read without any network)"
    )
    package: str | None = Field(None, description="an installed Python package that holds the model in `folder`")
    folder: str = Field(".", description="inside that package")
    factory: str | None = Field(
        None,
        description="module:function, called with `arguments`; gives a model or (model, tokenizer). it may lie here",
    )
    arguments: dict[str, Any] = Field(default_factory=dict, description="of the factory")
    task: Literal[*TASKS] = Field("feature-extraction", description="which head")
    num_labels: PositiveInt | None = Field(
        None, description="classes of a classification head (1: regression); by default as many as the data's labels"
    )
    tokenizer: str | None = Field(None, description="name or folder of the tokenizer, where it is not the model's own")
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = Field(
        "float32", description="of the weights; auto keeps what is stored"
    )
    attn_implementation: str | None = Field(
        None, description="which attention of transformers; its own choice by default"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="further arguments of from_pretrained")
    seed: int = Field(0, description="of tensors that the stored model lacks, such as a new head")

    @model_validator(mode="after")
    def _one_source(self) -> "ModelSpec":
        named = [name for name in ("transformers", "package", "factory") if getattr(self, name)]
        if len(named) != 1:
            raise ValueError(f"give one of transformers, package, factory; not {' and '.join(named) or 'none'}")
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

    loader = getattr(transformers, TASKS[spec.task].head)
    with without_progress(), torch.random.fork_rng(), naming_failure(source, local):
        torch.manual_seed(spec.seed)
        options = {"dtype": spec.dtype, **head(spec, labels), **spec.kwargs}
        if spec.attn_implementation:
            options["attn_implementation"] = spec.attn_implementation
        model, report = loader.from_pretrained(source, local_files_only=local, output_loading_info=True, **options)
    share_padding(model, tokenizer)
    return LoadedModel(model, tokenizer, tuple(sorted(report["missing_keys"])))


def head(spec: ModelSpec, labels: Sequence[str]) -> dict[str, Any]:
    """Configuration of a classification head."""
    if spec.task not in CLASSIFYING:
        if spec.num_labels:
            raise ConfigError(f"num_labels belongs to {', '.join(CLASSIFYING)}, not to {spec.task}.")
        return {}
    if spec.num_labels and labels and spec.num_labels != len(labels):
        raise ConfigError(f"num_labels is {spec.num_labels}; the data has {len(labels)} labels: {', '.join(labels)}.")
    if labels:
        return {"id2label": dict(enumerate(labels)), "label2id": {name: i for i, name in enumerate(labels)}}
    return {"num_labels": spec.num_labels} if spec.num_labels else {}


def load_tokenizer(spec: ModelSpec) -> Any | None:
    """The tokenizer beside the model, or the one named; None where there is none. Its end token pads if none does."""
    if spec.tokenizer:
        source, local = spec.tokenizer, Path(spec.tokenizer).expanduser().is_dir()
    elif spec.factory or spec.task == "image-classification":
        return None
    else:
        source, local = location(spec)
        if local and not any((Path(source) / name).is_file() for name in TOKENIZER_FILES):
            return None
    from transformers import AutoTokenizer

    with without_progress(), naming_failure(source, local):
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def location(spec: ModelSpec) -> tuple[str, bool]:
    """(name or folder, whether it is a folder)"""
    if spec.package:
        found = importlib.util.find_spec(spec.package)
        if found is None or not found.submodule_search_locations:
            raise ConfigError(f"The package {spec.package!r} is not installed in {sys.prefix}.")
        folder = Path(found.submodule_search_locations[0]) / spec.folder
    else:
        folder = Path(spec.transformers).expanduser()
        if not folder.is_dir():
            if folder.is_absolute() or spec.transformers.startswith("."):
                raise ConfigError(f"There is no folder {folder.absolute()}.")
            return spec.transformers, False
    if not (folder / "config.json").is_file():
        raise ConfigError(f"{folder} holds no transformers model: config.json is missing.")
    return str(folder), True


def from_factory(spec: ModelSpec) -> LoadedModel:
    with importable():
        made = imported(spec.factory, spec.arguments)(**spec.arguments)
    model, tokenizer = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        kind = type(made).__name__
        raise ConfigError(f"Factory {spec.factory!r} gives {kind}, not an nn.Module or (nn.Module, tokenizer).")
    tokenizer = load_tokenizer(spec) or tokenizer
    share_padding(model, tokenizer)
    return LoadedModel(model, tokenizer)


def share_padding(model: nn.Module, tokenizer: Any | None) -> None:
    """Tell a model without a padding token the tokenizer's: its classification head looks for the last real token."""
    config = getattr(model, "config", None)
    if tokenizer is not None and config is not None and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = tokenizer.pad_token_id


def imported(name: str, arguments: Mapping[str, Any]) -> Callable[..., Any]:
    """The callable `module:function`, which must take `arguments`. Raises ConfigError: which part was not found."""
    module_name, _, path = name.partition(":")
    if not module_name or not path:
        raise ConfigError(f"A factory is written 'module:function', not {name!r}.")
    with importable():
        try:
            target: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            if f"{module_name}.".startswith(f"{error.name}."):
                where = f"neither in {Path.cwd()} nor among the installed packages"
                raise ConfigError(f"Factory {name!r}: there is no module {error.name!r}, {where}.") from error
            raise ConfigError(f"Factory {name!r}: {module_name} needs {error.name!r}, not installed here.") from error
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            what = f"{type(error).__name__}: {error} ({frame.filename}:{frame.lineno})"
            raise ConfigError(f"Factory {name!r}: importing {module_name} failed: {what}.") from error
    for part in path.split("."):
        if not hasattr(target, part):
            close = ", ".join(nearest(part, [n for n, value in vars(target).items() if callable(value)])) or "none"
            raise ConfigError(f"Factory {name!r}: {module_name} has no {path!r}. Nearest: {close}.")
        target = getattr(target, part)
    if not callable(target):
        raise ConfigError(f"Factory {name!r} is a {type(target).__name__}, not a function.")
    try:
        signature = inspect.signature(target)
        signature.bind(**arguments)
    except TypeError as error:
        raise ConfigError(f"Factory {name!r} takes {signature}: {error}.") from error
    return target


@contextmanager
def naming_failure(source: str, local: bool) -> Iterator[None]:
    """What transformers could not load, as a ConfigError."""
    try:
        yield
    except Exception as error:
        what = f"{source} cannot be loaded" if local else f"{source!r} is no folder here and cannot be had from the hub"
        raise ConfigError(f"{what}: {type(error).__name__}: {first_line(error)}") from error
