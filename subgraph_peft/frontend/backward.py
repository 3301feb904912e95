"""Backward passes by hand: torch.export keeps the forward of a torch.autograd.Function and differentiates that."""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..base.borrowed import pytree
from ..base.compare import difference
from ..base.errors import CaptureError, CaptureWarning
from ..base.patches import watched
from ..graph.signature import export_arguments
from ..program.checkpointing import uncheckpointed
from ..program.program import Program
from .contexts import prepared, seeded, unwritten

BOUND = 1e-3  # on the difference of gradients, relative to the largest of a parameter


def check_backward(
    program: Program, model: nn.Module, inputs: Mapping[str, Any], functions: set[str], verify: bool
) -> None:
    """Compare the gradients of parameters, in training, where the model has backward passes by hand. Raises
    CaptureError where they differ; warns where they cannot be compared, or the model has none."""
    if not functions:
        return
    what = f"{type(model).__name__} uses {', '.join(sorted(functions))}, whose own backward the captured graph has not"
    names = [name for name, p in model.named_parameters() if p.is_floating_point()]
    expected = actual = None
    if verify and program.home.device.type != "meta":
        with prepared(model, training=True), prepared(program.module, training=True), uncheckpointed(model), watched():
            expected, actual = (gradients(module, names, inputs) for module in (model, program.module))
    if expected is None:
        warnings.warn(f"{what}: gradients are those of its forward.", CaptureWarning, stacklevel=3)
        return
    for name, *both in zip(names, expected, actual or map(torch.zeros_like, expected), strict=True):
        if not (error := difference(*both)) <= BOUND:
            raise CaptureError(
                f"{what}: the gradient of {name} differs by {error:.0e} of its largest. Write it with operators that "
                "autograd differentiates to the same: a straight-through estimate is x + (f(x) - x).detach()."
            )


def gradients(module: nn.Module, names: Sequence[str], inputs: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """Of the mean square of the outputs, one a named parameter, zeros where there is none; None where no output hangs
    on any of them."""
    held = dict(module.named_parameters(remove_duplicate=False))
    free = {name: held[name].detach().clone().requires_grad_() for name in names}
    args, kwargs = export_arguments(module.forward, pytree.tree_map_only(torch.Tensor, torch.clone, dict(inputs)))
    device = next((p.device for p in free.values()), torch.device("cpu"))
    with torch.enable_grad(), seeded(device), unwritten(module):
        leaves = pytree.tree_leaves(torch.func.functional_call(module, free, args, kwargs))
        losses = [t.square().mean() for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
        if not free or not losses:
            return None
        found = torch.autograd.grad(sum(losses), list(free.values()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(free.values(), found, strict=True)]
