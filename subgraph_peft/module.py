"""The captured model as an nn.Module: the source's parameters under their own names, its computation as a graph."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from . import graphs
from .errors import CaptureError
from .signature import Signature, compile_forward


class Home(NamedTuple):
    """Where the constants of a graph live; literals equal to these follow the module when it moves."""

    device: torch.device
    dtype: torch.dtype


class GraphModel(nn.Module):
    """Runs `graph` (its training form) with the call signature and output type of the captured model.

    home: device and dtype of the graph's constants now; origin: those it was captured with

    `eval_graph` is the graph of eval mode where it is not the training graph with dropout and batch norm switched.
    An input that was captured may be left out; outputs that need it are then None (a loss without labels).
    """

    signature: Signature
    graph: fx.Graph
    eval_graph: fx.Graph | None

    def __init__(self, signature: Signature, graph: fx.Graph, eval_graph: fx.Graph | None, home: Home):
        super().__init__()
        self.signature = signature
        self.graph = graph
        self.eval_graph = eval_graph
        self.home = home
        self.origin = home
        self.runners: dict[tuple[bool, frozenset[str]], Any] = {}

    def call(self, inputs: Mapping[str, Any]) -> Any:
        flat = self.signature.flatten(inputs)
        missing = frozenset(
            name for name, value in zip(self.signature.input_names(), flat, strict=True) if value is None
        )
        key = (self.training, missing)
        if key not in self.runners:
            self.make_runner(key)
        return self.signature.unflatten(self.runners[key](self, *flat))

    def make_runner(self, key: tuple[bool, frozenset[str]]) -> None:
        self.runners[key] = graphs.compile_graph(self.specialise(*key), type(self).__name__)

    def make_runners(self) -> None:
        """Both modes with every input, made beforehand so that torch.compile meets finished functions."""
        self.runners.clear()
        for training in (True, False):
            self.make_runner((training, frozenset()))

    def graphs(self) -> list[fx.Graph]:
        return [self.graph] if self.eval_graph is None else [self.graph, self.eval_graph]

    def specialise(self, training: bool, missing: frozenset[str] = frozenset()) -> fx.Graph:
        """The graph of one mode, without the outputs that need the missing inputs."""
        source = self.graph if training or self.eval_graph is None else self.eval_graph
        graph, _ = graphs.clone(source)
        graphs.set_mode(graph, training)
        if missing:
            placeholders = dict(zip(self.signature.input_names(), graph.find_nodes(op="placeholder"), strict=True))
            kept = graphs.without_inputs(graph, {placeholders[name].name for name in missing})
            if not any(kept):
                needed = (
                    sorted(missing) if len(missing) == 1 else [m for m in sorted(missing) if self.blocks(source, m)]
                )
                raise CaptureError(
                    f"Missing input {', '.join(needed or sorted(missing))}: every output of the graph needs it. Pass "
                    "it, or capture the model without it."
                )
        return graph

    def blocks(self, source: fx.Graph, name: str) -> bool:
        """Whether no output is left without this input."""
        graph, _ = graphs.clone(source)
        placeholders = dict(zip(self.signature.input_names(), graph.find_nodes(op="placeholder"), strict=True))
        return not any(graphs.without_inputs(graph, {placeholders[name].name}))

    def _apply(self, fn: Any, recurse: bool = True) -> "GraphModel":
        held = {p.dtype for p in self.parameters() if p.is_floating_point()} | {self.home.dtype}
        for dtype in held:
            moved = fn(torch.empty(0, dtype=dtype, device=self.home.device)).dtype
            if torch.promote_types(moved, dtype) != moved:
                raise CaptureError(
                    f"The module holds {dtype} values, which {moved} would narrow. Convert the model first "
                    f"(model.to({moved})), capture it again, and pass dtype={moved} to rewrite for its adapters."
                )
        moved = fn(torch.empty(0, dtype=self.home.dtype, device=self.home.device))
        super()._apply(fn, recurse)
        if (moved.device, moved.dtype) != self.home:
            for graph in self.graphs():
                graphs.move(graph, {self.home.device: moved.device, self.home.dtype: moved.dtype})
            self.home = Home(moved.device, moved.dtype)
            self.make_runners()
        return self

    def __deepcopy__(self, memo: dict) -> "GraphModel":
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        for name, value in self.__dict__.items():
            if name in ("graph", "eval_graph"):
                value = value and graphs.clone(value)[0]
            elif name == "runners":
                value = dict(value)
            elif name != "signature":
                value = copy.deepcopy(value, memo)
            duplicate.__dict__[name] = value
        return duplicate

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer by qualified name, tied names included."""
        yield from self.named_parameters(remove_duplicate=False)
        yield from self.named_buffers(remove_duplicate=False)


def build(
    signature: Signature,
    graph: fx.Graph,
    eval_graph: fx.Graph | None,
    tensors: Mapping[str, torch.Tensor],
    volatile: set[str] = frozenset(),
    home: Home | None = None,
    name: str = "Model",
    config: Any = None,
) -> GraphModel:
    """A GraphModel whose attribute tree holds `tensors` (Parameters stay Parameters; `volatile` names are buffers
    that the state dict leaves out) and whose `forward` has the signature's parameters."""
    cls = type(name, (GraphModel,), {"forward": compile_forward(signature.parameters), "__module__": __name__})
    module = cls(signature, graph, eval_graph, home or home_of(tensors))
    if config is not None:
        module.config = config
    for path, tensor in tensors.items():
        attach(module, path, tensor, persistent=path not in volatile)
    module.make_runners()
    return module


def attach(module: nn.Module, path: str, tensor: torch.Tensor | nn.Module, persistent: bool = True) -> None:
    """Set `module.<path>`, making containers on the way."""
    *parents, leaf = path.split(".")
    for parent in parents:
        if parent not in module._modules:
            module.add_module(parent, nn.Module())
        module = module._modules[parent]
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    elif isinstance(tensor, nn.Module):
        module.add_module(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor, persistent=persistent)


def home_of(tensors: Mapping[str, torch.Tensor]) -> Home:
    """Device and dtype of the first floating-point parameter (else tensor)."""
    floating = [t for t in tensors.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    first = next((t for t in floating if isinstance(t, nn.Parameter)), floating[0] if floating else torch.empty(0))
    return Home(first.device, first.dtype)
