"""A pipeline's state at the stage that a command starts from: configured, captured, with a trained adapter."""

from dataclasses import replace
from pathlib import Path

from .console import announce
from .errors import ConfigError


def configured(pipeline: str, overrides: list[str], output: Path | None):
    from .config import load_config

    config = load_config(pipeline, overrides)
    return config.model_copy(update={"output": str(output)}) if output else config


def until(config, last: str):
    """The configuration up to and with its pass `last`."""
    passes = config.pipeline().passes
    names = [item.name for item in passes]
    if last not in names:
        raise ConfigError(
            f"This pipeline has no {last!r} pass; it has {', '.join(item.option_name() for item in passes)}."
        )
    kept = passes[: names.index(last) + 1]
    return config.model_copy(update={"passes": ",".join(item.spelled() for item in kept)})


def with_model(config):
    """The state of a pipeline with the captured model."""
    from .run import prepare
    from .steps import Capture

    state = prepare(config, Path(config.output), announce)
    return next((item for item in config.pipeline().passes if isinstance(item, Capture)), Capture())(state).state


def with_adapter(config, adapter: Path | None):
    """The state of a pipeline with the captured model and a trained adapter on it."""
    from .checkpoint import load

    state = with_model(config)
    return replace(state, program=load(state.program, adapter or Path(config.output) / "adapter"))


def fold_pass(config):
    """The pipeline's own fold, or the default one."""
    from .steps import Fold

    return next((item for item in config.pipeline().passes if isinstance(item, Fold)), Fold())


def run_folder(path: str) -> Path | None:
    """The path where it is a folder that `run` or `train` wrote."""
    return Path(path) if (Path(path) / "config.yaml").is_file() else None


def adapter_folder(path: Path) -> Path:
    """An adapter folder, or that of a run folder."""
    return path if run_folder(str(path)) is None else path / "adapter"
