"""A Program: a captured model, what it was captured from, and the adapters that rewrite it."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from ..base.borrowed import pytree
from ..base.errors import SubgraphPeftError
from ..graph.signature import Signature
from ..method.adapter import Adapter
from .calls import call
from .internals import Home, internals
from .module import GraphModel
from .records import Constant, FoldReport, Lowered
from .tree import named_tensors


@dataclass(frozen=True)
class Program:
    """A captured model as a graph.

    module:   runs the graph; any training loop takes it
    example:  the example inputs by argument name
    source:   class name of the model it came from
    ties:     groups of parameter names that are one tensor
    adapters: the methods that rewrite it, in the order they were applied
    base:     the captured program under the adapters (None on the captured program itself)
    history:  the passes that made it, in order
    lowered:  how each site was rewritten, by weight name
    folded:   what the fold kept, on a folded program
    before:   the program as it was captured, where weights were untied or folded since
    constants: buffers that hold what the adapters' equations need and no training changes
    """

    module: GraphModel
    example: Mapping[str, Any]
    source: str
    ties: tuple[frozenset[str], ...] = ()
    adapters: tuple[Adapter, ...] = ()
    base: "Program | None" = None
    history: tuple[str, ...] = ("capture",)
    lowered: Mapping[str, Lowered] = field(default_factory=dict)
    constants: Mapping[str, Constant] = field(default_factory=dict)
    folded: FoldReport | None = None
    before: "Program | None" = None

    @property
    def graph(self) -> fx.Graph:
        """The graph in its training form."""
        return internals(self.module).graph

    def graphs(self) -> list[fx.Graph]:
        """The graph, and that of eval mode where it is another."""
        return internals(self.module).graphs()

    @property
    def signature(self) -> Signature:
        """What it is called with and what it returns."""
        return internals(self.module).signature

    @property
    def home(self) -> Home:
        """Device and dtype that it computes in."""
        return internals(self.module).home

    @property
    def captured(self) -> "Program":
        """The captured program, without adapters."""
        return self.base or self

    def parameters(self, trainable: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), each parameter once; only those that require gradients if `trainable`."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad or not trainable)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every parameter and buffer, tied names included."""
        return named_tensors(self.module)

    def counts(self) -> tuple[int, int]:
        """(numbers that train, numbers of the captured model)"""
        trainable = sum(p.numel() for _, p in self.parameters(trainable=True))
        return trainable, sum(p.numel() for _, p in self.captured.parameters())

    def run(self, inputs: Mapping[str, Any] | None = None, training: bool = False) -> Any:
        """Outputs on `inputs` (the example inputs by default) without gradients, in eval mode unless `training`."""
        mode = self.module.training
        try:
            self.module.train(training)
            with torch.no_grad():
                return call(self.module, self.at_home(self.example if inputs is None else inputs))
        finally:
            self.module.train(mode)

    def at_home(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of inputs, which a graph may write to, on the module's device; those in the dtype it was captured in,
        in the dtype it has now."""
        home, origin = self.home, internals(self.module).origin

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(home.device, home.dtype if tensor.dtype == origin.dtype else tensor.dtype, copy=True)

        return pytree.tree_map_only(torch.Tensor, move, dict(inputs))

    def need_values(self, purpose: str, error: type[SubgraphPeftError]) -> None:
        """Raises `error` on the meta device, where a program can be listed, rewritten and costed: "… to fold"."""
        if self.home.device.type == "meta":
            raise error(f"A program on the meta device has no weights to {purpose}; capture the loaded model.")

    def __copy__(self) -> "Program":
        return replace(self)

    def __deepcopy__(self, memo: dict) -> "Program":
        return replace(self, module=copy.deepcopy(self.module, memo), base=copy.deepcopy(self.base, memo))

    def __repr__(self) -> str:
        nodes = len(self.graph.nodes)
        return f"Program({self.source}: {nodes} nodes, {' → '.join(self.history)})"
