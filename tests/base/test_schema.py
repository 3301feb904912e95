"""What is read has a schema: a field that is missing, unknown or of another type is named with its file."""

import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest

from subgraph_peft.base.errors import CheckpointError, ConfigError, MethodError
from subgraph_peft.base.schema import Schema, read_as
from subgraph_peft.method.written import define
from subgraph_peft.passes import LoRA
from subgraph_peft.pipeline.builtin_passes import Fold
from subgraph_peft.pipeline.pipeline import Pipeline


class Inner(Schema):
    names: tuple[str, ...]


class Held(Schema):
    format: Literal[1]
    count: int
    inner: Inner


GOOD = {"format": 1, "count": 2, "inner": {"names": ["a"]}}


def spoiled(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """(field, the values without it or with another type in its place) for every field at the top."""
    for field in values:
        yield field, {key: value for key, value in values.items() if key != field}
        yield field, {**values, field: [{"another": "type"}]}


def test_what_fits_is_read():
    assert read_as(Held, json.dumps(GOOD), "file") == Held(format=1, count=2, inner=Inner(names=("a",)))


@pytest.mark.parametrize(("field", "values"), [*spoiled(GOOD), ("other", {**GOOD, "other": 1})])
def test_a_field_that_does_not_fit_is_named(field, values):
    with pytest.raises(CheckpointError, match=rf"^file (has |is damaged.*'){field}"):
        read_as(Held, json.dumps(values), "file")


def test_a_nested_field_is_named_by_its_path_and_long_values_are_cut():
    with pytest.raises(CheckpointError, match=r"'inner.names.0': .*string.*, got 7"):
        read_as(Held, json.dumps({**GOOD, "inner": {"names": [7]}}), "file")
    with pytest.raises(CheckpointError) as caught:
        read_as(Held, json.dumps({**GOOD, "count": "a" * 10_000}), "file")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("text", ["", "{", "[1]", b"\xff", "[" * 100_000])
def test_what_is_no_json_of_a_mapping(text):
    with pytest.raises(CheckpointError, match="file is damaged"):
        read_as(Held, text, "file")


def test_an_error_of_an_option_has_the_keys_to_it():
    with pytest.raises(MethodError) as of_method:
        LoRA(r=0)
    tensors = {"A": {"shape": ["r", "in"], "int": "zeros"}}
    with pytest.raises(MethodError) as of_definition:
        define({"name": "own", "tensors": tensors, "weight": "W + A", "options": {"r": 2}})
    with pytest.raises(MethodError) as of_equation:
        define({"name": "own", "tensors": {"A": {"shape": ["out", "in"]}}, "weight": "W + "})
    with pytest.raises(ConfigError) as of_pass:
        Fold(dtyp="float32")
    with pytest.raises(ConfigError) as of_rewrite:
        Pipeline.read([{"lora": {"rank": 3}}])
    errors = (of_method, of_definition, of_equation, of_pass, of_rewrite)
    assert [e.value.option for e in errors] == [("r",), ("tensors", "A", "int"), ("weight",), ("dtyp",), ("rank",)]
