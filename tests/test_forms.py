"""Every operator that applies a weight is a site: rewritten equals folded equals eager, factored where laws allow."""

import pytest
import torch
import torch.nn.functional as F
from subgraph_peft.passes import SSB, DoRA, LoRA, LoRADash, MoSLoRA, PiSSA, SVDiff, TriLoRA, VeRA
from torch import nn

import subgraph_peft as sp
from tests.methods import WEIGHT_METHODS


class Weighted(nn.Module):
    """f(x, w) with weights of the given shapes."""

    def __init__(self, f, *shapes):
        super().__init__()
        self.f = f
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])

    def forward(self, x):
        return self.f(x, *self.weights)


def picked(x, w):
    experts = torch.arange(x.shape[0]) % 3
    return torch.bmm(w[experts], x.unsqueeze(-1)).squeeze(-1)


def grouped(x, w):
    rows = x.reshape(-1, 6)
    offsets = torch.tensor([2, 2, 0], dtype=torch.int32) + torch.tensor([0, 0, 1], dtype=torch.int32) * rows.shape[0]
    return torch.ops.transformers.grouped_mm_fallback(rows, w.transpose(-2, -1), offsets)


X = (4, 5, 6)
# name -> (f(x, *weights), shapes of the weights, shape of x, is it factored)
FORMS = {
    "linear": (F.linear, [(9, 6)], X, True),
    "linear_t": (lambda x, w: F.linear(x, w.T), [(6, 9)], X, True),
    "matmul": (lambda x, w: x @ w, [(6, 9)], X, True),
    "matmul_t": (lambda x, w: x @ w.T, [(9, 6)], X, True),
    "vector": (lambda x, w: (w @ x[0, 0]).expand(x.shape[0], 9), [(9, 6)], X, True),
    "left": (lambda x, w: w @ x.transpose(1, 2), [(9, 6)], X, True),
    "left_t": (lambda x, w: w.T @ x.transpose(1, 2), [(6, 9)], X, True),
    "bmm_expanded": (lambda x, w: torch.bmm(x, w.expand(x.shape[0], 6, 9)), [(6, 9)], X, True),
    "einsum": (lambda x, w: torch.einsum("bsd,df->bsf", x, w), [(6, 9)], X, True),
    "einsum_first": (lambda x, w: torch.einsum("fd,bsd->bfs", w, x), [(9, 6)], X, True),
    "einsum_heads": (lambda x, w: torch.einsum("bsd,dnh->bsnh", x, w), [(6, 2, 5)], X, True),
    "einsum_heads_apart": (lambda x, w: torch.einsum("bsd,dnh->bnsh", x, w), [(6, 2, 5)], X, True),
    "einsum_back": (lambda x, w: torch.einsum("bsnh,nhd->bsd", x.reshape(-1, 5, 2, 3), w), [(2, 3, 7)], X, True),
    "slice_rows": (lambda x, w: torch.cat([F.linear(x, w[:4]).tanh(), F.linear(x, w[4:])], -1), [(9, 6)], X, True),
    "slice_columns": (lambda x, w: F.linear(x[..., :4], w[:, :4]) + F.linear(x[..., 4:].tanh(), w[:, 4:]), [(9, 6)], X,
                      True),
    "split": (lambda x, w: sum(F.linear(x, part) for part in w.split([3, 3, 3])), [(9, 6)], X, True),
    "chunk_t": (lambda x, w: x @ w.chunk(3)[1].T, [(9, 6)], X, True),
    "both_ways": (lambda x, w: F.linear(F.linear(x, w).tanh(), w.T), [(9, 6)], X, True),
    "stack_bmm": (lambda x, w: torch.matmul(x.reshape(-1, 1, 5, 6).expand(-1, 3, 5, 6), w), [(3, 6, 9)], X, True),
    "stack_einsum": (lambda x, w: torch.einsum("ebd,edf->bef", x.transpose(0, 1)[:3], w), [(3, 6, 9)], X, True),
    "stack_picked": (lambda x, w: picked(x[:, 0], w), [(3, 9, 6)], X, True),
    "stack_grouped": (grouped, [(3, 9, 6)], X, True),
    "experts_apart": (lambda x, w: torch.einsum("bsd,edf->bsef", x, w), [(3, 6, 9)], X, True),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), [(9, 5, 3)], X, True),
    "conv2d": (lambda x, w: F.conv2d(x, w, stride=2), [(9, 5, 3, 2)], (4, 5, 8, 7), True),
    "conv2d_grouped": (lambda x, w: F.conv2d(x, w, groups=2), [(6, 2, 3, 2)], (4, 4, 8, 7), False),
    "conv3d": (lambda x, w: F.conv3d(x, w), [(7, 3, 2, 2, 3)], (4, 3, 4, 4, 5), True),
    "conv_transpose1d": (lambda x, w: F.conv_transpose1d(x, w, stride=2), [(5, 7, 3)], X, True),
    "conv_transpose2d": (lambda x, w: F.conv_transpose2d(x, w, stride=2, output_padding=1), [(5, 7, 3, 2)],
                         (4, 5, 4, 3), True),
    "conv_transpose2d_grouped": (lambda x, w: F.conv_transpose2d(x, w, groups=2), [(4, 3, 3, 2)], (4, 4, 4, 3), False),
    "conv_transpose3d": (lambda x, w: F.conv_transpose3d(x, w), [(3, 4, 2, 2, 3)], (4, 3, 4, 4, 5), True),
    "normalised": (lambda x, w: F.linear(x, w / w.norm(dim=1, keepdim=True)), [(9, 6)], X, False),
    "product": (lambda x, w, v: x @ (w @ v), [(6, 4), (4, 9)], X, False),
    "added": (lambda x, w: x + w, [(1, 5, 6)], X, False),
    "bilinear": (lambda x, w: F.bilinear(x, x[..., :4], w), [(9, 6, 4)], X, False),
}  # fmt: skip
METHODS = {
    "lora": LoRA(r=2, alpha=5.0), "ssb": SSB(), "dora": DoRA(of=LoRA(r=2, alpha=5.0)), "pissa": PiSSA(r=1),
    "moslora": MoSLoRA(r=2), "svdiff": SVDiff(), "trilora": TriLoRA(r=2), "vera": VeRA(r=2),
    "dora_pissa": DoRA(of=PiSSA(r=1)), "lora_dash": LoRADash(r=1, directions=1), **WEIGHT_METHODS,
}  # fmt: skip
FAST = ("lora", "ssb", "dora", "pissa")


@pytest.fixture(scope="module")
def captured():
    import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback

    known = {}

    def get(form):
        if form not in known:
            f, shapes, size, _ = FORMS[form]
            torch.manual_seed(0)
            model = Weighted(f, *shapes).double()
            known[form] = model, sp.capture(model, (torch.randn(*size, dtype=torch.float64),))
        return known[form]

    return get


def moved(program):
    """Every adapter tensor away from where it starts."""
    torch.manual_seed(1)
    for _, parameter in program.parameters(trainable=True):
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    return program


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", FAST)
def test_rewritten_equals_folded_equals_eager(captured, form, method):
    model, base = captured(form)
    program = moved(sp.rewrite(base, METHODS[method], lambda site: True))
    dense = {name for name, lowered in program.lowered.items() if lowered.form == "dense"}
    if method in ("lora", "ssb", "pissa"):
        whole = method == "ssb" and form.startswith("conv")  # columns of a kernel are no scaling of the input
        assert bool(dense) != (FORMS[form][3] and not whole), program.lowered
    folded = sp.fold(program)
    torch.testing.assert_close(program.run(), folded.run(), rtol=1e-10, atol=1e-10)
    weights = {name: p.detach() for name, p in folded.module.named_parameters()}
    x = torch.randn_like(base.example["x"])[:3]
    eager = torch.func.functional_call(model, weights, (x,))
    torch.testing.assert_close(folded.run({"x": x}), eager, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program.run({"x": x}), eager, rtol=1e-10, atol=1e-10)
    assert (program.run() - base.run()).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FAST)))
def test_every_method_on_every_form(captured, form, method):
    test_rewritten_equals_folded_equals_eager(captured, form, method)
