"""What a captured module keeps to itself, under one name, so that its children may be called anything."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..graph import edit
from ..graph.sequence.padding import Padding
from ..graph.signature import Signature

Key = tuple[bool, frozenset[str]]  # training, missing inputs


class Home(NamedTuple):
    """Where the constants of a graph live; literals equal to these follow the module when it moves."""

    device: torch.device
    dtype: torch.dtype


class Checkpointing(NamedTuple):
    """The blocks that are computed again, and options of `torch.utils.checkpoint.checkpoint`."""

    paths: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass
class Internals:
    """How a captured module computes.

    graph:   its training form; eval_graph: that of eval mode where it is not the training graph with dropout and batch
             norm switched
    home:    device and dtype of the graph's constants now; origin: those it was captured with
    broken_guard: number of the first condition of the signature that inputs break, else -1
    computed: buffers that the equations of adapters give; recompute: computes them from the tensors as they are
    block_paths: modules of the source that runners call as modules
    checkpointing: modules of the source that are computed again for the backward pass
    padding: "right" where it is promised that attention masks are ones and then zeros, which runners check
    without: optimising passes that are switched off
    runners: (training, missing inputs) -> function that runs the graph of that mode, made when it is first called
    changes: what each optimising pass changed, by runner
    """

    signature: Signature
    graph: fx.Graph
    eval_graph: fx.Graph | None
    home: Home
    origin: Home
    broken_guard: Callable[[Mapping[str, Any]], int]
    checkpointing: Checkpointing | None = None
    padding: Padding | None = None
    without: frozenset[str] = frozenset()
    block_paths: tuple[str, ...] = ()
    computed: frozenset[str] = frozenset()
    recompute: Callable[[nn.Module], None] | None = None
    changes: dict[Key, dict[str, int]] = field(default_factory=dict)
    runners: dict[Key, Callable] = field(default_factory=dict)

    def graphs(self) -> list[fx.Graph]:
        return [self.graph] if self.eval_graph is None else [self.graph, self.eval_graph]

    def copy(self) -> "Internals":
        """With graphs of its own; functions are shared."""
        graph, *rest = (edit.clone(graph)[0] for graph in self.graphs())
        return replace(
            self, graph=graph, eval_graph=rest[0] if rest else None, changes=dict(self.changes),
            runners=dict(self.runners),
        )  # fmt: skip


def internals(module: nn.Module) -> Internals:
    """Those of a captured module, a view of one, or what wraps it and hands its attributes on."""
    return module._subgraph
