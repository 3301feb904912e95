"""The quickstart: MiniLM learns which chapter of the Python reference a paragraph comes from, by five methods."""

import pydoc_data.topics
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..base.text import Table
from .config import PipelineConfig, load_config
from .passes import Result
from .report import last_adapted, write_report
from .run import prepare, run_pipeline

CHAPTERS = (
    "specialnames", "compound", "types", "string-methods", "debugger", "typesseq", "typesmapping", "comparisons",
)  # fmt: skip
# method -> its own options and learning rate: factors that start at one move in larger steps
METHODS = {
    "lora": ({"r": 8}, 2e-3),
    "pissa": ({"r": 8}, 2e-3),
    "ssl": ({}, 2e-2),
    "ssb": ({}, 2e-2),
    "dora": ({"of": {"lora": {"r": 8}}}, 2e-3),
}


def paragraphs(held_out: bool = False, share: float = 0.25, seed: int = 0) -> list[dict[str, str]]:
    """Paragraphs of the reference that ships with CPython, as {"text", "label"}: those to train on, or those held out.

    The chapters share no paragraph: one that stands in two is left out.
    """
    found = {chapter: list(dict.fromkeys(split(pydoc_data.topics.topics[chapter]))) for chapter in CHAPTERS}
    counts = Counter(text for texts in found.values() for text in texts)
    chosen: list[dict[str, str]] = []
    for chapter, texts in found.items():
        own = [text for text in texts if counts[text] == 1]
        random.Random(f"{seed}-{chapter}").shuffle(own)
        cut = round(len(own) * share)
        chosen += [{"text": text, "label": chapter} for text in (own[:cut] if held_out else own[cut:])]
    return chosen


def held_out_paragraphs() -> list[dict[str, str]]:
    return paragraphs(held_out=True)


def split(chapter: str) -> list[str]:
    """Paragraphs of prose, of at least 60 characters."""
    texts = (" ".join(text.split()) for text in re.split(r"\n\s*\n", chapter))
    return [t for t in texts if len(t) >= 60 and sum(map(str.isalpha, t)) > 0.6 * len(t)]


@dataclass(frozen=True)
class Row:
    """One method's line of the comparison."""

    method: str
    results: tuple[Result, ...]
    folder: Path

    @property
    def scores(self) -> dict[str, dict[str, float]]:
        return self.results[-1].state.scores

    @property
    def accuracy(self) -> float:
        return self.scores["after"]["accuracy"]

    def cells(self) -> list[str]:
        state = self.results[-1].state
        trainable, everything = last_adapted(self.results).counts()
        head = sum(
            p.numel() for n, p in last_adapted(self.results).parameters(trainable=True) if n.startswith("classifier")
        )
        trained, export, fold = state.records["train"], state.records["export"], state.program.folded
        return [
            self.method, f"{(trainable - head) / everything:.3%}", f"{self.accuracy:.1%}", f"{trained.seconds:.1f}",
            f"{fold.output_error:.1e}", f"{fold.retained:.3%}", f"{max(d.absolute for d in export.drift.values()):.1e}",
        ]  # fmt: skip


def compare(config: PipelineConfig, output: Path, announce: Callable[[str], None]) -> list[Row]:
    """Run the pipeline once for each method, on the same data, model and seed."""
    start = prepare(config, output, announce)
    rows = []
    for method in METHODS:
        own = config.changed(passes=passes_of(config, method), output=str(output / method))
        announce(f"\n{method}")
        results = run_pipeline(own, start, announce)
        write_report(results, output / method)
        rows.append(Row(method, tuple(results), output / method))
    return rows


def passes_of(config: PipelineConfig, method: str) -> list[Any]:
    """The file's passes, with `method` at its rewrite's place and the method's learning rate."""
    options, lr = METHODS[method]
    changed = []
    for item in config.passes:
        name, given = next(iter(item.items())) if isinstance(item, dict) else (item, {})
        if name == "lora":
            shared = {key: given[key] for key in ("where", "trainable")}
            changed.append({method: {**options, **shared}})
        else:
            changed.append({name: {**given, "lr": lr}} if name == "train" else item)
    return changed


def table(rows: list[Row]) -> Table:
    base = rows[0].scores["before"]["accuracy"]
    return Table(
        f"Held-out accuracy; the frozen base with an untrained head: {base:.1%}",
        ["method", ">trained share", ">accuracy", ">seconds", ">fold error", ">delta retained", ">ONNX drift"],
        [row.cells() for row in rows],
    )


def quickstart(output: Path, announce: Callable[[str], None]) -> tuple[list[Row], Row]:
    """(every method's row, the best). Each method leaves a folder with adapter, merged weights, ONNX and report."""
    rows = compare(load_config("quickstart"), output, announce)
    return rows, max(rows, key=lambda row: row.accuracy)
