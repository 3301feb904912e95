"""The one-line form of a pipeline, `capture,lora{r=8,where=*.query},dora{of={lora{r=4}}},fold`: as printed, so read.

A value is a scalar, a list `[a,b]`, a method `{name{option=value}}` or a mapping `{key=value}`.
"""

import json
import re
from typing import Any

import yaml

from ..base.errors import ConfigError

PLAIN = re.compile(r"[^\s,{}\[\]'\"=]+")
MAPPING = re.compile(rf"\{{(\}}$|\s*\"|\s*{PLAIN.pattern}\s*=)")
OPENING, CLOSING = "{[", "}]"


def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
    """(pass name, options) in order. Raises ConfigError that points at the character."""
    return [parse_item(item, text) for item in split(text, text) if item.strip()]


def parse_item(item: str, whole: str) -> tuple[str, dict[str, Any]]:
    name, brace, rest = item.strip().partition("{")
    if not re.fullmatch(r"[\w-]+", name):
        raise error(f"{name!r} is no pass name", item, whole)
    if not brace:
        return name, {}
    if not rest.endswith("}"):
        raise error("'}' expected at the end", item, whole)
    return name, parse_options(rest[:-1], whole)


def parse_options(text: str, whole: str) -> dict[str, Any]:
    options = {}
    for part in split(text, whole) if text.strip() else []:
        quoted = re.match(r'\s*("(?:[^"\\]|\\.)*")\s*(?==)', part)
        key, equals, value = (quoted[1], *part[quoted.end() :].partition("=")[1:]) if quoted else part.partition("=")
        if not equals:
            raise error(f"option=value expected in {part!r}", part, whole)
        options[parse_value(key, whole) if quoted else key.strip()] = parse_value(value.strip(), whole)
    return options


def parse_value(text: str, whole: str) -> Any:
    if text.startswith("{") and re.match(r"\{[\w-]+\s*[{}]", text):
        name, options = parse_item(text[1:-1], whole)
        return {name: options}
    if text.endswith("}") and MAPPING.match(text):
        return parse_options(text[1:-1], whole)
    if text.startswith("[") and text.endswith("]"):
        return [parse_value(part.strip(), whole) for part in split(text[1:-1], whole) if part.strip()]
    if text.startswith('"'):
        try:
            return json.loads(text)
        except json.JSONDecodeError as problem:
            raise error(f"bad string: {problem.msg}", text, whole) from problem
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return value if isinstance(value, (int, float, bool)) or value is None else text


def split(text: str, whole: str) -> list[str]:
    """Split at commas outside braces, brackets and quotes."""
    parts, depth, quoted, escaped = [""], 0, False, False
    for character in text:
        if character == '"' and not escaped:
            quoted = not quoted
        escaped = quoted and character == "\\" and not escaped
        if not quoted:
            depth += (character in OPENING) - (character in CLOSING)
        if depth < 0:
            raise error(f"{character!r} closes nothing", text, whole)
        if character == "," and depth == 0 and not quoted:
            parts.append("")
        else:
            parts[-1] += character
    if depth or quoted:
        raise error("a quote is open" if quoted else "a brace is open", parts[-1], whole)
    return parts


def error(what: str, part: str, whole: str) -> ConfigError:
    return ConfigError(f"{what}, at character {max(whole.find(part.strip()), 0)} of {whole!r}.")


def spell(name: str, options: dict[str, Any]) -> str:
    inner = ",".join(f"{key}={spell_value(value)}" for key, value in options.items())
    return f"{name}{{{inner}}}" if inner else name


def spell_value(value: Any) -> str:
    if isinstance(value, dict):
        name, options = next(iter(value.items()), ("", None))
        if len(value) == 1 and isinstance(options, dict) and re.fullmatch(r"[\w-]+", name):
            return "{" + spell(name, options) + ("" if options else "{}") + "}"
        return "{" + ",".join(f"{spell_value(key)}={spell_value(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(spell_value, value)) + "]"
    if isinstance(value, str):
        return value if PLAIN.fullmatch(value) and parse_value(value, value) == value else json.dumps(value)
    return "null" if value is None else json.dumps(value)
