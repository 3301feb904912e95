"""Generate the program of a captured one under adapters. Programs share the memory of weights and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import fx, nn

from ..base.patches import uncollected
from ..graph import edit, nodes
from ..graph.rewriter import Rewriter
from ..graph.site import PLACES
from ..method.adapter import Adapter, Target, targets
from ..method.equation import Equation
from ..program.internals import Home, internals
from ..program.module import GraphModel, build
from ..program.program import Program
from ..program.records import Constant, Lowered
from ..program.runners import renew
from .constants import refresh
from .lowering.lower import Lowering
from .lowering.lower_activations import lower_embeddings, lower_keys_values, lower_module, lower_output
from .lowering.lower_weights import lower_bias, lower_weight


@uncollected()
def generate(
    captured: Program, adapters: tuple[Adapter, ...], own: Mapping[str, nn.Parameter], dtype: torch.dtype
) -> Program:
    """The program of `captured` under `adapters`: every graph rewritten anew from the captured one.

    own: the adapters' tensors and the trained parameters of the model, by qualified name
    """
    base = dict(captured.tensors())
    constants: dict[str, Constant] = {}
    held: dict[int, dict[fx.Node, str]] = {}
    lowered: dict[str, Lowered] = {}

    def hoist(target: Target, equation: Equation, node: fx.Node) -> str:
        """The buffer of a constant, the same for every graph."""
        own = held.setdefault(id(target), {})
        if node not in own:
            name = equation.adapter(node) or target.chain[0][0].name
            adapter, site = next((a, s) for a, s in target.chain if a.name == name)
            own[node] = adapter.path(site, f"constant_{len(own)}")
            constants[own[node]] = Constant(target, equation, node)
        return own[node]

    rewritten = []
    wanted = targets(adapters)
    for original in captured.graphs():
        graph, _ = edit.clone(original)
        cast_trained(graph, own, base)
        readers = {str(node.target): node for node in reversed(graph.find_nodes(op="get_attr"))}
        for target in wanted:
            note = lowered.setdefault(target.chain[0][1].name, Lowered()) if not rewritten else Lowered()
            device, without = captured.home.device, internals(captured.module).without
            lower(Lowering(graph, readers, target, dtype, device, hoist, note, without))
        edit.eliminate_dead_code(graph)
        rewritten.append(graph)
    tensors = {**base, **own}
    module = rebuild(captured, tensors, rewritten)
    program = replace(captured, module=module, adapters=adapters, base=captured, lowered=lowered, constants=constants)
    if constants:
        inner = internals(module)
        inner.computed, inner.recompute = frozenset(constants), lambda moved: refresh(moved, constants)
        inner.recompute(module)
        module.register_load_state_dict_post_hook(lambda loaded, keys: internals(loaded).recompute(loaded))
    return program


def lower(lowering: Lowering) -> None:
    """Rewrite everything that reads the target in the graph, in place."""
    part, site = lowering.target.part, lowering.site
    whole = {"embeddings": lower_embeddings, "keys_values": lower_keys_values}
    if part in whole:
        whole[part](lowering)
    elif site.kind in PLACES:
        lower_module(lowering)
    elif parameter := lowering.readers.get(lowering.target.name):
        {"bias": lower_bias, "output": lower_output, "weight": lower_weight}[part](lowering, parameter)


def cast_trained(graph: fx.Graph, own: Mapping[str, nn.Parameter], base: Mapping[str, torch.Tensor]) -> None:
    """A parameter of the model that trains in a wider dtype is cast to the model's where it is read."""
    rewrite = Rewriter(graph)
    for node in graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in own and name in base and own[name].dtype != base[name].dtype:
            users, says = list(node.users), {"site": name, "adapter": "trainable", "term": "cast"}
            cast = rewrite.add(nodes.aten.to.dtype, (node, base[name].dtype), like=node, before=node.next, says=says)
            cast.meta["val"] = node.meta["val"]
            for user in users:
                user.replace_input_with(node, cast)


def rebuild(
    captured: Program,
    tensors: Mapping[str, torch.Tensor],
    rewritten: Sequence[fx.Graph] | None = None,
    moves: edit.Moves = MappingProxyType({}),
    without: frozenset[str] | None = None,
) -> GraphModel:
    """A module like the captured one with these tensors, by default its own graphs, whose literals follow `moves`.

    Parameters are new objects over the same memory, tied ones tied; buffers are copies. `without` switches optimising
    passes off.
    """
    source, former = captured.module, internals(captured.module)
    own = [edit.clone(graph)[0] for graph in captured.graphs()] if rewritten is None else list(rewritten)
    home = Home(*(moves.get(literal, literal) for literal in former.home))
    for graph in own if moves else ():
        edit.move(graph, moves)
    known: dict[int, nn.Parameter] = {}

    def separate(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            return tensor.detach().clone()
        if id(tensor) not in known:
            known[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=tensor.requires_grad)
        return known[id(tensor)]

    saved = set(source.state_dict(keep_vars=True))
    volatile = {name for name, _ in source.named_buffers(remove_duplicate=False) if name not in saved}
    parts = {name: child for name, child in source.named_children() if isinstance(child, fx.GraphModule)}
    held = {name: separate(tensor) for name, tensor in tensors.items()} | parts
    module = build(
        former.signature, own[0], own[1] if len(own) > 1 else None, held, volatile, home, type(source).__name__,
        config=vars(source).get("config"), checkpointing=former.checkpointing,
        padding=former.padding, without=former.without if without is None else without,
    )  # fmt: skip
    internals(module).origin = former.origin
    return module.train(source.training)


def base_of(program: Program) -> Program:
    """The captured program under a program's adapters, where the program is now: on its device, in its dtype, with the
    buffers that training has written."""
    if program.base is None:
        return program
    base, held = program.base, dict(program.tensors())
    trained = {name for name, _ in program.parameters(trainable=True)}
    moves = dict(zip(base.home, program.home, strict=True))
    for name, tensor in base.tensors():
        if name not in trained:
            moves.setdefault(tensor.device, held[name].device)
            moves.setdefault(tensor.dtype, held[name].dtype)

    def current(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name not in trained:
            return held[name]
        moved = tensor.detach().to(moves[tensor.device], moves.get(tensor.dtype, tensor.dtype))
        return nn.Parameter(moved, requires_grad=False)

    tensors = {name: current(name, tensor) for name, tensor in base.tensors()}
    module = rebuild(base, tensors, moves={old: new for old, new in moves.items() if old != new})
    own, made = internals(program.module), internals(module)
    kept = own.checkpointing, own.padding, own.without
    if (made.checkpointing, made.padding, made.without) != kept:
        made.checkpointing, made.padding, made.without = kept
        renew(module)
    return replace(base, module=module)
