"""Attention as its fast kernels take it: `is_causal` or no mask in place of a mask, grouped keys as they are.

A captured graph computes every mask in full and repeats grouped keys and values for all queries. The graph that runs
calls attention without them where nothing changes by it, or where right padding has been promised, which is checked.
Rewrites, folding and export see the captured graph.
"""

import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import fx

from .attention import attentions, bound, repeated
from .entry import MASK, sizes
from .errors import CaptureError, CaptureWarning
from .graphs import aten, clone, sweep

if TYPE_CHECKING:
    from .masks import Mask
    from .module import Home
    from .program import Program

Padding = Literal["right"]
ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
HALF, WIDEST = (torch.float16, torch.bfloat16), 256  # what the kernel of CUDA that takes grouped keys takes
BROKEN = "attention_mask is not padded on the right: every row has to be ones and then zeros"


@dataclass(frozen=True)
class Call:
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


class Kernels(tuple[Call, ...]):
    """The attention calls of a program; prints as a table."""

    def __str__(self) -> str:
        from .tables import fill, grouped, new_table, render

        table = new_table(f"{len(self)} attention calls", ("module", ">calls", "kernel", "keys", "mask", "why"))
        fill(table, grouped(map(row, self)))
        return render(table)


def row(call: Call) -> tuple[str, ...]:
    promise = (f"{name} is padded on the right" for name in sorted(call.promise))
    why = "; ".join((*promise, *filter(None, [call.why])))
    return call.name, call.kernel, "grouped" if call.grouped else "", call.mask, why


def kernels(program: "Program") -> Kernels:
    """Which kernel every attention of a program gets, and why."""
    module = program.module
    return Kernels(choose(clone(module.graph)[0], module.home, module.padding))


def promise(program: "Program", padding: Padding | None) -> "Program":
    """See `Program.promise`."""
    if padding not in (None, "right"):
        raise CaptureError(f'padding is "right" or None, not {padding!r}.')
    if padding == program.module.padding:
        return program
    if padding and not padding_masks(program.graph):
        names = ", ".join(node.name for node in program.graph.find_nodes(op="placeholder"))
        raise CaptureError(f"{program.source} has no attention_mask [batch, length] to promise anything of ({names}).")
    module = copy.deepcopy(program.module, {id(tensor): tensor for _, tensor in program.module.tensors()})
    module.padding = padding
    module.make_runners()
    promised = replace(program, module=module)
    if padding and not any(call.promise for call in kernels(promised)):
        warnings.warn(
            f'padding="{padding}" changes no attention of {program.source}; sp.kernels(program) says why.',
            CaptureWarning,
            stacklevel=4,
        )
    return promised


def accelerate(graph: fx.Graph, home: "Home", padding: Padding | None) -> None:
    """Give every attention its kernel, check what that takes for granted before anything is computed, remove what
    nothing reads any more. In place."""
    checked = {name for call in choose(graph, home, padding) for name in call.promise}
    inputs = graph.find_nodes(op="placeholder")
    with graph.inserting_before(inputs[-1].next if inputs else None):
        for node in inputs:
            if node.name in checked:
                graph.call_function(check_right, (node,))
    sweep(graph)


def choose(graph: fx.Graph, home: "Home", padding: Padding | None) -> Iterator[Call]:
    """Change every attention of a graph that is to run at `home`, in place, one after the other."""
    from .masks import Mask

    masks: dict[fx.Node, tuple[Mask, str]] = {}
    for name, node in attentions(graph).items():
        arguments = bound(node)
        mask, why = arguments["attn_mask"], ""
        if mask is None:
            known = Mask("causal", "is_causal") if arguments["is_causal"] else Mask("all", "none")
        else:
            if mask not in masks:
                masks[mask] = read(graph, mask, padding)
            known, why = masks[mask]
            if known.form == "causal" and str(sizes(node.args[0])[-2]) != str(sizes(node.args[1])[-2]):
                known, why = replace(known, form=None), "other queries than keys"
        if known.form is None:
            yield Call(name, known.formula, "mask", bool(arguments.get("enable_gqa")), why)
            continue
        causal = known.form == "causal"
        arguments |= {"attn_mask": None, "is_causal": causal}
        (key, repeats), (value, also) = (repeated(arguments[which]) for which in ("key", "value"))
        if repeats == also != 1:
            why = repeats_for(home, node.args[0])
            arguments |= {} if why else {"key": key, "value": value, "enable_gqa": True}
        call(node, arguments)
        grouped = bool(arguments.get("enable_gqa"))
        yield Call(name, known.formula, "is_causal" if causal else "no mask", grouped, why, known.promise)


def read(graph: fx.Graph, mask: fx.Node, padding: Padding | None) -> tuple["Mask", str]:
    """The mask, and which promise would make it a causal one."""
    from .masks import recognise

    names = frozenset(map(str, padding_masks(graph)))
    known = recognise(graph, mask, names if padding else frozenset())
    would = known.form is None and not padding and recognise(graph, mask, names).form
    if known.form is None:
        return known, 'causal under padding="right"' if would else "no kernel computes this without a mask"
    return known, ""


def padding_masks(graph: fx.Graph) -> list[fx.Node]:
    """The inputs [batch, length] that tell tokens from padding."""
    named = (n for n in graph.find_nodes(op="placeholder") if n.name == MASK or n.name.endswith(f"_{MASK}"))
    return [node for node in named if len(sizes(node)) == 2 and not node.meta["val"].is_floating_point()]


def repeats_for(home: "Home", query: fx.Node) -> str:
    """Why grouped keys stay repeated: the other kernels would give way to one that holds all scores at once. Empty
    where there is a fast kernel that takes them."""
    dtype, width = query.meta["val"].dtype, sizes(query)[-1]
    if home.device.type == "cuda" and dtype not in HALF:
        return f"the kernel for grouped keys takes 16 bits, not {dtype}"
    if home.device.type == "cuda" and not (isinstance(width, int) and width <= WIDEST):
        return f"the kernel for grouped keys takes up to {WIDEST} a head, not {width}"
    return ""


def call(node: fx.Node, arguments: Mapping[str, Any]) -> None:
    node.args = tuple(arguments[name] for name in ARGUMENTS)
    node.kwargs = {name: value for name, value in arguments.items() if name not in ARGUMENTS}


def check_right(mask: torch.Tensor) -> None:
    """Raises CaptureError where a row of `mask` [batch, length] is not ones and then zeros.

    Compiled code cannot look at values before it goes on: there the device asserts it, and the error is a RuntimeError.
    """
    right = ((mask == 0) | (mask == 1)).all() & (mask[:, 1:] <= mask[:, :-1]).all()
    if torch.compiler.is_compiling():
        aten._assert_async.msg(right, BROKEN)
    elif not mask.is_meta and not right:
        raise CaptureError(
            f'{BROKEN}, as padding="right" promises. Pad on the right, or take the promise back: program.promise(None).'
        )
