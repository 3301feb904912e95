"""What changed between two graphs, for people: places that differ in the layer number are one difference."""

import os.path
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

# a node, an operator or a parameter
NAME = re.compile(r"(?<![\w.])(?:[A-Za-z_][\w.]*|\d+\.[A-Za-z_][\w.]*)")
DEFINED = re.compile(r"[-+]([\w.]+) = ")
LITERALS = {"True", "False", "None"}
Run = tuple[str, ...]


def summarised(difference: Iterable[str]) -> list[str]:
    """The changed lines of a unified difference of two printed graphs. Runs of them that are alike up to numbers in
    names, and to what they read from elsewhere, stand there once, under the modules that they belong to."""
    alike: dict[str, list[Run]] = {}
    for run in runs(difference):
        alike.setdefault(canonical(run), []).append(run)
    lines: list[str] = []
    for group in alike.values():
        places = list(dict.fromkeys(filter(None, map(place, group))))
        count = f"{len(group)} times" if len(group) > 1 else ""
        heading = ", ".join(filter(None, [" ".join(braced(places)), count]))
        lines += [f"@@ {heading}".rstrip(), *group[0]]
    return lines


def runs(difference: Iterable[str]) -> Iterator[Run]:
    """Lines that were removed and added next to each other, those of one module at a time."""

    def changed(line: str) -> bool:
        return line.startswith(("+", "-")) and not line.startswith(("+++", "---"))

    for is_run, lines in groupby(difference, changed):
        if is_run:
            yield from by_module(tuple(lines))


def by_module(run: Run) -> list[Run]:
    """A run by the modules whose parameters its lines read; a line that reads none belongs to the one before."""
    bases = [path for line in run for path in paths(line)]
    found: dict[str, list[str]] = {}
    for sign in "-+":
        current = ""
        for line in run:
            if line.startswith(sign):
                current = next((module(path, bases) for path in paths(line)), current)
                found.setdefault(current, []).append(line)
    return [tuple(lines) for lines in found.values()]


def paths(line: str) -> list[str]:
    return [name for name in NAME.findall(line) if "." in name]


def module(path: str, bases: Iterable[str]) -> str:
    """Of a parameter, or of the one that an adapter's tensor is named after."""
    return min((base for base in bases if path.startswith(f"{base}_")), key=len, default=path).rpartition(".")[0]


def canonical(run: Run) -> str:
    """A run without the numbers in its names, and with what it reads from elsewhere by order of appearance."""
    own = {found[1] for line in run if (found := DEFINED.match(line))}
    outside: dict[str, str] = {}

    def known(match: re.Match) -> str:
        name, follows = match[0], match.string[match.end() : match.end() + 1]
        if name in own or "." in name or follows in ("(", "=") or name in LITERALS:
            return re.sub(r"_\d+$", "", re.sub(r"(?:(?<=[_.])|^)\d+(?=[_.])", "*", name))
        return outside.setdefault(name, f"·{len(outside)}")

    return "\n".join(NAME.sub(known, line) for line in run)


def place(run: Run) -> str:
    """The module that all parameters of a run are below."""
    found = [path.split(".") for line in run for path in paths(line)]
    return ".".join(os.path.commonprefix(found)) if found else ""


def braced(places: Sequence[str]) -> list[str]:
    """Places that differ in one number as one, as a selector writes them: `layer.{0,1}.query`."""
    numbered: dict[str, list[str]] = {}
    for text in places:
        parts = re.split(r"(?:(?<=\.)|^)(\d+)(?=\.|$)", text, maxsplit=1)
        head, number, tail = parts if len(parts) == 3 else (text, "", "")
        numbered.setdefault(f"{head}\0{tail}", []).append(number)
    return [
        text.replace("\0", numbers[0] if len(numbers) == 1 else f"{{{','.join(numbers)}}}")
        for text, numbers in numbered.items()
    ]
