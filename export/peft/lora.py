"""LoRA and DoRA in peft's layout."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.passes import DoRA, LoRA, PiSSA, RsLoRA
from subgraph_peft.program.program import Program

from ..pieces import Piece, number
from .folder import FolderContents
from .form import Keys, ModuleForm, one
from .options import ABOUT, CONVERT, ModuleOptions
from .targets import pattern_of

CONVOLUTIONS = ("conv1d", "conv2d")
# starting values that leave the base as it is, and all of them in the file
STARTS = (True, False, "gaussian", "eva", "orthogonal")


class LoRAOptions(ModuleOptions):
    """LoraConfig."""

    ignored: ClassVar[frozenset[str]] = ABOUT | {"megatron_core", "qalora_group_size", "runtime_config", "eva_config"}
    refused: ClassVar[Mapping[str, str]] = {
        **ModuleOptions.refused,
        "megatron_config": "parallel layers of Megatron are not adapted; gather the weights into plain layers",
        "loftq_config": CONVERT,
        "corda_config": CONVERT,
        "lora_ga_config": CONVERT,
        "lora_bias": "B has no bias here; merge it in peft (merge_and_unload)",
        "alora_invocation_tokens": "the adapter acts on all tokens here; use it in peft",
        "use_qalora": "inputs are not pooled; use it in peft, or merge it there",
        "use_bdlora": "block-diagonal factors are not known; merge it in peft",
        "ensure_weight_tying": "one adapter at two tied weights is not known; merge it in peft",
        "arrow_config": "adapters are not routed; load one of them",
    }

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    bias: Literal["none", "all", "lora_only"] = "none"
    use_rslora: bool = False
    use_dora: bool = False
    init_lora_weights: bool | str = True
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None

    def problems(self) -> list[str]:
        start, found = self.init_lora_weights, super().problems()
        if isinstance(start, str) and start.startswith("pissa_niter_"):
            found.append(
                f"init_lora_weights = {start!r}: the residual hangs on random numbers that peft drew and did not save; "
                "save it in peft with path_initial_model_for_weight_conversion, as a plain LoRA of twice the rank"
            )
        elif start == "pissa" and self.use_dora:
            found.append("use_dora beside init_lora_weights = 'pissa': the magnitude is that of a residual; convert it")
        elif start == "pissa" and self.lora_dropout:
            found.append("lora_dropout beside init_lora_weights = 'pissa': PiSSA drops nothing; set it to 0")
        elif start not in (*STARTS, "pissa"):
            found.append(f"init_lora_weights = {start!r}: {CONVERT}")
        return found

    def patterns(self) -> list[tuple[str, str]]:
        named = [(key, name) for key in ("rank_pattern", "alpha_pattern") for name in getattr(self, key) or {}]
        return [*super().patterns(), *named]


class LoRAForm(ModuleForm):
    """lora_A, lora_B and, for DoRA, lora_magnitude_vector; the ranks and scales of single modules are patterns."""

    peft_type = "LORA"
    options = LoRAOptions
    kinds = ("linear", "addmm", "embedding", *CONVOLUTIONS)
    only = "lora_only"

    def takes(self, method: Method) -> bool:
        inner = method.of if isinstance(method, DoRA) else method
        return type(inner) in (LoRA, RsLoRA)

    def methods(self, options: LoRAOptions, sites: Sequence[Site]) -> list[Method]:
        return [self.method(options, site) for site in sites]

    def method(self, options: LoRAOptions, site: Site) -> Method:
        r = matched(options.rank_pattern, site.owner, options.r)
        alpha = matched(options.alpha_pattern, site.owner, options.lora_alpha)
        if options.init_lora_weights == "pissa":
            s = alpha / (r**0.5 if options.use_rslora else r)
            return PiSSA(r=r, alpha=s * r if options.use_rslora else alpha)
        method = (RsLoRA if options.use_rslora else LoRA)(r=r, alpha=alpha, dropout=options.lora_dropout)
        return DoRA(of=method) if options.use_dora else method

    def layout(self, captured: Program, options: LoRAOptions, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        layout = super().layout(captured, options, tensors)
        return layout if options.init_lora_weights != "pissa" else replace(layout, computed=starts(captured, layout))

    def keys(self, site: Site, method: Method) -> Keys:
        r = (method.of if isinstance(method, DoRA) else method).r
        size_in, out = site.in_features, site.out_features
        if site.kind == "embedding":
            found = {"A": ("lora_embedding_A", (r, size_in)), "B": ("lora_embedding_B", (out, r))}
        elif site.kind in CONVOLUTIONS:
            ones = (1,) * len(site.shape[2:])
            found = {"A": ("lora_A.weight", (r, *site.shape[1:])), "B": ("lora_B.weight", (out, r, *ones))}
        else:
            found = {"A": ("lora_A.weight", (r, size_in)), "B": ("lora_B.weight", (out, r))}
        if isinstance(method, DoRA):
            ones = (1,) * len(site.shape[2:])
            found["m"] = ("lora_magnitude_vector", (1, out, *ones) if ones else (out,))
        return found

    def config(self, captured: Program, pieces: Sequence[Piece]) -> dict[str, Any]:
        def inner(method: Method) -> LoRA:
            return method.of if isinstance(method, DoRA) else method

        owners = [piece.site.owner for piece in pieces]
        r, ranks = common(owners, [inner(piece.method).r for piece in pieces])
        alpha, alphas = common(owners, [number(inner(piece.method).alpha) for piece in pieces])
        return {
            "r": r,
            "lora_alpha": alpha,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "lora_dropout": one("lora_dropout", pieces, lambda method: inner(method).dropout),
            "use_rslora": one("use_rslora", pieces, lambda method: isinstance(inner(method), RsLoRA)),
            "use_dora": one("use_dora", pieces, lambda method: isinstance(method, DoRA)),
            "init_lora_weights": True,
            "bias": "none",
        }


def matched(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    key = pattern_of(patterns or {}, module)
    return default if key is None else patterns[key]


def common(owners: Sequence[str], values: Sequence[Any]) -> tuple[Any, dict[str, Any]]:
    """(the most frequent value, the others by module, as a pattern anchored at the start)"""
    usual = Counter(values).most_common(1)[0][0]
    return usual, {f"^{owner}": value for owner, value in zip(owners, values, strict=True) if value != usual}


@torch.no_grad()
def starts(captured: Program, layout: FolderContents) -> dict[str, torch.Tensor]:
    """A₀ and B₀ as peft computes them when it loads the folder on the original weights: the r largest singular triplets
    of W in float32, by the same operators."""
    (adapter,) = layout.adapters
    found = {}
    for site in adapter.sites:
        method = adapter.at(site)
        if site.kind not in ("linear", "addmm") or method.r > min(site.out_features, site.in_features):
            raise MethodError(
                f"init_lora_weights = 'pissa' at {site.name} ({site.kind}): peft has it for linear layers."
            )
        W = site.matrix(captured.module.get_parameter(site.name).detach()).float()
        V, S, Uh = torch.linalg.svd(W, full_matrices=False)
        root = torch.diag(torch.sqrt(S[: method.r] / method.s))
        found[adapter.path(site, "A0")] = root @ Uh[: method.r]
        found[adapter.path(site, "B0")] = V[:, : method.r] @ root
    return found
