"""Where a graph's loss compares labels: with the logits of their own position, or with those of the one before."""

import warnings

import torch
from torch import fx

from ..base.errors import TrainError, TrainWarning
from ..graph.nodes import backward_slice, evaluate_node
from ..graph.operators import Kind, argument, is_a
from .program import Program

IGNORED = -100
FIRST = 1_000_003  # the labels that stand for positions: no token of padding, whose label some models ignore


def label_shift(program: Program) -> int | None:
    """s, where the loss compares the logits at position t with the label at t + s; the least, where it has several.

    Read from the graph: the target of its cross entropy is computed with numbered positions for `labels`. Labels that
    are no sequences of class numbers are not shifted. None where the graph takes no labels; where its loss is no cross
    entropy of them, a TrainWarning says that they are taken as not shifted.
    """
    captured = program.captured
    labels = captured.example.get("labels")
    if not isinstance(labels, torch.Tensor):
        return None
    if labels.ndim < 2 or labels.is_floating_point() or labels.shape[1] < 2:
        return 0
    graph = captured.graph
    source = next((node for node in graph.find_nodes(op="placeholder") if node.name == "labels"), None)
    targets = [argument(node, "target") for node in graph.nodes if is_a(node, Kind.LOSS)]
    shifts = [shift_of(captured, source, target) for target in targets if source in backward_slice(target)]
    if not shifts or None in shifts:
        warnings.warn(
            f"The loss of {program.source} is no cross entropy of its labels or of a slice of them: what is a mean "
            "over labels counts every one of them.",
            TrainWarning,
            stacklevel=3,
        )
        return 0
    return min(shifts)


def shift_of(captured: Program, source: fx.Node, target: fx.Node) -> int | None:
    """The shift of a target that depends on the placeholder of the labels; None where it is no slice of them, or
    computed with them as class numbers."""
    example = captured.at_home(captured.example)
    labels = example["labels"]
    numbered = torch.arange(FIRST, FIRST + labels.numel(), device=labels.device, dtype=torch.int64).view(labels.shape)

    def read(node: fx.Node) -> torch.Tensor | None:
        if node is source:
            return numbered
        return example.get(node.name) if node.op == "placeholder" else tensors.get(str(node.target))

    tensors = dict(captured.tensors())
    try:
        with torch.no_grad():
            found = evaluate_node(target, read).flatten()
    except (IndexError, RuntimeError):  # of numbers that are no classes: it looks labels up, as `one_hot` does
        return None
    found = found[found != IGNORED]
    shift = int(found[0]) - FIRST if found.numel() else -1
    if not 0 <= shift < labels.shape[1] or not torch.equal(found, numbered[:, shift:].flatten()):
        return None
    return shift


def scored(labels: torch.Tensor, shift: int | None) -> torch.Tensor:
    """The labels that the loss is a mean over: without those it ignores, and without the first `shift` of a sequence.

    Raises TrainError for sequences where the shift is not known.
    """
    labels = shifted(labels, shift)
    return labels.flatten() if labels.is_floating_point() else labels[labels != IGNORED]


def shifted(labels: torch.Tensor, shift: int | None) -> torch.Tensor:
    """The labels that are compared. Raises TrainError for sequences where the shift is not known."""
    if labels.ndim < 2 or labels.is_floating_point():
        return labels
    if shift is None:
        raise TrainError(
            "Whether labels are compared with the logits of their own position or of the one before is read from the "
            "graph's loss, and the graph has none: capture the model with `labels` among its example inputs."
        )
    return labels[:, shift:]
