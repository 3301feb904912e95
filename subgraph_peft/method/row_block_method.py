"""A method at some row blocks of a fused weight."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from ..base.errors import MethodError, suggestion
from ..graph.site import Site
from .method import Layer, Method, Wrapper
from .tensors import Tensor


class RowBlocks(Wrapper):
    """φ(W) = [φ_of(W_q); W_k; φ_of(W_v)] for a packed W = [W_q; W_k; W_v]

    A weight method at chosen row blocks of a packed weight, each with tensors of its own: what a selector `…qkv[q,v]`
    stands for. `names` are the blocks in order, `sizes` their rows (default: all equal), `only` those to rewrite.
    """

    name: ClassVar[str] = "blocks"
    family: ClassVar[str] = "framework"

    only: tuple[str, ...] = Field(("q", "v"), description="blocks that the method rewrites")
    names: tuple[str, ...] = Field(("q", "k", "v"), description="of the blocks, in the order of the rows")
    sizes: tuple[PositiveInt, ...] | None = Field(None, description="rows of each block; all equal by default")

    def model_post_init(self, context: object) -> None:
        super().model_post_init(context)
        for name in self.only:
            if name not in self.names:
                raise MethodError(
                    f"blocks: there is no block {name!r}.{suggestion(name, self.names)} "
                    f"Blocks: {', '.join(self.names)}."
                )
        hidden = any(a.endswith(f"_{b}") for a in self.names for b in self.names)
        counted = self.sizes is None or len(self.sizes) == len(self.names)
        if not self.only or hidden or not counted or len(set(self.names)) < len(self.names):
            raise MethodError(
                "blocks: `only` names at least one block, `names` are distinct and none ends in _ and another, `sizes` "
                "gives one number a name."
            )

    def rows(self, out_features: int) -> Iterator[tuple[str, slice]]:
        """(block, its rows)"""
        count = len(self.names)
        sizes = self.sizes or (out_features // count,) * count
        if sum(sizes) != out_features:
            raise MethodError(f"blocks: {out_features} rows are not {' + '.join(map(str, sizes))}; give `sizes`.")
        start = 0
        for name, size in zip(self.names, sizes, strict=True):
            yield name, slice(start, start := start + size)

    def chosen(self, site: Site) -> Iterator[tuple[str, slice, Site]]:
        """(block, its rows, the block as a site)"""
        for name, rows in self.rows(site.out_features):
            if name in self.only:
                yield name, rows, site.part(name, rows.stop - rows.start)

    def layers_at(self, site: Site) -> list[Layer]:
        found = Method.layers_at(self, site)
        for name, rows, block in self.chosen(site):
            for layer in self.of.layers_at(block):
                names = {inner: f"{outer}_{name}" for inner, outer in layer.names.items()}
                found.append(replace(layer, names=names, rows=(rows, *layer.rows)))
        return found

    def tensors(self, site: Site) -> dict[str, Tensor]:
        return {f"{t}_{name}": v for name, _, block in self.chosen(site) for t, v in self.of.tensors(block).items()}

    def shared(self, sites: Sequence[Site]) -> dict[str, Tensor]:
        return self.of.shared([block for site in sites for _, _, block in self.chosen(site)])

    @property
    def reads_weight(self) -> bool:
        return self.of.reads_weight

    def prepare(self, site: Site, W: torch.Tensor) -> dict[str, torch.Tensor]:
        found = ((name, self.of.prepare(block, W[rows])) for name, rows, block in self.chosen(site))
        return {f"{t}_{name}": value for name, values in found for t, value in values.items()}

    def weight(self, W: torch.Tensor, **tensors: torch.Tensor) -> torch.Tensor:
        shared = {t: v for t, v in tensors.items() if not t.endswith(tuple(f"_{name}" for name in self.only))}
        parts = []
        for name, rows in self.rows(W.shape[0]):
            own = {t.removesuffix(f"_{name}"): v for t, v in tensors.items() if t.endswith(f"_{name}")}
            parts.append(
                self.of.evaluate("weight", W[rows], tensors={**shared, **own}) if name in self.only else W[rows]
            )
        return torch.cat(parts)
