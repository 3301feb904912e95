"""Patterns over dotted names: `glob:` (default), `exact:` and `re:`, with brace lists and blocks: `*.qkv_proj[q,v]`."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .errors import SelectorError


@dataclass(frozen=True)
class Pattern:
    """One pattern; `match` tells how it met a site: "no", "wildcard" or "named"."""

    text: str

    def __post_init__(self) -> None:
        if self.kind == "re":
            try:
                re.compile(self.body)
            except re.error as error:
                raise SelectorError(f"{self.text!r} is not a regular expression: {error}.") from error
        elif not self.body:
            raise SelectorError(f"{self.text!r} is an empty selector.")

    @property
    def kind(self) -> str:
        head = self.text.partition(":")[0]
        return head if head in ("glob", "exact", "re") else "glob"

    @property
    def body(self) -> str:
        return self.text[len(self.kind) + 1 :] if self.text.startswith(f"{self.kind}:") else self.text

    @property
    def blocks(self) -> tuple["Pattern", tuple[str, ...]] | None:
        """(pattern of the weights, names of their blocks) of `…[a,b]`, where it can be read so."""
        head, bracket, names = self.text.rpartition("[")
        if self.kind == "re" or not bracket or not names.endswith("]") or head.endswith((".", "*", ":")) or not head:
            return None
        return Pattern(head), tuple(name.strip() for name in names[:-1].split(","))

    def match(self, paths: Iterable[str]) -> str:
        for path in paths:
            if self.kind == "exact" and path == self.body:
                return "named"
            if self.kind == "re" and re.fullmatch(self.body, path):
                literal = path.removesuffix(".weight").rpartition(".")[2]
                return "named" if literal in self.body.replace("\\", "") else "wildcard"
            if self.kind == "glob":
                for glob in expand_braces(self.body):
                    if fnmatch.fnmatchcase(path, glob):
                        last = glob.removesuffix(".weight").rpartition(".")[2]
                        return "named" if last.strip("*?") else "wildcard"
        return "no"


def expand_braces(text: str) -> list[str]:
    """`a.{b,c}` -> `a.b`, `a.c`; lists may nest."""
    depth, start = 0, -1
    for index, character in enumerate(text):
        if character == "{":
            depth += 1
            start = index if depth == 1 else start
        elif character == "}":
            depth -= 1
            if depth < 0:
                break
            if depth == 0:
                inner = split_top(text[start + 1 : index])
                return [out for item in inner for out in expand_braces(text[:start] + item + text[index + 1 :])]
    if depth:
        raise SelectorError(f"{text!r}: unbalanced braces.")
    return [text]


def split_top(text: str) -> list[str]:
    """Split at commas that are not inside braces or brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return parts


def patterns(where: str | Sequence[str]) -> list[Pattern]:
    return [Pattern(text) for text in ([where] if isinstance(where, str) else where)]
