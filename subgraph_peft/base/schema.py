"""What is read has a schema: text becomes a model, or an error that says file, field and reason."""

from typing import TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from .errors import CheckpointError

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
        raise CheckpointError(f"{where} is damaged: {'; '.join(map(problem, wrong[:4]))}.") from error


def problem(item: dict) -> str:
    """What is wrong with one field."""
    if not item["loc"]:
        return item["msg"]
    field = f"the field {'.'.join(map(str, item['loc']))!r}"
    if item["type"] == "missing":
        return f"{field} is missing"
    if item["type"] == "extra_forbidden":
        return f"{field} is unknown"
    got = repr(item["input"])
    return f"{field}: {item['msg']}, got {got if len(got) <= SHOWN else got[:SHOWN] + '…'}"
