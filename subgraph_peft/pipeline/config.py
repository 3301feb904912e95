"""Pipeline files: YAML with a schema; unknown keys are refused with their line; `--set lora.r=16` overrides."""

import inspect
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..base.errors import ConfigError, MethodError, suggestion
from ..base.schema import explained
from ..method import registry
from ..method.definition import Definition
from ..method.written import WRITTEN, Written
from . import oneline
from .builtin_passes import Rewrite
from .data import DataSpec
from .models import ModelSpec
from .pipeline import Pipeline, names, steps


class PipelineConfig(BaseModel):
    """model, data, passes, output, seed: one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: ModelSpec = Field(description="what to capture")
    data: DataSpec | None = Field(None, description="what to train and to evaluate on, and to capture with")
    passes: list[str | dict[str, Any]] = Field(min_length=1, description="names and {name: options}, or one line")
    output: str = Field("runs/pipeline", description="results folder")
    seed: int = Field(0, description="of everything that is drawn, where nothing says otherwise")

    @field_validator("passes", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """The one-line form is the list that it spells."""
        if isinstance(value, str):
            return [{name: options} for name, options in oneline.parse(value)]
        if isinstance(value, list):
            return [{k: v or {} for k, v in item.items()} if isinstance(item, dict) else item for item in value]
        return value

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline.read(self.passes)

    def changed(self, **fields: Any) -> "PipelineConfig":
        """The configuration with other values of some fields."""
        return PipelineConfig(**{**{name: getattr(self, name) for name in type(self).model_fields}, **fields})

    def until(self, name: str) -> "PipelineConfig":
        """The configuration up to and with the first pass of that name. Raises ConfigError where there is none."""
        return self.changed(passes=self.passes[: len(self.pipeline.until(name).passes)])

    def written(self) -> dict[str, type[Written]]:
        """The methods that the passes define, by name."""
        methods = [item.method for item in self.pipeline.passes if isinstance(item, Rewrite)]
        layers = [layer for method in methods for layer in method.layers()]
        return {layer.name: type(layer) for layer in layers if isinstance(layer, Written)}


class Lines(yaml.SafeLoader):
    """A safe loader that refuses duplicate keys."""


def construct_mapping(loader: Lines, node: yaml.MappingNode) -> dict:
    seen = set()
    for key, _ in node.value:
        if key.value in seen:
            raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} stands twice", problem_mark=key.start_mark)
        seen.add(key.value)
    loader.flatten_mapping(node)
    return dict((loader.construct_object(k, deep=True), loader.construct_object(v, deep=True)) for k, v in node.value)


Lines.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, construct_mapping)


def find_config(name: str | os.PathLike) -> Path:
    """A path, or the name of a pipeline that this package ships."""
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_configs()
    if str(name).removesuffix(".yaml") in shipped:
        return shipped[str(name).removesuffix(".yaml")]
    raise ConfigError(
        f"{name} is neither a file nor a shipped pipeline.{suggestion(str(name), shipped)} "
        f"Shipped: {', '.join(shipped)}."
    )


def shipped_configs() -> dict[str, Path]:
    folder = resources.files("subgraph_peft.passes.pipelines")
    return {
        Path(str(item)).stem: Path(str(item))
        for item in sorted(folder.iterdir(), key=str)
        if str(item).endswith(".yaml")
    }


def load_config(name: str | os.PathLike, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Read, override, check. Every error names file and line. Relative paths in the file are relative to the
    current directory, or to the file where they exist there."""
    path = find_config(name)
    text = path.read_text(encoding="utf-8")
    try:
        loader = Lines(text)
        root = loader.get_single_node()
        raw = loader.construct_document(root) if root is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(f"{path}:{line}: {error.problem}.") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}:1: a pipeline file is a mapping with model, data, passes and output.")
    for override in overrides:
        apply_override(raw, override)
    try:
        config = PipelineConfig(**raw)
    except ValidationError as error:
        wrong = [(line_of(root, item["loc"]), explained([item], PipelineConfig, "key")) for item in error.errors()]
        raise ConfigError("\n".join(f"{path}:{line}: {what}." for line, what in wrong)) from error
    try:
        config.pipeline  # noqa: B018
    except (ConfigError, MethodError):
        for index, item in enumerate(config.passes):
            try:
                Pipeline.read([item])
            except (ConfigError, MethodError) as error:
                line = line_of(root, ("passes", index, *option_path(item, error.option)))
                raise ConfigError(f"{path}:{line}: {error}") from error
        raise
    return config


def option_path(item: Any, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The keys of a pass down to an option of it or of a method in it, as far as the pass has them."""
    every = list(key_paths(item))
    while wanted:
        if found := next((keys for keys in every if keys[-len(wanted) :] == wanted), None):
            return found
        wanted = wanted[:-1]
    return every[0] if every else ()


def key_paths(value: Any) -> Iterator[tuple[str, ...]]:
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield (str(key),)
        yield from ((str(key), *rest) for rest in key_paths(inner))


def line_of(node: yaml.Node, location: Sequence[str | int]) -> int:
    """1-based line of the deepest node of a location that the file has."""
    line = node.start_mark.line + 1
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
            if found is None:
                continue
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
            line = node.start_mark.line + 1
    return line


def apply_override(raw: dict[str, Any], override: str) -> None:
    """`a.b=value`: `a` is a top-level key or the name of a pass; the value is YAML."""
    path, equals, text = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set takes a.b=value, not {override!r}.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if parts[0] in PipelineConfig.model_fields:
        target: Any = raw
    else:
        (own, target), parts = pass_options(raw, parts[0], override), parts[1:]
        if not parts:
            raise ConfigError(f"--set {override}: name an option of the pass, {path}.option=value.")
        if own == WRITTEN:
            target = defined_options(target, parts[0], override)
    for part in parts[:-1]:
        if not isinstance(target.get(part), dict):
            target[part] = {}
        target = target[part]
    target[parts[-1]] = value


def pass_options(raw: dict[str, Any], name: str, override: str) -> tuple[str, dict[str, Any]]:
    """(key, options) of the pass of that name; a pass that defines a method has that method's name too."""
    passes = raw.get("passes") or []
    if isinstance(passes, str):
        raise ConfigError(f"--set {override}: `passes` is in the one-line form; change it there.")
    present = []
    for index, item in enumerate(passes):
        own = item if isinstance(item, str) else next(iter(item))
        defined = own == WRITTEN and isinstance(item, dict) and isinstance(item[own], dict)
        present.append(item[own].get("name", own) if defined else own)
        if name in (own, present[-1]):
            if isinstance(item, str) or item[own] is None:
                passes[index] = {own: {}}
            return own, passes[index][own]
    known = [*PipelineConfig.model_fields, *present]
    raise ConfigError(
        f"--set {override}: there is no {name!r} in this pipeline.{suggestion(name, known)} "
        f"There are: {', '.join(known)}."
    )


def defined_options(definition: dict[str, Any], name: str, override: str) -> dict[str, Any]:
    """The mapping that holds an option of a pass that defines a method: the method's options, or the pass itself."""
    own = definition.get("options") or {}
    beside = [*Definition.model_fields, *sorted(Rewrite.own_options())]
    if name not in own and name not in beside:
        known = [*own, *beside]
        raise ConfigError(
            f"--set {override}: option {name!r}: it is unknown.{suggestion(name, known)} Known: {', '.join(known)}."
        )
    return own if name in own else definition


def schema() -> dict[str, Any]:
    """JSON schema of a pipeline file, for editors. What passes share stands in `$defs` once."""
    document = PipelineConfig.model_json_schema()
    definitions = document.setdefault("$defs", {})
    rewriting = own_schema(Rewrite, definitions)["properties"]
    beside = {name: field for name, field in rewriting.items() if name != "method"}
    definitions |= {f"rewrite.{name}": field for name, field in beside.items()}
    shared = {name: {"$ref": f"#/$defs/rewrite.{name}"} for name in beside}
    choices: list[dict[str, Any]] = [{"enum": names()}]
    known = steps()
    for name in (*names(), WRITTEN):
        described = known.get(name) or (Definition if name == WRITTEN else registry.methods()[name])
        own = own_schema(described, definitions)
        options = own.setdefault("properties", {})
        if name not in known:
            options |= shared
            if "of" in options:
                text = "the inner method: a name, {name: {options}}, or {method: {definition}}"
                options["of"] = {"description": text}
        text = inspect.cleandoc(described.__doc__ or "").partition("\n\n")[0]
        closed = {"type": ["object", "null"], "description": text, "additionalProperties": False}
        definitions[name] = own | closed
        choices.append(
            {
                "type": "object",
                "properties": {name: {"$ref": f"#/$defs/{name}"}},
                "required": [name],
                "additionalProperties": False,
            }
        )
    document["properties"]["passes"] |= {
        "anyOf": [{"type": "string"}, {"type": "array", "items": {"anyOf": choices}, "minItems": 1}]
    }
    del document["properties"]["passes"]["items"], document["properties"]["passes"]["type"]
    return {"title": "Pipeline", **untitled(document)}


def own_schema(described: type[BaseModel], definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of a class; what it refers to is put among the definitions."""
    made = described.model_json_schema(by_alias=True)
    definitions |= made.pop("$defs", {})
    return made


def untitled(value: Any) -> Any:
    """A schema without titles, which say a field's name again."""
    if isinstance(value, dict):
        return {k: untitled(v) for k, v in value.items() if not (k == "title" and isinstance(v, str))}
    return [untitled(item) for item in value] if isinstance(value, list) else value
