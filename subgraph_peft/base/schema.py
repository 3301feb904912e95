"""What is read has a schema: text becomes a model, or an error that says file, field and reason."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import CheckpointError, suggestion

SHOWN = 80


class Schema(BaseModel):
    """Base of what files hold: every field is there, of its own type, and there are no others."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


S = TypeVar("S", bound=BaseModel)


def read_as(schema: type[S], text: str | bytes, where: object) -> S:
    """JSON as a model. Raises CheckpointError, which starts with `where`."""
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        wrong = error.errors()
        if version := next((item for item in wrong if item["loc"] == ("format",) and item["type"] != "missing"), None):
            expected = schema.model_fields["format"].annotation.__args__[0]
            raise CheckpointError(
                f"{where} has format {version['input']!r}; this version reads format {expected}."
            ) from error
        raise CheckpointError(f"{where} is damaged: {explained(wrong[:4], schema, 'field')}.") from error


def explained(wrong: Sequence[Any], model: type[BaseModel], noun: str = "option") -> str:
    """What the errors of a ValidationError say of a model's fields, each field once."""
    problems: dict[str, list[str]] = {}
    for item in wrong:
        problems.setdefault(".".join(map(str, item["loc"])), []).append(problem(item, model))
    return "; ".join(
        f"{noun} {where!r}: {' or '.join(texts)}" if where else " or ".join(texts) for where, texts in problems.items()
    )


def problem(item: Mapping[str, Any], model: type[BaseModel]) -> str:
    """What is wrong with one field."""
    if item["type"] == "missing":
        return "it is required"
    if item["type"] == "extra_forbidden":
        known = fields_at(model, item["loc"][:-1])
        return f"it is unknown.{suggestion(str(item['loc'][-1]), known)} Known: {', '.join(known) or 'none'}"
    text, got = item["msg"].removeprefix("Value error, ").rstrip("."), repr(item["input"])
    return f"{text}, got {got if len(got) <= SHOWN else got[:SHOWN] + '…'}" if item["loc"] else text


def option_of(wrong: Sequence[Any]) -> tuple[str, ...]:
    """The keys down to the first field at fault."""
    return tuple(map(str, wrong[0]["loc"]))


def fields_at(model: type[BaseModel], path: Sequence[Any]) -> list[str]:
    """The fields of the model that a path through `model` leads to."""
    for part in path:
        if part in model.model_fields:
            model = next(models_in(model.model_fields[part].annotation), model)
    return list(model.model_fields)


def models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from models_in(inner)
