"""Gradient checkpointing: blocks keep their inputs for the backward pass and compute the rest again."""

import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

from ..base.borrowed import OpOverload, checkpoint_options, checkpointed_layers
from ..base.errors import CaptureError, CaptureWarning, SelectorError
from ..graph import nodes, operators
from ..graph.partition import chosen, cut, regions
from .internals import Checkpointing, internals
from .runners import renew


class Checkpointed(nn.Module):
    """Gradient checkpointing under the names by which transformers.Trainer switches it."""

    def gradient_checkpointing_enable(
        self,
        where: str | Sequence[str] | None = None,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """Compute the activations within blocks again in the backward pass, in train mode.

        Outputs and gradients stay the same bit for bit, those of dropout included.

        where:  patterns over module paths; by default the repeated layers. It replaces an earlier choice
        gradient_checkpointing_kwargs: options of torch.utils.checkpoint.checkpoint, such as preserve_rng_state
        every_n_layers: only the first of every n blocks

        Raises SelectorError where a pattern matches no module, CaptureError for a block that cannot be computed twice.
        """
        options = dict(gradient_checkpointing_kwargs or {})
        if options.pop("use_reentrant", False):
            raise CaptureError("Checkpointing of a graph is not reentrant: pass use_reentrant=False, or leave it out.")
        if offload:
            raise CaptureError(
                "Activations of a graph are not offloaded by checkpointing: leave out offload, and call the module "
                "under torch.autograd.graph.save_on_cpu."
            )
        checkpoint_blocks(self, where, options, every_n_layers)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        checkpoint_nothing(self)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: Mapping[str, Any] | None = None, **options: Any
    ) -> None:
        """`gradient_checkpointing_enable` under the name that transformers gave it in 5.2x."""
        self.gradient_checkpointing_enable(gradient_checkpointing_kwargs=activation_checkpointing_kwargs, **options)

    def activation_checkpointing_disable(self) -> None:
        checkpoint_nothing(self)

    @property
    def is_gradient_checkpointing(self) -> bool:
        return internals(self).checkpointing is not None


def checkpoint_blocks(
    module: nn.Module, where: str | Sequence[str] | None, options: Mapping[str, Any], every_n_layers: int = 1
) -> None:
    """See `Checkpointed.gradient_checkpointing_enable`."""
    own = internals(module)
    paths = chosen(own.graph, where)[::every_n_layers]
    check_twice(own.graph, paths)
    former, own.checkpointing = own.checkpointing, Checkpointing(paths, options)
    try:
        renew(module)
    except CaptureError:
        own.checkpointing = former
        renew(module)
        raise


def checkpoint_nothing(module: nn.Module) -> None:
    internals(module).checkpointing = None
    renew(module)


@contextmanager
def uncheckpointed(model: nn.Module) -> Iterator[None]:
    """The layers of the model that transformers checkpoints without it, so that none of it is traced; restored
    afterwards."""
    on = checkpointed_layers(model)
    try:
        for layer in on.values():
            layer.gradient_checkpointing = False
        yield
    finally:
        for layer in on.values():
            layer.gradient_checkpointing = True


def keep_checkpointing(module: nn.Module, model: nn.Module, calls: Collection[str]) -> None:
    """Checkpoint the layers of a captured module that transformers checkpoints in the model. Warns where it cannot, and
    of `calls` of torch.utils.checkpoint that the model makes itself."""
    name = type(model).__name__
    if calls:
        message = (
            f"{name} calls torch.utils.checkpoint itself ({', '.join(sorted(calls))}), which is not part of the graph: "
            "it keeps all activations. module.gradient_checkpointing_enable(where=[…]) switches it by module path."
        )
        warnings.warn(message, CaptureWarning, stacklevel=3)
    if not (on := checkpointed_layers(model)):
        return
    known = regions(internals(module).graph)
    try:
        if not (layers := [f"exact:{path}" for path in on if path in known]):
            raise SelectorError(f"the graph has none of its layers {', '.join(on)}.")
        checkpoint_blocks(module, layers, checkpoint_options(on.values()))
    except (CaptureError, SelectorError) as error:
        message = f"Gradient checkpointing of {name} is off in the captured module: {error}"
        warnings.warn(message, CaptureWarning, stacklevel=3)


def check_twice(graph: fx.Graph, paths: Sequence[str]) -> None:
    """Raises CaptureError where a block writes to a tensor, which a second computation would write again."""
    for piece in cut(graph, paths, "train"):
        for node in piece.graph.nodes if piece.path else ():
            if updates(node):
                raise CaptureError(
                    f"{piece.path} cannot be checkpointed: {node.name} updates a buffer, and would do so twice a step. "
                    "Choose blocks without it (where=…)."
                )


def updates(node: fx.Node) -> bool:
    """Whether a node of a block writes to something that lives outside of the block."""
    if isinstance(node.target, OpOverload) and "running_mean" in operators.schema(node.target):
        mode = nodes.mode_argument(node)
        return mode is not None and bool(operators.argument(node, mode))
    return any(nodes.viewed(target).op != "call_function" for target in nodes.written_arguments(node))
