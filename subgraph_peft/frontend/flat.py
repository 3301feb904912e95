"""Exported programs as flat, normalised graphs over their own tensors, whatever these are called."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from keyword import iskeyword
from typing import Any, NamedTuple

from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature

from ..graph.legal import is_path
from ..graph.nodes import attribute
from .diagnostics import check_graph
from .normalise import normalise

EMPTY = fx.GraphModule({}, fx.Graph())  # what any GraphModule has


class Flat(NamedTuple):
    """A flat graph, and the module that holds what it reads; `aliases`: name of a tensor -> its name in that module,
    where it is another."""

    root: fx.GraphModule
    aliases: Mapping[str, str]

    @property
    def graph(self) -> fx.Graph:
        return self.root.graph

    def read(self, path: str) -> Any:
        return attribute(self.root, self.aliases.get(path, path))


def flat(exported: ExportedProgram) -> Flat:
    """The program as a flat, normalised graph. Raises CaptureError."""
    exported, aliases = readable(exported)
    root = exported.module(check_guards=False)
    normalise(root)
    rename(root.graph, {alias: name for name, alias in aliases.items()})
    check_graph(root.graph)
    return Flat(root, aliases)


def readable(exported: ExportedProgram) -> tuple[ExportedProgram, dict[str, str]]:
    """(the program with names for its tensors that code can read, name -> the alias that it has there).

    torch makes code over a GraphModule of a program, so that no tensor can have the name of an attribute of that class
    (`graph.weight`, `code`), of a keyword (`in.weight`) or of its argument `self` there.
    """
    specs = exported.graph_signature.input_specs
    names = dict.fromkeys(spec.target for spec in specs if spec.target is not None)
    hidden = [name for name in names if not is_readable(name)]
    if not hidden:
        return exported, {}
    aliases = {name: f"held_{i}_{re.sub(r'[^a-zA-Z0-9]+', '_', name)}" for i, name in enumerate(hidden)}
    return renamed(exported, lambda name: aliases.get(name, name)), aliases


def is_readable(name: str) -> bool:
    """Whether code over a GraphModule can read a tensor of this name as one of its own."""
    parts = name.split(".")
    plain = is_path(name) and not any(map(iskeyword, parts))
    return plain and name != "self" and not hasattr(EMPTY, parts[0])


def renamed(exported: ExportedProgram, called: Callable[[str | None], str | None]) -> ExportedProgram:
    """The same program whose tensors are called otherwise."""
    signature = exported.graph_signature
    return ExportedProgram(
        exported.graph_module,
        exported.graph,
        ExportGraphSignature(
            [replace(spec, target=called(spec.target)) for spec in signature.input_specs],
            [replace(spec, target=called(spec.target)) for spec in signature.output_specs],
        ),
        {called(name): tensor for name, tensor in exported.state_dict.items()},
        exported.range_constraints,
        exported.module_call_graph,
        exported.example_inputs,
        {called(name): value for name, value in exported.constants.items()},
        verifiers=exported.verifiers,
    )


def rename(graph: fx.Graph, names: Mapping[str, str]) -> None:
    for node in graph.find_nodes(op="get_attr"):
        node.target = names.get(str(node.target), node.target)
