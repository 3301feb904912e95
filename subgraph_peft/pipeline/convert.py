"""Turn an adapter folder of one layout into another."""

from pathlib import Path
from typing import Literal

from subgraph_peft.export.peft.folder import CONFIG, read_config
from subgraph_peft.export.peft.reading import from_peft
from subgraph_peft.export.peft.writing import to_peft

from ..base.errors import ConfigError, first_line, suggestion
from ..frontend.capture import capture
from ..program.program import Program
from ..store.adapter_file import load, save
from ..training.tasks import TASKS, task_of
from .models import ModelSpec, load_model

Layouts = Literal["native", "peft", "lora"]


def convert(
    program: Program, source: Path, target: Path, to: Layouts, rank: int | None = None, tolerance: float = 0.01
) -> list[tuple[str, str]]:
    """Read `source`, of either layout, on the captured program, and write `target`; what was done, for a table.

    to: "native" adapter.json; "peft" adapter_config.json; "lora" the same, every update as a plain LoRA (see `to_peft`)
    """
    adapted = from_peft(program, source) if is_peft(source) else load(program, source)
    if to != "native":
        return to_peft(adapted, target, as_lora=to == "lora", rank=rank, tolerance=tolerance).rows()
    if rank is not None:
        raise ConfigError("A rank belongs to the layout lora.")
    save(adapted, target)
    sites = sum(len(adapter.sites) for adapter in adapted.adapters)
    return [("folder", str(target)), ("type", ", ".join(a.name for a in adapted.adapters)), ("sites", str(sites))]


def is_peft(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def base_named(folder: Path) -> str:
    """The model that a peft folder names as its base. Raises ConfigError."""
    name = read_config(folder).get("base_model_name_or_path") if is_peft(folder) else None
    if not name:
        raise ConfigError(f"{folder} does not say on which model it was trained: give a pipeline, a run or a model.")
    return name


def captured_model(name: str, task: str | None = None) -> Program:
    """A stored transformers model, captured with its own dummy inputs.

    task: which head it has; by default that of the class it was stored as. Raises ConfigError, CaptureError.
    """
    task = task or stored_task(name)
    if task not in TASKS:
        raise ConfigError(f"There is no task {task!r}.{suggestion(task, TASKS)} Tasks: {', '.join(TASKS)}.")
    model = load_model(ModelSpec(transformers=name, task=task)).model
    return capture(model, dict(model.dummy_inputs))


def stored_task(name: str) -> str:
    """The task of the class that a model was stored as."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        what = f"{name} is no pipeline, no run and no model that can be loaded"
        raise ConfigError(f"{what}: {first_line(error)}") from error
    stored = (config.architectures or [""])[0]
    return task_of(stored, getattr(config, "is_encoder_decoder", False)) or "feature-extraction"
