"""(IA)³ in peft's layout."""

import re
from collections.abc import Sequence
from typing import Any, ClassVar

from subgraph_peft.graph.site import Site
from subgraph_peft.method.method import Method
from subgraph_peft.passes import IA3
from subgraph_peft.program.program import Program

from ..pieces import Piece
from .form import Keys, ModuleForm
from .options import ABOUT, ModuleOptions
from .targets import exactly, shortest


class IA3Options(ModuleOptions):
    """IA3Config. Modules among `feedforward_modules` scale their input, the others their result."""

    ignored: ClassVar[frozenset[str]] = ABOUT | {"init_ia3_weights"}

    feedforward_modules: list[str] | str | None = None

    def problems(self) -> list[str]:
        missing = "feedforward_modules is missing: name them, or []; peft's defaults by architecture are not looked up"
        return [*super().problems(), *([missing] if self.feedforward_modules is None else [])]

    def patterns(self) -> list[tuple[str, str]]:
        named = self.feedforward_modules
        return [*super().patterns(), *([("feedforward_modules", named)] if isinstance(named, str) else [])]

    def feedforward(self, module: str) -> bool:
        """peft's rule: an ending of any kind, not of whole names."""
        named = self.feedforward_modules
        return bool(re.fullmatch(named, module)) if isinstance(named, str) else module.endswith(tuple(named))


class IA3Form(ModuleForm):
    """ia3_l, a column where it scales the result and a row where it scales the input."""

    peft_type = "IA3"
    options = IA3Options
    kinds = ("linear", "addmm", "conv2d")

    def takes(self, method: Method) -> bool:
        return isinstance(method, IA3)

    def obstacle(self, site: Site, method: IA3) -> str | None:
        if method.scale == "weight" and site.bias:
            return "scales the weight and not the bias, which peft's (IA)³ scales too"
        if method.scale == "input" and site.kind == "conv2d" and site.in_features != site.shape[1] * site.groups:
            return "scales every element of a kernel, where peft's (IA)³ scales input channels"
        return super().obstacle(site, method) if site.kind not in self.kinds or method.scale == "input" else None

    def methods(self, options: IA3Options, sites: Sequence[Site]) -> list[Method]:
        return [IA3(scale="input" if options.feedforward(site.owner) else "output") for site in sites]

    def keys(self, site: Site, method: IA3) -> Keys:
        inputs = method.scale == "input"
        size = site.in_features if inputs else site.out_features
        if site.kind == "conv2d":
            return {"l": ("ia3_l", (1, size, 1, 1))}
        return {"l": ("ia3_l", (1, size) if inputs else (size, 1))}

    def config(self, captured: Program, pieces: Sequence[Piece]) -> dict[str, Any]:
        inputs = [piece.site.owner for piece in pieces if piece.method.scale == "input"]
        outputs = [piece.site.owner for piece in pieces if piece.method.scale != "input"]
        first, second = (shortest(owners, captured) if owners else [] for owners in (inputs, outputs))
        expressions = isinstance(first, str) or isinstance(second, str)
        if expressions or any(owner.endswith(tuple(first)) for owner in outputs):
            return {"target_modules": exactly([*inputs, *outputs]), "feedforward_modules": exactly(inputs)}
        return {"target_modules": [*first, *second], "feedforward_modules": first}
