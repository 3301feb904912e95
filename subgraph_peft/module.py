"""The captured model as an nn.Module: the source's parameters under their own names, its computation as a graph."""

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from . import graphs
from .checkpointing import Checkpointed, Checkpointing, checkpointed
from .errors import CaptureError, CaptureWarning, TrainError
from .graphs import Moves
from .guards import compile_guards, guards_of, refusal
from .optimise import optimised
from .outline import outline
from .partition import Block, cut
from .promise import Padding
from .signature import Signature, compile_forward

Key = tuple[bool, frozenset[str]]  # training, missing inputs


class Home(NamedTuple):
    """Where the constants of a graph live; literals equal to these follow the module when it moves."""

    device: torch.device
    dtype: torch.dtype


class GraphModel(Checkpointed, nn.Module):
    """Runs `graph` (its training form) with the call signature and output type of the captured model.

    home: device and dtype of the graph's constants now; origin: those it was captured with
    computed: buffers that the equations of adapters give; recompute: computes them from the tensors as they are
    block_paths: modules of the source that runners call as modules
    checkpointing: modules of the source that are computed again for the backward pass
    padding: "right" where it is promised that attention masks are ones and then zeros, which runners check
    without: optimising passes that are switched off
    runners: (training, missing inputs) -> function that runs the graph of that mode, made when it is first called
    changes: what each optimising pass changed, by runner

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
        self.computed: frozenset[str] = frozenset()
        self.recompute: Callable[[GraphModel], None] | None = None
        self.block_paths: tuple[str, ...] = ()
        self.checkpointing: Checkpointing | None = None
        self.padding: Padding | None = None
        self.without: frozenset[str] = frozenset()
        self.changes: dict[Key, dict[str, int]] = {}
        self.runners: dict[Key, Any] = {}

    def checked(self, inputs: Mapping[str, Any]) -> list[Any]:
        """The leaves of inputs that the graph can take, None where one is missing."""
        flat = self.signature.flatten(inputs)
        if (broken := self.broken_guard(inputs)) >= 0:
            raise refusal(self.signature.guards[broken])
        if self.home.device.type == "meta" and any(p.is_meta for p in self.parameters()):  # torch.func replaces them
            self.check_meta(flat)
        return flat

    def call(self, inputs: Mapping[str, Any]) -> Any:
        flat = self.checked(inputs)
        missing = frozenset(
            name for name, value in zip(self.signature.input_names(), flat, strict=True) if value is None
        )
        if torch.compiler.is_compiling():
            self.make_traced(*missing)  # before `runners` is read, which a trace reads once
        elif (self.training, missing) not in self.runners:
            self.make_runner((self.training, missing))
        return self.signature.unflatten(self.runners[self.training, missing](self, *flat))

    def check_meta(self, flat: list[Any]) -> None:
        """On the meta device shapes can be had, of inputs there, and no training."""
        if any(isinstance(leaf, torch.Tensor) and not leaf.is_meta for leaf in flat):
            raise CaptureError("The module is on the meta device and has no weights: capture the loaded model.")
        if self.training and torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise TrainError("A module on the meta device has no weights to train; capture the loaded model.")

    def add_guards(self, exported: torch.export.ExportedProgram) -> None:
        """Check the conditions of another trace of the model too."""
        added = guards_of(getattr(exported, "_guards_code", ()), self.signature.inputs)
        guards = tuple(dict.fromkeys((*self.signature.guards, *added)))
        self.signature = replace(self.signature, guards=guards)
        type(self).broken_guard = staticmethod(compile_guards(guards))

    def make_runner(self, key: Key) -> None:
        training, missing = key
        again = self.checkpointing if training else None
        label = " without ".join(("train" if training else "eval", *sorted(missing)))
        paths = (*self.block_paths, *(again.paths if again else ()))
        graph = self.specialise(*key)
        self.changes.setdefault(key, {}).update(optimised(graph, self, "graph", self.without))
        graphs.sweep(graph)
        for piece in cut(graph, paths, label):
            run = graphs.compile_graph(piece.graph, f"{type(self).__name__} {piece.path}".strip())
            if again and piece.path in again.paths:
                run = checkpointed(run, again.options)
            if piece.path:
                container(self, piece.path.split(".")).runners[piece.call] = run
            else:
                self.runners[key] = run

    def make_runners(self) -> None:
        """Both modes with every input."""
        for key in ((training, frozenset()) for training in (True, False)):
            if key not in self.runners:
                self.make_runner(key)

    def make_traced(self, *missing: str) -> None:
        """What torch.compile meets as finished functions: it runs this where it would trace it. Both modes, since what
        is compiled for one hangs on which runners there are."""
        self.make_runners()
        if (key := (self.training, frozenset(missing))) not in self.runners:
            self.make_runner(key)

    def renew(self) -> None:
        """Runners follow graphs and options as they are now: each is made when it is first called, or at once where
        graphs are cut at modules, which may be no units of them. Raises CaptureError."""
        self.runners.clear()
        self.changes.clear()
        for module in self.modules():
            if isinstance(module, Block):
                module.runners.clear()
        for graph in self.graphs():
            graph.owning_module = None  # what it reads has this module's names
            graphs.check(graph)
        if self.block_paths or self.checkpointing:
            self.make_runners()

    @property
    def matches(self) -> dict[Key, dict[str, int]]:
        """What each optimising pass changed, by runner."""
        self.make_runners()
        return self.changes

    def graphs(self) -> list[fx.Graph]:
        return [self.graph] if self.eval_graph is None else [self.graph, self.eval_graph]

    def specialise(self, training: bool, missing: frozenset[str] = frozenset()) -> fx.Graph:
        """The graph of one mode, without the outputs that need the missing inputs."""
        source = self.graph if training or self.eval_graph is None else self.eval_graph
        graph, _ = graphs.clone(source)
        if not training and self.eval_graph is None:
            graphs.set_eval(graph, self)
        if missing:
            placeholders = dict(zip(self.signature.input_names(), graph.find_nodes(op="placeholder"), strict=True))
            kept = graphs.without_inputs(graph, {placeholders[name].name for name in missing})
            if not any(kept):
                needed = (
                    sorted(missing)
                    if len(missing) == 1
                    else [m for m in sorted(missing) if needed_by_all(self, source, m)]
                )
                raise CaptureError(
                    f"Missing input {', '.join(needed or sorted(missing))}: every output of the graph needs it. Pass "
                    "it, or capture the model without it."
                )
        return graph

    def _apply(self, fn: Any, recurse: bool = True) -> "GraphModel":
        """What `.to()`, `.cuda()`, `.double()` and `.to_empty()` do: literals of the graph follow its tensors.

        A wider dtype is exact, and computes everything in it, also what the model's code casts to float32. Raises
        CaptureError, before anything moves, for a dtype that would narrow a value. Tied tensors stay tied.
        """
        moves = self.moves(fn)
        ties: dict[int, list[str]] = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            ties.setdefault(id(parameter), []).append(name)
        lost = self.unsaved() if self.home.device.type == "meta" else []
        super()._apply(fn, recurse)
        for first, *others in ties.values():
            for other in others:
                attach(self, other, self.get_parameter(first))
        self.follow(moves)
        if lost and self.home.device.type != "meta":
            warnings.warn(
                f"{type(self).__name__} left the meta device, where tensors have no values, and its state dict does "
                f"not hold {', '.join(lost[:5])}{' …' if len(lost) > 5 else ''}. Set them from a loaded model.",
                CaptureWarning,
                stacklevel=4,
            )
        return self

    def follow(self, moves: Moves) -> None:
        """Let the literals of the graphs follow tensors that have moved."""
        self.home = Home(*(moves[literal] for literal in self.home))
        if moves := {literal: moved for literal, moved in moves.items() if moved != literal}:
            for graph in self.graphs():
                graphs.move(graph, moves)
            for body in (part for part in self.modules() if isinstance(part, fx.GraphModule)):
                graphs.move(body.graph, moves)
                body.recompile()
            self.renew()
            if self.recompute and self.home.device.type != "meta" and any(isinstance(m, torch.dtype) for m in moves):
                self.recompute(self)

    def moves(self, fn: Any) -> Moves:
        """What `fn` makes of every device, and of every floating-point dtype, that the module holds."""
        moves: dict[Any, Any] = {}
        probed: set[Home] = set()
        for name, held in [*self.tensors(), ("", torch.empty(0, device=self.home.device, dtype=self.home.dtype))]:
            if (kind := Home(held.device, held.dtype)) in probed:
                continue
            probed.add(kind)
            moved = fn(torch.empty(0, device=held.device, dtype=held.dtype))
            moves[held.device] = moved.device
            if held.is_floating_point():
                moves[held.dtype] = moved.dtype
                if torch.promote_types(moved.dtype, held.dtype) != moved.dtype:
                    raise CaptureError(
                        f"{name or type(self).__name__} holds {held.dtype} values, which {moved.dtype} would narrow. "
                        f"Convert the model first (model.to({moved.dtype})), capture it again, and pass "
                        f"dtype={moved.dtype} to rewrite for its adapters. A move to a device alone is .to(device)."
                    )
        return moves

    def unsaved(self) -> list[str]:
        """Buffers that the state dict does not hold and no equation computes."""
        saved = self.state_dict(keep_vars=True)
        return [n for n, _ in self.named_buffers(remove_duplicate=False) if n not in saved and n not in self.computed]

    def __deepcopy__(self, memo: dict) -> "GraphModel":
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        for name, value in self.__dict__.items():
            if name in ("graph", "eval_graph"):
                value = value and graphs.clone(value)[0]
            elif name in ("runners", "changes"):
                value = dict(value)
            elif name != "signature":
                value = copy.deepcopy(value, memo)
            duplicate.__dict__[name] = value
        return duplicate

    def __copy__(self) -> "GraphModel":
        duplicate = type(self).__new__(type(self))
        duplicate.__dict__.update(self.__dict__)
        return duplicate

    def __reduce__(self) -> tuple:
        from .saved import module_bytes, module_from

        return module_from, (module_bytes(self),)

    def __repr__(self) -> str:
        return outline(self)

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Every parameter and buffer by qualified name, tied names included."""
        yield from self.named_parameters(remove_duplicate=False)
        yield from self.named_buffers(remove_duplicate=False)


def needed_by_all(module: GraphModel, source: fx.Graph, name: str) -> bool:
    """Whether no output is left without this input."""
    graph, _ = graphs.clone(source)
    placeholders = dict(zip(module.signature.input_names(), graph.find_nodes(op="placeholder"), strict=True))
    return not any(graphs.without_inputs(graph, {placeholders[name].name}))


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
    torch.compiler.assume_constant_result(GraphModel.make_traced)  # not before: it imports what captures do in any case
    own = {"forward": compile_forward(signature.parameters), "__module__": __name__}
    cls = type(name, (GraphModel,), {**own, "broken_guard": staticmethod(compile_guards(signature.guards))})
    module = cls(signature, graph, eval_graph, home or home_of(tensors))
    module.checkpointing, module.padding, module.without = checkpointing, padding, without
    if config is not None:
        module.config = config
    for path, tensor in tensors.items():
        attach(module, path, tensor, persistent=path not in volatile)
    module.renew()
    return module


def attach(module: nn.Module, path: str, tensor: torch.Tensor | nn.Module, persistent: bool = True) -> None:
    """Set `module.<path>`, making containers on the way. Raises CaptureError for a name of GraphModel's own."""
    *parents, leaf = path.split(".")
    first = (*parents, leaf)[0]
    if isinstance(module, GraphModel) and not isinstance(getattr(module, first, tensor), (nn.Module, torch.Tensor)):
        raise CaptureError(
            f"{path}: the captured module has an attribute {first!r} of its own. Give the model's another name."
        )
    module = container(module, parents)
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    elif isinstance(tensor, nn.Module):
        module.add_module(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor, persistent=persistent)


def container(module: nn.Module, path: Sequence[str]) -> nn.Module:
    """The module at a path; a Block is made where there is none."""
    for name in path:
        if not isinstance(getattr(module, name, None), nn.Module):
            module.add_module(name, Block())
        module = getattr(module, name)
    return module


def home_of(tensors: Mapping[str, torch.Tensor]) -> Home:
    """Device and dtype of the first floating-point parameter (else tensor)."""
    floating = [t for t in tensors.values() if isinstance(t, torch.Tensor) and t.is_floating_point()]
    first = next((t for t in floating if isinstance(t, nn.Parameter)), floating[0] if floating else torch.empty(0))
    return Home(first.device, first.dtype)
