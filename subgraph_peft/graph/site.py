"""A site: one weight parameter, or a place, where a method can rewrite a graph; with every use of it."""

import math
from dataclasses import dataclass, replace

import torch

from .layout import MATRIX, Layout

VECTORS = ("bias", "scale")
PLACES = ("module", "attention")


@dataclass(frozen=True)
class Call:
    """One use of a weight: the node, its op form, its operator."""

    node: str
    form: str
    operator: str


@dataclass(frozen=True)
class Site:
    """One weight parameter.

    name:    qualified name of the parameter         owner:  path of the module that holds it
    kind:    op form: linear, addmm ([in,out], as transformers' Conv1D), matmul, einsum (any contraction, bmm too),
             grouped_mm (stacked experts), conv1d … conv3d, conv_transpose1d … 3d, embedding, packed (attention
             in_proj); lstm, gru, …, which take the weight as a whole; sequence (the table that embeds the main input,
             as the place where the sequence begins), bias, scale (another vector), other. Not a parameter but a place:
             module, attention
    shape:   as stored                               layout: which of its dimensions are rows and columns of W
    calls:   every use in the graph                  bias:   name of the bias added at every call, if one
    ties:    other names of the same tensor          head:   its result is an output of the model
    groups:  of a convolution                        blocks: (name, start, stop) of the row blocks of a fused weight
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    calls: tuple[Call, ...]
    bias: str | None = None
    ties: tuple[str, ...] = ()
    head: bool = False
    groups: int = 1
    layout: Layout = MATRIX
    blocks: tuple[tuple[str, int, int], ...] = ()

    @property
    def owner(self) -> str:
        """Path of the module that holds the parameter; a place is its own."""
        return self.name if self.kind in PLACES else self.name.rpartition(".")[0]

    @property
    def out_features(self) -> int:
        return self.layout.rows(self.shape) if len(self.shape) > 1 else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix W [out, in]; for a convolution in_channels/groups · kernel size."""
        return self.layout.columns(self.shape) if len(self.shape) > 1 else 1

    @property
    def stack(self) -> int:
        """How many matrices the parameter holds (experts); 0 where it is one."""
        return 0 if self.layout.stack is None else self.shape[self.layout.stack]

    @property
    def kernel(self) -> tuple[int, ...]:
        """Sizes of a convolution's kernel."""
        return self.shape[2:] if self.kind.startswith("conv") else ()

    def part(self, name: str, rows: int) -> "Site":
        """Some rows of the matrix, as a site of their own."""
        inner = self.kernel and (self.in_features // math.prod(self.kernel), *self.kernel)
        shape = (rows, *(inner or (self.in_features,)))
        layout = Layout((0,), tuple(range(1, len(shape))))
        return replace(self, name=f"{self.name}[{name}]", shape=shape, layout=layout, blocks=())

    @property
    def entry(self) -> "Site":
        """One matrix of a stack; the site itself where there is none."""
        if not self.stack:
            return self
        return replace(self, shape=(self.out_features, self.in_features), layout=MATRIX)

    @property
    def layout_text(self) -> str:
        """`[out, in]`, `[in, out]`, `[out, in, kh, kw]`, …"""
        if len(self.shape) == 1:
            return "[out]" if self.kind == "bias" else "[features]"
        if self.kind == "attention":
            return "[heads, width]"
        named = self.layout.text(("out", "vocabulary") if self.kind in ("embedding", "sequence") else ("out", "in"))
        if self.kernel:
            sizes = {1: "k", 2: "kh, kw", 3: "kt, kh, kw"}[len(self.kernel)]
            return f"[{', '.join(named.strip('[]').split(', ')[:2])}, {sizes}]"
        return named

    @property
    def reserved(self) -> str | None:
        """Why a wildcard does not select this site."""
        if self.head:
            return "output head: name it to include it"
        if self.kind in ("embedding", "other", "module"):
            return f"{self.kind}: name it to include it"
        return None

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored tensor as the matrix W [out, in], or [stack, out, in] (a view where strides allow)."""
        return self.layout.matrix(stored) if stored.ndim > 1 else stored

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix W in the layout of the parameter."""
        return self.layout.stored(matrix, self.shape)
