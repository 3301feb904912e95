"""The laws that every method obeys, in float64 on non-square sites with bias."""

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

import subgraph_peft as sp
from subgraph_peft.graph.nodes import show
from subgraph_peft.graph.site import VECTORS
from subgraph_peft.passes import LoRA
from subgraph_peft.store.adapter_file import restore
from tests.methods import METHODS, WEIGHT_METHODS

SITES = ["wide", "tall", "bare", "conv1d"]
TOLERANCE = 1e-12


class Sites(nn.Module):
    """Linear layers wider than tall, taller than wide, without bias and stored [in, out]; `wide` is called twice."""

    def __init__(self, wide: int = 7, tall: int = 5):
        super().__init__()
        self.wide = nn.Linear(wide, tall)
        self.tall = nn.Linear(tall, wide)
        self.bare = nn.Linear(wide, tall + 1, bias=False)
        self.conv1d = Conv1D(3, tall + 1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.tall(torch.tanh(self.wide(x))))
        h = torch.tanh(self.bare(torch.sin(h) + x * 0.1) + self.bare(h))
        return self.head(torch.tanh(self.conv1d(h)) + self.wide(x).sum(-1, keepdim=True))


@cache
def program(wide: int = 7, tall: int = 5) -> sp.Program:
    torch.manual_seed(0)
    model = Sites(wide, tall).double()
    for conv in (model.conv1d,):
        nn.init.normal_(conv.bias)
    return sp.capture(model, torch.randn(3, 4, wide, dtype=torch.float64))


@pytest.fixture(scope="module")
def base() -> sp.Program:
    return program()


def adapt(base: sp.Program, method: sp.Method, **options) -> sp.Program:
    is_bias = method.defines("bias") and not method.defines("weight")
    return sp.rewrite(base, method, where="*" if is_bias else SITES, **options)


def shake(adapted: sp.Program, size: float = 0.3, seed: int = 1) -> sp.Program:
    """Random values in every trained tensor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in adapted.parameters(trainable=True):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return adapted


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-30)).item()


@pytest.mark.parametrize("name", METHODS)
def test_identity_at_step_0(base, name):
    assert relative(adapt(base, METHODS[name]).run(), base.run()) <= TOLERANCE


@pytest.mark.parametrize("name", WEIGHT_METHODS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10_000), sizes=st.sampled_from([(7, 5), (4, 9), (9, 2), (3, 3)]))
def test_training_form_equals_fold(name, seed, sizes):
    base = program(*sizes)
    adapted = shake(adapt(base, WEIGHT_METHODS[name]), seed=seed)
    folded = sp.fold(adapted)
    generator = torch.Generator().manual_seed(seed)
    inputs = {"x": torch.randn(2, 3, sizes[0], dtype=torch.float64, generator=generator)}
    assert relative(adapted.run(inputs), folded.run(inputs)) <= TOLERANCE
    assert relative(adapted.run(inputs), base.run(inputs)) > 1e-6


@pytest.mark.parametrize("name", METHODS)
def test_the_training_graph_computes_the_equation(base, name):
    """Against φ evaluated on tensors and put into the eager model: an oracle that shares no code with the lowering."""
    method = METHODS[name]
    if not method.foldable():
        pytest.skip("an output method has no weight equation")
    adapted = shake(adapt(base, method))
    model = Sites().double()
    model.load_state_dict({k: v for k, v in base.module.state_dict().items()})
    own = dict(adapted.module.named_parameters())
    with torch.no_grad():
        for site in adapted.adapters[0].sites:
            tensors = {t: own[path] for t, path in adapted.adapters[0].paths(site).items()}
            weight = model.get_parameter(site.name)
            if site.kind in VECTORS:
                weight.copy_(method.evaluate("bias", weight.clone(), tensors=tensors))
            elif method.defines("weight"):
                W = weight.T if site.kind == "addmm" else weight
                value = method.evaluate("weight", W.clone(), tensors=tensors)
                weight.copy_(value.T if site.kind == "addmm" else value)
                if site.bias and method.defines("bias") and not method.every_parameter:
                    bias = model.get_parameter(site.bias)
                    bias.copy_(method.evaluate("bias", bias.clone(), tensors=tensors))
        expected = model(base.example["x"])
    assert relative(adapted.run(), expected) <= TOLERANCE


@pytest.mark.parametrize("name", METHODS)
def test_fold_is_idempotent_and_gives_back_the_captured_graph(base, name):
    adapted = shake(adapt(base, METHODS[name]))
    before = {n: p.detach().clone() for n, p in adapted.module.named_parameters()}
    folded = sp.fold(adapted)
    again = sp.fold(folded)
    assert again is folded
    if METHODS[name].foldable():
        assert show(folded.graph) == show(base.graph)
        assert not folded.adapters
    else:
        assert folded is adapted
    assert all(torch.equal(p, before[n]) for n, p in adapted.module.named_parameters())


EACH = ["lora", "ssl", "ssb", "ia3_output", "ia3_input", "pissa_scaled", "milora", "dora", "bitfit", "parallel_adapter"]
ALSO = ["flora", "liera", "spectral_additive", "spectral_rotational"]
PAIRS = [(a, b) for a in EACH for b in EACH] + [pair for a in ALSO for pair in ((a, "lora"), ("lora", a))]
PAIRS += [("sam_parser", "lora"), ("svdiff", "lora"), ("mpc_n", "lora"), ("lora", "mpc_n"), ("vera", "adalora")]


@pytest.mark.parametrize(("first", "second"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_composition_equals_the_composed_fold(base, first, second):
    """φ₂(φ₁(W)) in the graph = folding φ₁, rewriting the result by φ₂ with the same tensors, folding that."""
    one = shake(adapt(base, METHODS[first]))
    two = adapt(one, METHODS[second])
    assert relative(two.run(), one.run()) <= TOLERANCE, "the second method starts at the identity"
    shake(two, seed=2)
    assert relative(two.run(), one.run()) > 1e-6
    assert relative(two.run(), sp.fold(two).run()) <= TOLERANCE
    if METHODS[first].foldable():
        folded = sp.fold(with_values(adapt(base, METHODS[first]), two))
        stepwise = with_values(adapt(folded, METHODS[second], name=two.adapters[1].name), two)
        assert relative(two.run(), sp.fold(stepwise).run()) <= TOLERANCE


def test_a_method_that_keeps_nothing_of_its_weight_takes_none_beneath_it(base):
    with pytest.raises(
        sp.MethodError, match="sam_parser keeps nothing of the weight it is given, so that lora beneath"
    ):
        adapt(adapt(base, METHODS["lora"]), METHODS["sam_parser"])


def with_values(target: sp.Program, source: sp.Program) -> sp.Program:
    """Copy the tensors that both have, frozen ones of the method included."""
    from subgraph_peft.compiler.constants import refresh

    values = dict(source.module.named_parameters())
    with torch.no_grad():
        for adapter in target.adapters:
            for _, _, path in adapter.all_paths():
                dict(target.module.named_parameters())[path].copy_(values[path])
    refresh(target.module, target.constants)
    return target


@pytest.mark.parametrize("name", METHODS)
def test_checkpoint_round_trip_is_bit_equal(base, name, tmp_path):
    adapted = shake(adapt(base, METHODS[name], trainable="head"))
    sp.save(adapted, tmp_path / "adapter")
    fresh = restore(adapt(base, METHODS[name], trainable="head", seed=5), tmp_path / "adapter")
    rebuilt = sp.load(base, tmp_path / "adapter")
    for other in (fresh, rebuilt):
        theirs = dict(other.module.named_parameters())
        assert all(torch.equal(p, theirs[n]) for n, p in adapted.module.named_parameters())
        assert {n for n, _ in other.parameters(trainable=True)} == {n for n, _ in adapted.parameters(trainable=True)}
        assert torch.equal(other.run(), adapted.run())


# METHODS: the tensors whose gradient is not zero at step 0
MOVES = {
    "lora": {"B"},
    "rslora": {"B"},
    "ssl": {"c"},
    "ssb": {"rho", "c"},
    "ia3_output": {"l"},
    "ia3_input": {"l"},
    "ia3_weight": {"l"},
    "pissa": {"A", "B"},
    "pissa_scaled": {"A", "B"},
    "pissa_fast": {"A", "B"},
    "milora": {"A", "B"},
    "dora": {"B", "m"},
    "dora_full_gradient": {"B", "m"},
    "dora_pissa": {"A", "B", "m"},
    "sam_parser": {"s"},
    "trilora": {"e"},
    "flora": {"G"},
    "moslora": {"B"},
    "liera": {"B"},
    "liera_exponential": {"B"},
    "svdiff": {"delta"},
    "spectral_additive": {"A_U", "A_V"},
    "spectral_rotational": {"X_U", "X_V", "d"},
    "dora_ssb": {"rho", "c", "m"},
    "bitfit": {"delta"},
    "parallel_adapter": {"U", "bu"},
    "dora_vera": {"b", "m"},
    "vera": {"b"},
    "adalora": {"e"},
    "lora_dash": {"B"},
    "diff_pruning": {"w"},
    "mpc_o": {"B"},
    "mpc_d": {"G"},
    "houlsby": {"U", "bu"},
    "mpc_n": {"B"},
}
WAIT = (".g",)  # LoRA-Dash's directions, until its switch  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_gradients_at_step_0(base, name):
    adapted = adapt(base, METHODS[name])
    adapted.module(**base.example).square().sum().backward()
    grads: dict[str, list[float]] = {}
    for _, tensor, path in adapted.adapters[0].all_paths():
        parameter = adapted.module.get_parameter(path)
        if parameter.requires_grad:
            grads.setdefault(tensor, []).append(parameter.grad.abs().max().item())
    assert {tensor for tensor, sizes in grads.items() if min(sizes) > 0} == MOVES[name]
    assert {tensor for tensor, sizes in grads.items() if max(sizes) == 0} == set(grads) - MOVES[name]


@pytest.mark.parametrize("name", METHODS)
def test_frozen_means_frozen_and_every_trained_tensor_moves(base, name):
    adapted = adapt(base, METHODS[name])
    before = {n: t.detach().clone() for n, t in adapted.tensors()}
    trained = [p for _, p in adapted.parameters(trainable=True)]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    adapted.module.train()
    for _ in range(5):
        optimizer.zero_grad()
        adapted.module(**base.example).square().mean().backward()
        optimizer.step()
    for path, tensor in adapted.tensors():
        moved = not torch.equal(tensor, before[path])
        assert moved == (getattr(tensor, "requires_grad", False) and not path.endswith(WAIT)), path


def test_dropout_acts_on_the_low_rank_term_only_and_only_in_training(base):
    adapted = shake(adapt(base, LoRA(r=2, dropout=0.5)))
    plain = shake(adapt(base, LoRA(r=2)))
    assert torch.equal(adapted.run(), plain.run())
    adapted.module.train()
    assert not torch.equal(adapted.module(**base.example), adapted.module(**base.example))
    lines = show(adapted.graph).splitlines()
    assert "wide_lora_dropout = dropout(x, 0.5, True)" in lines
    assert "wide_lora_A = linear(wide_lora_dropout, wide.weight_lora.A)" in lines
    assert "wide_base = linear(x, wide.weight, wide.bias)" in lines


def test_ssl_scales_columns_ssb_both_ia3_rows_and_bias():
    from subgraph_peft.passes import IA3, SSB, SSL

    W = torch.arange(6.0).reshape(3, 2) + 1
    c, rho = torch.tensor([2.0, 1.0]), torch.tensor([1.0, 3.0, 1.0])
    assert torch.equal(SSL().weight(W, c), torch.stack([W[:, 0] * 2, W[:, 1]], dim=1))
    assert torch.equal(SSB().weight(W, rho, c), torch.diag(rho) @ W @ torch.diag(c))
    assert torch.equal(IA3().weight(W, rho), torch.diag(rho) @ W)
    assert torch.equal(IA3().bias(torch.ones(3), rho), rho)
    assert torch.equal(IA3(scale="weight").bias(torch.ones(3), rho), torch.ones(3))


def test_dora_row_norms_are_m_and_a_zero_row_stays_finite():
    from subgraph_peft.passes import DoRA

    torch.manual_seed(0)
    W, A, B, m = (
        torch.randn(5, 3).double(),
        torch.randn(2, 3).double(),
        torch.randn(5, 2).double(),
        torch.rand(5).double(),
    )
    phi = DoRA(of=LoRA(r=2)).weight(W, m, A=A, B=B)
    assert torch.allclose(phi.norm(dim=1), m, atol=1e-14)
    W[2], B[2] = 0, 0
    assert torch.isfinite(DoRA(of=LoRA(r=2)).weight(W, m, A=A, B=B)).all()


def test_pissa_residual_and_conversion():
    from subgraph_peft.passes import PiSSA

    torch.manual_seed(0)
    W = torch.randn(6, 9).double()
    site = sp.Site("w", "linear", (6, 9), torch.float64, ())
    method = PiSSA(r=2, alpha=6.0)
    t = method.prepare(site, W)
    residual = W - method.s * t["B0"] @ t["A0"]
    sigma = torch.linalg.svdvals(W)
    assert torch.allclose(torch.linalg.matrix_norm(residual, 2), sigma[2])
    A, B = t["A"] + torch.randn(2, 9).double(), t["B"] + torch.randn(6, 2).double()
    as_lora = method.s * torch.cat([B, -t["B0"]], 1) @ torch.cat([A, t["A0"]], 0)
    assert torch.allclose(method.weight(W, A, B, t["A0"], t["B0"]), W + as_lora, atol=1e-13)


def test_milora_keeps_the_principal_part_in_the_residual():
    from subgraph_peft.passes import MiLoRA

    torch.manual_seed(0)
    W = torch.randn(6, 9).double()
    method = MiLoRA(r=2)
    t = method.prepare(sp.Site("w", "linear", (6, 9), torch.float64, ()), W)
    residual = W - t["B0"] @ t["A0"]
    assert torch.allclose(torch.linalg.matrix_norm(residual, 2), torch.linalg.svdvals(W)[0])
    assert torch.allclose(torch.linalg.svdvals(t["B0"] @ t["A0"])[:2], torch.linalg.svdvals(W)[-2:])
