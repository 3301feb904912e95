"""The table of operators: whole, and heads and weights are known through every view that it names."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import subgraph_peft as sp
from subgraph_peft.graph import operators
from subgraph_peft.graph.operators import Kind, argument, extent, found, kind_of, permutation
from subgraph_peft.passes import DoRA, LoRA
from tests.compiler.test_forms import Weighted, moved

# what a functional operator may return of its input without saying so
UNSAID = ("unsafe_", "_unsafe_")


def overloads():
    """(name in the table, operator) of all functional operators of aten."""
    for full in sorted(torch._C._dispatch_get_all_op_names()):
        library, _, name = full.partition("::")
        if library == "aten" and (held := found(name)) and not held[0]._schema.is_mutable:
            yield name, held[0]


def shows_its_input(name, operator):
    """Whether an operator says that its result is its input, or a copy of a view of it."""
    packet, dot, overload = name.partition(".")
    base = found(packet.removesuffix("_copy") + dot + overload)
    return any(a.alias_info for each in (operator, *base) for a in each._schema.arguments) and not any(
        a.alias_info and a.alias_info.is_write for each in base for a in each._schema.arguments
    )


def changes_nothing(operator):
    """Whether an operator of one tensor gives back what it is given: numbers of either sign, not finite, no order."""
    x = torch.tensor([[-1.5, torch.nan, 0.25], [3.75, torch.inf, -2.0]])
    required = [a for a in operator._schema.arguments if not a.has_default_value()]
    if [str(a.type) for a in required] != ["Tensor"] or operator._schema.name.startswith("aten::_"):
        return False
    try:
        y = operator(x)
    except Exception:
        return False
    plain = isinstance(y, torch.Tensor) and y.layout == torch.strided and y.dtype == x.dtype
    return plain and y.shape == x.shape and torch.equal(y.nan_to_num(7.0), x.nan_to_num(7.0))


def missing():
    return [
        name
        for name, operator in overloads()
        if (shows_its_input(name, operator) or changes_nothing(operator)) and not kind_of(name)
    ]


def test_every_operator_that_shows_its_input_is_in_the_table():
    assert missing() == []


@pytest.mark.parametrize("name", ["squeeze.dims", "unbind.int", "clone", "_reshape_alias"])
def test_one_that_is_left_out_is_found(name, monkeypatch):
    monkeypatch.delitem(operators.KINDS, name)
    assert name in missing()


def test_an_operator_stands_in_the_table_once():
    names = [name for names in operators.TABLE.values() for name in names.split()]
    assert sorted(names) == sorted(operators.KINDS)
    assert kind_of("squeeze_copy.dims") == kind_of("squeeze.dims") == Kind.RESHAPE
    assert not kind_of("relu") and not kind_of("")


def call(target, *args, **kwargs):
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = torch.empty(3, 4, 5, device="meta")
    return graph.call_function(target, (x, *args), kwargs)


def test_arguments_are_read_by_name_however_they_are_given():
    aten = torch.ops.aten
    assert argument(call(aten.slice.Tensor), "step") == 1
    assert argument(call(aten.slice.Tensor, 1, step=2), "step") == 2
    assert extent(call(aten.slice.Tensor, 1, end=3)) == (1, None, 3, 1)
    assert extent(call(aten.narrow.default, -1, start=1, length=2)) == (-1, 1, 3, 1)
    assert extent(call(aten.narrow.default, 0, -2, 2)) == (0, -2, None, 1)


@pytest.mark.parametrize(
    "target, args",
    [
        (torch.ops.aten.transpose.int, (0, -1)), (torch.ops.aten.permute.default, ([2, 0, 1],)),
        (torch.ops.aten.movedim.int, (0, 2)), (torch.ops.aten.swapaxes.default, (1, 2)),
        (torch.ops.aten.mT.default, ()), (torch.ops.aten.numpy_T.default, ()),
    ],
)  # fmt: skip
def test_a_permutation_is_what_the_operator_does(target, args):
    x = torch.randn(3, 4, 5)
    assert torch.equal(x.permute(permutation(call(target, *args))), target(x, *args))


# what may be done with the result of a head [batch, tokens, 7] that leaves it that of a head
HEADS = {
    "flatten": lambda y: y.flatten(1),
    "flatten_all": lambda y: y.flatten(),
    "permute": lambda y: y.permute(0, 2, 1),
    "squeeze": lambda y: y[:, :1].squeeze(),
    "squeeze_dims": lambda y: torch.ops.aten.squeeze.dims(y[:, :1], [1]),
    "unflatten": lambda y: y.unflatten(-1, (7, 1)),
    "detach": lambda y: y.detach(),
    "expand": lambda y: y.unsqueeze(0).expand(2, *y.shape),
    "broadcast_to": lambda y: y.unsqueeze(0).broadcast_to(2, *y.shape),
    "movedim": lambda y: y.movedim(1, 0),
    "swapaxes": lambda y: y.swapaxes(1, 2),
    "mT": lambda y: y.mT,
    "type_as": lambda y: y.type_as(torch.zeros((), dtype=torch.float64)),
    "to_other": lambda y: y.to(torch.zeros((), dtype=torch.float64)),
    "device": lambda y: y.to("cpu", copy=True),
    "alias": lambda y: torch.ops.aten.alias(y),
    "clone": lambda y: y.clone(memory_format=torch.contiguous_format),
    "chunk": lambda y: y.chunk(2, -1)[0],
    "split": lambda y: y.split(3, -1),
    "span": lambda y: [part.squeeze(-1).contiguous() for part in y.split(1, -1)[:2]],
    "unbind": lambda y: y.unbind(1)[0],
    "stack": lambda y: torch.stack(y.unbind(1), 0),
    "cat": lambda y: torch.cat([y[:, 1:], y[:, :1]], 1),
    "select": lambda y: y[:, -1],
    "narrow": lambda y: y.narrow(1, 0, 2),
    "picked": lambda y: y[torch.arange(y.shape[0]), torch.zeros(y.shape[0], dtype=torch.long)],
    "index_select": lambda y: y.index_select(1, torch.tensor([0, 2])),
    "gather": lambda y: y.gather(1, torch.zeros(y.shape[0], 1, 7, dtype=torch.long)),
    "flip": lambda y: y.flip(1),
    "roll": lambda y: y.roll(1, 1),
    "repeat": lambda y: y.repeat(1, 2, 1),
    "pad": lambda y: F.pad(y, (0, 1)),
    "unfold": lambda y: y.unfold(1, 2, 1),
    "pixel_shuffle": lambda y: F.pixel_shuffle(y.unflatten(-1, (7, 1))[:, :, :4].movedim(2, 1), 2),
    "pixel_unshuffle": lambda y: F.pixel_unshuffle(y[:, None, :2, :6], 2),
    "channel_shuffle": lambda y: torch.channel_shuffle(y.unsqueeze(-1).movedim(2, 1)[:, :6], 3),
    "diagonal": lambda y: y.diagonal(dim1=1, dim2=2),
    "real": lambda y: torch.view_as_complex(y[..., :6].unflatten(-1, (3, 2)).contiguous()),
    "reshape_as": lambda y: y.reshape_as(y.detach().permute(0, 2, 1)),
}


class Headed(nn.Module):
    def __init__(self, shaped):
        super().__init__()
        self.body, self.head, self.shaped = nn.Linear(6, 5), nn.Linear(5, 7), shaped

    def forward(self, x):
        return self.shaped(self.head(self.body(x).tanh()))


@pytest.mark.parametrize("name", HEADS)
def test_a_head_is_left_out_however_its_result_is_shaped(name):
    program = sp.capture(Headed(HEADS[name]), (torch.randn(4, 3, 6),), verify=False)
    assert [(s.name, s.head) for s in sp.sites(program)] == [("body.weight", False), ("head.weight", True)]
    assert sp.rewrite(program, LoRA(r=2), "*").lowered.keys() == {"body.weight"}


def test_what_picks_by_a_result_is_no_result():
    class Routed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.table = nn.Linear(6, 5), nn.Parameter(torch.randn(5, 3))

        def forward(self, x):
            return self.table.to(self.gate(x))[:2]

    assert not any(site.head for site in sp.sites(sp.capture(Routed(), (torch.randn(4, 6),))))


# what may be done with a weight [9, 6] that leaves it that weight
SAME = {
    "to_other": lambda w, x: w.to(x),
    "to_device": lambda w, x: w.to(x.device),
    "to_copied": lambda w, x: w.to(torch.float64, copy=True),
    "type_as": lambda w, x: w.type_as(x),
    "flatten": lambda w, x: w.flatten(1),
    "flatten_and_back": lambda w, x: w.flatten(0).view(9, 6),
    "view": lambda w, x: w.view(9, 6),
    "view_inferred": lambda w, x: w.view(9, -1),
    "reshape": lambda w, x: w.reshape(w.shape),
    "squeeze": lambda w, x: w.squeeze(),
    "squeeze_dims": lambda w, x: torch.ops.aten.squeeze.dims(w[None], [0]),
    "unsqueeze_and_back": lambda w, x: w.unsqueeze(0).squeeze(0),
    "unsqueeze_middle": lambda w, x: w.unsqueeze(1).squeeze(),
    "unsqueeze_last": lambda w, x: w.unsqueeze(-1).flatten(1),
    "selected": lambda w, x: w[None][0],
    "contiguous": lambda w, x: w.contiguous(),
    "clone": lambda w, x: w.clone(),
    "alias": lambda w, x: torch.ops.aten.alias(w),
    "expand": lambda w, x: w.expand(9, 6),
    "expand_of_one": lambda w, x: w.expand(1, 9, 6).squeeze(0),
    "broadcast_to": lambda w, x: w.broadcast_to(9, 6),
    "turned_twice": lambda w, x: w.T.mT,
    "moved": lambda w, x: w.movedim(0, 1).swapaxes(0, 1),
    "permuted": lambda w, x: w.permute(-2, 1),
    "unflatten": lambda w, x: w.unflatten(1, (1, 6)).squeeze(1),
    "narrow": lambda w, x: w.narrow(0, 0, 9),
    "positive": lambda w, x: torch.ops.aten.positive(w),
    "atleast": lambda w, x: torch.atleast_2d(w),
    "unbound": lambda w, x: w[None].unbind(0)[0],
}


def linear_site(view, x):
    program = sp.capture(Weighted(lambda x, w: F.linear(x, view(w, x)), (9, 6)).double(), (x,))
    (site,) = sp.sites(program)
    return program, site


def check_same_site(view):
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    program, site = linear_site(view, x)
    assert (site.kind, site.shape, site.layout.text()) == ("linear", (9, 6), "[out, in]")
    adapted = moved(sp.rewrite(program, DoRA(of=LoRA(r=2)), "exact:weights.0"))
    assert {lowered.form for lowered in adapted.lowered.values()} == {"factored"}
    torch.testing.assert_close(sp.fold(adapted).run(), adapted.run(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SAME)
def test_a_weight_is_the_same_site_behind_what_leaves_it(name):
    check_same_site(SAME[name])


@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from(sorted(SAME)), min_size=2, max_size=5))
def test_and_behind_several_of_them(names):
    def view(w, x):
        for name in names:
            w = SAME[name](w, x)
        return w

    check_same_site(view)


def test_a_tensor_that_gives_its_dtype_alone_is_not_used():
    program, site = linear_site(lambda w, x: w, torch.randn(4, 5, 6, dtype=torch.float64))
    program = sp.capture(
        Weighted(lambda x, w: F.linear(x.type_as(w) + torch.zeros_like(w).sum(), w), (9, 6)), (torch.randn(4, 6),)
    )
    assert sp.sites(program)[0].calls[0].form == site.calls[0].form == "linear"
    assert len(sp.sites(program)[0].calls) == 1


def test_a_kernel_of_one_that_is_flattened_is_a_matrix():
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = Weighted(lambda x, w: F.linear(x, w.flatten(1)) + F.linear(x, w.squeeze(2, 3)), (9, 6, 1, 1)).double()
    adapted = moved(sp.rewrite(sp.capture(model, (x,)), DoRA(of=LoRA(r=2)), lambda site: True))
    assert {lowered.form for lowered in adapted.lowered.values()} == {"factored"}
    torch.testing.assert_close(sp.fold(adapted).run(), adapted.run(), rtol=1e-12, atol=1e-12)


def test_a_kernel_that_is_flattened_is_a_matrix():
    x = torch.randn(4, 5, 12, dtype=torch.float64)
    model = Weighted(lambda x, w: F.linear(x, w.view(9, -1)) - x @ w.flatten(1).T, (9, 3, 2, 2)).double()
    adapted = moved(sp.rewrite(sp.capture(model, (x,)), DoRA(of=LoRA(r=2)), lambda site: True))
    assert {lowered.form for lowered in adapted.lowered.values()} == {"factored"}
    torch.testing.assert_close(sp.fold(adapted).run(), adapted.run(), rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_taken_apart_is_not_one_matrix():
    x = torch.randn(4, 5, 6, dtype=torch.float64)
    model = Weighted(lambda x, w: F.linear(x, w.view(6, 9).T), (9, 6)).double()
    (site,) = sp.sites(sp.capture(model, (x,)))
    assert site.kind == "other"
