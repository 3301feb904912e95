"""adapter_config.json: the keys that are implemented, with peft's defaults; every other one is refused by name."""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

from subgraph_peft.base.errors import CheckpointError
from subgraph_peft.base.schema import explained

# what is about files and sessions, not about the adapter's function
ABOUT = frozenset({"auto_mapping", "peft_version", "revision", "inference_mode", "base_model_name_or_path"})
EMPTY: tuple[Any, ...] = (None, False, "", [], {})
CONVERT = (
    "it changes the base when it starts; save it in peft with path_initial_model_for_weight_conversion, as a plain "
    "LoRA of twice the rank, and read that"
)
UNKNOWN = "not known here; merge the adapter in peft (merge_and_unload) and capture the result"


class Options(BaseModel):
    """Keys that every type of adapter has."""

    model_config = ConfigDict(frozen=True, extra="allow")

    ignored: ClassVar[frozenset[str]] = ABOUT
    refused: ClassVar[Mapping[str, str]] = {}  # key -> why, and what to do

    peft_type: str
    task_type: str | None = None
    modules_to_save: list[str] | None = None

    @classmethod
    def read(cls, config: Mapping[str, Any], where: str) -> Self:
        """Raises CheckpointError for keys that are not implemented, unless they hold nothing, and for wrong values."""
        try:
            options = cls(**config)
        except ValidationError as error:
            raise CheckpointError(f"{where}: {explained(error.errors(), cls, 'key')}.") from error
        for key, pattern in options.patterns():
            try:
                re.compile(pattern)
            except re.error as error:
                raise CheckpointError(f"{where}: {key} = {pattern!r} is no regular expression: {error}.") from error
        problems = options.problems()
        for key, value in (options.model_extra or {}).items():
            if key not in cls.ignored and not any(value is empty or value == empty for empty in EMPTY):
                problems.append(f"{key} = {value!r}: {cls.refused.get(key, UNKNOWN)}")
        if problems:
            raise CheckpointError(f"{where} asks for what is not implemented: {'; '.join(problems)}.")
        return options

    def problems(self) -> list[str]:
        """What is refused among the implemented keys."""
        return []

    def patterns(self) -> list[tuple[str, str]]:
        """(key, regular expression) of all that are matched with paths of modules."""
        return [("modules_to_save", name) for name in self.modules_to_save or []]


class ModuleOptions(Options):
    """Keys of adapters at modules."""

    refused: ClassVar[Mapping[str, str]] = {
        "target_parameters": "parameters without a module are not adapted; choose modules",
        "trainable_token_indices": "train the embedding as a whole, in modules_to_save",
        "layer_replication": "the program has the layers that were captured; build the deeper model and capture it",
    }

    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    fan_in_fan_out: bool = False  # follows from the weights

    def problems(self) -> list[str]:
        if not self.target_modules:
            return ["target_modules is missing: name the modules; peft's defaults by architecture are not looked up"]
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            return ["layers_to_transform beside target_modules as a regular expression: peft refuses that too"]
        return []

    def patterns(self) -> list[tuple[str, str]]:
        whole = [(key, getattr(self, key)) for key in ("target_modules", "exclude_modules")]
        layers = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern or []
        found = [(key, pattern) for key, pattern in whole if isinstance(pattern, str)]
        return [*super().patterns(), *found, *(("layers_pattern", name) for name in layers)]
