"""Keys and values put before those of attention, against attention by hand."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base.errors import MethodError
from subgraph_peft.graph.nodes import show
from subgraph_peft.passes.reconstruction.prefix_tuning import PrefixTuning
from tests.models import BATCH, LENGTH, VOCABULARY
from tests.sequences import EXACT, N, adapt, captured, full, gap, model, tensor


def patched(monkeypatch: pytest.MonkeyPatch, adapted: sp.Program) -> None:
    """Every eager attention gets its keys and values by hand, its mask n columns that are seen."""
    plain, calls = F.scaled_dot_product_attention, iter(range(99))

    def attention(q, k, v, attn_mask=None, **options):
        site = next(calls)
        prefix = []
        for name, old in (("keys", k), ("values", v)):
            own = tensor(adapted, name, site).detach().transpose(0, 1)
            own = own.repeat_interleave(old.shape[1] // own.shape[0], 0)
            prefix.append(torch.cat([own.expand(old.shape[0], -1, -1, -1), old], 2))
        return plain(q, *prefix, attn_mask=F.pad(attn_mask, (N, 0), value=True), **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


@pytest.mark.parametrize("name", ["bert", "modernbert", "llama", "mistral"])
@pytest.mark.parametrize("positions", ["shifted", "kept"])
def test_prefix_tuning_is_attention_over_more_keys(name, positions, monkeypatch):
    adapted = adapt(name, PrefixTuning(n=N, positions=positions))
    net, inputs = model(name)
    found = adapted.run()
    patched(monkeypatch, adapted)
    at = torch.arange(LENGTH).expand(BATCH, -1) + (N if positions == "shifted" else 0)
    with torch.no_grad():
        expected = net(**inputs, position_ids=at)
    assert gap(inputs, found.logits, expected.logits) < 1e-6  # angles are float32
    assert abs(found.loss - expected.loss) < 1e-6


def test_prefix_of_zeros_is_no_identity():
    adapted = adapt("bert", PrefixTuning(n=N, init="zeros", positions="kept"))
    assert not tensor(adapted, "keys").any()
    assert gap(model("bert")[1], adapted.run().logits, captured("bert").run().logits) > 1e-3


def test_counts_follow_the_grouped_heads():
    assert adapt("bert", PrefixTuning(n=N)).counts()[0] == 2 * 2 * N * 24
    assert adapt("llama", PrefixTuning(n=N)).counts()[0] == 2 * 2 * N * 12
    assert adapt("albert", PrefixTuning(n=N)).counts()[0] == 2 * 2 * N * 24  # one set of weights, two attentions
    d, e = 12, 5
    projected = adapt("llama", PrefixTuning(n=N, projection=True, hidden=e))
    assert projected.counts()[0] == N * d + d * e + e + e * 2 * 2 * d + 2 * 2 * d


class Attention(nn.Module):
    """A decoder without a mask input, whose forward is given."""

    def __init__(self, forward: Callable, width: int = 8, positions: bool = False):
        super().__init__()
        self.tokens, self.head = nn.Embedding(VOCABULARY, width), nn.Linear(width, 5)
        self.qkv = nn.Linear(width, 3 * width)
        self.positions = nn.Embedding(16, width) if positions else None
        self.run = forward

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.tokens(ids)
        if self.positions is not None:
            x = x + self.positions(torch.arange(ids.shape[1]))
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        return self.head(self.run(q, k, v).transpose(1, 2).flatten(2))


class Distances(nn.Module):
    """Attention with a bias per distance: positions are looked up, but only their differences."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Embedding(32, 1)

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        at = torch.arange(q.shape[2])
        return F.scaled_dot_product_attention(q, k, v, self.bias(at[:, None] - at + 16)[..., 0])


def reference(net: Attention, ids: torch.Tensor, P: tuple[torch.Tensor, torch.Tensor], causal: bool) -> torch.Tensor:
    x = net.tokens(ids)
    if net.positions is not None:
        x = x + net.positions(torch.arange(ids.shape[1]) + N)
    q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
    k, v = (
        torch.cat([p.transpose(0, 1).expand(len(ids), -1, -1, -1), t[:, : p.shape[1]]], 2)
        for p, t in zip(P, (k, v), strict=True)
    )
    k, v = (t.repeat_interleave(4 // t.shape[1], 1) for t in (k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    length = ids.shape[1]
    seen = torch.ones(length, length).tril() if causal else torch.ones(length, length)
    seen = torch.cat([torch.ones(length, N), seen], 1).bool()
    y = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v
    return net.head(y.transpose(1, 2).flatten(2))


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], is_causal=True, enable_gqa=True)


def added(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), -torch.inf, dtype=q.dtype).triu(1)
    return F.scaled_dot_product_attention(q, k, v, mask)


FORMS: dict[str, tuple[Callable, bool]] = {
    "no mask": (F.scaled_dot_product_attention, False),
    "causal": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), True),
    "grouped": (grouped, True),
    "added": (added, True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_attention(form):
    attention, causal = FORMS[form]
    net = Attention(attention, positions=True).double().eval()
    ids = torch.randint(VOCABULARY, (2, 5))
    adapted = sp.rewrite(sp.capture(net, ids), PrefixTuning(n=N))
    for given in (ids, torch.randint(VOCABULARY, (3, 7))):
        with torch.no_grad():
            expected = reference(net, given, (tensor(adapted, "keys"), tensor(adapted, "values")), causal)
        assert (adapted.run({"ids": given}) - expected).abs().max() < EXACT


def test_causal_attentions_of_one_length_share_their_mask():
    causal = FORMS["causal"][0]
    net = Attention(lambda q, k, v: causal(causal(q, k, v), k, v), positions=True)
    adapted = sp.rewrite(sp.capture(net, torch.randint(VOCABULARY, (2, 5))), PrefixTuning(n=N))
    assert [site.name for site in adapted.adapters[0].sites] == ["attention", "attention@1"]
    text = show(adapted.graph)
    assert text.count(" = tril(") == text.count(" = constant_pad_nd(") == 1
    assert text.count("is_causal") == 0


ONES = torch.ones(2, 5, dtype=torch.long)
REFUSED: dict[str, tuple[Callable[[], sp.Program], str]] = {
    "full table": (full, "does not run on the example inputs.*positions end at 32"),
    "eager attention": (
        lambda: captured("deberta"), "without scaled_dot_product_attention. Load .* with attn_implementation=.sdpa",
    ),
    "distances": (lambda: sp.capture(Attention(Distances()), ONES), "cannot be seen"),
    "no positions": (
        lambda: sp.capture(Attention(F.scaled_dot_product_attention), ONES), 'cannot be seen.*positions="kept"',
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_with_the_reason(case):
    program, reason = REFUSED[case]
    with pytest.raises(MethodError, match=reason):
        sp.rewrite(program(), PrefixTuning(n=N))
