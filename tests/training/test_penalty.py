"""Penalties against numbers worked out by hand: matrix pattern constraints, AdaLoRA's regulariser, the trainer."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.compiler.fold import folds
from subgraph_peft.passes import (
    IA3,
    SSB,
    SSL,
    AdaLoRA,
    Blocks,
    DiffPruning,
    DoRA,
    FLoRA,
    LoRA,
    LoRADash,
    MiLoRA,
    MoSLoRA,
    MPCd,
    MPCn,
    MPCo,
    ParallelAdapter,
    PiSSA,
    SAMParser,
    SVDiff,
    TriLoRA,
    VeRA,
)
from subgraph_peft.pipeline.data import Examples
from subgraph_peft.training.options import TrainOptions
from subgraph_peft.training.penalty import has_penalty
from subgraph_peft.training.step_optimizer import parameter_groups
from subgraph_peft.training.train import train
from tests import models
from tests.models import VOCABULARY

SITES = ["wide", "tall", "same"]
FACTORED = {
    "lora": LoRA(r=3, alpha=5.0),
    "trilora": TriLoRA(r=3),
    "flora": FLoRA(r=3),
    "moslora": MoSLoRA(r=3),
    "pissa": PiSSA(r=3),
    "milora": MiLoRA(r=3),
    "lora_dash": LoRADash(r=3, directions=2),
    "dora": DoRA(of=LoRA(r=3, alpha=5.0)),
    "adalora": AdaLoRA(r=3, target_r=1, orthogonal=0.0),
}


class Three(nn.Module):
    """Sites wider than tall, taller than wide, and another of the first one's shape."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.same, self.head = nn.Linear(7, 5), nn.Linear(5, 7), nn.Linear(7, 5), nn.Linear(5, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.same(torch.tanh(self.tall(torch.tanh(self.wide(x)))))))


@pytest.fixture(scope="module")
def base() -> sp.Program:
    torch.manual_seed(0)
    return sp.capture(Three().double(), torch.randn(4, 7, dtype=torch.float64))


def factors(program: sp.Program) -> list[tuple[nn.Parameter, nn.Parameter]]:
    adapter = program.adapters[-1]
    read = program.module.get_parameter
    return [tuple(read(adapter.path(site, name)) for name in ("A", "B")) for site in adapter.sites]


def shake(program: sp.Program, seed: int = 1, size: float = 0.4) -> sp.Program:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in program.parameters(trainable=True):
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return program


def slow(A: torch.Tensor, B: torch.Tensor, diagonal: bool) -> tuple[float, float]:
    """(‖AAᵀ − I‖²_F, ‖BᵀB − I‖²_F, or without B's diagonal) entry by entry."""
    r = A.shape[0]
    first = second = 0.0
    for i in range(r):
        for j in range(r):
            first += (sum((A[i, k] * A[j, k]).item() for k in range(A.shape[1])) - (i == j)) ** 2
            if not (diagonal and i == j):
                second += (sum((B[k, i] * B[k, j]).item() for k in range(B.shape[0])) - (i == j)) ** 2
    return first, second


@pytest.mark.parametrize("inner", FACTORED.values(), ids=FACTORED)
@pytest.mark.parametrize("wrapper", [MPCo, MPCd])
@pytest.mark.parametrize("form", ["squared_sum", "unsquared_mean"])
def test_value_and_gradient_over_every_method_with_factors(base, inner, wrapper, form):
    program = shake(sp.rewrite(base, wrapper(of=inner, coefficient=0.25, form=form), where=SITES))
    pairs = factors(program)
    terms = [slow(A.detach(), B.detach(), wrapper is MPCd) for A, B in pairs]
    if form == "squared_sum":
        expected = sum(a + b for a, b in terms)
    else:
        expected = sum(math.sqrt(a) + math.sqrt(b) for a, b in terms) / (2 * len(pairs))
    penalty = sp.penalty(program)
    assert penalty.shape == () and penalty.item() == pytest.approx(0.25 * expected, rel=1e-12)
    penalty.backward()
    held = {id(p) for pair in pairs for p in pair}
    for name, p in program.parameters(trainable=True):
        assert (p.grad is not None and bool(p.grad.any())) == (id(p) in held), name
    for A, B in pairs:
        copies = [p.detach().clone().requires_grad_() for p in (A, B)]
        eye = torch.eye(3, dtype=torch.float64)
        gram_a, gram_b = copies[0] @ copies[0].T - eye, copies[1].T @ copies[1]
        gram_b = gram_b * (1 - eye) if wrapper is MPCd else gram_b - eye
        parts = [gram.square().sum() for gram in (gram_a, gram_b)]
        (0.25 * (sum(parts) if form == "squared_sum" else sum(p.sqrt() for p in parts) / 6)).backward()
        torch.testing.assert_close(A.grad, copies[0].grad, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(B.grad, copies[1].grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("wrapper", [MPCo, MPCd])
def test_a_constraint_changes_neither_the_function_nor_the_count(base, wrapper):
    plain, constrained = (sp.rewrite(base, m, where=SITES) for m in (LoRA(r=3), wrapper(of=LoRA(r=3))))
    assert plain.counts() == constrained.counts()
    assert torch.equal(shake(plain).run(), shake(constrained).run())
    torch.testing.assert_close(sp.fold(constrained).run(), constrained.run(), rtol=1e-12, atol=1e-13)
    assert sp.penalty(plain).item() == 0 and not has_penalty(plain) and has_penalty(constrained)


def with_factors(base: sp.Program, method: sp.Method, A: torch.Tensor, B: torch.Tensor) -> sp.Program:
    """At `wide` [5, 7] alone."""
    program = sp.rewrite(base, method, where="wide")
    own_a, own_b = factors(program)[0]
    with torch.no_grad():
        own_a.copy_(A)
        own_b.copy_(B)
    return program


def orthonormal(rows: int, columns: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(columns, rows, generator=torch.Generator().manual_seed(3)).double())[0].T


@pytest.mark.parametrize("form", ["squared_sum", "unsquared_mean"])
def test_orthonormal_factors_cost_nothing(base, form):
    A, B = orthonormal(3, 7), orthonormal(3, 5).T
    for wrapper in (MPCo, MPCd):
        program = with_factors(base, wrapper(of=LoRA(r=3), coefficient=1.0, form=form), A, B)
        assert sp.penalty(program).item() < 1e-14
        sp.penalty(program).backward()
        assert all(torch.isfinite(p.grad).all() for pair in factors(program) for p in pair)


@pytest.mark.parametrize(("form", "expected"), [("squared_sum", 3.0), ("unsquared_mean", math.sqrt(3) / 2)])
def test_a_zero_b_costs_r_and_stays_where_it_is(base, form, expected):
    """‖−I_r‖² = r; unsquared √r, halved by the mean over A and B. No gradient in B, and a finite one."""
    program = with_factors(base, MPCo(of=LoRA(r=3), coefficient=1.0, form=form), orthonormal(3, 7), torch.zeros(5, 3))
    assert sp.penalty(program).item() == pytest.approx(expected, rel=1e-12)
    sp.penalty(program).backward()
    A, B = factors(program)[0]
    assert not B.grad.any() and torch.isfinite(A.grad).all()
    program = with_factors(base, MPCd(of=LoRA(r=3), coefficient=1.0, form=form), orthonormal(3, 7), torch.zeros(5, 3))
    assert sp.penalty(program).item() < 1e-14
    sp.penalty(program).backward()
    A, B = factors(program)[0]
    assert torch.equal(B.grad, torch.zeros_like(B)) and torch.isfinite(A.grad).all()


def test_scaled_orthogonal_columns_are_free_in_the_diagonal_form(base):
    A, B = orthonormal(3, 7), orthonormal(3, 5).T * torch.tensor([0.5, 2.0, 3.0])
    assert sp.penalty(with_factors(base, MPCd(of=LoRA(r=3), coefficient=1.0), A, B)).item() < 1e-26
    expected = (0.25 - 1) ** 2 + (4 - 1) ** 2 + (9 - 1) ** 2
    assert sp.penalty(with_factors(base, MPCo(of=LoRA(r=3), coefficient=1.0), A, B)).item() == pytest.approx(expected)


@pytest.mark.parametrize("form", ["squared_sum", "unsquared_mean"])
def test_one_direction_has_no_off_diagonal(base, form):
    A, B = orthonormal(1, 7), 3 * orthonormal(1, 5).T
    program = with_factors(base, MPCd(of=LoRA(r=1), coefficient=1.0, form=form), A, B)
    assert sp.penalty(program).item() < 1e-14
    sp.penalty(program).backward()
    assert all(torch.isfinite(p.grad).all() for pair in factors(program) for p in pair)


@pytest.mark.parametrize("wrapper", [MPCo, MPCd, MPCn])
@pytest.mark.parametrize(
    ("inner", "why"),
    [
        (SSB(), "ssb has no such A"),
        (SSL(), "ssl has no such A"),
        (VeRA(r=4), "vera has no such A"),
        (IA3(), "ia3 has no such A"),
        (SVDiff(), "svdiff has no such A"),
        (SAMParser(), "sam_parser has no such A"),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_a_method_without_trained_factors_is_refused(base, wrapper, inner, why):
    with pytest.raises(sp.MethodError, match=f"{wrapper.name} needs a method with trained factors A and B; {why}"):
        sp.rewrite(base, wrapper(of=inner), where=SITES)


def test_an_output_method_inside_a_constraint_is_refused():
    with pytest.raises(sp.MethodError, match="needs a weight method that folds inside; parallel_adapter is none"):
        MPCo(of=ParallelAdapter())


def test_the_squared_form_over_per_site_ranks(base):
    program = shake(sp.rewrite(base, MPCo(of=LoRA(r=2), coefficient=1.0), where=SITES, patterns={"same": {"r": 4}}))
    assert [A.shape[0] for A, _ in factors(program)] == [2, 2, 4]
    expected = sum(sum(slow(A.detach(), B.detach(), False)) for A, B in factors(program))
    assert sp.penalty(program).item() == pytest.approx(expected, rel=1e-12)
    own = sp.rewrite(base, MPCo(of=LoRA(r=2), coefficient=1.0), where=SITES, patterns={"same": {"coefficient": 0.5}})
    found = [sum(slow(A.detach(), B.detach(), False)) for A, B in factors(shake(own))]
    assert sp.penalty(own).item() == pytest.approx(found[0] + found[1] + 0.5 * found[2], rel=1e-12)


def test_penalties_of_several_adapters_add_up(base):
    one = shake(sp.rewrite(base, MPCo(of=LoRA(r=2), coefficient=1.0), where="wide"))
    both = sp.rewrite(one, AdaLoRA(r=2, target_r=1, orthogonal=0.5), where="tall")
    (A, B), (C, D) = factors(one)[0], factors(both)[0]
    expected = sum(slow(A.detach(), B.detach(), False))
    expected += 0.5 * sum(math.sqrt(x) for x in slow(C.detach(), D.detach(), False)) / 2
    assert sp.penalty(both).item() == pytest.approx(expected, rel=1e-12)


def test_adalora_within_a_constraint_keeps_its_own(base):
    program = shake(sp.rewrite(base, MPCo(of=AdaLoRA(r=3, target_r=1, orthogonal=0.5), coefficient=2.0), where=SITES))
    terms = [slow(A.detach(), B.detach(), False) for A, B in factors(program)]
    expected = 2.0 * sum(map(sum, terms)) + 0.5 * sum(math.sqrt(a) + math.sqrt(b) for a, b in terms) / 6
    assert sp.penalty(program).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("inner", [MPCo(of=LoRA(r=2), coefficient=1.0), AdaLoRA(r=2, target_r=1, orthogonal=1.0)],
                         ids=["mpc_o", "adalora"])  # fmt: skip
def test_blocks_pay_the_penalty_of_the_method_within(inner):
    torch.manual_seed(0)
    program = sp.capture(
        nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2)).double(), torch.randn(4, 5).double()
    )
    program = shake(sp.rewrite(program, Blocks(of=inner), where="0"))
    terms = []
    for block in ("q", "v"):
        A, B = (program.module.get_parameter(f"0.weight_blocks.{n}_{block}").detach() for n in ("A", "B"))
        terms.append(slow(A, B, False))
    mean = sum(math.sqrt(a) + math.sqrt(b) for a, b in terms) / 4
    expected = mean if isinstance(inner, AdaLoRA) else sum(map(sum, terms))
    assert sp.penalty(program).item() == pytest.approx(expected, rel=1e-12)


def test_the_penalty_keeps_its_precision_under_autocast():
    torch.manual_seed(0)
    program = sp.capture(Three(), torch.randn(4, 7))
    program = shake(sp.rewrite(program, MPCo(of=LoRA(r=3), coefficient=1.0), where=SITES))
    expected = sum(sum(slow(A.detach().double(), B.detach().double(), False)) for A, B in factors(program))
    with torch.autocast("cpu", torch.bfloat16):
        penalty = sp.penalty(program)
    assert penalty.dtype == torch.float32 and penalty.item() == pytest.approx(expected, rel=1e-6)


# MPC_n


def test_a_nonlinearity_in_lora_is_the_parallel_adapter(base):
    lora = shake(sp.rewrite(base, MPCn(of=LoRA(r=3, alpha=5.0)), where=SITES))
    parallel = sp.rewrite(base, ParallelAdapter(r=3, scale=5 / 3, biases=False), where=SITES)
    with torch.no_grad():
        for site in SITES:
            for ours, theirs in (("A", "D"), ("B", "U")):
                source = lora.module.get_parameter(f"{site}.weight_mpc_n.{ours}")
                parallel.module.get_parameter(f"{site}.weight_parallel_adapter.{theirs}").copy_(source)
    inputs = {"x": torch.randn(3, 7, dtype=torch.float64)}
    torch.testing.assert_close(lora.run(inputs), parallel.run(inputs), rtol=1e-13, atol=1e-14)
    assert lora.counts() == parallel.counts()
    for program in (lora, parallel):
        program.module.train()(**inputs).square().sum().backward()
    for (_, p), (_, q) in zip(lora.parameters(trainable=True), parallel.parameters(trainable=True), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-11, atol=1e-13)


SMOOTH = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


@pytest.mark.parametrize("activation", SMOOTH)
@pytest.mark.parametrize("inner", ["lora", "trilora", "flora", "moslora", "adalora"])
def test_a_nonlinearity_follows_a_in_every_method(base, inner, activation):
    method = FACTORED[inner]
    program = sp.rewrite(base, MPCn(of=method, activation=activation), where="wide")
    torch.testing.assert_close(program.run(), base.run(), rtol=0, atol=1e-15)
    shake(program)
    t = {n: program.module.get_parameter(p) for _, n, p in program.adapters[0].all_paths()}
    rest = {
        "lora": lambda z: 5 / 3 * z @ t["B"].T,
        "trilora": lambda z: 16 / 3 * (z * t["e"]) @ t["B"].T,
        "flora": lambda z: 16 / 3 * z @ t["G"].T @ t["B"].T,
        "moslora": lambda z: 16 / 3 * z @ t["M"].T @ t["B"].T,
        "adalora": lambda z: 16 / (3 + 1e-5) * (z * t["e"]) @ t["B"].T,
    }[inner]
    model = Three().double()
    model.load_state_dict(base.module.state_dict())
    model.wide.register_forward_hook(lambda module, args, y: y + rest(SMOOTH[activation](args[0] @ t["A"].T)))
    with torch.no_grad():
        torch.testing.assert_close(program.run(), model(base.example["x"]), rtol=1e-12, atol=1e-13)


def test_a_nonlinearity_does_not_fold_and_keeps_what_is_above_it(base):
    """SSB above it stays, LoRA beneath it and SSL at another site fold."""
    program = sp.rewrite(base, LoRA(r=2), where="wide", name="beneath")
    program = sp.rewrite(program, MPCn(of=LoRA(r=3)), where=["wide", "tall"])
    program = sp.rewrite(program, SSB(), where="wide", name="above")
    program = shake(sp.rewrite(program, SSL(), where="same"))
    assert [folds(program, adapter) for adapter in program.adapters] == [True, False, False, True]
    folded = sp.fold(program)
    assert folded.folded.remaining == ("mpc_n", "above") and set(folded.folded.sites) == {"wide.weight", "same.weight"}
    torch.testing.assert_close(folded.run(), program.run(), rtol=1e-12, atol=1e-13)
    x, get = base.example["x"], program.module.get_parameter
    W, b = base.module.get_parameter("wide.weight"), base.module.get_parameter("wide.bias")
    t = {n: get(f"wide.weight_{n}") for n in ("beneath.A", "beneath.B", "mpc_n.A", "mpc_n.B", "above.rho", "above.c")}
    scaled = x * t["above.c"]
    inner = scaled @ (W + 8 * t["beneath.B"] @ t["beneath.A"]).T
    inner = inner + 16 / 3 * F.relu(scaled @ t["mpc_n.A"].T) @ t["mpc_n.B"].T
    model = Three().double()
    model.load_state_dict(sp.fold(shake_alike(base, program)).module.state_dict())
    with torch.no_grad():
        model.wide.register_forward_hook(lambda *_: inner * t["above.rho"] + b)
        A, B = get("tall.weight_mpc_n.A"), get("tall.weight_mpc_n.B")
        model.tall.register_forward_hook(lambda m, a, y: y + 16 / 3 * F.relu(a[0] @ A.T) @ B.T)
        torch.testing.assert_close(program.run(), model(x), rtol=1e-12, atol=1e-13)


def shake_alike(base: sp.Program, program: sp.Program) -> sp.Program:
    """The base under the program's SSL alone."""
    alone = sp.rewrite(base, SSL(), where="same")
    with torch.no_grad():
        alone.module.get_parameter("same.weight_ssl.c").copy_(program.module.get_parameter("same.weight_ssl.c"))
    return alone


def test_a_nonlinearity_survives_a_checkpoint(base, tmp_path):
    program = shake(sp.rewrite(base, MPCn(of=LoRA(r=3), activation="gelu"), where=SITES))
    sp.save(program, tmp_path)
    assert torch.equal(sp.load(base, tmp_path).run(), program.run())


@pytest.mark.parametrize("inner", [PiSSA(r=2), MiLoRA(r=2)], ids=["pissa", "milora"])
def test_a_nonlinearity_over_factors_of_the_weight_is_refused(base, inner):
    with pytest.raises(
        sp.MethodError, match="would change the model before any training. Take a method whose B starts"
    ):
        sp.rewrite(base, MPCn(of=inner), where="wide")


def test_a_method_that_reads_the_whole_weight_cannot_stand_above_a_nonlinearity(base):
    message = "a nonlinearity follows A, but (matmul|mul|div) needs A in a matrix of its own.*no method over it that"
    with pytest.raises(sp.MethodError, match=message):
        sp.rewrite(sp.rewrite(base, MPCn(of=LoRA(r=2)), where="wide"), DoRA(of=LoRA(r=2)), where="wide")
    with pytest.raises(sp.MethodError, match=message):
        sp.rewrite(base, MPCn(of=DoRA(of=LoRA(r=2))), where="wide")
    with pytest.raises(sp.MethodError, match="needs a weight method that folds inside; mpc_n is none"):
        DoRA(of=MPCn(of=LoRA(r=2)))


# training


def examples(count: int, length: int = 6) -> Examples:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=generator).tolist()
    return Examples([{"input_ids": row, "attention_mask": [1] * length, "labels": sum(row) % 3} for row in ids])


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


@pytest.fixture(scope="module")
def captured() -> sp.Program:
    return models.captured("bert")


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("method", [
    MPCo(of=LoRA(r=2), coefficient=0.1), AdaLoRA(r=3, target_r=1, orthogonal=0.5), DiffPruning(l0=1e-3, gate_lr=2.0),
], ids=lambda m: m.name)  # fmt: skip
def test_the_trainer_adds_what_a_loop_would(captured, tmp_path, method, parts):
    """Once a step, however the step is accumulated. Batches of all examples, so that their order does not matter."""
    data, lr, total = examples(8), 1e-2, 4
    fresh = [sp.rewrite(captured, method, where="*.{query,value}") for _ in range(2)]
    options = TrainOptions(
        max_steps=total, batch_size=8 // parts, gradient_accumulation=parts, lr=lr, warmup=0, schedule="constant",
        eval_every=None, save_every=None, max_grad_norm=0,
    )  # fmt: skip
    torch.manual_seed(0)
    result = train(fresh[0], data, output=tmp_path, options=options, collate=collate)
    batch = collate([data[i] for i in range(8)])
    optimizer = torch.optim.AdamW(parameter_groups(fresh[1], lr), lr=lr)
    sp.schedule(fresh[1], optimizer, total)
    if method.name == "diff_pruning":  # one step: the noise of the later ones is the trainer's own
        total = 1
    for step in range(total):
        optimizer.zero_grad()
        loss = fresh[1].module(**batch).loss
        penalty = sp.penalty(fresh[1])
        assert penalty.item() > 1e-2 * loss.item()
        (loss + penalty).backward()
        optimizer.step()
        assert result.losses[step][1] == pytest.approx((loss + penalty).item(), rel=1e-5), step


def test_evaluation_reports_the_loss_without_the_penalty(captured, tmp_path):
    program = sp.rewrite(captured, MPCo(of=LoRA(r=2), coefficient=10.0), where="*.query")
    options = TrainOptions(max_steps=1, batch_size=8, save_every=None)
    result = train(program, examples(8), examples(8), output=tmp_path, options=options, collate=collate)
    plain = captured.run(collate([examples(8)[i] for i in range(8)])).loss.item()
    assert result.evaluations[0][1]["loss"] == pytest.approx(plain, rel=1e-5)
    assert result.losses[0][1] > plain + 10


MULTIPLICATIVE = {
    "ssl": (SSL(), {"c"}), "ssb": (SSB(), {"rho", "c"}), "ia3": (IA3(), {"l"}), "dora": (DoRA(of=LoRA(r=2)), {"m"}),
    "sam_parser": (SAMParser(), {"s"}), "vera": (VeRA(r=4), {"b", "d"}), "lora": (LoRA(r=2), set()),
    "adalora": (AdaLoRA(r=2, target_r=1), set()), "trilora": (TriLoRA(r=2), set()),
    "diff_pruning": (DiffPruning(gate_lr=7.0), {"a", "a_g"}),
}  # fmt: skip


@pytest.mark.parametrize("name", MULTIPLICATIVE)
def test_weight_decay_leaves_multiplicative_tensors_alone(base, name):
    method, spared = MULTIPLICATIVE[name]
    program = sp.rewrite(base, method, where="wide", trainable="head")
    groups = parameter_groups(program, 2e-3, weight_decay=0.1)
    of = {id(p): (group["weight_decay"], group["lr"]) for group in groups for p in group["params"]}
    assert set(of) == {id(p) for _, p in program.parameters(trainable=True)}
    own = {n: of[id(program.module.get_parameter(p))] for _, n, p in program.adapters[0].all_paths() if n in spared}
    rate = 14e-3 if name == "diff_pruning" else 2e-3
    assert set(own) == spared
    assert all(decay == 0 and lr == pytest.approx(rate) for decay, lr in own.values())
    for _, n, path in program.adapters[0].all_paths():
        parameter = program.module.get_parameter(path)
        if n not in spared and parameter.requires_grad:
            assert of[id(parameter)] == (0.1, 2e-3), n
    assert of[id(program.module.get_parameter("head.weight"))] == (0.1, 2e-3)
    assert of[id(program.module.get_parameter("head.bias"))] == (0.0, 2e-3)
