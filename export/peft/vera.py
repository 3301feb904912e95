"""VeRA in peft's layout."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.passes import VeRA
from subgraph_peft.program.program import Program

from ..pieces import Piece
from .folder import WRAPPER
from .form import Keys, ModuleForm, one
from .options import ABOUT, ModuleOptions


class VeRAOptions(ModuleOptions):
    """VeraConfig."""

    ignored: ClassVar[frozenset[str]] = ABOUT | {"init_weights"}

    r: int = 256
    projection_prng_key: int = 0
    save_projection: bool = True
    vera_dropout: float = 0.0
    d_initial: float = 0.1
    bias: Literal["none", "all", "vera_only"] = "none"


class VeRAForm(ModuleForm):
    """vera_lambda_b and vera_lambda_d at every module; vera_A and vera_B once, unless the seed alone is kept."""

    peft_type = "VERA"
    options = VeRAOptions
    only = "vera_only"

    def takes(self, method: Method) -> bool:
        return type(method) is VeRA

    def methods(self, options: VeRAOptions, sites: Sequence[Site]) -> list[Method]:
        method = VeRA(
            r=options.r, d_initial=options.d_initial, projection_seed=options.projection_prng_key,
            save_projections=options.save_projection, dropout=options.vera_dropout,
        )  # fmt: skip
        return [method] * len(sites)

    def keys(self, site: Site, method: VeRA) -> Keys:
        return {"b": ("vera_lambda_b", (site.out_features,)), "d": ("vera_lambda_d", (method.r,))}

    def shared_keys(self, method: VeRA, shapes: Mapping[str, tuple[int, ...]]) -> Keys:
        if not method.save_projections:
            return {}
        return {name: (f"{WRAPPER}vera_{name}", shape) for name, shape in shapes.items()}

    def config(self, captured: Program, pieces: Sequence[Piece]) -> dict[str, Any]:
        method = one("the method", pieces, lambda method: method)
        if len({piece.adapter for piece in pieces}) > 1:
            raise MethodError(
                "Two VeRA adapters have projections of their own; a peft folder has one pair. Save them apart."
            )
        return {
            "r": method.r,
            "d_initial": method.d_initial,
            "projection_prng_key": method.projection_seed,
            "save_projection": method.save_projections,
            "vera_dropout": method.dropout,
            "bias": "none",
        }
