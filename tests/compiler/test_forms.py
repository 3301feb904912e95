"""Every operator that applies a weight is a site: rewritten equals folded equals eager, factored where laws allow."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.passes import SSB, DoRA, LoRA, LoRADash, MoSLoRA, MPCo, PiSSA, SVDiff, TriLoRA, VeRA
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
    "stack_selected": (lambda x, w: sum((i + 1) * (x @ w[i]).tanh() for i in range(3)), [(3, 6, 9)], X, True),
    "stack_unbound": (lambda x, w: sum(F.linear(x, each).tanh() for each in w.unbind(0)), [(3, 9, 6)], X, True),
    "stack_left": (lambda x, w: w[1] @ x.transpose(1, 2) + w[2] @ x.transpose(1, 2).tanh(), [(3, 9, 6)], X, True),
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
    "in_a_row": (lambda x, w: F.linear(F.linear(x, w), w), [(6, 6)], X, True),
    "in_a_row_sliced": (lambda x, w: x @ w[:3].t() @ w[3:], [(6, 6)], X, True),
    "with_itself": (lambda x, w: x @ (w @ w.t()), [(6, 9)], X, False),
    "squared": (lambda x, w: x @ (w @ w), [(6, 6)], X, False),
    "repeated": (lambda x, w: F.linear(x, w.expand(2, 4, 6).sum(0)), [(2, 1, 6)], X, False),
    "rows_picked": (lambda x, w: w[(x[..., 0] > 0).long() + 2], [(9, 6)], X, True),
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
        whole = method == "ssb" and form.startswith(("conv", "rows"))  # columns of a kernel are no scaling of the input
        assert bool(dense) != (FORMS[form][3] and not whole), program.lowered
    folded = sp.fold(program)
    torch.testing.assert_close(program.run(), folded.run(), rtol=1e-10, atol=1e-10)
    weights = {name: p.detach() for name, p in folded.module.named_parameters()}
    x = torch.randn_like(base.example["x"])[:3]
    eager = torch.func.functional_call(model, weights, (x,))
    torch.testing.assert_close(folded.run({"x": x}), eager, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(program.run({"x": x}), eager, rtol=1e-10, atol=1e-10)
    if not (form == "normalised" and method.startswith("ia3")):  # which undoes the scaling of rows
        assert (program.run() - base.run()).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", sorted(set(METHODS) - set(FAST)))
def test_every_method_on_every_form(captured, form, method):
    if form.startswith("stack") and any(layer.defines("schedule") for layer in METHODS[method].layers()):
        with pytest.raises(
            sp.MethodError, match=r"its schedule decides about one matrix a site, and this weight holds 3"
        ):
            sp.rewrite(captured(form)[1], METHODS[method], lambda site: True)
        return
    test_rewritten_equals_folded_equals_eager(captured, form, method)


class Fused(nn.Module):
    """A fused projection [n·d, in], taken apart in several ways."""

    def __init__(self, apart, out=12, name="qkv"):
        super().__init__()
        self.apart, self.name = apart, name
        self.add_module(name, nn.Linear(6, out))

    def forward(self, x):
        return sum((i + 1) * part.tanh() for i, part in enumerate(self.apart(getattr(self, self.name)(x))))


def permuted(y):
    return y.view(*y.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4).unbind(0)


APART = {
    "chunk": (lambda y: y.chunk(3, -1), "qkv", 12, (("q", 0, 4), ("k", 4, 8), ("v", 8, 12))),
    "split": (lambda y: [p.mean(-1) for p in y.split([6, 3, 3], 2)], "qkv_proj", 12,
              (("q", 0, 6), ("k", 6, 9), ("v", 9, 12))),
    "heads": (permuted, "Wqkv", 12, (("q", 0, 4), ("k", 4, 8), ("v", 8, 12))),
    "slices": (lambda y: (y[..., :5], y[..., 5:10]), "gate_up_proj", 10, (("gate", 0, 5), ("up", 5, 10))),
    "three of in_proj": (lambda y: y.chunk(3, -1), "in_proj", 12, (("0", 0, 4), ("1", 4, 8), ("2", 8, 12))),
    "dynamic": (lambda y: (y[..., : y.shape[1]], y[..., 1 : y.shape[1] + 1]), "qkv", 12, ()),
    "narrow": (lambda y: (y.narrow(-1, 0, 5), y.narrow(-1, 5, 5)), "kv", 10, (("k", 0, 5), ("v", 5, 10))),
    "names": (lambda y: y.chunk(2, dim=2), "in_proj", 10, (("0", 0, 5), ("1", 5, 10))),
    "interleaved": (lambda y: y.view(*y.shape[:2], 2, 3, 2).unbind(3), "qkv", 12, ()),
    "whole too": (lambda y: (y[..., :4], y[..., 4:8], y.mean(-1, keepdim=True)), "qkv", 12, ()),
    "gap": (lambda y: (y[..., :4], y[..., 8:]), "qkv", 12, ()),
}  # fmt: skip


@pytest.mark.parametrize("way", APART)
def test_row_blocks_are_read_off_the_graph(way):
    apart, name, out, expected = APART[way]
    torch.manual_seed(0)
    program = sp.capture(Fused(apart, out, name).double(), (torch.randn(3, 5, 6, dtype=torch.float64),))
    (site,) = sp.sites(program)
    assert site.blocks == expected
    if not expected:
        with pytest.raises(sp.SelectorError, match=f"{name}.weight has no block 'q': the graph does not take"):
            sp.rewrite(program, LoRA(), where=f"{name}[q]")
        return
    first, last = expected[0], expected[-1]
    adapted = moved(sp.rewrite(program, DoRA(of=LoRA(r=2)), where=f"{name}[{last[0]},{first[0]}]"))
    folded = sp.fold(adapted)
    torch.testing.assert_close(adapted.run(), folded.run(), rtol=1e-10, atol=1e-10)
    changed = (folded.module.get_parameter(site.name) - program.module.get_parameter(site.name)).abs().sum(1) > 0
    rows = {i for _, start, stop in (first, last) for i in range(start, stop)}
    assert {i for i, value in enumerate(changed.tolist()) if value} == rows


def test_two_adapters_on_two_blocks_stay_factored_and_are_read_back(tmp_path):
    torch.manual_seed(0)
    program = sp.capture(Fused(APART["chunk"][0]).double(), (torch.randn(3, 5, 6, dtype=torch.float64),))
    both = moved(sp.rewrite(sp.rewrite(program, LoRA(r=2), where="qkv[q]"), LoRA(r=1), where="qkv[v]"))
    assert {lowered.form for lowered in both.lowered.values()} == {"factored"}
    assert both.counts()[0] == 2 * (6 + 4) + 1 * (6 + 4)
    torch.testing.assert_close(both.run(), sp.fold(both).run(), rtol=1e-10, atol=1e-10)
    sp.save(both, tmp_path)
    assert torch.equal(sp.load(program, tmp_path).run(), both.run())


def test_a_block_that_is_not_there_is_refused_with_those_that_are():
    program = sp.capture(Fused(APART["chunk"][0]), (torch.randn(3, 5, 6),))
    with pytest.raises(sp.SelectorError, match=r"qkv.weight has no block 'w': its blocks are q, k, v\."):
        sp.rewrite(program, LoRA(), where="qkv[q,w]")


def test_a_parameter_that_no_output_needs_is_listed_as_no_site():
    model = Weighted(lambda x, w, unused: x @ w, (6, 9), (4, 3))
    table = sp.sites(sp.capture(model, (torch.randn(4, 5, 6),)))
    assert table.unread == ("weights.1",)
    assert "no site: weights.1 (no output depends on it)" in str(table)


def test_a_penalty_of_experts_is_the_sum_over_them(captured):
    _, base = captured("stack_bmm")
    program = moved(sp.rewrite(base, MPCo(of=LoRA(r=2)), lambda site: True))
    A, B = (program.module.get_parameter(f"weights.0_mpc_o.{name}").detach() for name in "AB")
    one = sum(MPCo(of=LoRA(r=2)).evaluate("penalty", tensors={"A": a, "B": b}) for a, b in zip(A, B, strict=True))
    torch.testing.assert_close(sp.penalty(program).detach(), one)


def test_experts_start_and_train_apart(captured):
    _, base = captured("stack_bmm")
    program = sp.rewrite(base, LoRA(r=2), lambda site: True)
    (site,) = program.adapters[0].sites
    assert (site.stack, site.out_features, site.in_features, site.layout_text) == (3, 9, 6, "[experts, in, out]")
    A = program.module.get_parameter("weights.0_lora.A")
    assert A.shape == (3, 2, 6) and program.module.get_parameter("weights.0_lora.B").shape == (3, 9, 2)
    assert not torch.equal(A[0], A[1])
    assert program.counts()[0] == 3 * 2 * (6 + 9)
    folded = sp.fold(moved(program))
    factors = {name: program.module.get_parameter(f"weights.0_lora.{name}").detach() for name in "AB"}
    delta = folded.module.get_parameter("weights.0") - base.module.get_parameter("weights.0")
    torch.testing.assert_close(delta, (16.0 / 2) * torch.einsum("eor,eri->eio", factors["B"], factors["A"]))


def test_only_the_gates_of_a_recurrent_layer_are_blocks():
    model = nn.LSTM(6, 8, proj_size=4, batch_first=True)
    blocks = {
        site.name: [name for name, _, _ in site.blocks] for site in sp.sites(sp.capture(model, (torch.randn(3, 5, 6),)))
    }
    assert blocks == {"weight_ih_l0": ["i", "f", "g", "o"], "weight_hh_l0": ["i", "f", "g", "o"], "weight_hr_l0": []}


def test_blocks_in_a_brace_list():
    model = nn.ModuleDict({"qkv": Fused(APART["chunk"][0]), "o": nn.Linear(6, 6)})
    model.forward = lambda x: model["qkv"](x).sum(-1, keepdim=True) + model["o"](x)
    program = sp.rewrite(sp.capture(model, (torch.randn(3, 5, 6),)), LoRA(r=2), where="{qkv.qkv[q,v],o}")
    assert [site.name for site in program.adapters[0].sites] == ["qkv.qkv.weight", "o.weight"]
    assert dict(program.adapters[0].variants)["qkv.qkv.weight"].only == ("q", "v")


def test_blocks_are_chosen_by_where_alone():
    program = sp.capture(Fused(APART["chunk"][0]), (torch.randn(3, 5, 6),))
    with pytest.raises(sp.SelectorError, match=r"exclude 'qkv\[q\]' names row blocks, which only `where` takes"):
        sp.rewrite(program, LoRA(), where="*", exclude="qkv[q]")
    with pytest.raises(sp.SelectorError, match=r"exclude '\*nonsense\*' matches none of 1 sites. Nearest: qkv"):
        sp.rewrite(program, LoRA(), where="*", exclude="*nonsense*")
    with pytest.raises(
        sp.SelectorError, match=r"pattern 'qkv\[v\]' names row blocks; options differ from weight to weight"
    ):
        sp.rewrite(program, LoRA(), patterns={"qkv[v]": {"r": 2}})


def test_a_weight_taken_by_rows_has_them_as_blocks():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = attention

        def forward(self, x, y, z):
            return self.attention(x, y, z, need_weights=False)[0]

    program = sp.capture(Cross(), tuple(torch.randn(3, 5, 8) for _ in range(3)))
    packed = next(site for site in sp.sites(program) if site.name.endswith("in_proj_weight"))
    assert packed.blocks == (("q", 0, 8), ("k", 8, 16), ("v", 16, 24))


def test_weights_that_are_no_parameters_and_sites_without_gradient_are_said():
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.w = nn.Linear(6, 6), nn.Linear(6, 6), torch.randn(6, 6)

        def forward(self, x):
            return F.linear(self.a(x), self.w) + self.b(x).detach()

    program = sp.capture(Hidden(), (torch.randn(3, 5, 6),))
    assert sp.sites(program).unowned == ("w",)
    assert "no site: w (a constant or a buffer, not a parameter)" in str(sp.sites(program))
    with pytest.warns(sp.CaptureWarning, match=r"lora gets no gradient at b\.weight: the model detaches"):
        sp.rewrite(program, LoRA())
