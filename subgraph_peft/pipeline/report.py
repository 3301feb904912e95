"""The report of a run: `report.json` for programs, `report.md` with the loss curve for people, `graph.diff`."""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel

from ..base.errors import ConfigError
from ..base.files import write_json, write_text
from ..base.text import Table
from ..compiler.costs import rewrite_rows, rewrite_table
from ..compiler.fold import fold_rows
from ..method import catalogue
from ..method.adapter import Adapter
from ..method.method import Method, spell
from ..program.program import Program
from . import oneline
from .graph_diff import summarised
from .passes import Result

ADAPTER_COLUMNS = ("adapter", "equation", "options", "sites", "chosen")
PACKAGES = ("subgraph-peft", "torch", "transformers", "onnx", "onnxscript", "onnxruntime-gpu", "onnxruntime")


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": machine()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def machine() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def summary(results: Sequence[Result]) -> dict[str, Any]:
    """Everything a run did, as plain data."""
    state = results[-1].state
    records = {name: plain(value) for name, value in state.records.items()}
    adapted = last_adapted(results)
    document: dict[str, Any] = {
        "versions": versions(),
        "passes": [
            {
                "pass": item.pass_.spelled(),
                "summary": item.summary,
                "seconds": item.seconds,
                "peak_bytes": item.peak,
                "difference": list(item.difference),
            }
            for item in results
        ],
        "scores": dict(state.scores),
        "records": records,
    }
    if adapted is not None:
        trainable, everything = adapted.counts()
        document["parameters"] = {"trainable": trainable, "all": everything}
        document["sites"] = rewrite_rows(adapted)
        document["adapters"] = [adapter_facts(adapter) for adapter in adapted.adapters]
        document["left_out"] = [list(entry) for adapter in adapted.adapters for entry in adapter.left_out]
    if state.program is not None and state.program.folded is not None:
        folded = state.program.folded
        document["fold"] = {
            "dtype": str(folded.dtype),
            "output_error": folded.output_error,
            "sites": fold_rows(state.program),
        }
    return document


def adapter_facts(adapter: Adapter) -> dict[str, str]:
    """An adapter's equation, what it adds to the loss, every option, and what its patterns and its budget chose."""
    own = [f"{name}: {describe(method)}" for name, method in adapter.variants]
    return {
        "adapter": adapter.name,
        "equation": catalogue.described(adapter.method).equation,
        "options": describe(adapter.method),
        "chosen": "; ".join([adapter.chosen] * bool(adapter.chosen) + own),
        "sites": str(len(adapter.sites)),
    }


def describe(method: Method) -> str:
    name, options = next(iter(spell(method).items()))
    return oneline.spell(name, options)


def last_adapted(results: Sequence[Result]) -> Program | None:
    programs = [item.state.program for item in results if item.state.program is not None]
    return next((program for program in reversed(programs) if program.adapters), None)


def plain(value: Any) -> Any:
    """Dataclasses and models as JSON-able data."""
    if isinstance(value, BaseModel):
        return value.model_dump(mode="json")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return json.loads(json.dumps(dataclasses.asdict(value), default=str))
    return value


def write_report(results: Sequence[Result], folder: Path) -> Path:
    """Write report.json, report.md, graph.diff and loss.png to `folder`; returns the path of report.md."""
    document = summary(results)
    state = results[-1].state
    write_json(folder / "report.json", document, ConfigError, default=str)
    differences = [
        line for item in results for line in (f"# {item.pass_.spelled()}", *item.difference) if item.difference
    ]
    if differences:
        write_text(folder / "graph.diff", "\n".join(differences) + "\n", ConfigError)
    trained = state.records.get("train")
    if trained is not None and trained.losses:
        trained.curve(folder / "loss.png")
    write_text(
        folder / "report.md",
        "\n".join(page(document, results, trained is not None and bool(trained.losses))) + "\n",
        ConfigError,
    )
    return folder / "report.md"


def page(document: Mapping[str, Any], results: Sequence[Result], curve: bool) -> list[str]:
    program = results[-1].state.program
    lines = [f"# {program.source if program is not None else 'Pipeline'}", ""]
    lines += [f"`{','.join(item['pass'] for item in document['passes'])}`", ""]
    did = [(f"`{result.pass_.spelled()}`", result.summary, result.cost) for result in results]
    lines += Table("Passes", ("pass", "what it did", "cost"), did).markdown()
    if document["scores"]:
        names = sorted({name for scores in document["scores"].values() for name in scores})
        rows = [(stage, *(number(scores.get(name)) for name in names)) for stage, scores in document["scores"].items()]
        lines += section(Table("Scores on held-out data", ("model", *names), rows))
    if "adapters" in document:
        rows = [[fact[column] for column in ADAPTER_COLUMNS] for fact in document["adapters"]]
        lines += section(Table("Adapters", ADAPTER_COLUMNS, rows))
    if curve:
        lines += ["## Training", "", "![loss curve](loss.png)", ""]
    if "parameters" in document:
        trainable, everything = document["parameters"]["trainable"], document["parameters"]["all"]
        lines += ["## Sites", "", f"{trainable:,} of {everything:,} numbers train ({trainable / everything:.3%}).", ""]
        lines += rewrite_table(last_adapted(results)).markdown()
        if document["left_out"]:
            lines += ["Left out: " + ", ".join(f"`{name}` ({why})" for name, why in document["left_out"]) + ".", ""]
    for result in results:
        for table in result.pass_.tables(result.state):
            lines += section(table)
    for item in document["passes"]:
        if item["difference"]:
            shown = shortened(summarised(item["difference"]))
            lines += [f"## Graph: `{item['pass']}`", "", "```diff", *shown, "```", ""]
    lines += section(Table("Versions", ("package", "version"), list(document["versions"].items())))
    return lines


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def shortened(lines: Sequence[str], limit: int = 60) -> list[str]:
    rest = len(lines) - limit
    return [*lines[:limit], f"… {rest} more lines in graph.diff"] if rest > 0 else list(lines)


def section(table: Table) -> list[str]:
    return [f"## {table.title}", "", *table.markdown()]
