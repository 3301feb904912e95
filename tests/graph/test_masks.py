"""Masks read as formulas: what is causal is found to be, and nothing else."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.graph.sequence.attention import attentions

MIN = torch.finfo(torch.float32).min
T, C = torch.Tensor, "key <= query"


class Attention(nn.Module):
    """One attention over itself under a mask."""

    def __init__(self, mask: Callable[..., T | None]):
        super().__init__()
        self.qkv, self.mask, self.bias = nn.Linear(8, 24), mask, nn.Embedding(32, 1)
        self.register_buffer("table", torch.ones(16, 16).tril().bool())

    def forward(self, x: T, attention_mask: T | None = None, token_type_ids: T | None = None) -> T:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        given = [t for t in (attention_mask, token_type_ids) if t is not None]
        return F.scaled_dot_product_attention(q, k, v, self.mask(self, x, *given))


def at(x: T) -> tuple[T, T]:
    steps = torch.arange(x.shape[1])
    return steps[:, None], steps[None, :]


def compared(test: Callable[[T, T], T]) -> Callable[..., T]:
    return lambda net, x: test(*at(x))


def written(net: nn.Module, x: T) -> T:
    """A lower triangle, until its first column is hidden."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask[1:, :1].fill_(False)
    return mask


def written_apart(net: nn.Module, x: T) -> T:
    """A lower triangle, until its first row, one of several views, sees every key."""
    mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
    mask.split([1, x.shape[1] - 1])[0].fill_(True)
    return mask


def built(net: nn.Module, x: T) -> T:
    mask = torch.full((x.shape[1], x.shape[1]), MIN)
    return torch.where(torch.arange(x.shape[1])[:, None] >= torch.arange(x.shape[1]), 0.0, mask)


def packed(net: nn.Module, x: T) -> T:
    """Documents as transformers finds them: where positions do not go on. Here they always do."""
    places = torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1)
    document = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return ((document[:, :, None] == document[:, None, :]) & (places[:, None, :] <= places[:, :, None]))[:, None]


def restarted(net: nn.Module, x: T) -> T:
    """Two documents in a row: positions go on by 2."""
    places = 2 * torch.arange(x.shape[1]).unsqueeze(0).expand(x.shape[0], -1)
    document = (torch.diff(places, prepend=places[:, :1] - 1, dim=-1) != 1).cumsum(-1)
    return ((document[:, :, None] == document[:, None, :]) & (places[:, None, :] <= places[:, :, None]))[:, None]


def added(net: nn.Module, x: T) -> T:
    """A window and the causal mask, both to be added."""
    q, k = at(x)
    hidden = torch.zeros(x.shape[1], x.shape[1]).masked_fill(k > q, -torch.inf)
    return hidden + torch.zeros(1, 1, x.shape[1], x.shape[1]).masked_fill(k > q, -torch.inf)


# name -> (mask, what it lets a query see)
ALONE: dict[str, tuple[Callable[..., T | None], str]] = {
    "compared": (compared(lambda q, k: k <= q), C),
    "compared the other way": (compared(lambda q, k: q >= k), C),
    "strictly compared": (compared(lambda q, k: ~(q < k)), C),
    "of differences": (compared(lambda q, k: (k - q) < 1), C),
    "lower triangle": (lambda net, x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(), C),
    "added triangle": (lambda net, x: torch.full((x.shape[1], x.shape[1]), -torch.inf).triu(1), C),
    "least number": (built, C),
    "added twice": (added, C),
    "packed, one document": (packed, C),
    "times the least number": (compared(lambda q, k: (1.0 - (k <= q).float()) * MIN), C),
    "transposed": (compared(lambda q, k: (q <= k).transpose(0, 1)), C),
    "all": (compared(lambda q, k: (k >= 0) | (q < 3)), "all"),
    "adding zeros": (lambda net, x: torch.zeros(1, 1, 1, x.shape[1]), "all"),
    "window": (compared(lambda q, k: (k <= q) & (k > q - 4)), "key <= query and key + 4 > query"),
    "chunks": (compared(lambda q, k: (k <= q) & (k // 4 == q // 4)), "floor_divide"),
    "prefix": (compared(lambda q, k: (k <= q) | (k < 3)), "key <= 2 or key <= query"),
    "earlier keys": (compared(lambda q, k: k < q), "key + 1 <= query"),
    "one key ahead": (compared(lambda q, k: k <= q + 1), "key <= query + 1"),
    "later keys": (compared(lambda q, k: k >= q), "key + 1 > query"),
    "keys of even number": (compared(lambda q, k: 2 * k <= q), "2*key <= query"),
    "from the third on": (lambda net, x: (torch.arange(x.shape[1] + 2)[2:] <= at(x)[0]), "key + 2 <= query"),
    "counted from behind": (lambda net, x: torch.arange(x.shape[1] + 2)[-x.shape[1] :] <= at(x)[0], "from behind"),
    "rounded positions": (compared(lambda q, k: k.bfloat16() <= q.bfloat16()), "reads positions as torch.bfloat16"),
    "wrapped positions": (compared(lambda q, k: k.to(torch.uint8) <= q.to(torch.uint8)), "positions as torch.uint8"),
    "not quite hidden": (compared(lambda q, k: torch.where(k <= q, 0.0, -1e4)), "adds -10000"),
    "a bias": (compared(lambda q, k: torch.where(k <= q, 0.5, -torch.inf)), "adds 0.5"),
    "distances": (lambda net, x: net.bias(at(x)[0] - at(x)[1] + 8)[..., 0], "embedding"),
    "a buffer": (lambda net, x: net.table[: x.shape[1], : x.shape[1]], "reads the tensor table"),
    "written in place": (written, "written to in place"),
    "written in place, in parts": (written_apart, "written to in place"),
    "documents": (restarted, "diff"),
}  # fmt: skip
# the same of masks that hang on inputs: (mask, what it lets a query see, the form under the promise)
PADDED: dict[str, tuple[Callable[..., T], str, str | None]] = {
    "keys": (lambda net, x, m: (at(x)[1] <= at(x)[0]) & m[:, None, None, :].bool(), "attention_mask", "causal"),
    "keys and queries": (
        lambda net, x, m: (at(x)[1] <= at(x)[0]) & (m[:, None, None, :] == 1) & (m[:, None, :, None] > 0),
        "attention_mask", "causal",
    ),
    "added": (
        lambda net, x, m: (1.0 - m[:, None, None, :].float()) * MIN + torch.where(at(x)[1] <= at(x)[0], 0.0, MIN),
        "reads positions as torch.float32", "causal",
    ),
    "alone": (lambda net, x, m: m[:, None, None, :].bool().expand(-1, 1, x.shape[1], -1), "attention_mask", None),
    "of queries": (lambda net, x, m: (at(x)[1] <= at(x)[0]) & (m[:, None, :, None] == 0), "attention_mask", None),
    "turned": (lambda net, x, m: (at(x)[1] <= at(x)[0]) & (m[:, None, None, :] == 0), "attention_mask", None),
    "moved by one": (
        lambda net, x, m: (at(x)[1] <= at(x)[0]) & F.pad(m, (1, -1))[:, None, None, :].bool(), "reads pad", None,
    ),
    "in a window": (
        lambda net, x, m: (at(x)[1] <= at(x)[0]) & (at(x)[1] > at(x)[0] - 2) & m[:, None, None, :].bool(),
        "key + 2 > query", None,
    ),
}  # fmt: skip


def captured(mask: Callable, *names: str) -> sp.Program:
    inputs = {"x": torch.randn(2, 6, 8)} | {name: torch.ones(2, 6, dtype=torch.long) for name in names}
    return sp.capture(Attention(mask).eval(), inputs)


@pytest.mark.parametrize("name", ALONE)
def test_a_mask_of_positions(name):
    mask, seen = ALONE[name]
    program = captured(mask)
    (call,) = sp.kernels(program)
    assert call.kernel == {C: "is_causal", "all": "no mask"}.get(seen, "mask"), call
    assert seen in call.mask, call
    assert not call.promise
    assert next(iter(attentions(program.graph).values())).args[3] is not None  # the captured graph keeps it
    x = torch.randn(3, 9, 8)
    assert torch.allclose(program.run({"x": x}), Attention.forward(eager(program, mask), x), atol=1e-6)


def eager(program: sp.Program, mask: Callable) -> Attention:
    net = Attention(mask)
    net.load_state_dict(program.module.state_dict())
    return net.eval()


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.filterwarnings("ignore:padding=")
def test_a_mask_that_hides_padding(name):
    mask, seen, form = PADDED[name]
    program = captured(mask, "attention_mask")
    (call,) = sp.kernels(program)
    assert call.kernel == "mask"
    assert seen in call.mask, call
    assert ('padding="right"' in call.why) == (form is not None)
    (promised,) = sp.kernels(sp.promise(program, "right"))
    assert promised.kernel == ("is_causal" if form else "mask"), promised
    assert promised.promise == ({"attention_mask"} if form else set())


def test_other_inputs_stay_in_the_mask():
    def mask(net, x, m, types):
        q, k = at(x)
        return (k <= q) & m[:, None, None, :].bool() | (types[:, None, None, :] == 1)

    with pytest.warns(sp.CaptureWarning, match="changes no attention of Attention"):
        program = sp.promise(captured(mask, "attention_mask", "token_type_ids"), "right")
    (call,) = sp.kernels(program)
    assert call.kernel == "mask"
    assert "token_type_ids[batch, key] == 1" in call.mask
