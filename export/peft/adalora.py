"""AdaLoRA in peft's layout."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch

from subgraph_peft.base.errors import CheckpointError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.passes import AdaLoRA
from subgraph_peft.program.program import Program

from ..pieces import Piece, number
from .folder import MODULES, FolderContents, Slot
from .form import Keys, ModuleForm, one
from .lora import LoRAOptions

# our option -> peft's
NAMES = {
    "r": "init_r", "target_r": "target_r", "warmup": "tinit", "final": "tfinal", "interval": "deltaT", "beta1": "beta1",
    "beta2": "beta2", "orthogonal": "orth_reg_weight", "dropout": "lora_dropout",
}  # fmt: skip


class AdaLoRAOptions(LoRAOptions):
    """AdaLoraConfig. `r` and `total_step` say nothing about the adapter's function."""

    ignored: ClassVar[frozenset[str]] = LoRAOptions.ignored | {"total_step", "alpha_pattern"}

    init_r: int = 12
    target_r: int = 8
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    rank_pattern: dict[str, list[bool]] | None = None


class AdaLoRAForm(ModuleForm):
    """lora_A, lora_B, lora_E without `.weight`. A folder that peft pruned lacks the triplets that rank_pattern marks as
    gone; they come back as zeros, so that s = α/(r + 10⁻⁵) keeps the first r."""

    peft_type = "ADALORA"
    options = AdaLoRAOptions
    kinds = ("linear", "addmm", "conv2d")
    only = "lora_only"

    def takes(self, method: Method) -> bool:
        return type(method) is AdaLoRA

    def methods(self, options: AdaLoRAOptions, sites: Sequence[Site]) -> list[Method]:
        named = {ours: getattr(options, theirs) for ours, theirs in NAMES.items()}
        alpha = options.lora_alpha if options.lora_alpha > 0 else options.init_r
        return [AdaLoRA(alpha=alpha, **named)] * len(sites)

    def keys(self, site: Site, method: AdaLoRA) -> Keys:
        r = method.r
        shapes = {"A": (r, site.in_features), "B": (site.out_features, r), "e": (r, 1)}
        return {name: (f"lora_{name.upper()}", shape) for name, shape in shapes.items()}

    def layout(self, captured: Program, options: AdaLoRAOptions, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        layout = super().layout(captured, options, tensors)
        slots, (adapter,) = dict(layout.slots), layout.adapters
        for site in adapter.sites:
            if (kept := kept_triplets(options, site.owner)) is not None:
                for name in ("A", "B", "e"):
                    path = adapter.path(site, name)
                    slots[path] = pruned(slots[path], kept, dim=1 if name == "B" else 0)
        return replace(layout, slots=slots)

    def config(self, captured: Program, pieces: Sequence[Piece]) -> dict[str, Any]:
        method = one("the method", pieces, lambda method: method)
        return {
            **{theirs: getattr(method, ours) for ours, theirs in NAMES.items()},
            "lora_alpha": number(method.alpha if method.alpha > 0 else method.r),
            "total_step": method.warmup + method.final + 1,  # peft wants one that leaves room to prune
            "rank_pattern": None,
            "init_lora_weights": True,
            "bias": "none",
        }


def kept_triplets(options: AdaLoRAOptions, module: str) -> torch.Tensor | None:
    """Which of the first r triplets the file still has, where it lacks some."""
    patterns = {name.partition(".lora_E")[0]: kept for name, kept in (options.rank_pattern or {}).items()}
    kept = torch.tensor(patterns.get(module.removeprefix(MODULES), []), dtype=torch.bool).flatten()
    if not len(kept) or kept.all():
        return None
    if len(kept) != options.init_r:
        raise CheckpointError(f"rank_pattern has {len(kept)} entries for {module}; init_r is {options.init_r}.")
    return kept


def pruned(slot: Slot, kept: torch.Tensor, dim: int) -> Slot:
    shape = tuple(int(kept.sum()) if d == dim else size for d, size in enumerate(slot.shape))
    return replace(slot, shape=shape, restore=spread(slot.shape, kept, dim))


def spread(shape: tuple[int, ...], kept: torch.Tensor, dim: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """The stored triplets at their places among zeros."""
    return lambda stored: stored.new_zeros(shape).index_copy(dim, kept.nonzero().flatten(), stored)
