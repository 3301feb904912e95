"""A Program: a captured model, what it was captured from, and the adapters that rewrite it."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .errors import SubgraphPeftError
from .module import GraphModel

if TYPE_CHECKING:
    from .adapter import Adapter
    from .constants import Constant
    from .fold import FoldReport
    from .promise import Padding
    from .schedule import Schedule
    from .values import Lowered


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
    adapters: tuple["Adapter", ...] = ()
    base: "Program | None" = None
    history: tuple[str, ...] = ("capture",)
    lowered: Mapping[str, "Lowered"] = field(default_factory=dict)
    constants: Mapping[str, "Constant"] = field(default_factory=dict)
    folded: "FoldReport | None" = None
    before: "Program | None" = None

    @property
    def graph(self) -> fx.Graph:
        """The graph in its training form."""
        return self.module.graph

    @property
    def captured(self) -> "Program":
        """The captured program, without adapters."""
        return self.base or self

    def parameters(self, trainable: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), each parameter once; only those that require gradients if `trainable`."""
        return ((n, p) for n, p in self.module.named_parameters() if p.requires_grad or not trainable)

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
                return self.module.call(self.at_home(self.example if inputs is None else inputs))
        finally:
            self.module.train(mode)

    def at_home(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Copies of inputs, which a graph may write to, on the module's device; those in the dtype it was captured in,
        in the dtype it has now."""
        home, origin = self.module.home, self.module.origin

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(home.device, home.dtype if tensor.dtype == origin.dtype else tensor.dtype, copy=True)

        return pytree.tree_map_only(torch.Tensor, move, dict(inputs))

    def need_values(self, purpose: str, error: type[SubgraphPeftError]) -> None:
        """Raises `error` on the meta device, where a program can be listed, rewritten and costed: "… to fold"."""
        if self.module.home.device.type == "meta":
            raise error(f"A program on the meta device has no weights to {purpose}; capture the loaded model.")

    def penalty(self) -> torch.Tensor:
        """What the adapters' methods add to the loss, a scalar; 0 where they add nothing."""
        from .penalty import penalty

        return penalty(self)

    def schedule(self, optimizer: torch.optim.Optimizer, total_steps: int | None = None) -> "Schedule":
        """Let methods with a schedule follow the steps of `optimizer`, `total_steps` in all."""
        from .schedule import Schedule

        return Schedule(self, optimizer, total_steps)

    def save(self, folder: Any) -> None:
        """Write the adapters to `folder`: adapter.json and adapter.safetensors."""
        from .checkpoint import save

        save(self, folder)

    def load(self, folder: Any) -> "Program":
        """Read trained tensors from `folder` into this program's adapters, strictly. Returns self."""
        from .checkpoint import load_into

        return load_into(self, folder)

    def write(self, path: Any) -> None:
        """Write the whole program to one file, which `subgraph_peft.read` turns into a program again."""
        from .saved import write

        write(self, path)

    def write_to(self, model: nn.Module) -> list[str]:
        """Copy this program's weights into the eager model it was captured from. Returns the names that changed."""
        from .merged import write_to

        return write_to(self, model)

    def take(self, view: nn.Module) -> "Program":
        """Read what training changed in `view`, made by `subgraph_peft.unflatten`, into this program. Returns self."""
        from .unflatten import take

        return take(self, view)

    def promise(self, padding: "Padding | None") -> "Program":
        """The same program, sharing all tensors, with a promise about its inputs or, with None, without one.

        padding="right":  every row of an attention mask [batch, length] is ones and then zeros. A causal mask that
                          hides padding then gives way to `is_causal`, wherever that is all the mask says. Outputs at
                          tokens, and gradients of a loss over tokens, stay the same where tokens meet in
                          attention only; hidden states at padding do not

        Every call checks the promise before it computes anything: CaptureError, or RuntimeError in compiled code.
        Export does without it. Raises CaptureError for a program without an attention mask; warns (CaptureWarning)
        where no attention gains from it.
        """
        from .promise import promise

        return promise(self, padding)

    def __copy__(self) -> "Program":
        return replace(self)

    def __deepcopy__(self, memo: dict) -> "Program":
        return replace(self, module=copy.deepcopy(self.module, memo), base=copy.deepcopy(self.base, memo))

    def __reduce__(self) -> tuple:
        from .saved import program_bytes, program_from

        return program_from, (program_bytes(self),)

    def __repr__(self) -> str:
        nodes = len(self.graph.nodes)
        return f"Program({self.source}: {nodes} nodes, {' → '.join(self.history)})"
