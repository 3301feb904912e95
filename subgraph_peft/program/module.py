"""The captured model as an nn.Module: the source's parameters under their own names, its computation as a graph."""

import copy
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn

from ..base.borrowed import runs_in_traces
from ..graph.guards import compile_guards
from ..graph.sequence.padding import Padding
from ..graph.signature import Signature, compile_forward
from .calls import call
from .checkpointing import Checkpointed
from .internals import Checkpointing, Home, Internals, internals
from .movement import move
from .runners import make_runner, make_runners, renew
from .tree import attach, home_of, named_tensors

LINES = 24  # of groups of modules that are shown


class GraphModel(Checkpointed, nn.Module):
    """Runs a graph with the call signature, the output type and the names of the captured model.

    What it keeps for itself is in `_subgraph`, which `internals` gives. A method that is not nn.Module's own gives way
    to a child or tensor of the model that has its name, see `build`.
    """

    _subgraph: Internals

    def __init__(self, own: Internals):
        super().__init__()
        self._subgraph = own

    @property
    def block_paths(self) -> tuple[str, ...]:
        """The modules of the source that are called as modules, see `subgraph_peft.unflatten`."""
        return internals(self).block_paths

    @runs_in_traces
    def _subgraph_prepare(self, *missing: str) -> None:
        """What torch.compile meets as finished functions: it runs this where it would trace it. Both modes, since what
        is compiled for one depends on which runners there are."""
        make_runners(self)
        if (key := (self.training, frozenset(missing))) not in internals(self).runners:
            make_runner(self, key)

    def _apply(self, fn: Any, recurse: bool = True) -> "GraphModel":
        """What `.to()`, `.cuda()`, `.double()` and `.to_empty()` do: literals of the graph follow its tensors.

        A wider dtype is exact, and computes everything in it, also what the model's code casts to float32. Raises
        CaptureError, before anything moves, for a dtype that would narrow a value. Tied tensors stay tied.
        """
        move(self, fn, lambda: super(GraphModel, self)._apply(fn, recurse))
        return self

    def __deepcopy__(self, memo: dict) -> "GraphModel":
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        for name, value in self.__dict__.items():
            duplicate.__dict__[name] = value.copy() if name == "_subgraph" else copy.deepcopy(value, memo)
        return duplicate

    def __copy__(self) -> "GraphModel":
        duplicate = type(self).__new__(type(self))
        duplicate.__dict__.update(self.__dict__, _subgraph=copy.copy(self._subgraph))
        return duplicate

    def __repr__(self) -> str:
        """Call signature, size and state, then one line for each group of modules whose paths differ in numbers."""
        own, sizes = internals(self), {name: p.numel() for name, p in self.named_parameters()}
        trainable = sum(p.numel() for p in self.parameters() if p.requires_grad)
        called = f"{type(self).__name__}({', '.join(own.signature.inputs)}) → {', '.join(own.signature.output_names())}"
        size = f"{sum(sizes.values()):,} parameters, {trainable:,} of them train; {len(own.graph.nodes)} nodes"
        mode = "train" if self.training else "eval"
        state = f"{str(own.home.dtype).removeprefix('torch.')} on {own.home.device}, {mode} mode"
        return "\n".join([called, f"  {size}; {state}", *groups(self)])


def groups(module: nn.Module) -> list[str]:
    """One line for each group of modules whose paths differ in numbers alone: `layers.*.q  weight [4, 4]  × 2`."""
    found: dict[str, dict[str, list]] = {}
    for name, tensor in named_tensors(module):
        owner, _, leaf = name.rpartition(".")
        held = found.setdefault(re.sub(r"(?<![^.])\d+(?![^.])", "*", owner), {})
        held.setdefault(f"{leaf} {list(tensor.shape)}", []).append(tensor)
    width = min(60, max((len(path) for path in found), default=0))
    lines = []
    for path, held in found.items():
        count = max(map(len, held.values()))
        trains = any(tensor.requires_grad for tensors in held.values() for tensor in tensors)
        text = f"  {path:<{width}}  {', '.join(held)}{f'  × {count}' if count > 1 else ''}"
        lines.append(f"{text}{'  trains' if trains else ''}")
    return lines if len(lines) <= LINES else [*lines[:LINES], f"  … and {len(lines) - LINES} more"]


class Given:
    """In place of a method of GraphModel: the child or tensor of the model that has its name."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, module: nn.Module, owner: type) -> Any:
        return nn.Module.__getattr__(module, self.name)


def build(
    signature: Signature,
    graph: fx.Graph,
    eval_graph: fx.Graph | None,
    tensors: Mapping[str, torch.Tensor],
    volatile: set[str] = frozenset(),
    home: Home | None = None,
    name: str = "Model",
    config: Any = None,
    checkpointing: Checkpointing | None = None,
    padding: Padding | None = None,
    without: frozenset[str] = frozenset(),
) -> GraphModel:
    """A GraphModel whose attribute tree holds `tensors` (Parameters stay Parameters; `volatile` names are buffers
    that the state dict leaves out) and whose `forward` has the signature's parameters."""
    home = home or home_of(tensors)
    children = {path.partition(".")[0] for path in tensors}
    hidden = {n for n in children & set(dir(GraphModel)) - set(dir(nn.Module)) if not n.startswith("_")}
    own = {"forward": compile_forward(signature.parameters, call), "__module__": __name__}
    cls = type(name, (GraphModel,), own | {method: Given() for method in hidden})
    broken = compile_guards(signature.guards)
    module = cls(Internals(signature, graph, eval_graph, home, home, broken, checkpointing, padding, without))
    if config is not None and "config" not in children:
        module.config = config
    for path, tensor in tensors.items():
        attach(module, path, tensor, persistent=path not in volatile)
    renew(module)
    return module
