"""Adapter folders of huggingface/peft: `adapter_config.json` and `adapter_model.safetensors`, written and read."""

from .reading import from_peft
from .writing import PeftReport, to_peft

__all__ = ["PeftReport", "from_peft", "to_peft"]
