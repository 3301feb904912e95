"""Schedules against slow references: AdaLoRA's ranks, LoRA-Dash's switch, Diff pruning's mask, in any loop."""

import copy
import math
import random

import numpy as np
import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import subgraph_peft as sp
from subgraph_peft.passes import SSL, AdaLoRA, Blocks, DiffPruning, DoRA, LoRA, LoRADash
from subgraph_peft.pipeline.data import Examples
from subgraph_peft.store.adapter_file import restore
from subgraph_peft.training.options import TrainOptions
from subgraph_peft.training.schedule import Schedule
from subgraph_peft.training.step_optimizer import parameter_groups
from subgraph_peft.training.train import train
from tests import models
from tests.models import VOCABULARY, bert

SITES = ["wide", "tall", "last"]


class Three(nn.Module):
    """Three non-square layers with biases; `wide` is called twice."""

    def __init__(self):
        super().__init__()
        self.wide, self.tall, self.last = nn.Linear(7, 5), nn.Linear(5, 9), nn.Linear(9, 4)
        self.norm = nn.LayerNorm(9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.wide(x)) + 0.5 * torch.tanh(self.wide(x.flip(1)))
        return self.last(self.norm(torch.tanh(self.tall(h))))


@pytest.fixture(scope="module")
def base() -> sp.Program:
    torch.manual_seed(0)
    model = Three().double()
    nn.init.normal_(model.norm.bias)
    return sp.capture(model, torch.randn(6, 7, dtype=torch.float64))


def trained(program: sp.Program) -> list[nn.Parameter]:
    return [parameter for _, parameter in program.parameters(trainable=True)]


def tensor(program: sp.Program, site: str, name: str) -> nn.Parameter:
    return program.module.get_parameter(f"{site}.weight_{program.adapters[-1].name}.{name}")


def values(program: sp.Program) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in program.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def backward(program: sp.Program, seed: int, scale: float = 1.0) -> torch.Tensor:
    """A loss on random data, and its gradients."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    target = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    loss = F.mse_loss(program.module.train()(x), target) * scale
    loss.backward()
    return loss.detach()


def steps(program: sp.Program, total: int, count: int | None = None, lr: float = 0.05) -> torch.optim.Optimizer:
    """`count` steps of a run of `total`."""
    optimizer = torch.optim.AdamW(parameter_groups(program, lr), lr=lr)
    sp.schedule(program, optimizer, total)
    for number in range(total if count is None else count):
        optimizer.zero_grad()
        backward(program, number)
        optimizer.step()
    return optimizer


# AdaLoRA


class SlowAdaLoRA:
    """The published algorithm, number by number: plain SGD, then importance, budget and mask."""

    def __init__(self, method: AdaLoRA, sites: dict[str, dict[str, torch.Tensor]], total: int):
        self.method, self.total = method, total
        self.p = {s: {n: t.detach().numpy().copy() for n, t in tensors.items()} for s, tensors in sites.items()}
        self.mean = {s: {n: np.zeros_like(v) for n, v in own.items()} for s, own in self.p.items()}
        self.spread = {s: {n: np.zeros_like(v) for n, v in own.items()} for s, own in self.p.items()}

    def zeros(self) -> set[tuple[str, int]]:
        return {(site, i) for site in self.p for i in range(self.method.r) if self.p[site]["e"][i] == 0}

    def budget(self, t: int) -> int:
        m, sites = self.method, len(self.p)
        first, last, stop = m.r * sites, m.target_r * sites, self.total - m.final
        if t <= m.warmup:
            return first
        if t > stop:
            return last
        return int(last + (first - last) * (1 - (t - m.warmup) / (stop - m.warmup)) ** 3)

    def step(self, t: int, lr: float, gradients: dict[str, dict[str, np.ndarray]]) -> None:
        m, stop = self.method, self.total - self.method.final
        for site, own in self.p.items():
            for name, p in own.items():
                for index in np.ndindex(*p.shape):
                    g = gradients[site][name][index]
                    p[index] -= lr * g
                    if t < stop:
                        importance = abs(p[index] * g)
                        mean = m.beta1 * self.mean[site][name][index] + (1 - m.beta1) * importance
                        self.mean[site][name][index] = mean
                        spread = self.spread[site][name][index]
                        self.spread[site][name][index] = m.beta2 * spread + (1 - m.beta2) * abs(importance - mean)
        if t >= stop or (t > m.warmup and t % m.interval == 0):
            self.mask(m.r * len(self.p) - self.budget(t))

    def mask(self, excess: int) -> None:
        if not excess:
            return
        scores = {(site, i): self.score(site, i) for site in self.p for i in range(self.method.r)}
        threshold = sorted(scores.values())[excess - 1]
        for (site, i), score in scores.items():
            if score <= threshold:
                self.p[site]["e"][i] = 0

    def score(self, site: str, i: int) -> float:
        def s(name: str, *index: int) -> float:
            return self.mean[site][name][index] * self.spread[site][name][index]

        width, height = self.p[site]["A"].shape[1], self.p[site]["B"].shape[0]
        return (
            s("e", i)
            + sum(s("A", i, j) for j in range(width)) / width
            + sum(s("B", j, i) for j in range(height)) / height
        )


CASES = {
    "no_stages": (AdaLoRA(r=4, target_r=2), 12),
    "all_stages": (AdaLoRA(r=4, target_r=1, warmup=4, final=6), 24),
    "interval": (AdaLoRA(r=5, target_r=2, warmup=3, final=5, interval=3), 26),
    "interval_does_not_divide_the_run": (AdaLoRA(r=4, target_r=1, interval=4), 14),
    "other_betas": (AdaLoRA(r=3, target_r=1, warmup=1, final=2, beta1=0.5, beta2=0.0), 9),
    "nothing_to_prune": (AdaLoRA(r=3, target_r=3, warmup=1, final=2), 6),
}


@pytest.mark.parametrize(("method", "total"), CASES.values(), ids=CASES)
def test_adalora_ranks_agree_with_a_slow_reference(base, method, total):
    program = sp.rewrite(base, method, where=SITES)
    own = {site: {n: tensor(program, site, n) for n in ("A", "B", "e")} for site in SITES}
    slow = SlowAdaLoRA(method, own, total)
    objects = trained(program)
    optimizer = torch.optim.SGD(objects, lr=0.1)
    sp.schedule(program, optimizer, total)
    generator = np.random.default_rng(3)
    zeros, grown = set(), False
    for t in range(1, total + 1):
        gradients = {s: {n: generator.normal(size=p.shape) for n, p in ts.items()} for s, ts in own.items()}
        for site, tensors in own.items():
            for name, p in tensors.items():
                p.grad = torch.from_numpy(gradients[site][name])
        before = zeros
        optimizer.step()
        slow.step(t, 0.1, gradients)
        zeros = {(site, i) for site in SITES for i in range(method.r) if own[site]["e"][i] == 0}
        assert zeros == slow.zeros(), t
        for site, tensors in own.items():
            for name, p in tensors.items():
                np.testing.assert_allclose(p.detach().numpy(), slow.p[site][name], rtol=1e-12, atol=1e-14)
        if t <= total - method.final:
            grown |= bool(before - zeros)
        else:
            assert zeros == before
    assert len(SITES) * method.r - len(zeros) == len(SITES) * method.target_r
    assert grown == (method.target_r < method.r), "a masked triplet can come back before the final stage"
    assert all(a is b for a, b in zip(objects, trained(program), strict=True))
    assert optimizer.param_groups[0]["params"] == objects


def test_adalora_budget_is_the_closed_form():
    method = AdaLoRA(r=12, target_r=8, warmup=10, final=20)
    found = [method.budget(t, 100, 72, 48) for t in range(1, 101)]
    assert found[:10] == [72] * 10 and found[80:] == [48] * 20
    for t in range(11, 81):
        assert found[t - 1] == int(48 + 24 * (1 - (t - 10) / 70) ** 3)
    assert found[79] == 48 and sorted(found, reverse=True) == found


def test_adalora_budget_starts_from_the_ranks_that_there_are(base):
    """b(0) is the sum of all first ranks, also where a site has a rank of its own."""
    for r in (1, 6):
        method = AdaLoRA(r=4, target_r=1, warmup=1, final=1)
        program = sp.rewrite(base, method, where=SITES, patterns={"wide": {"r": r}})
        optimizer = torch.optim.AdamW(trained(program), lr=0.05)
        sp.schedule(program, optimizer, 8)
        left = []
        for number in range(8):
            optimizer.zero_grad()
            backward(program, number)
            optimizer.step()
            left.append(sum(int((tensor(program, s, "e") != 0).sum()) for s in SITES))
        first = r + 8
        assert left == [first, *(int(3 + (first - 3) * (1 - (t - 1) / 6) ** 3) for t in range(2, 8)), 3]


def test_adalora_scale_keeps_the_first_rank(base):
    program = sp.rewrite(base, AdaLoRA(r=4, target_r=1, alpha=6.0, final=1), where="tall")
    steps(program, 5)
    A, B, e = (tensor(program, "tall", n).detach() for n in ("A", "B", "e"))
    assert int((e != 0).sum()) == 1
    expected = base.module.get_parameter("tall.weight") + 6 / (4 + 1e-5) * (B * e) @ A
    folded = sp.fold(program)
    torch.testing.assert_close(folded.module.get_parameter("tall.weight"), expected, rtol=1e-13, atol=1e-14)
    torch.testing.assert_close(program.run(), folded.run(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("options", [{"warmup": 2, "final": 3}, {"warmup": 0, "final": 4, "interval": 3}])
def test_adalora_trains_as_peft_does(options):
    """Losses with the regulariser, and ranks, over a run: the same tensors, the same data."""
    total, r, target, alpha = 14, 4, 2, 6.0
    model, inputs = bert()
    program = sp.rewrite(
        sp.capture(model.double(), inputs),
        AdaLoRA(r=r, target_r=target, alpha=alpha, orthogonal=0.3, **options),
        where="*.{query,value,dense}", exclude="*.pooler.*",
    )  # fmt: skip
    names = {"warmup": "tinit", "final": "tfinal", "interval": "deltaT"}
    config = peft.AdaLoraConfig(
        init_r=r, target_r=target, lora_alpha=alpha, orth_reg_weight=0.3, total_step=total, lora_dropout=0.0,
        target_modules=r".*encoder.*\.(query|value|dense)", **{names[k]: v for k, v in options.items()},
    )  # fmt: skip
    theirs = peft.get_peft_model(bert()[0], config).double()
    own = dict(theirs.named_parameters())
    with torch.no_grad():
        for site, name, path in program.adapters[0].all_paths():
            p = own[f"base_model.model.{site.owner}.lora_{name.upper()}.default"]
            p.copy_(program.module.get_parameter(path).reshape(p.shape))
    ours_by, theirs_by = (torch.optim.AdamW(ps, lr=0.02) for ps in (
        trained(program), [p for p in theirs.parameters() if p.requires_grad]))  # fmt: skip
    sp.schedule(program, ours_by, total)
    for t in range(1, total + 1):
        ours_by.zero_grad()
        theirs_by.zero_grad()
        loss = program.module(**inputs).loss + sp.penalty(program)
        expected = theirs.base_model(**inputs).loss
        assert loss.item() == pytest.approx(expected.item(), rel=1e-11)
        loss.backward()
        expected.backward()
        ours_by.step()
        theirs_by.step()
        theirs.base_model.update_and_allocate(t)
        for site in program.adapters[0].sites:
            e = program.module.get_parameter(program.adapters[0].path(site, "e"))
            their_e = own[f"base_model.model.{site.owner}.lora_E.default"].flatten()
            assert torch.equal(e != 0, their_e != 0), (t, site.name)
    found = [
        int((program.module.get_parameter(p) != 0).sum()) for _, n, p in program.adapters[0].all_paths() if n == "e"
    ]
    assert sum(found) == target * len(found) and len(set(found)) > 1


@pytest.mark.parametrize(("method", "message"), [
    (AdaLoRA(r=2, target_r=3), "target_r = 3 exceeds the first rank r = 2"),
    (AdaLoRA(r=4, target_r=2, warmup=6, final=4), r"warmup \(6\) and final \(4\) leave no step of the run's 10"),
    (LoRADash(directions=2, switch=10), "switch at step 10 is not before the end of the run's 10 steps"),
    (DiffPruning(fix_at=0.04), "fix_at = 0.04 leaves one of the two phases without a step"),
])  # fmt: skip
def test_a_schedule_that_does_not_fit_is_refused(base, method, message):
    program = sp.rewrite(base, method, where="tall")
    with pytest.raises(sp.MethodError, match=message):
        sp.schedule(program, torch.optim.SGD(trained(program), lr=0.1), 10)


def test_a_schedule_needs_the_number_of_steps_and_the_right_optimiser(base):
    program = sp.rewrite(base, AdaLoRA(r=2, target_r=1), where="tall")
    with pytest.raises(sp.MethodError, match="pass total_steps"):
        sp.schedule(program, torch.optim.SGD(trained(program), lr=0.1))
    with pytest.raises(sp.MethodError, match="tall.weight_adalora.e trains, but this optimiser does not hold it"):
        sp.schedule(program, torch.optim.SGD(trained(program)[:2], lr=0.1), 10)
    plain = sp.rewrite(base, LoRA(r=2), where="tall")
    sp.schedule(plain, torch.optim.SGD(trained(plain), lr=0.1))


# every schedule, in any loop

SCHEDULED = {
    "adalora": AdaLoRA(r=4, target_r=2, warmup=1, final=2),
    "lora_dash": LoRADash(r=2, directions=2, switch=4),
    "diff_pruning": DiffPruning(target=0.2, fix_at=0.5, gate_lr=1.0),
    "dora_adalora": DoRA(of=AdaLoRA(r=4, target_r=2, warmup=1, final=2)),
}


@pytest.mark.parametrize("method", SCHEDULED.values(), ids=SCHEDULED)
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_gradient_scaler_skips_does_not_count(base, method, fused):
    """And gradients are unscaled: the run equals one in full precision without the skipped steps."""
    outcomes = []
    for scaled in (False, True):
        torch.manual_seed(1)
        program = sp.rewrite(base, method, where=SITES)
        optimizer = torch.optim.AdamW(trained(program), lr=0.05, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100, enabled=scaled)
        schedule = sp.schedule(program, optimizer, 8)
        for number in range(8):
            optimizer.zero_grad()
            loss = loss_of(program, number)
            if scaled and number in (2, 5):
                scaler.scale(loss * math.inf).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
                loss = loss_of(program, number)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert schedule.number == 8
        outcomes.append(values(program))
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-9, atol=1e-12)


def loss_of(program: sp.Program, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.mse_loss(
        program.module.train()(torch.randn(6, 7, generator=generator, dtype=torch.float64)),
        torch.randn(6, 4, generator=generator, dtype=torch.float64),
    )


@pytest.mark.parametrize("method", SCHEDULED.values(), ids=SCHEDULED)
def test_forward_calls_and_accumulation_do_not_count(base, method):
    """Eight steps; then the same in four parts each, with evaluations between."""
    outcomes = []
    for parts in (1, 4):
        torch.manual_seed(1)
        program = sp.rewrite(base, method, where=SITES)
        optimizer = torch.optim.AdamW(trained(program), lr=0.05)
        schedule = sp.schedule(program, optimizer, 8)
        for number in range(8):
            optimizer.zero_grad()
            for _ in range(parts):
                backward(program, number, 1 / parts)
                if parts > 1:
                    program.run()
                    program.run(training=True)
            optimizer.step()
        assert schedule.number == 8
        outcomes.append(values(program))
    for name, value in outcomes[0].items():
        torch.testing.assert_close(outcomes[1][name], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", SCHEDULED.values(), ids=SCHEDULED)
def test_a_schedule_goes_on_from_its_state(base, method, tmp_path):
    """In a loop of one's own: adapter, optimiser, schedule and random numbers saved after step 5 of 8."""

    def go(program: sp.Program, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
        for number in range(first, last):
            optimizer.zero_grad()
            backward(program, number)
            optimizer.step()

    def fresh(seed: int) -> tuple[sp.Program, torch.optim.Optimizer, Schedule]:
        program = sp.rewrite(base, method, where=SITES, seed=seed)
        optimizer = torch.optim.AdamW(parameter_groups(program, 0.05), lr=0.05)
        return program, optimizer, sp.schedule(program, optimizer, 8)

    torch.manual_seed(1)
    whole, optimizer, schedule = fresh(0)
    go(whole, optimizer, 0, 5)
    sp.save(whole, tmp_path)
    state, optimised = copy.deepcopy((schedule.state_dict(), optimizer.state_dict()))
    noise = torch.get_rng_state()
    part, again, resumed = fresh(5)
    restore(part, tmp_path)
    again.load_state_dict(optimised)
    resumed.load_state_dict(state)
    go(whole, optimizer, 5, 8)
    torch.set_rng_state(noise)
    go(part, again, 5, 8)
    assert same(values(part), values(whole))
    rebuilt = sp.load(base, tmp_path)
    assert {n for n, _ in rebuilt.parameters(trainable=True)} == {n for n, _ in whole.parameters(trainable=True)}


def test_two_schedules_share_the_count_of_steps(base):
    """And a third adapter has none."""
    program = sp.rewrite(base, AdaLoRA(r=3, target_r=1, final=1), where="tall")
    program = sp.rewrite(program, LoRADash(r=2, directions=2, switch=3), where=["wide", "tall"])
    program = sp.rewrite(program, SSL(), where="last")
    optimizer = torch.optim.AdamW(trained(program), lr=0.05)
    schedule = sp.schedule(program, optimizer, 6)
    for number in range(6):
        optimizer.zero_grad()
        backward(program, number)
        optimizer.step()
        found = [program.module.get_parameter(f"{site}.weight_lora_dash.U").any() for site in ("wide", "tall")]
        assert all(found) if number >= 2 else not any(found)
    assert int((program.module.get_parameter("tall.weight_adalora.e") != 0).sum()) == 1 and schedule.number == 6
    schedule.remove()
    optimizer.step()
    assert schedule.number == 6
    assert sp.fold(program).folded.output_error < 1e-12


def test_a_state_of_another_program_is_refused(base):
    def schedule(where: list[str]) -> Schedule:
        program = sp.rewrite(base, AdaLoRA(r=2, target_r=1), where=where)
        optimizer = torch.optim.SGD(trained(program), lr=0.1)
        found = sp.schedule(program, optimizer, 10)
        backward(program, 0)
        optimizer.step()
        return found

    with pytest.raises(sp.CheckpointError, match="tall.*which this program has no place for"):
        schedule(["wide"]).load_state_dict(schedule(["wide", "tall"]).state_dict())


# through the trainer

QUICK = TrainOptions(max_steps=9, batch_size=8, lr=1e-2, warmup=0, eval_every=None, save_every=None, seed=3)
LAYERS = "*.{query,value}"
IN_TRAINER = {
    "adalora": AdaLoRA(r=4, target_r=2, warmup=1, final=2, dropout=0.1),
    "lora_dash": LoRADash(r=2, directions=2, switch=4),
    "diff_pruning": DiffPruning(target=0.1, fix_at=0.8, gate_lr=1.0),
    "diff_pruning_fixed": DiffPruning(target=0.1, fix_at=0.4, gate_lr=1.0),
}


@pytest.fixture(scope="module")
def captured() -> sp.Program:
    return models.captured("bert", 0.1)


@pytest.fixture(scope="module")
def still() -> sp.Program:
    return models.captured("bert")


def examples(count: int, seed: int = 0, length: int = 6) -> Examples:
    generator = random.Random(seed)
    rows = [[generator.randrange(3, VOCABULARY) for _ in range(length)] for _ in range(count)]
    return Examples([{"input_ids": r, "attention_mask": [1] * length, "labels": sum(r) % 3} for r in rows])


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def run(program: sp.Program, output, options: TrainOptions = QUICK, **more):
    return train(program, examples(24), output=output, options=options, collate=collate, **more)


class Stop(transformers.TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("name", IN_TRAINER)
def test_resumed_in_the_middle_is_bit_identical(captured, tmp_path, name):
    def fresh(seed: int = 0) -> sp.Program:
        return sp.rewrite(captured, IN_TRAINER[name], where=LAYERS, trainable="classifier", seed=seed)

    whole, part = fresh(), fresh()
    expected = run(whole, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt, match="checkpoint-5 resumes it"):
        run(part, tmp_path / "part", callbacks=[Stop(5)])
    torch.rand(3)
    again = fresh(7)
    result = run(again, tmp_path / "part")
    assert result.resumed_from == 5 and result.losses == expected.losses
    assert same(values(again), values(whole))


@pytest.mark.parametrize("name", IN_TRAINER)
def test_evaluations_in_between_change_nothing(captured, tmp_path, name):
    outcomes = []
    for every in (None, 1):
        program = sp.rewrite(captured, IN_TRAINER[name], where=LAYERS)
        options = QUICK.model_copy(update={"eval_every": every})
        losses = run(program, tmp_path / str(every), options, eval_data=examples(5, seed=1)).losses
        outcomes.append((losses, values(program)))
    assert outcomes[0][0] == outcomes[1][0] and same(outcomes[0][1], outcomes[1][1])


def test_accumulation_gives_the_ranks_of_a_big_batch(still, tmp_path):
    outcomes = []
    for batch, parts in ((8, 1), (2, 4)):
        program = sp.rewrite(still, AdaLoRA(r=4, target_r=2, warmup=1, final=2), where=LAYERS)
        options = QUICK.model_copy(update={"batch_size": batch, "gradient_accumulation": parts})
        losses = run(program, tmp_path / str(batch), options).losses
        outcomes.append((losses, values(program)))
    (losses, big), (others, small) = outcomes
    np.testing.assert_allclose(others, losses, rtol=1e-4)
    names = [name for name in big if name.endswith("adalora.e")]
    assert names and sum(int((big[n] != 0).sum()) for n in names) == 2 * len(names)
    assert all(torch.equal(big[n] != 0, small[n] != 0) for n in names)


# LoRA-Dash


def calls(program: sp.Program) -> int:
    return len(program.adapters[0].sites[0].calls)


def test_lora_dash_switches_at_its_step_and_not_before(base):
    program = sp.rewrite(base, LoRADash(r=2, alpha=3.0, directions=3, switch=4), where=SITES)
    assert calls(program) == 2, "wide is called twice in a forward"
    optimizer = torch.optim.AdamW(trained(program), lr=0.05)
    sp.schedule(program, optimizer, 9)
    for number in range(1, 10):
        optimizer.zero_grad()
        backward(program, number)
        program.run()
        gradients = [tensor(program, site, "g").grad.abs().max().item() for site in SITES]
        assert all(g == 0 for g in gradients) if number <= 4 else all(g > 0 for g in gradients)
        if number == 4:
            lora = sp.rewrite(base, LoRA(r=2, alpha=3.0), where=SITES)
            frozen = {n: p for n, p in program.module.named_parameters() if not p.requires_grad}
            kept = {n: p.detach().clone() for n, p in frozen.items()}
        optimizer.step()
        switched = [bool(tensor(program, site, "U").any()) for site in SITES]
        assert all(switched) if number >= 4 else not any(switched)
        if number == 4:
            with torch.no_grad():
                for site in SITES:
                    for name in ("A", "B"):
                        lora.module.get_parameter(f"{site}.weight_lora.{name}").copy_(tensor(program, site, name))
            torch.testing.assert_close(program.run(), lora.run(), rtol=0, atol=1e-15)
            changed = {n for n, p in frozen.items() if not torch.equal(p, kept[n])}
            assert {n.rpartition(".")[2] for n in changed} == {"U", "V"}
            directions = {site: tensor(program, site, "U").clone() for site in SITES}
    assert all(torch.equal(directions[site], tensor(program, site, "U")) for site in SITES)
    assert all(tensor(program, site, "g").abs().min() > 0 for site in SITES)
    assert sp.fold(program).folded.output_error < 1e-12


def test_lora_dash_directions_against_a_slow_reference(base):
    method = LoRADash(r=2, alpha=3.0, directions=3, switch=2)
    program = sp.rewrite(base, method, where=SITES)
    steps(program, 6, 2)
    for site in SITES:
        W = base.module.get_parameter(f"{site}.weight").detach().numpy()
        A, B = (tensor(program, site, n).detach().numpy() for n in ("A", "B"))
        U, sigma, Vh = np.linalg.svd(W, full_matrices=False)
        ratio = []
        for i in range(len(sigma)):
            change = 0.0
            for row in range(W.shape[0]):
                for column in range(W.shape[1]):
                    delta = 1.5 * sum(B[row, k] * A[k, column] for k in range(2))
                    change += U[row, i] * delta * Vh[i, column]
            ratio.append(abs(change) / (sigma[i] + method.epsilon * sigma[0]))
        chosen = sorted(range(len(ratio)), key=ratio.__getitem__, reverse=True)[:3]
        expected = sum(np.outer(U[:, i], Vh[i]) for i in chosen)
        found = (tensor(program, site, "U") @ tensor(program, site, "V")).detach().numpy()
        np.testing.assert_allclose(found, expected, atol=1e-12)


def test_lora_dash_saved_after_the_switch_keeps_its_directions(base, tmp_path):
    program = sp.rewrite(base, LoRADash(r=2, directions=2, switch=2), where=SITES)
    steps(program, 6, 4)
    sp.save(program, tmp_path)
    rebuilt = sp.load(base, tmp_path)
    assert torch.equal(rebuilt.run(), program.run()) and tensor(rebuilt, "wide", "U").any()
    assert not tensor(rebuilt, "wide", "U").requires_grad and tensor(rebuilt, "wide", "g").requires_grad


def test_lora_dash_above_another_adapter_reads_the_weight_beneath_it(base):
    """W is what it rewrites: SSL's result, as it is at the switch."""
    program = sp.rewrite(sp.rewrite(base, SSL(), where="tall"), LoRADash(r=2, directions=1, switch=2), where="tall")
    steps(program, 4, 2)
    c = program.module.get_parameter("tall.weight_ssl.c").detach()
    U, _, Vh = torch.linalg.svd(base.module.get_parameter("tall.weight") * c, full_matrices=False)
    found = tensor(program, "tall", "U") @ tensor(program, "tall", "V")
    assert min((found - torch.outer(U[:, i], Vh[i])).abs().max().item() for i in range(5)) < 1e-12


def test_lora_dash_survives_a_weight_without_full_rank():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(5, 2) @ torch.randn(2, 6))
    program = sp.rewrite(
        sp.capture(model, torch.randn(4, 6).double()), LoRADash(r=1, directions=3, switch=1), where="0"
    )
    optimizer = torch.optim.SGD(trained(program), lr=0.1)
    sp.schedule(program, optimizer, 3)
    for _ in range(3):
        program.module(torch.randn(4, 6).double()).square().sum().backward()
        optimizer.step()
    assert torch.isfinite(program.run()).all()


def test_lora_dash_asks_for_no_more_directions_than_there_are(base):
    with pytest.raises(sp.MethodError, match=r"8 directions exceed min\(in, out\) = 5"):
        sp.rewrite(base, LoRADash(), where="wide")


# Diff pruning


def everything(program: sp.Program, method: DiffPruning) -> sp.Program:
    return sp.rewrite(program, method, where=lambda site: True)


def gates(program: sp.Program, name: str) -> list[nn.Parameter]:
    return [program.module.get_parameter(path) for _, t, path in program.adapters[0].all_paths() if t == name]


def fill(parameters: list[nn.Parameter], value: float) -> None:
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(value)


def test_diff_pruning_takes_every_parameter_and_starts_as_the_base(base):
    program = everything(base, DiffPruning())
    names = {site.name for site in program.adapters[0].sites}
    assert names == {name for name, _ in base.module.named_parameters()}
    assert torch.equal(program.run(), base.run())
    assert program.counts()[0] == 2 * base.counts()[1] + len(names)


@pytest.mark.parametrize("noise", [-40.0, -5.0, -4.5, 0.0, 40.0])
def test_diff_pruning_without_differences_or_without_gates_is_the_base(base, noise):
    """w = 0 for any z; z = 0 for any w."""
    program = everything(base, DiffPruning())
    fill(gates(program, "u"), noise)
    torch.testing.assert_close(program.run(), base.run(), rtol=0, atol=1e-15)
    with torch.no_grad():
        for w in gates(program, "w"):
            w.normal_()
    open_gates = noise > -5
    difference = (program.run() - base.run()).abs().max()
    assert (difference > 1e-3) == open_gates
    fill(gates(program, "u"), 0.0)
    fill(gates(program, "u_g"), -40.0)
    torch.testing.assert_close(program.run(), base.run(), rtol=0, atol=1e-15)


def test_diff_pruning_gate_is_the_hard_concrete_one(base):
    """z = clamp(σ(u + a)(ζ − γ) + γ, 0, 1), γ = −1.5, ζ = 1.5, for elements and for the whole; gradients between."""
    program = everything(base, DiffPruning())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name in ("w", "a", "u"):
            for p in gates(program, name):
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        for p in gates(program, "a_g"):
            p.copy_(0.4 + torch.rand(1, generator=generator))
    model = Three().double()
    state = {n: p.detach().clone() for n, p in base.module.named_parameters()}
    adapter = program.adapters[0]
    for site in adapter.sites:
        t = {n: program.module.get_parameter(p).detach() for n, p in adapter.paths(site).items()}
        z = (torch.sigmoid(t["u"] + t["a"]) * 3.0 - 1.5).clamp(0, 1)
        z_g = (torch.sigmoid(t["u_g"] + t["a_g"]) * 3.0 - 1.5).clamp(0, 1)
        state[site.name] += z * z_g * t["w"]
    model.load_state_dict(state)
    torch.testing.assert_close(program.run(), model(base.example["x"]), rtol=1e-12, atol=1e-13)
    program.module(base.example["x"]).square().sum().backward()
    a, u = tensor(program, "tall", "a"), tensor(program, "tall", "u")
    stretched = 3 * torch.sigmoid(a + u) - 1.5
    assert torch.equal(a.grad != 0, (stretched > 0) & (stretched < 1))


def test_diff_pruning_penalty_at_the_start(base):
    program = everything(base, DiffPruning(l0=0.01))
    sigma = 1 / (1 + math.exp(-5.0))
    count = base.counts()[1] + len(program.adapters[0].sites)
    assert sp.penalty(program).item() == pytest.approx(0.01 * sigma * count, rel=1e-12)
    sp.penalty(program).backward()
    for p in (*gates(program, "a"), *gates(program, "a_g")):
        torch.testing.assert_close(p.grad, torch.full_like(p, 0.01 * sigma * (1 - sigma)))
    assert all(p.grad is None or not p.grad.any() for p in gates(program, "w"))


def test_diff_pruning_draws_new_noise_after_every_step(base):
    torch.manual_seed(0)
    program = everything(base, DiffPruning(fix_at=0.9))
    optimizer = torch.optim.AdamW(parameter_groups(program, 1e-3), lr=1e-3)
    sp.schedule(program, optimizer, 10)
    seen = []
    for number in range(3):
        backward(program, number)
        before = torch.cat([u.detach().flatten() for u in gates(program, "u")])
        program.run()
        assert torch.equal(before, torch.cat([u.detach().flatten() for u in gates(program, "u")]))
        optimizer.step()
        seen.append(torch.cat([u.detach().flatten() for u in gates(program, "u")]))
    assert not torch.equal(seen[0], seen[1]) and not torch.equal(seen[1], seen[2])
    uniform = torch.sigmoid(torch.cat(seen))
    assert uniform.min() >= 1e-4 - 1e-12 and uniform.max() <= 1 - 1e-4 + 1e-12
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.06)
    assert uniform.var().item() == pytest.approx(1 / 12, abs=0.02)


@pytest.mark.parametrize("target", [0.01, 0.1, 0.37])
def test_diff_pruning_keeps_its_share_of_all_parameters(base, target):
    torch.manual_seed(0)
    program = everything(base, DiffPruning(target=target, fix_at=0.5, gate_lr=5.0))
    total = base.counts()[1]
    optimizer = torch.optim.AdamW(parameter_groups(program, 0.02), lr=0.02)
    sp.schedule(program, optimizer, 12)

    def differences() -> dict[str, torch.Tensor]:
        held = dict(program.tensors())
        found = {}
        for site in program.adapters[0].sites:
            own = {n: held[path].detach() for n, path in program.adapters[0].paths(site).items()}
            zero = torch.zeros(own["w"].shape, dtype=torch.float64)
            found[site.name] = DiffPruning().gated(zero, **own)
        return found

    masks = []
    for number in range(12):
        optimizer.zero_grad()
        backward(program, number)
        sp.penalty(program).backward()
        optimizer.step()
        if number >= 5:
            found = differences()
            masks.append({n: d != 0 for n, d in found.items()})
            assert sum(int(mask.sum()) for mask in masks[-1].values()) == math.floor(target * total)
            assert sp.penalty(program).item() == 0
    assert all(torch.equal(masks[0][n], mask[n]) for mask in masks for n in mask)
    changed = differences()
    folded = sp.fold(program)
    for site in program.adapters[0].sites:
        delta = folded.module.get_parameter(site.name) - base.module.get_parameter(site.name)
        torch.testing.assert_close(site.matrix(delta), changed[site.name], rtol=1e-9, atol=1e-14)
        assert torch.equal(site.matrix(delta) != 0, masks[0][site.name])
    torch.testing.assert_close(program.run(), folded.run(), rtol=1e-13, atol=1e-14)


def test_diff_pruning_keeps_the_largest_expected_differences(base):
    torch.manual_seed(0)
    program = everything(base, DiffPruning(target=0.2, fix_at=0.5))
    optimizer = torch.optim.SGD(parameter_groups(program, 1e-12), lr=1e-12)
    sp.schedule(program, optimizer, 2)
    with torch.no_grad():
        for w, a in zip(gates(program, "w"), gates(program, "a"), strict=True):
            w.normal_()
            a.copy_(2 * torch.rand_like(a) - 0.5)
        for a in gates(program, "a_g"):
            a.copy_(0.2 + torch.rand(1))
    sizes = [
        ((3 * torch.sigmoid(a) - 1.5).clamp(0, 1) * (3 * torch.sigmoid(g) - 1.5).clamp(0, 1) * w)
        .detach()
        .abs()
        .flatten()
        for w, a, g in zip(gates(program, "w"), gates(program, "a"), gates(program, "a_g"), strict=True)
    ]
    every = torch.cat(sizes).numpy()
    backward(program, 0)
    optimizer.step()
    kept = torch.cat([(u > 0).flatten() for u in gates(program, "u")]).numpy()
    assert kept.sum() == math.floor(0.2 * len(every)) and every[kept].min() > every[~kept].max()


def test_diff_pruning_on_a_transformer_with_embeddings(still):
    torch.manual_seed(0)
    program = everything(still, DiffPruning(target=0.05, fix_at=0.5, gate_lr=10.0))
    kinds = {site.kind for site in program.adapters[0].sites}
    assert {"embedding", "linear", "bias", "scale"} <= kinds
    optimizer = torch.optim.AdamW(parameter_groups(program, 1e-3), lr=1e-3)
    sp.schedule(program, optimizer, 4)
    for _ in range(4):
        optimizer.zero_grad()
        program.module(**still.example).loss.backward()
        optimizer.step()
    folded = sp.fold(program)
    kept = sum(
        int((folded.module.get_parameter(s.name) != still.module.get_parameter(s.name)).sum())
        for s in program.adapters[0].sites
    )
    size = sum(math.prod(site.shape) for site in program.adapters[0].sites)
    assert 0.99 * math.floor(0.05 * size) <= kept <= math.floor(0.05 * size), "float32 rounds some away"
    assert folded.folded.output_error < 1e-5


def test_the_gates_learn_at_their_own_rate(base):
    program = everything(base, DiffPruning(gate_lr=50.0))
    groups = parameter_groups(program, 2e-3, weight_decay=0.1)
    of = {id(p): group for group in groups for p in group["params"]}
    assert {(of[id(w)]["lr"], of[id(w)]["weight_decay"]) for w in gates(program, "w")} == {(2e-3, 0.1)}
    for name in ("a", "a_g"):
        assert {(of[id(a)]["lr"], of[id(a)]["weight_decay"]) for a in gates(program, name)} == {(0.1, 0.0)}


def test_the_rate_of_the_gates_follows_the_trainer(still, tmp_path):
    seen = []

    class Look(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
            seen.append({round(group["lr"], 9) for group in optimizer.param_groups})

    program = sp.rewrite(still, DiffPruning(gate_lr=50.0), where=LAYERS)
    options = QUICK.model_copy(update={"max_steps": 4, "lr": 1e-3, "schedule": "linear"})
    run(program, tmp_path, options, callbacks=[Look()])
    assert seen == [{round(f * 1e-3, 9), round(f * 5e-2, 9)} for f in (1, 0.75, 0.5, 0.25)]


# blocks of a packed weight


@pytest.mark.parametrize("inner", [AdaLoRA(r=3, target_r=1, warmup=1, final=2), LoRADash(r=2, directions=2, switch=4)],
                         ids=["adalora", "lora_dash"])  # fmt: skip
def test_blocks_follow_the_schedule_of_the_method_within(inner):
    """As if each block were a layer of its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2)).double()
    base = sp.capture(model, torch.randn(4, 5).double())
    program = sp.rewrite(base, Blocks(of=inner, only=("q", "v")), where="0")

    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v, self.out = *(nn.Linear(5, 3) for _ in range(3)), nn.Linear(9, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(torch.tanh(torch.cat([self.q(x), self.k(x), self.v(x)], -1)))

    split = Split().double()
    with torch.no_grad():
        for i, part in enumerate((split.q, split.k, split.v)):
            part.weight.copy_(model[0].weight[3 * i : 3 * i + 3])
            part.bias.copy_(model[0].bias[3 * i : 3 * i + 3])
    split.out.load_state_dict(model[2].state_dict())
    apart = sp.rewrite(sp.capture(split, base.example["input"]), inner, where=["q", "v"])
    pairs = []
    with torch.no_grad():
        for site in apart.adapters[0].sites:
            for name, path in apart.adapters[0].paths(site).items():
                whole = program.module.get_parameter(f"0.weight_blocks.{name}_{site.owner}")
                whole.copy_(apart.module.get_parameter(path))
                pairs.append((whole, apart.module.get_parameter(path)))
    optimizers = [torch.optim.AdamW(trained(p), lr=0.05) for p in (program, apart)]
    for one, optimizer in zip((program, apart), optimizers, strict=True):
        sp.schedule(one, optimizer, 8)
    for number in range(8):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(number), dtype=torch.float64)
        for one, optimizer in zip((program, apart), optimizers, strict=True):
            optimizer.zero_grad()
            (one.module(x).square().sum() + sp.penalty(one)).backward()
            optimizer.step()
        for a, b in pairs:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(program.run(), apart.run(), rtol=1e-9, atol=1e-11)
