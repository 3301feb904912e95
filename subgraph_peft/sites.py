"""Sites: the weight parameters of a program, with every place that uses them."""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import fx

from .graphs import aten, flat_outputs, operator_name

if TYPE_CHECKING:
    from .program import Program

TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}
# operators through which a projection's result is still that projection's result
RESHAPES = {
    aten.view.default, aten.reshape.default, aten.to.dtype, aten.slice.Tensor, aten.contiguous.default,
    aten.squeeze.dim, aten.unsqueeze.default, aten.clone.default, aten.transpose.int, aten.select.int,
    aten._to_copy.default,
}  # fmt: skip


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
    kind:    op form: linear, addmm ([in,out], as transformers' Conv1D), matmul, conv1d, conv2d, embedding, packed
             (attention in_proj), sequence (the table that embeds the main input, as the place where the sequence
             begins), bias, scale (another vector), other. Not a parameter but a place: module, attention
    shape:   as stored                               bias:   name of the bias added at every call, if one
    calls:   every use in the graph                  ties:   other names of the same tensor
    head:    its result is an output of the model
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

    @property
    def owner(self) -> str:
        """Path of the module that holds the parameter; a place is its own."""
        return self.name if self.kind in PLACES else self.name.rpartition(".")[0]

    @property
    def transposed(self) -> bool:
        """Stored as [in, out]: the matrix W [out, in] is its transpose."""
        tables = ("embedding", "sequence")
        return self.kind in ("addmm", *tables) or any(call.form == "matmul_in_out" for call in self.calls)

    @property
    def out_features(self) -> int:
        return self.shape[-1] if self.transposed else self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the matrix W [out, in]; for a convolution in_channels/groups · kernel size."""
        return self.shape[0] if self.transposed else math.prod(self.shape[1:])

    @property
    def layout(self) -> str:
        named = {
            "embedding": "[vocabulary, out]",
            "sequence": "[vocabulary, out]",
            "attention": "[heads, width]",
            "conv2d": "[out, in, kh, kw]",
            "conv1d": "[out, in, k]",
            "bias": "[out]",
            "scale": "[features]",
        }
        return named.get(self.kind, "[in, out]" if self.transposed else "[out, in]")

    @property
    def reserved(self) -> str | None:
        """Why a wildcard does not select this site."""
        if self.head:
            return "output head: name it to include it"
        if self.kind in ("embedding", "other", "module"):
            return f"{self.kind}: name it to include it"
        return None

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """The stored tensor as the matrix W [out, in] (a view)."""
        return stored.T if self.transposed else stored.reshape(self.out_features, -1) if stored.ndim > 1 else stored

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """The matrix W [out, in] in the layout of the parameter."""
        return matrix.T.contiguous() if self.transposed else matrix.reshape(self.shape)


class SiteTable(tuple[Site, ...]):
    """Sites that print as a table."""

    def __str__(self) -> str:
        from .tables import render, site_table

        return render(site_table(self))


def sites(program: "Program") -> SiteTable:
    """Every weight of two or more dimensions in the captured graph."""
    return SiteTable(s for s in find(program) if s.kind not in VECTORS)


def find(program: "Program") -> Iterator[Site]:
    """Every parameter of the captured graph: weights first, then vectors (biases, norm scales)."""
    captured = program.captured
    tensors = dict(captured.module.tensors())
    graphs = captured.module.graphs()
    vectors: list[Site] = []
    for node in graphs[0].find_nodes(op="get_attr"):
        name, tensor = str(node.target), tensors.get(str(node.target))
        if not isinstance(tensor, torch.nn.Parameter):
            continue
        ties = tuple(sorted(other for group in captured.ties if name in group for other in group - {name}))
        common = {"name": name, "shape": tuple(tensor.shape), "dtype": tensor.dtype, "ties": ties}
        if tensor.ndim == 1:
            kind = "bias" if is_bias(node) else "scale"
            calls = tuple(Call(user.name, kind, operator_name(user)) for user in node.users)
            vectors.append(Site(kind=kind, calls=calls, **common))
        elif tensor.ndim >= 2:
            found = list(calls_of(node))
            forms = {call.form for call, _ in found}
            bias_names = {bias for _, bias in found}
            form = forms.pop() if len(forms) == 1 else "other"
            kind = {"matmul_in_out": "matmul"}.get(form, form)
            if kind == "linear" and name.endswith("in_proj_weight"):
                kind = "packed"
            yield Site(
                kind=kind,
                calls=tuple(call for call, _ in found),
                bias=bias_names.pop() if len(bias_names) == 1 else None,
                head=is_head(graphs[0], [call.node for call, _ in found]),
                groups=max((groups_of(graphs[0], call) for call, _ in found), default=1),
                **common,
            )
    yield from vectors


def calls_of(weight: fx.Node) -> Iterator[tuple[Call, str | None]]:
    """(call, name of its bias) for every use of a weight's get_attr node, through a transpose where there is one."""
    for user in weight.users:
        form, bias = form_of(weight, user)
        if user.target in TRANSPOSES and weight.meta["val"].ndim == 2 and user.users:
            for inner in user.users:
                is_product = inner.target in (aten.matmul.default, aten.mm.default) and inner.args[1] is user
                if not is_product:
                    yield Call(inner.name, "other", operator_name(inner)), None
                else:
                    yield Call(inner.name, "matmul", operator_name(inner)), None
            continue
        yield Call(user.name, form, operator_name(user)), bias


def form_of(weight: fx.Node, user: fx.Node) -> tuple[str, str | None]:
    arguments, target = user.args, user.target

    def bias(index: int) -> str | None:
        node = arguments[index] if len(arguments) > index else None
        return str(node.target) if isinstance(node, fx.Node) and node.op == "get_attr" else None

    two_dimensional = weight.meta["val"].ndim == 2
    if target is aten.linear.default and arguments[1] is weight and arguments[0] is not weight:
        return "linear", bias(2)
    if target is aten.addmm.default and arguments[2] is weight and not user.kwargs:
        return "addmm", bias(0)
    if target in (aten.matmul.default, aten.mm.default) and arguments[1] is weight and two_dimensional:
        return "matmul_in_out", None
    if target in (aten.conv2d.default, aten.conv2d.padding) and arguments[1] is weight:
        return "conv2d", bias(2)
    if target in (aten.conv1d.default, aten.conv1d.padding) and arguments[1] is weight:
        return "conv1d", bias(2)
    if target is aten.embedding.default and arguments[0] is weight:
        return "embedding", None
    return "other", None


def groups_of(graph: fx.Graph, call: Call) -> int:
    if call.form not in ("conv1d", "conv2d"):
        return 1
    node = next(n for n in graph.nodes if n.name == call.node)
    return node.args[6] if len(node.args) > 6 else 1


def is_bias(node: fx.Node) -> bool:
    return str(node.target).rpartition(".")[2].endswith("bias")


def is_head(graph: fx.Graph, calls: Sequence[str]) -> bool:
    """Whether a call's result is an output of the graph, up to reshapes and casts."""
    outputs = set(flat_outputs(graph))
    frontier = [node for node in graph.nodes if node.name in calls and node.target is not aten.embedding.default]
    while frontier:
        node = frontier.pop()
        if node in outputs:
            return True
        frontier.extend(user for user in node.users if user.target in RESHAPES)
    return False


def layered(name: str) -> str:
    """A weight's path with its layer numbers as `*`: a selector that matches the same place in every layer."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name.removesuffix(".weight"))
