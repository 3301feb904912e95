"""What is particular to one method: known cases, edges of the rank, convolutions, printed equations, counts."""

import math
import re

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.graph.nodes import show
from subgraph_peft.method.formula import count_formula, equations, shapes
from subgraph_peft.method.svd import cayley
from subgraph_peft.passes import (
    DoRA,
    FLoRA,
    LieRA,
    LoRA,
    MiLoRA,
    MoSLoRA,
    PiSSA,
    SAMParser,
    SpectralAdditive,
    SpectralRotational,
    SVDiff,
    TriLoRA,
)
from subgraph_peft.program.internals import internals
from tests.compiler.test_laws import relative, shake

OUT, IN = 6, 9
SITE = sp.Site("w", "linear", (OUT, IN), torch.float64, ())
DECOMPOSING = [PiSSA, MiLoRA, SpectralAdditive, SpectralRotational]
RANKED = [*DECOMPOSING, TriLoRA, FLoRA, MoSLoRA, LieRA]


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def started(method: sp.Method, W: torch.Tensor) -> dict[str, torch.Tensor]:
    from subgraph_peft.compiler.initial_values import Job, prepare_group
    from subgraph_peft.method.method import initial

    _, prepared = next(prepare_group([Job(method, SITE)], lambda site: W, W.device))
    values = initial(method, SITE, prepared, torch.Generator().manual_seed(0))
    return {name: value.double().clone() for name, (_, value) in values.items()}


def phi(method: sp.Method, W: torch.Tensor, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    return method.evaluate("weight", W, tensors=tensors)


# PiSSA, MiLoRA


@pytest.mark.parametrize(
    ("method", "chosen"),
    [
        (PiSSA(r=2), (0, 1)),
        (PiSSA(r=2, components="medium"), (2, 3)),
        (PiSSA(r=3, components="medium"), (1, 2, 3)),
        (PiSSA(r=2, components="minor"), (4, 5)),
        (MiLoRA(r=2, alpha=6.0), (4, 5)),
    ],
)
def test_the_residual_keeps_the_other_singular_values(method, chosen):
    W = random(OUT, IN)
    start = started(method, W)
    sigma = torch.linalg.svdvals(W)
    kept = [s for i, s in enumerate(sigma.tolist()) if i not in chosen]
    residual = torch.linalg.svdvals(W - method.s * start["B0"] @ start["A0"])
    assert torch.allclose(residual, torch.tensor(kept + [0.0] * len(chosen), dtype=torch.float64), atol=1e-12)
    moved = torch.linalg.svdvals(method.s * start["B"] @ start["A"])[: method.r]
    assert torch.allclose(moved, sigma[list(chosen)], atol=1e-12)


def test_the_fast_decomposition_is_for_principal_components():
    with pytest.raises(sp.MethodError, match=r"niter = 4\) finds principal components, not medium ones"):
        PiSSA(components="medium", niter=4)
    with pytest.raises(sp.MethodError, match="option 'niter'"):
        MiLoRA(niter=4)


@pytest.mark.parametrize("method", [MiLoRA(r=2), PiSSA(r=5)])
def test_a_rank_deficient_weight_leaves_no_factor_dead(method):
    W = random(OUT, 3) @ random(3, IN)
    start = {name: value.requires_grad_() for name, value in started(method, W).items()}
    assert relative(phi(method, W, start), W) <= 1e-14
    (phi(method, W, start) * random(OUT, IN)).sum().backward()
    least = math.sqrt(torch.finfo(torch.float32).eps)
    assert start["A"].grad.norm(dim=1).min() > least and start["B"].grad.norm(dim=0).min() > least
    with pytest.raises(sp.MethodError, match=f"{method.name} at w: W is zero"):
        started(method, torch.zeros(OUT, IN))


# SAM-PARSER, SVDiff, Spectral Adapter


def test_sam_parser_takes_any_value_and_svdiff_none_below_zero():
    W = random(OUT, IN)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    start = started(SAMParser(), W)
    assert torch.allclose(start["s"], sigma)
    negative = {**start, "s": -start["s"]}
    assert torch.allclose(phi(SAMParser(), W, negative), -W)
    start = started(SVDiff(s=0.5), W)
    moved = {**start, "delta": torch.tensor([1.0, 0, 0, 0, 0, -9], dtype=torch.float64)}
    expected = U @ torch.diag(torch.cat([sigma[:1] + 0.5, sigma[1:5], sigma.new_zeros(1)])) @ Vh
    assert sigma[-1] < 4.5 and torch.allclose(phi(SVDiff(s=0.5), W, moved), expected)


@pytest.mark.parametrize("method", [SAMParser(), SVDiff()], ids=["sam_parser", "svdiff"])
def test_factors_of_the_whole_weight_leave_nothing_of_a_method_beneath(narrow, method):
    lora = sp.rewrite(narrow, LoRA(r=1), where="from_one")
    with pytest.raises(sp.MethodError, match=f"{method.name} keeps nothing .* lora beneath it would have no effect"):
        sp.rewrite(lora, method, where="from_one")
    folded = sp.rewrite(sp.fold(shake(lora)), method, where="from_one")
    assert relative(folded.run(), lora.run()) <= 1e-12


def test_svdiff_below_zero_is_zero_with_a_finite_gradient():
    W = random(OUT, IN)
    start = started(SVDiff(), W)
    start["delta"] = (-2 * start["sigma"]).requires_grad_()
    value = phi(SVDiff(), W, start)
    assert torch.equal(value, torch.zeros_like(W))
    value.sum().backward()
    assert torch.equal(start["delta"].grad, torch.zeros(OUT, dtype=torch.float64))


@pytest.mark.parametrize("size", [0.1, 30.0])
def test_cayley_is_orthogonal(size):
    X = size * random(4, 4)
    Q, K = cayley(X), (X - X.T) / 2
    eye = torch.eye(4, dtype=torch.float64)
    assert relative(Q.T @ Q, eye) <= 1e-13
    assert relative(Q, (eye - K) @ torch.linalg.inv(eye + K)) <= 1e-12
    assert torch.equal(cayley(torch.zeros(4, 4)), torch.eye(4))


def test_a_rotation_keeps_the_singular_values_of_the_rotated_part():
    W = random(OUT, IN)
    U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
    for r in (1, 3, OUT):
        method = SpectralRotational(r=r)
        moved = {**started(method, W), "X_U": random(r, r), "X_V": random(r, r)}
        value = phi(method, W, moved)
        assert torch.allclose(torch.linalg.svdvals(value), sigma, atol=1e-12)
        assert (relative(value, W) > 0.1) == (r > 1), "a rotation of one dimension is the identity"
    method = SpectralRotational(r=2, scale=True)
    moved = {**started(method, W), "d": torch.tensor([3.0, 2.0], dtype=torch.float64)}
    assert torch.allclose(torch.linalg.svdvals(phi(method, W, moved))[:2], sigma[:2] * moved["d"])


def test_the_additive_update_in_its_three_terms():
    """ΔW = A_U σ Vᵀ + U σ A_Vᵀ + A_U σ A_Vᵀ, of rank 2r at most."""
    W = random(OUT, IN)
    U, sigma, Vh = (t[..., :2] if i < 2 else t[:2] for i, t in enumerate(torch.linalg.svd(W, full_matrices=False)))
    method = SpectralAdditive(r=2)
    start = started(method, W)
    signs = torch.diag(U.T @ start["U"]).round()
    A_U, A_V, S = random(OUT, 2), random(IN, 2), torch.diag(sigma)
    update = A_U @ S @ Vh + U @ S @ A_V.T + A_U @ S @ A_V.T
    moved = {**start, "A_U": A_U * signs, "A_V": A_V * signs}
    assert torch.allclose(phi(method, W, moved) - W, update)
    assert torch.linalg.matrix_rank(update) == 4


# extensions


def test_mosloras_mixer_and_triloras_diagonal_fold_into_a_plain_lora():
    W = random(OUT, IN)
    plain = LoRA(r=2, alpha=5.0)
    t = {"A": random(2, IN), "B": random(OUT, 2), "M": random(2, 2), "G": random(2, 2), "e": random(2)}
    mixed = {"A": t["M"] @ t["A"], "B": t["B"]}
    assert torch.allclose(phi(MoSLoRA(r=2, alpha=5.0), W, t), phi(plain, W, mixed))
    scaled = {"A": torch.diag(t["e"]) @ t["A"], "B": t["B"]}
    assert torch.allclose(phi(TriLoRA(r=2, alpha=5.0), W, t), phi(plain, W, scaled))
    core = {"A": t["G"] @ t["A"], "B": t["B"]}
    given = {name: t[name] for name in "ABG"}
    assert torch.allclose(phi(FLoRA(r=2, alpha=5.0), W, given), phi(plain, W, core))


def test_liera_keeps_zeros_and_its_exponential_the_signs():
    W = random(OUT, IN) * (torch.rand(OUT, IN) > 0.3)
    t = {"A": random(2, IN), "B": random(OUT, 2)}
    first, exact = (phi(LieRA(r=2, alpha=2.0, exponential=e), W, t) for e in (False, True))
    assert torch.equal(first == 0, W == 0) and torch.equal(exact.sign(), W.sign())
    assert not torch.equal(first.sign(), W.sign())
    assert torch.allclose(first, W * (1 + t["B"] @ t["A"])) and torch.allclose(exact, W * torch.exp(t["B"] @ t["A"]))
    assert torch.linalg.matrix_rank(first - W) == OUT, "the update is not of low rank"
    small = {"A": t["A"], "B": 1e-5 * t["B"]}
    first, exact = (phi(LieRA(r=2, alpha=2.0, exponential=e), W, small) for e in (False, True))
    assert 0 < relative(first, exact) < 1e-8


@pytest.mark.parametrize("exponential", [False, True])
def test_lieras_dropout_acts_on_the_update_alone(exponential):
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh()).double()
    base = sp.capture(model, random(3, 5))
    adapted = sp.rewrite(base, LieRA(r=2, dropout=0.5, exponential=exponential), where="0")
    adapted.module.train()
    assert torch.equal(adapted.module(**base.example), base.run()), "with B = 0 there is nothing to drop"
    assert "_0_base = linear(input_1, 0.weight, 0.bias)" in show(adapted.graph).splitlines()
    dropping, plain = shake(adapted), shake(sp.rewrite(base, LieRA(r=2, exponential=exponential), where="0"))
    assert relative(dropping.run(), plain.run()) <= 1e-14
    assert not torch.equal(adapted.module(**base.example), adapted.module(**base.example))


# convolutions


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        self.two = nn.Conv2d(3, 6, (3, 2), stride=2, padding=1, dilation=(1, 2))
        self.one = nn.Conv1d(6, 5, 3, padding=2, dilation=2)
        self.grouped = nn.Conv1d(5, 5, 3, groups=5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.grouped(torch.tanh(self.one(torch.tanh(self.two(x)).flatten(2))))


@pytest.fixture(scope="module")
def convolutions() -> sp.Program:
    torch.manual_seed(0)
    return sp.capture(Convolutions().double(), random(2, 3, 8, 9))


CONVOLVING = [
    SAMParser(), SVDiff(), PiSSA(r=2), MiLoRA(r=2), TriLoRA(r=2), FLoRA(r=2), FLoRA(r=2, kernel_r=1), MoSLoRA(r=2),
    LieRA(r=2), SpectralAdditive(r=2), SpectralRotational(r=2, scale=True), DoRA(of=FLoRA(r=2)),
]  # fmt: skip


@pytest.mark.parametrize("method", CONVOLVING, ids=[f"{i}-{m.name}" for i, m in enumerate(CONVOLVING)])
def test_convolutions(convolutions, method):
    adapted = sp.rewrite(convolutions, method, where=["two", "one"])
    assert relative(adapted.run(), convolutions.run()) <= 1e-12
    shake(adapted)
    assert relative(adapted.run(), convolutions.run()) > 1e-6
    assert relative(adapted.run(), sp.fold(adapted).run()) <= 1e-12
    dense = {name for name, lowered in adapted.lowered.items() if lowered.dense}
    assert bool(dense) == (method.name == "liera")


def test_floras_core_is_the_tucker_product(convolutions):
    adapted = shake(sp.rewrite(convolutions, FLoRA(r=2, alpha=6.0), where=["two", "one", "grouped"]))
    changed, K = dict(sp.fold(adapted).module.named_parameters()), dict(convolutions.module.named_parameters())
    letters = {"two": "bacd,ai,ob,ck,dl->oikl", "one": "bac,ai,ob,ck->oik", "grouped": "bac,ai,ob,ck->oik"}
    assert "grouped convolution" in adapted.lowered["grouped.weight"].dense[0]
    for name, formula in letters.items():
        own = {t: adapted.module.get_parameter(f"{name}.weight_flora.{t}") for t in "GABCD"[: formula.index("->") // 3]}
        assert own["G"].ndim == K[f"{name}.weight"].ndim
        update = torch.einsum(formula, *own.values())
        assert torch.allclose(changed[f"{name}.weight"], K[f"{name}.weight"] + 3.0 * update)


# edges


@pytest.fixture(scope="module")
def narrow() -> sp.Program:
    class Narrow(nn.Module):
        def __init__(self):
            super().__init__()
            self.to_one, self.single, self.from_one = nn.Linear(5, 1), nn.Linear(1, 1), nn.Linear(1, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.from_one(torch.tanh(self.single(torch.tanh(self.to_one(x)))))

    torch.manual_seed(0)
    return sp.capture(Narrow().double(), random(3, 5))


SMALL = [SAMParser(), SVDiff(), *(cls(r=1) for cls in RANKED)]


@pytest.mark.parametrize("method", SMALL, ids=[m.name for m in SMALL])
def test_a_feature_of_one(narrow, method):
    sites = ["to_one", "single", "from_one"]
    adapted = sp.rewrite(narrow, method, where=sites)
    assert relative(adapted.run(), narrow.run()) <= 1e-12
    shake(adapted)
    assert (relative(adapted.run(), narrow.run()) > 1e-6) == (method.name != "spectral_rotational")
    assert relative(adapted.run(), sp.fold(adapted).run()) <= 1e-12
    if type(method) in DECOMPOSING:
        with pytest.raises(sp.MethodError, match=rf"{method.name} at .*: r = 2 exceeds min\(in, out\) = 1"):
            sp.rewrite(narrow, type(method)(r=2), where=sites)


@pytest.mark.parametrize("cls", RANKED, ids=[cls.name for cls in RANKED])
def test_a_rank_of_all_singular_values(cls):
    W = random(OUT, IN)
    method = cls(r=OUT)
    start = started(method, W)
    assert relative(phi(method, W, start), W) <= 1e-12
    moved = {name: value + 0.3 * random(*value.shape) for name, value in start.items()}
    assert torch.isfinite(phi(method, W, moved)).all()


def test_factors_stay_in_float32_beside_a_bfloat16_model():
    model = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 5)).bfloat16()
    base = sp.capture(model, torch.randn(4, 12, dtype=torch.bfloat16))
    for method in (SAMParser(), MiLoRA(r=2), SpectralRotational(r=2), SpectralAdditive(r=2), LieRA(r=2)):
        adapted = sp.rewrite(base, method, where=["0", "2"])
        assert {p.dtype for a in adapted.adapters for _, _, n in a.all_paths()
                for p in [adapted.module.get_parameter(n)]} == {torch.float32}  # fmt: skip
        assert relative(adapted.run().float(), base.run().float()) < 2e-2
        adapted.module(**base.example).float().square().sum().backward()
        assert all(p.grad.isfinite().all() for _, p in adapted.parameters(trainable=True))


# printing, counting

PRINTED = {
    SAMParser(): ("U diag(s) Vh", "min(in, out)"),
    SVDiff(): ("U diag(ReLU(σ + s δ)) Vh", "min(in, out)"),
    PiSSA(components="medium"): ("W − (α/r) B₀ A₀ + (α/r) B A", "r·in + out·r"),
    TriLoRA(): ("W + (α/r) B diag(e) A", "r·in + out·r + r"),
    FLoRA(): ("W + (α/r) B G A", "r·in + out·r + r·r"),
    MoSLoRA(): ("W + (α/r) B M A", "r·in + out·r + r·r"),
    LieRA(): ("W ⊙ (1 + (α/r) B A)", "r·in + out·r"),
    LieRA(exponential=True): ("W ⊙ exp((α/r) B A)", "r·in + out·r"),
    SpectralAdditive(): ("W − U diag(σ) Vᵀ + (U + A_U) diag(σ) (V + A_V)ᵀ", "out·r + in·r"),
    SpectralRotational(): ("W − U diag(σ) Vᵀ + U Q(X_U) diag(σ) (V Q(X_V))ᵀ", "r·r + r·r"),
    DoRA(of=SAMParser()): ("diag(m/‖U diag(s) Vh‖) U diag(s) Vh", "min(in, out) + out"),
}


@pytest.mark.parametrize("method", PRINTED, ids=[f"{i}-{m.name}" for i, m in enumerate(PRINTED)])
def test_equations_as_printed(method):
    equation, count = PRINTED[method]
    assert equations(method) == {"weight": equation} and count_formula(method) == count
    assert all(re.fullmatch(r"[a-z(), ]+|\d+", size) for sizes in shapes(method).values() for size in sizes)


def test_sizes_are_told_apart():
    found = shapes(SAMParser())
    assert found == {"s": ("min(in, out)",), "U": ("out", "min(in, out)"), "Vh": ("min(in, out)", "in")}

    class Wide(LoRA):
        other: int = 8

        def tensors(self, site: sp.Site) -> dict:
            from subgraph_peft.method.tensors import trainable

            return {"P": trainable(self.r, self.other, 3), "Q": trainable(site.out_features // 2)}

    assert shapes(Wide(r=8)) == {"P": ("r", "other", "3"), "Q": ("out/2",)}


def test_counts_on_the_six_sites_of_a_deberta_layer():
    def count(method: sp.Method) -> int:
        sizes = [(768, 768)] * 4 + [(3072, 768), (768, 3072)]
        sites = [sp.Site("w", "linear", size, torch.float32, ()) for size in sizes]
        tensors = (tensor for site in sites for tensor in method.tensors(site).values())
        return 12 * sum(math.prod(tensor.shape) for tensor in tensors if tensor.trainable)

    lora = 331_776
    assert count(LoRA(r=2)) == lora and count(SAMParser()) == count(SVDiff()) == 55_296
    assert count(PiSSA(r=2)) == count(MiLoRA(r=2)) == count(LieRA(r=2)) == count(SpectralAdditive(r=2)) == lora
    assert count(FLoRA(r=2)) == count(MoSLoRA(r=2)) == lora + 72 * 4 and count(TriLoRA(r=2)) == lora + 72 * 2
    assert count(SpectralRotational(r=2)) == 72 * 2 * 4 and count(SpectralRotational(r=2, scale=True)) == 72 * (8 + 2)


def test_a_wrapper_whose_tensor_is_the_inner_methods_too_is_refused(narrow):
    with pytest.raises(sp.MethodError, match="dora and dora inside it both have a tensor 'm'"):
        sp.rewrite(narrow, DoRA(of=DoRA()), where="from_one")


def test_constants_are_computed_anew_in_their_own_memory():
    """Recorded work goes on reading the buffers of constants: a new value stands where the old one stood."""
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
    program = sp.rewrite(sp.capture(model, torch.randn(3, 6)), DoRA(of=LoRA(r=2)), where="0")
    (path,) = program.constants
    held = program.module.get_buffer(path)
    before = held.clone()
    with torch.no_grad():
        program.module.get_parameter("0.weight").mul_(2.0)
    internals(program.module).recompute(program.module)
    assert program.module.get_buffer(path) is held
    torch.testing.assert_close(held, 4 * before)
