"""Attention as its fast kernels take it: `is_causal` or no mask in place of a mask, grouped keys as they are.

A captured graph computes every mask in full and repeats grouped keys and values for all queries. The graph that runs
calls attention without them where nothing changes by it, or where right padding has been promised, which is checked.
Rewrites, folding and export see the captured graph.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from ..base.errors import CaptureError, CaptureWarning
from ..base.text import Table, grouped
from ..graph.edit import clone, eliminate_dead_code
from ..graph.nodes import sizes
from ..graph.sequence.attention import attentions, bound, repeated
from ..graph.sequence.masks import Mask, recognise
from ..graph.sequence.padding import Padding, padding_masks, watch
from .internals import Home, internals
from .program import Program
from .runners import renew

ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
HALF, WIDEST = (torch.float16, torch.bfloat16), 256  # what the kernel of CUDA that takes grouped keys takes


@dataclass(frozen=True)
class AttentionCall:
    """One call of attention.

    name:    of its module                             mask:    where a query sees a key, as captured
    kernel:  "is_causal", "no mask" or "mask"          grouped: keys and values are passed once for a group of queries
    why:     what keeps the mask, or the keys repeated
    promise: inputs that have to be padded on the right
    """

    name: str
    mask: str
    kernel: str
    grouped: bool = False
    why: str = ""
    promise: frozenset[str] = frozenset()


class Kernels(tuple[AttentionCall, ...]):
    """The attention calls of a program; prints as a table."""

    def __str__(self) -> str:
        columns = ("module", ">calls", "kernel", "keys", "mask", "why")
        return str(Table(f"{len(self)} attention calls", columns, grouped(map(row, self))))


def row(call: AttentionCall) -> tuple[str, ...]:
    promise = (f"{name} is padded on the right" for name in sorted(call.promise))
    why = "; ".join((*promise, *filter(None, [call.why])))
    return call.name, call.kernel, "grouped" if call.grouped else "", call.mask, why


def kernels(program: Program) -> Kernels:
    """Which kernel every attention of a program gets, and why."""
    own = internals(program.module)
    return Kernels(choose_kernel(clone(own.graph)[0], own.home, own.padding))


def promise(program: Program, padding: Padding | None) -> Program:
    """The same program, sharing all tensors, with a promise about its inputs or, with None, without one.

    padding="right":  every row of an attention mask [batch, length] is ones and then zeros. A causal mask that hides
                      padding then gives way to `is_causal`, wherever that is all the mask says. Outputs at tokens, and
                      gradients of a loss over tokens, stay the same where tokens meet in attention only; hidden states
                      at padding do not

    Every call checks the promise before it computes anything: CaptureError, or RuntimeError in compiled code. Export
    does without it. Raises CaptureError for a program without an attention mask; warns (CaptureWarning) where no
    attention gains from it.
    """
    if padding not in (None, "right"):
        raise CaptureError(f'padding is "right" or None, not {padding!r}.')
    if padding == internals(program.module).padding:
        return program
    if padding and not padding_masks(program.graph):
        names = ", ".join(node.name for node in program.graph.find_nodes(op="placeholder"))
        raise CaptureError(f"{program.source} has no attention_mask [batch, length] to promise anything of ({names}).")
    module = copy.deepcopy(program.module, {id(tensor): tensor for _, tensor in program.tensors()})
    internals(module).padding = padding
    renew(module)
    promised = replace(program, module=module)
    if padding and not any(call.promise for call in kernels(promised)):
        warnings.warn(
            f'padding="{padding}" changes no attention of {program.source}; sp.kernels(program) says why.',
            CaptureWarning,
            stacklevel=3,
        )
    return promised


def accelerate(graph: fx.Graph, home: Home, padding: Padding | None) -> int:
    """Give every attention its kernel, check what that takes for granted before anything is computed, remove what
    nothing reads any more. In place. Returns how many go without a mask."""
    calls = list(choose_kernel(graph, home, padding))
    watch(graph, {name for call in calls for name in call.promise})
    eliminate_dead_code(graph)
    return sum(call.kernel != "mask" for call in calls)


def choose_kernel(graph: fx.Graph, home: Home, padding: Padding | None) -> Iterator[AttentionCall]:
    """Change every attention of a graph that is to run at `home`, in place, one after the other."""
    masks: dict[fx.Node, tuple[Mask, str]] = {}
    for name, node in attentions(graph).items():
        arguments = bound(node)
        mask, why = arguments["attn_mask"], ""
        if mask is None:
            known = Mask("causal", "is_causal") if arguments["is_causal"] else Mask("all", "none")
        else:
            if mask not in masks:
                masks[mask] = read_mask(graph, mask, padding)
            known, why = masks[mask]
            if known.form == "causal" and str(sizes(node.args[0])[-2]) != str(sizes(node.args[1])[-2]):
                known, why = replace(known, form=None), "other queries than keys"
        if known.form is None:
            yield AttentionCall(name, known.formula, "mask", bool(arguments.get("enable_gqa")), why)
            continue
        causal = known.form == "causal"
        arguments |= {"attn_mask": None, "is_causal": causal}
        (key, repeats), (value, also) = (repeated(arguments[which]) for which in ("key", "value"))
        if repeats == also != 1:
            why = repeats_for(home, node.args[0])
            arguments |= {} if why else {"key": key, "value": value, "enable_gqa": True}
        call(node, arguments)
        grouped = bool(arguments.get("enable_gqa"))
        yield AttentionCall(name, known.formula, "is_causal" if causal else "no mask", grouped, why, known.promise)


def read_mask(graph: fx.Graph, mask: fx.Node, padding: Padding | None) -> tuple[Mask, str]:
    """The mask, and which promise would make it a causal one."""
    names = frozenset(map(str, padding_masks(graph)))
    known = recognise(graph, mask, names if padding else frozenset())
    would = known.form is None and not padding and recognise(graph, mask, names).form
    if known.form is None:
        return known, 'causal under padding="right"' if would else "no kernel computes this without a mask"
    return known, ""


def repeats_for(home: Home, query: fx.Node) -> str:
    """Why grouped keys stay repeated: the other kernels would give way to one that holds all scores at once. Empty
    where there is a fast kernel that takes them."""
    dtype, width = query.meta["val"].dtype, sizes(query)[-1]
    if home.device.type == "cuda" and dtype not in HALF:
        return f"the kernel for grouped keys takes 16 bits, not {dtype}"
    if home.device.type == "cuda" and not (isinstance(width, int) and width <= WIDEST):
        return f"the kernel for grouped keys takes up to {WIDEST} a head, not {width}"
    return ""


def group_keys(graph: fx.Graph) -> int:
    """Pass keys and values to every attention as they are before they are repeated for the queries, in place. Returns
    to how many."""
    count = 0
    for node in attentions(graph).values():
        arguments = bound(node)
        (key, repeats), (value, also) = (repeated(arguments[which]) for which in ("key", "value"))
        if repeats == also != 1:
            call(node, arguments | {"key": key, "value": value, "enable_gqa": True})
            count += 1
    eliminate_dead_code(graph)
    return count


def call(node: fx.Node, arguments: Mapping[str, Any]) -> None:
    node.args = tuple(arguments[name] for name in ARGUMENTS)
    node.kwargs = {name: value for name, value in arguments.items() if name not in ARGUMENTS}
