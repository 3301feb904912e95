"""Run a pipeline file: load data and model, apply the passes, write the report."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from ..base.errors import ConfigError
from ..base.files import write_text
from ..base.processes import on_first
from .builtin_passes import Train
from .config import PipelineConfig
from .data import load_data
from .models import load_model, load_tokenizer
from .passes import Result, State
from .report import write_report

Announce = Callable[[str], None]


def prepare(config: PipelineConfig, output: Path, announce: Announce) -> State:
    """Data, tokenizer and model, which stays on the CPU where training is to shard it."""
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer, config.model.task) if config.data is not None else None
    loaded = load_model(config.model, data.labels if data is not None else ())
    shard = any(item.shard for item in config.pipeline.passes if isinstance(item, Train))
    model = loaded.model.to("cuda" if torch.cuda.is_available() and not shard else "cpu")
    sizes = f", {len(data.train):,} examples to train" if data is not None else ""
    sizes += f", {len(data.eval):,} held out" if data is not None and data.eval is not None else ""
    announce(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters{sizes}")
    if loaded.fresh:
        announce(f"newly drawn, not in the stored model: {', '.join(loaded.fresh)}")
    return State(
        model=model,
        tokenizer=loaded.tokenizer or tokenizer,
        data=data,
        folder=output,
        seed=config.seed,
    )


def spelled(config: PipelineConfig) -> str:
    """The configuration as YAML, with every override in it."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=True), sort_keys=False, allow_unicode=True)


def run_pipeline(config: PipelineConfig, state: State, announce: Announce) -> list[Result]:
    """The results of every pass, in order. A folder that cannot be written to stops the run before it starts."""
    folder = Path(config.output)
    on_first(lambda: write_text(folder / "config.yaml", spelled(config), ConfigError))
    results = []
    for result in config.pipeline.run(replace(state, folder=folder, seed=config.seed)):
        announce(f"{result.pass_.spelled()}  {result.summary}  ({result.cost})")
        results.append(result)
    return results


def run(config: PipelineConfig, announce: Announce) -> list[Result]:
    """Everything that `subgraph-peft run` does. The folder then holds config.yaml, adapter/, delta.safetensors,
    merged/, model.onnx, decoder/, report.json, report.md, loss.png and graph.diff, as far as the passes made them."""
    results = run_pipeline(config, prepare(config, Path(config.output), announce), announce)
    on_first(lambda: write_report(results, Path(config.output)))
    return results
