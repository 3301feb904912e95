"""sp.TrainStep against a plain loop over torch.optim.AdamW, and the compiled step in sp.train."""

import copy
import warnings
from collections.abc import Callable, Sequence

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base.errors import ConfigError, TrainError, TrainWarning
from subgraph_peft.passes import AdaLoRA, DoRA, LoRA, LoRADash, RsLoRA
from subgraph_peft.program.runners import changes
from subgraph_peft.training.collation import Padding, spread
from subgraph_peft.training.compiled import Compiled
from subgraph_peft.training.cuda_graph import signature
from subgraph_peft.training.options import TrainOptions
from subgraph_peft.training.penalty import penalty
from subgraph_peft.training.step_optimizer import Gradients, StepOptimizer, parameter_groups
from subgraph_peft.training.train import train
from tests import models
from tests.training.test_train import collate, examples

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="records CUDA graphs")
FLOATS = [torch.float32, torch.float64]
OPTIONS = {"lr": 1e-2, "weight_decay": 0.1, "max_grad_norm": 0.5}


@pytest.fixture
def eager(monkeypatch) -> list[Callable]:
    """torch.compile without a compiler: the step in pieces as they are. Gives the pieces that were compiled."""
    pieces: list[Callable] = []
    monkeypatch.setattr(torch, "compile", lambda run, **options: pieces.append(run) or run)
    return pieces


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.up, self.down, self.dropout = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.dropout(self.down(torch.tanh(self.up(x))))


class Deep(nn.Module):
    """Equal layers, with a loss; `spare` is not part of it."""

    def __init__(self, depth: int = 2, width: int = 8):
        super().__init__()
        self.layers = nn.ModuleList([Block(width) for _ in range(depth)])
        self.head, self.spare = nn.Linear(width, 3), nn.Linear(width, 3)

    def forward(
        self, x: torch.Tensor, labels: torch.Tensor | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(x)
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return loss, logits, self.spare(x)


def batch(rows: int = 5, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 8, generator=generator, dtype=dtype)
    return {"x": x, "labels": torch.randint(3, (rows,), generator=generator)}


def batches(count: int, rows: Sequence[int] = (5,)) -> list[dict[str, torch.Tensor]]:
    return [batch(rows[i % len(rows)], seed=i) for i in range(count)]


def made(method: sp.Method = LoRA(r=2), depth: int = 2, trainable: str | list[str] = "head", dropout: float = 0.0):  # noqa: B008
    """A new program in train mode, in float64."""
    torch.manual_seed(0)
    model = Deep(depth).double()
    for layer in model.layers:
        layer.dropout.p = dropout
    program = sp.rewrite(sp.capture(model, batch(), verify=False), method, where="layers.*", trainable=trainable)
    with torch.no_grad():
        for _, p in program.parameters(trainable=True):
            p.add_(0.1 * torch.randn(p.shape, dtype=p.dtype))
    program.module.train()
    return program


class Plain:
    """The loop that TrainStep stands for."""

    def __init__(self, program: sp.Program, lr: float, weight_decay: float = 0.0, max_grad_norm: float = 0.0):
        self.program, self.max_grad_norm = program, max_grad_norm
        self.optimizer = torch.optim.AdamW(parameter_groups(program, lr, weight_decay), lr=lr)

    def accumulate(self, given: dict, factor: float = 1.0, share: float = 1.0) -> torch.Tensor:
        outputs = self.program.module(**given)
        loss = (outputs.loss if hasattr(outputs, "loss") else outputs[0]) * factor + penalty(self.program)
        (share * loss).backward()
        return share * loss.detach()

    def step(self) -> None:
        parameters = [p for _, p in self.program.parameters(trainable=True)]
        if self.max_grad_norm:
            self.norm = torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def __call__(self, given: dict) -> torch.Tensor:
        loss = self.accumulate(given)
        self.step()
        return loss


def assert_equal(one: sp.Program, other: sp.Program, tolerance: float = 1e-10) -> None:
    expected = dict(other.module.state_dict())
    for name, value in one.module.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=tolerance, atol=tolerance), name


def both(program: sp.Program, **options) -> tuple[sp.TrainStep, Plain]:
    known = {**OPTIONS, **options}
    plain = {name: value for name, value in known.items() if name != "compile"}
    return sp.TrainStep(program, **known), Plain(copy.deepcopy(program), **plain)


def compare(step: sp.TrainStep, plain: Plain, given: list[dict], tolerance: float = 1e-10) -> None:
    for each in given:
        torch.manual_seed(1)
        loss = step(each)
        torch.manual_seed(1)
        expected = plain(each)
        assert loss.ndim == 0 and not loss.requires_grad
        assert torch.allclose(loss, expected, rtol=tolerance), (loss, expected)
    assert_equal(step.program, plain.program, tolerance)


METHODS = {
    "lora": LoRA(r=2), "dora": DoRA(of=LoRA(r=2), norm_gradient=True), "adalora": AdaLoRA(r=3, target_r=2),
    "dropout": LoRA(r=2, dropout=0.4),
}  # fmt: skip


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_is_that_of_a_plain_loop(name, compiled, eager):
    step, plain = both(made(METHODS[name], dropout=0.2), compile=compiled)
    compare(step, plain, batches(6))
    assert torch.allclose(step.optimizer.norm.double(), plain.norm, rtol=1e-5)
    assert bool(eager) == compiled


@pytest.mark.parametrize("compiled", [False, True])
def test_batches_of_other_shapes_in_between(compiled, eager):
    step, plain = both(made(dropout=0.2), compile=compiled)
    compare(step, plain, batches(9, rows=(5, 5, 3, 5, 2, 5)))


def test_many_shapes(eager):
    step, plain = both(made(), compile=True)
    with pytest.warns(TrainWarning, match="Deep: batches come in more than 8 shapes.*pad to fewer lengths"):
        compare(step, plain, [each for rows in range(2, 13) for each in (batch(rows, 1), batch(rows, 2))])


def test_without_clipping_and_decay(eager):
    compare(*both(made(), weight_decay=0.0, max_grad_norm=0.0, compile=True), batches(4))


def test_the_module_trains_in_train_mode(eager):
    program = made(LoRA(r=2, dropout=0.5))
    losses = []
    for compiled in (False, True):
        other = copy.deepcopy(program)
        other.module.eval()
        torch.manual_seed(3)
        losses.append(sp.TrainStep(other, compile=compiled)(batch()))
        assert other.module.training
    assert torch.equal(*losses)
    assert not torch.allclose(losses[0], program.module.eval()(**batch())[0])


def test_a_model_of_transformers(eager):
    model, inputs = models.bert(dropout=0.2)
    program = sp.capture(model.double(), inputs, verify=False)
    program = sp.rewrite(program, LoRA(r=2), where="*.{query,value}", trainable="classifier")
    step, plain = both(program, compile=True)
    plain.program.module.train()
    compare(step, plain, [inputs] * 3)
    assert [run.__code__.co_filename.partition(":")[0] for run in eager] == [
        "<BertForSequenceClassification around layers", "<BertForSequenceClassification bert.encoder.layer.0",
        "<BertForSequenceClassification around layers",
    ]  # fmt: skip


# pieces


@pytest.mark.parametrize("depth", [2, 5])
def test_equal_layers_are_compiled_once(depth, eager):
    step = sp.TrainStep(made(depth=depth), compile=True)
    step(batch())
    assert len(eager) == 2, "a layer, and what follows"
    (_, parts), *_ = step.compiled_loss.plans.values()
    assert len(parts) == depth + 1 and len({part.run for part in parts}) == 2


def test_layers_of_other_shapes_are_compiled_apart(eager):
    """As many as there are, where torch.compile would give up on the ninth shape of one function."""
    torch.manual_seed(0)
    base = sp.capture(Deep(10).double(), batch(), verify=False)
    ranks = {f"layers.{i}.*": {"r": i + 1, "alpha": float((i + 1) ** 0.5)} for i in range(10)}
    program = sp.rewrite(base, RsLoRA(r=1), where="layers.*", patterns=ranks)
    compare(*both(program, compile=True), batches(2))
    assert len(eager) == 11


def test_a_model_without_repeated_layers_is_one_piece(eager):
    model, inputs = models.mlp()
    program = sp.rewrite(sp.capture(model.double(), {**inputs, "x": inputs["x"].double()}), LoRA(r=1), where="first")
    step, plain = both(program, compile=True)
    compare(step, plain, [{**inputs, "x": inputs["x"].double()}] * 2)
    assert len(eager) == 1


def test_a_graph_that_cannot_be_cut_is_one_piece(eager):
    """Heads that share an input share a product, which belongs to none of them."""

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.heads = nn.ModuleList([nn.Linear(8, 3) for _ in range(3)])

        def forward(self, x, labels):
            logits = sum(head(x) for head in self.heads)
            return nn.functional.cross_entropy(logits, labels), logits

    program = sp.rewrite(sp.capture(Heads().double(), batch(), verify=False), LoRA(r=2), where="heads.*")
    assert changes(program.module)[True, frozenset()]["siblings"] == 1
    compare(*both(program, compile=True), batches(2))
    assert len(eager) == 1


@pytest.mark.parametrize("where", [None, "layers.0", "*.up"])
def test_checkpointed_layers(where, eager):
    program = made(LoRA(r=2, dropout=0.3), depth=3, dropout=0.3)
    step, plain = both(program, compile=True)
    program.module.gradient_checkpointing_enable(where)
    compare(step, plain, batches(3))


def test_a_loss_that_is_not_the_first_output(eager):
    class Named(Deep):
        def forward(self, x, labels):
            loss, logits, _ = super().forward(x, labels)
            return {"logits": logits, "loss": loss}

    program = sp.rewrite(sp.capture(Named().double(), batch(), verify=False), LoRA(r=2), where="layers.*")
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainWarning)
        losses = [sp.TrainStep(copy.deepcopy(program), compile=on)(batch()) for on in (True, False)]
    assert torch.allclose(*losses, rtol=1e-12)


def test_nested_inputs(eager):
    class Nested(Deep):
        def forward(self, parts, labels):
            return super().forward(parts[0] + parts[1]["more"], labels)

    def nested(seed: int) -> dict:
        given = batch(seed=seed)
        return {"parts": [given["x"], {"more": given["x"].tanh()}], "labels": given["labels"]}

    program = sp.capture(Nested().double(), nested(0), verify=False)
    program = sp.rewrite(program, LoRA(r=2), where="layers.*")
    step, plain = both(program, compile=True)
    compare(step, plain, [nested(i) for i in range(3)])
    assert len(step.met) == 1


def test_inputs_may_be_left_out(eager):
    class Optional(Deep):
        def forward(self, x, labels, more=None):
            loss, logits, spare = super().forward(x, labels)
            return loss, logits, spare if more is None else spare + more

    given = {**batch(), "more": torch.ones(5, 3, dtype=torch.float64)}
    program = sp.rewrite(sp.capture(Optional().double(), given, verify=False), LoRA(r=2), where="layers.*")
    step, plain = both(program, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainWarning)
        compare(step, plain, [given, batch(), batch(), given, {**given, "more": None}])
    assert len(step.compiled_loss.plans) == 2


def test_batch_norm_counts_every_step_once(eager):
    model, inputs = models.conv(dropout=0.2)
    inputs = {**inputs, "x": inputs["x"].double()}
    program = sp.capture(model.double(), inputs, verify=False)
    step, plain = both(sp.rewrite(program, LoRA(r=2), where=["stem", "point"]), compile=True)
    plain.program.module.train()
    compare(step, plain, [inputs] * 3)
    assert step.module.norm.num_batches_tracked == 3


def test_bfloat16_autocast(eager):
    program = sp.rewrite(sp.capture(Deep(), batch(dtype=torch.float32), verify=False), LoRA(r=2), where="layers.*")
    given, losses = batch(dtype=torch.float32), {}
    for compiled in (True, False):
        step = sp.TrainStep(copy.deepcopy(program), compile=compiled, autocast=torch.bfloat16)
        losses[compiled] = step(given)
        assert {p.dtype for p in step.parameters} == {torch.float32}
    assert torch.equal(losses[True], losses[False])
    exact = sp.TrainStep(copy.deepcopy(program))(given)
    assert 0 < (losses[True] - exact).abs() < 0.05


@pytest.mark.slow
def test_inductor():
    base = sp.capture(Deep(), batch(dtype=torch.float32), verify=False)
    program = sp.rewrite(base, DoRA(of=LoRA(r=2)), where="layers.*", trainable="head")
    step, plain = both(program, compile=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", TrainWarning)
        compare(step, plain, [batch(seed=i, dtype=torch.float32) for i in range(3)], 1e-5)
    assert isinstance(step.compiled_loss, Compiled)


# where it fails


def test_a_failing_compiler_warns_once_and_the_step_goes_on(monkeypatch):
    def broken(run, **options):
        def fail(*inputs):
            raise NotImplementedError("no such kernel")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    step, plain = both(made(), compile=True)
    with pytest.warns(TrainWarning, match="Deep: torch.compile failed.*NotImplementedError: no such") as met:
        compare(step, plain, batches(4))
    assert len(met) == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_without_labels_is_an_error(compiled, eager):
    step = sp.TrainStep(made(), compile=compiled)
    with pytest.raises(TrainError, match="gives no loss: capture the model with labels"):
        step({"x": batch()["x"]})
    with pytest.raises(sp.CaptureError):
        step({"x": batch()["x"], "labels": batch()["labels"], "more": 3})


def test_nothing_trains():
    base = sp.capture(Deep(), batch(dtype=torch.float32), verify=False)
    with pytest.raises(TrainError, match="Nothing requires gradients: rewrite the program"):
        sp.TrainStep(base)


# accumulation


@pytest.mark.parametrize("compiled", [False, True])
def test_accumulated_batches(compiled, eager):
    step, plain = both(made(AdaLoRA(r=3, target_r=2)), compile=compiled)
    for index in range(4):
        for part, (factor, share) in enumerate([(1.0, 1 / 3), (0.7, 1 / 3), (1.3, 1 / 3)]):
            given = batch(seed=10 * index + part)
            loss = step.accumulate(given, torch.tensor(factor, dtype=torch.float64) if part else factor, share)
            assert torch.allclose(loss, plain.accumulate(given, factor, share), rtol=1e-10)
        step.optimizer.step()
        plain.step()
    assert_equal(step.program, plain.program)


def test_without_a_batch_the_penalty_is_left():
    program = made(AdaLoRA(r=3, target_r=2))
    step = sp.TrainStep(program)
    found = step.accumulate(None, share=0.5)
    named = {n: p for n, p in program.parameters(trainable=True)}
    expected = torch.autograd.grad(0.5 * penalty(program), list(named.values()), allow_unused=True)
    assert torch.allclose(found, 0.5 * penalty(program))
    for parameter, grad in zip(named.values(), expected, strict=True):
        assert (parameter.grad is None) == (grad is None)
        assert grad is None or torch.allclose(parameter.grad, grad)


def test_zero_grad_forgets_what_was_accumulated():
    step, plain = both(made())
    step.accumulate(batch(seed=7))
    step.optimizer.zero_grad()
    step.accumulate(batch())
    step.optimizer.step()
    plain(batch())
    assert_equal(step.program, plain.program)


def test_gradients_of_the_users_own_are_no_part_of_a_step():
    step, plain = both(made())
    step.module(**batch(seed=9))[0].backward()
    compare(step, plain, batches(2))


def test_what_the_loss_does_not_depend_on_stays_as_it_is(eager):
    """Also under weight decay, as in a loop where its gradient is None."""
    program = made(trainable=["head", "spare"])
    before = program.module.spare.weight.clone()
    step, plain = both(program, compile=True)
    compare(step, plain, batches(3))
    assert torch.equal(program.module.spare.weight, before) and program.module.spare.weight.grad is None
    assert len(step.optimizer.state_dict()["state"]) == len(plain.optimizer.state_dict()["state"])


# schedules and options


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "method", [AdaLoRA(r=3, target_r=1, interval=1), LoRADash(r=2, directions=2, switch=2)], ids=lambda m: m.name
)
def test_schedules(method, compiled, eager):
    step, plain = both(made(method), compile=compiled)
    schedules = [sp.schedule(each.program, each.optimizer, total_steps=6) for each in (step, plain)]
    compare(step, plain, batches(6))
    one, other = (each.state_dict() for each in schedules)
    assert one["number"] == other["number"]
    assert all(torch.allclose(one["tensors"][n], other["tensors"][n]) for n in one["tensors"])


def test_learning_rate_schedulers_and_changed_options():
    step, plain = both(made())
    rates = [torch.optim.lr_scheduler.ExponentialLR(each.optimizer, 0.5) for each in (step, plain)]
    for index, given in enumerate(batches(5)):
        compare(step, plain, [given])
        for each, scheduler in zip((step, plain), rates, strict=True):
            scheduler.step()
            for group in each.optimizer.param_groups if index == 2 else ():
                group["weight_decay"], group["betas"] = 0.3, (0.8, 0.9)
    assert rates[0].get_last_lr() == rates[1].get_last_lr() != [OPTIONS["lr"]]


def test_hooks_of_the_optimizer_are_called_once():
    step, calls = sp.TrainStep(made()), []
    step.optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    step.optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    step(batch())
    assert calls == ["before", "after"]


@pytest.mark.parametrize("into", [StepOptimizer, torch.optim.AdamW])
def test_the_optimizers_state_goes_on(into):
    program = made()
    step, plain = both(program)
    compare(step, plain, batches(3))
    state = copy.deepcopy(step.optimizer.state_dict())
    other = copy.deepcopy(program)
    more = sp.TrainStep(other, **OPTIONS) if into is StepOptimizer else Plain(other, **OPTIONS)
    more.optimizer.load_state_dict(state)
    for given in batches(3):
        expected = plain(given)
        assert torch.allclose(more(given), expected, rtol=1e-10)
    assert_equal(other, plain.program)


def test_a_state_of_adamw_goes_on_in_a_step():
    program = made()
    _, plain = both(program)
    for given in batches(2):
        plain(given)
    step = sp.TrainStep(copy.deepcopy(plain.program), **OPTIONS)
    step.optimizer.load_state_dict(copy.deepcopy(plain.optimizer.state_dict()))
    compare(step, plain, batches(2))


# sp.train

QUICK = TrainOptions(max_steps=5, batch_size=4, lr=1e-2, eval_every=None, save_every=2, seed=3)


@pytest.fixture(scope="module")
def captured() -> sp.Program:
    model, inputs = models.bert(dropout=0.2)
    return sp.capture(model.double(), inputs, verify=False)


def run(captured: sp.Program, folder, method: sp.Method = LoRA(r=2, dropout=0.2), **changed):  # noqa: B008
    program = sp.rewrite(captured, method, where="*.{query,value}", trainable="classifier")
    options = QUICK.model_copy(update=changed)
    result = train(program, examples(26), output=folder, options=options, collate=collate)
    return program, result


@pytest.mark.parametrize(("accumulation", "method"), [(1, LoRA(r=2, dropout=0.2)), (3, AdaLoRA(r=3, target_r=2))])
def test_compiled_training_is_training(captured, tmp_path, eager, accumulation, method):
    """Also with a last, smaller batch."""
    changed = {"method": method, "gradient_accumulation": accumulation}
    (one, result), (other, expected) = (
        run(captured, tmp_path / str(on), compile=on, **changed) for on in (True, False)
    )
    assert eager
    for (step, loss), (number, true) in zip(result.losses, expected.losses, strict=True):
        assert step == number and abs(loss - true) < 1e-6
    assert_equal(one, other, 1e-8)


def test_a_compiled_run_resumes(captured, tmp_path, eager):
    whole, result = run(captured, tmp_path / "whole", compile=True)
    program, part = run(captured, tmp_path / "parts", compile=True)
    for folder in (tmp_path / "parts").iterdir():
        if folder.name != "checkpoint-4":
            for file in folder.iterdir():
                file.unlink()
            folder.rmdir()
    again, rest = run(captured, tmp_path / "parts", compile=False)
    assert rest.resumed_from == 4
    assert_equal(again, whole, 1e-8)
    assert [step for step, _ in rest.losses] == [1, 2, 3, 4, 5]
    assert all(abs(a - b) < 1e-6 for (_, a), (_, b) in zip(rest.losses, result.losses, strict=True))


def test_sharded_training_is_not_compiled(captured, tmp_path):
    with pytest.raises(ConfigError, match="shard: true gathers weights layer by layer, which is not compiled"):
        run(captured, tmp_path, compile=True, shard=True)
    assert not QUICK.compiles(torch.device("cpu")) and QUICK.compiles(torch.device("cuda"))
    assert not TrainOptions(shard=True).compiles(torch.device("cuda"))


# few lengths


@hypothesis.given(lengths=st.lists(st.integers(1, 600), min_size=1, max_size=30), count=st.integers(1, 12))
def test_spread(lengths, count):
    found = spread(lengths, count)
    assert len(found) <= count and found[-1] == max(lengths)
    assert list(found) == sorted(set(found)) and all(length % 8 == 0 for length in found[:-1])


class Tokenizer:
    """Pads with zeros on one side, as tokenizers of transformers do."""

    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, side: str):
        self.padding_side = side

    def pad(self, items, padding, max_length, return_tensors):
        assert (padding, return_tensors) == ("max_length", "pt")
        rows = {}
        for name in items[0]:
            filled = [[0] * (max_length - len(item[name])) for item in items]
            pairs = zip(items, filled, strict=True)
            ordered = [fill + item[name] if self.padding_side == "left" else item[name] + fill for item, fill in pairs]
            rows[name] = torch.tensor(ordered)
        return rows


def tokens(length: int) -> dict:
    ids = list(range(3, 3 + length))
    return {"input_ids": ids, "attention_mask": [1] * length, "labels": ids}


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_to_few_lengths(side):
    pad = Padding(Tokenizer(side), (8, 16, 21))
    for lengths, width in (([2, 5], 8), ([8], 8), ([9, 1], 16), ([17], 21), ([30, 2], 30)):
        found = pad([tokens(length) for length in lengths])
        assert {tuple(value.shape) for value in found.values()} == {(len(lengths), width)}
        assert torch.equal(found["labels"] == -100, found["attention_mask"] == 0)
        assert torch.equal(found["attention_mask"].sum(1), torch.tensor(lengths))
    assert Padding(Tokenizer(side))([tokens(5)])["labels"].shape == (1, 5)


def test_padding_to_few_lengths_changes_no_result(tmp_path, eager):
    model, inputs = models.llama()
    captured = sp.capture(model.double(), inputs, verify=False)
    data = [tokens(2 + 3 * i % 11) for i in range(12)]
    outcomes = []
    for lengths in (0, 2):
        program = sp.rewrite(captured, LoRA(r=2), where="*.q_proj")
        options = QUICK.model_copy(update={"lengths": lengths, "max_steps": 3, "compile": lengths > 0})
        pad = Padding(Tokenizer("right"))
        result = train(program, data, output=tmp_path / str(lengths), options=options, collate=pad)
        outcomes.append((program, result.losses))
    assert all(abs(a - b) < 1e-6 for (_, a), (_, b) in zip(outcomes[0][1], outcomes[1][1], strict=True))
    assert_equal(outcomes[0][0], outcomes[1][0], 1e-8)


# buffers and recordings


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(
    shapes=st.lists(st.tuples(st.sampled_from(FLOATS), st.lists(st.integers(0, 5), max_size=3)), min_size=1)
)
def test_gradients_are_views_of_a_buffer_a_dtype(shapes):
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for dtype, shape in shapes]
    gradients = Gradients(parameters)
    assert len(gradients.buffers) == len({dtype for dtype, _ in shapes})
    new = [torch.full_like(p, i + 1.0) if i % 3 else None for i, p in enumerate(parameters)]
    gradients.add(new)
    gradients.add(new)
    for parameter, value in zip(parameters, new, strict=True):
        assert (parameter.grad is None) == (value is None)
        if value is not None:
            assert torch.equal(parameter.grad, 2 * value) and parameter.grad.data_ptr() % 4 == 0
    held = sum(buffer.sum().item() for buffer in gradients.buffers)
    assert held == sum(2 * value.sum().item() for value in new if value is not None)
    gradients.zero()
    assert not any(p.grad.any() for p in parameters if p.grad is not None)


def test_gradients_that_another_process_gave():
    parameters = [nn.Parameter(torch.zeros(3)) for _ in range(2)]
    gradients = Gradients(parameters)
    gradients.add([torch.ones(3), None])
    parameters[1].grad = torch.full((3,), 2.0)
    gradients.adopt()
    gradients.attach()
    assert [p.grad.sum().item() for p in parameters] == [3.0, 6.0]
    assert parameters[1].grad is gradients.views[1]


def test_signatures():
    x = torch.zeros(2, 3)
    assert signature({"x": x, "flag": True}) == signature({"flag": True, "x": torch.ones(2, 3)})
    others = [(x, True), (x.double(), True), (x[:1], True), (x, False), ([x], True)]
    assert len({signature({"x": value, "flag": flag}) for value, flag in others}) == 5


def on_cuda(method: sp.Method, record: bool) -> sp.TrainStep:
    program = made(method)
    program.module.to("cuda")
    return sp.TrainStep(program, **OPTIONS, compile=False, record=record)


@cuda
@pytest.mark.parametrize("method", [LoRA(r=2), AdaLoRA(r=3, target_r=2)], ids=lambda m: m.name)
def test_recorded_steps_are_the_same(method):
    losses = {}
    for record in (True, False):
        step = on_cuda(method, record)
        torch.manual_seed(0)
        losses[record] = torch.stack([step(each) for each in batches(14, rows=(5, 5, 3))])
        assert len(step.recorded) == (2 if record else 0) and (step.optimizer.recorded is not None) == record
    assert torch.allclose(losses[True], losses[False], rtol=1e-9)


@cuda
def test_dropout_of_recorded_steps_goes_on():
    step = on_cuda(LoRA(r=2, dropout=0.5), True)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    losses = [step(batch()).item() for _ in range(8)]
    assert step.recorded and len(set(losses)) == 8


@cuda
def test_a_changed_rate_and_decay_reach_the_recording():
    steps = [on_cuda(LoRA(r=2), record) for record in (True, False)]
    for index, given in enumerate(batches(10)):
        losses = [step(given).item() for step in steps]
        assert abs(losses[0] - losses[1]) < 1e-9
        for step in steps:
            for group in step.optimizer.param_groups:
                group["lr"] *= 0.9
                group["weight_decay"] = 0.5 if index > 5 else group["weight_decay"]


@cuda
def test_a_failing_recording_warns_and_the_step_goes_on(monkeypatch):
    steps = [on_cuda(LoRA(r=2), record) for record in (True, False)]

    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr("subgraph_peft.training.step.Recorded", fail)
    with pytest.warns(TrainWarning, match="the step is not recorded as a CUDA graph: operation not permitted"):
        for given in batches(6):
            losses = [step(given).item() for step in steps]
            assert abs(losses[0] - losses[1]) < 1e-9
    assert not steps[0].recorded and not steps[0].record
