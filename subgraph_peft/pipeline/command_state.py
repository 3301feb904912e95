"""A pipeline's state at the stage that a command starts from: configured, captured, with a trained adapter."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..store.adapter_file import load
from .builtin_passes import Capture, Fold
from .config import PipelineConfig, load_config
from .console import announce
from .passes import State
from .run import prepare


def configured(pipeline: str, overrides: Sequence[str], output: Path | None) -> PipelineConfig:
    config = load_config(pipeline, overrides)
    return config.changed(output=str(output)) if output else config


def with_model(config: PipelineConfig) -> State:
    """The state of a pipeline with the captured model."""
    state = prepare(config, Path(config.output), announce)
    return next((item for item in config.pipeline.passes if isinstance(item, Capture)), Capture())(state).state


def with_adapter(config: PipelineConfig, adapter: Path | None) -> State:
    """The state of a pipeline with the captured model and a trained adapter on it."""
    state = with_model(config)
    return replace(state, program=load(state.program, adapter or Path(config.output) / "adapter"))


def fold_pass(config: PipelineConfig) -> Fold:
    """The pipeline's own fold, or the default one."""
    return next((item for item in config.pipeline.passes if isinstance(item, Fold)), Fold())


def run_folder(path: str) -> Path | None:
    """The path where it is a folder that `run` or `train` wrote."""
    return Path(path) if (Path(path) / "config.yaml").is_file() else None


def adapter_folder(path: Path) -> Path:
    """An adapter folder, or that of a run folder."""
    return path if run_folder(str(path)) is None else path / "adapter"
