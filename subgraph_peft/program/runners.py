"""Runners: the functions by which a captured module computes, one for each mode and set of missing inputs."""

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from ..base.errors import CaptureError
from ..graph import code, edit
from ..graph.partition import Block, cut
from ..graph.passes import optimised, running
from .internals import Key, internals
from .tree import container


def make_runner(module: nn.Module, key: Key) -> None:
    own, (training, missing) = internals(module), key
    again = own.checkpointing if training else None
    label = " without ".join(("train" if training else "eval", *sorted(missing)))
    paths = (*own.block_paths, *(again.paths if again else ()))
    graph = specialise(module, *key)
    own.changes.setdefault(key, {}).update(optimised(graph, own, running("graph", own.without)))
    edit.eliminate_dead_code(graph)
    for piece in cut(graph, paths, label):
        run = code.compile_graph(piece.graph, f"{type(module).__name__} {piece.path}".strip())
        if again and piece.path in again.paths:
            run = checkpointed(run, again.options)
        if piece.path:
            container(module, piece.path.split("."))._subgraph[piece.call] = run
        else:
            own.runners[key] = run


def checkpointed(run: Callable, options: Mapping[str, Any]) -> Callable:
    """`run(module, *inputs)`, computed again in the backward pass."""

    def again(module: nn.Module, *inputs: Any) -> Any:
        return checkpoint(functools.partial(run, module), *inputs, use_reentrant=False, **options)

    return again


def make_runners(module: nn.Module) -> None:
    """Both modes with every input."""
    for key in ((training, frozenset()) for training in (True, False)):
        if key not in internals(module).runners:
            make_runner(module, key)


def renew(module: nn.Module) -> None:
    """Runners follow graphs and options as they are now: each is made when it is first called, or at once where
    graphs are cut at modules, which may be no units of them. Raises CaptureError."""
    own = internals(module)
    own.runners.clear()
    own.changes.clear()
    for block in module.modules():
        if isinstance(block, Block):
            block._subgraph.clear()
    for graph in own.graphs():
        graph.owning_module = None  # what it reads has this module's names
        code.check_legal(graph)
    if own.block_paths or own.checkpointing:
        make_runners(module)


def changes(module: nn.Module) -> dict[Key, dict[str, int]]:
    """What each optimising pass changed, by runner."""
    make_runners(module)
    return internals(module).changes


def specialise(module: nn.Module, training: bool, missing: frozenset[str] = frozenset()) -> fx.Graph:
    """The graph of one mode, without the outputs that need the missing inputs."""
    own = internals(module)
    source = own.graph if training or own.eval_graph is None else own.eval_graph
    graph, _ = edit.clone(source)
    if not training and own.eval_graph is None:
        edit.set_eval(graph, module)
    if missing and not any(remove(graph, own.signature.input_names(), missing)):
        needed = [m for m in sorted(missing) if needed_by_all(source, own.signature.input_names(), m)]
        raise CaptureError(
            f"Missing input {', '.join(needed or sorted(missing))}: every output of the graph needs it. Pass it, or "
            "capture the model without it."
        )
    return graph


def remove(graph: fx.Graph, names: list[str], missing: frozenset[str]) -> list[bool]:
    """Take inputs, whose `names` are in the order of placeholders, out of a graph. Which outputs are left?"""
    placeholders = dict(zip(names, graph.find_nodes(op="placeholder"), strict=True))
    return edit.without_inputs(graph, {placeholders[name].name for name in missing})


def needed_by_all(source: fx.Graph, names: list[str], name: str) -> bool:
    """Whether no output is left without this input."""
    return not any(remove(edit.clone(source)[0], names, frozenset([name])))
