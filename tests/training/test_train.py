import json
import os
import signal
import threading

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import subgraph_peft as sp
from subgraph_peft.base.errors import CheckpointError, ConfigError, TrainError
from subgraph_peft.passes import SSL, DoRA, LoRA
from subgraph_peft.pipeline.data import Examples
from subgraph_peft.training.evaluate import evaluate, ranks
from subgraph_peft.training.options import TrainOptions, TrainResult
from subgraph_peft.training.order import Order
from subgraph_peft.training.step_optimizer import parameter_groups
from subgraph_peft.training.train import train
from tests import models
from tests.models import VOCABULARY, bert, conv, gpt2, mlp

QUICK = TrainOptions(max_steps=7, batch_size=4, lr=1e-2, eval_every=None, save_every=None, seed=3)


@pytest.fixture(scope="module")
def captured() -> sp.Program:
    return models.captured("bert", 0.2)


@pytest.fixture
def program(captured: sp.Program) -> sp.Program:
    return sp.rewrite(captured, LoRA(r=2), where="*.{query,value}", trainable="classifier")


def examples(count: int, seed: int = 0, length: int = 6) -> Examples:
    """The class is said by the first two tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (count, length), generator=generator)
    labels = torch.randint(3, (count,), generator=generator)
    ids[:, :2] = labels[:, None] + 3
    return Examples(
        [
            {"input_ids": row, "attention_mask": [1] * length, "labels": label}
            for row, label in zip(ids.tolist(), labels.tolist(), strict=True)
        ]
    )


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


def run(program: sp.Program, output: os.PathLike, options: TrainOptions = QUICK, **more: object) -> TrainResult:
    return train(program, examples(18), output=output, options=options, collate=collate, **more)


def weights(program: sp.Program) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in program.module.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class At(transformers.TrainerCallback):
    """Calls `act` at the end of a step, or once in the middle of a later one."""

    def __init__(self, step: int, act, event: str = "on_step_end"):
        self.step, self.act = step, act
        setattr(self, event, self.fire)

    def fire(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.step:
            self.act()


def interrupt() -> None:
    raise KeyboardInterrupt


# what training does


def test_training_learns_and_leaves_the_base_alone(program, tmp_path):
    before = weights(program)
    options = QUICK.model_copy(update={"max_steps": 60, "batch_size": 8, "eval_every": 30})
    result = train(program, examples(64), examples(32, seed=1), output=tmp_path, options=options, collate=collate)
    first, last = result.evaluations[0], result.evaluations[-1]
    assert [step for step, _ in result.evaluations] == [0, 30, 60]
    assert last[1]["loss"] < first[1]["loss"] and last[1]["accuracy"] > first[1]["accuracy"]
    assert [step for step, _ in result.losses] == list(range(1, 61))
    assert (result.trainable, result.total) == program.counts()
    after, trained = weights(program), {name for name, _ in program.parameters(trainable=True)}
    assert {name for name in after if not torch.equal(before[name], after[name])} == trained
    assert all(parameter.grad is None for parameter in program.module.parameters())


def test_result_is_json(program, tmp_path):
    result = run(program, tmp_path, QUICK.model_copy(update={"max_steps": 2}), eval_data=examples(5))
    assert TrainResult.model_validate_json(result.model_dump_json()) == result
    assert result.examples_per_second > 0 and result.seconds > 0 and result.resumed_from is None


def test_a_checkpoint_is_the_adapter_without_the_base(captured, program, tmp_path):
    result = run(program, tmp_path)
    assert result.checkpoint == tmp_path / "checkpoint-7"
    again = sp.load(captured, result.checkpoint)
    assert same(weights(program), weights(again))
    held = sum(parameter.numel() for _, parameter in program.parameters(trainable=True))
    assert (result.checkpoint / "optimizer.safetensors").stat().st_size < 8 * held + 10_000
    assert not {path.suffix for path in result.checkpoint.iterdir()} - {".json", ".safetensors"}


def test_old_checkpoints_are_removed(program, tmp_path):
    run(program, tmp_path, QUICK.model_copy(update={"save_every": 2, "keep_checkpoints": 2}))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-6", "checkpoint-7"]


def test_seed_decides(captured, tmp_path):
    outcomes = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        program = sp.rewrite(captured, LoRA(r=2), where="*.query")
        outcomes.append(run(program, tmp_path / folder, QUICK.model_copy(update={"seed": seed})).losses)
    assert outcomes[0] == outcomes[1] != outcomes[2]


def test_evaluation_does_not_change_training(captured, tmp_path):
    outcomes = []
    for name, every in (("never", None), ("always", 1)):
        program = sp.rewrite(captured, LoRA(r=2), where="*.query")
        options = QUICK.model_copy(update={"eval_every": every})
        outcomes.append((run(program, tmp_path / name, options, eval_data=examples(5)).losses, weights(program)))
    assert outcomes[0][0] == outcomes[1][0] and same(outcomes[0][1], outcomes[1][1])


def test_quiet_unless_asked(program, tmp_path, capfd):
    run(program, tmp_path / "a", eval_data=examples(5))
    assert capfd.readouterr() == ("", "")
    run(program, tmp_path / "b", eval_data=examples(5), progress=True)
    assert "7/7" in capfd.readouterr().err


def test_module_and_config_are_as_before(program, tmp_path):
    config, keys = program.module.config, set(program.module.__dict__)
    use_cache = config.use_cache
    config.use_cache = True
    try:
        run(program, tmp_path, QUICK.model_copy(update={"bf16": True, "max_steps": 2}))
        assert config.use_cache is True
    finally:
        config.use_cache = use_cache
    assert set(program.module.__dict__) == keys


def test_bf16_autocast_keeps_float32_adapters(captured, tmp_path):
    losses = {}
    for bf16 in (True, False):
        program = sp.rewrite(captured, LoRA(r=2), where="*.query")
        options = QUICK.model_copy(update={"bf16": bf16, "max_steps": 3})
        losses[bf16] = np.array(run(program, tmp_path / str(bf16), options).losses)[:, 1]
        assert {parameter.dtype for _, parameter in program.parameters(trainable=True)} == {torch.float32}
    assert 0 < np.abs(losses[True] - losses[False]).max() < 0.05


@pytest.mark.parametrize("model", [bert, gpt2])
def test_accumulation_equals_a_big_batch(model, tmp_path):
    """Also where the parts hold unequal numbers of labels: a language model with a mask, and a last, smaller batch."""
    captured = sp.capture(*model())
    rows = []
    for i, item in enumerate(examples(10)):
        ids = item["input_ids"]
        labels = [-100] * (i % 4) + ids[i % 4 :] if model is gpt2 else item["labels"]
        rows.append({"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels})
    outcomes = []
    for batch, accumulation in ((8, 1), (2, 4)):
        program = sp.rewrite(captured, LoRA(r=2), where="*.c_attn" if model is gpt2 else "*.query")
        options = QUICK.model_copy(update={"batch_size": batch, "gradient_accumulation": accumulation, "max_steps": 4})
        result = train(program, Examples(rows), output=tmp_path / str(batch), options=options, collate=collate)
        outcomes.append((np.array(result.losses), weights(program)))
    (losses, values), (parts, others) = outcomes
    np.testing.assert_allclose(parts, losses, rtol=2e-5)
    assert all(torch.allclose(values[name], others[name], atol=2e-4) for name in values)


# interruption


@pytest.fixture(scope="module")
def uninterrupted(captured, tmp_path_factory):
    """An epoch is 3 steps of 2 batches of 3."""
    options = QUICK.model_copy(update={"batch_size": 3, "gradient_accumulation": 2, "max_steps": 8, "eval_every": 2})
    program = sp.rewrite(captured, LoRA(r=2, dropout=0.1), where="*.{query,value}", trainable="classifier")
    result = run(program, tmp_path_factory.mktemp("whole"), options, eval_data=examples(5))
    return options, result, weights(program)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(
    ("callback", "error", "saved"),
    [
        (At(4, interrupt), KeyboardInterrupt, 4),
        (At(3, interrupt), KeyboardInterrupt, 3),
        (At(4, interrupt, "on_substep_end"), KeyboardInterrupt, 4),
        (At(4, lambda: send(signal.SIGINT), "on_substep_end"), KeyboardInterrupt, 5),
        (At(4, lambda: send(signal.SIGTERM), "on_substep_end"), SystemExit, 5),
        (At(4, lambda: send(signal.SIGINT), "on_save"), KeyboardInterrupt, 5),
        (At(8, lambda: send(signal.SIGINT), "on_save"), KeyboardInterrupt, 8),
    ],
    ids=["step", "epoch_end", "middle", "sigint", "sigterm", "saving", "last_save"],
)
def test_interrupted_and_resumed_is_bit_identical(captured, uninterrupted, tmp_path, callback, error, saved):
    options, whole, expected = uninterrupted
    options = options.model_copy(update={"save_every": 4})

    def fresh() -> sp.Program:
        return sp.rewrite(captured, LoRA(r=2, dropout=0.1), where="*.{query,value}", trainable="classifier")

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(error) as caught:
        run(fresh(), tmp_path, options, eval_data=examples(5), callbacks=[callback])
    assert caught.value.code == 143 if error is SystemExit else f"checkpoint-{saved}" in str(caught.value)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert f"checkpoint-{saved}" in {path.name for path in tmp_path.iterdir()}
    torch.rand(7)
    program = fresh()
    result = run(program, tmp_path, options, eval_data=examples(5))
    assert result.resumed_from == saved
    assert result.losses == whole.losses and result.evaluations == whole.evaluations
    assert same(weights(program), expected)


@pytest.mark.parametrize("step", [4, 8])
def test_interrupt_in_an_evaluation(captured, uninterrupted, tmp_path, step):
    options, whole, expected = uninterrupted
    calls = []

    def slow(items: list[dict]) -> dict[str, torch.Tensor]:
        calls.append(len(items))
        if len(items) == 5 and calls.count(5) == 1 + step // 2:
            send(signal.SIGINT)
        return collate(items)

    def go(collate) -> tuple[TrainResult, sp.Program]:
        program = sp.rewrite(captured, LoRA(r=2, dropout=0.1), where="*.{query,value}", trainable="classifier")
        result = train(program, examples(18), examples(5), output=tmp_path, options=options, collate=collate)
        return result, program

    with pytest.raises(KeyboardInterrupt, match=f"after step {step}.*checkpoint-{step}"):
        go(slow)
    result, program = go(collate)
    assert result.resumed_from == step
    assert result.losses == whole.losses and result.evaluations == whole.evaluations
    assert same(weights(program), expected)


def test_resumption_with_batches_of_similar_length(captured, tmp_path):
    cut = [
        {"input_ids": item["input_ids"][: 3 + i % 4], "attention_mask": [1] * (3 + i % 4), "labels": item["labels"]}
        for i, item in enumerate(examples(40))
    ]

    def pad(items: list[dict]) -> dict[str, torch.Tensor]:
        width = max(len(item["input_ids"]) for item in items)
        short = [{n: v + [0] * (width - len(v)) if n != "labels" else v for n, v in item.items()} for item in items]
        return collate(short)

    options = QUICK.model_copy(update={"max_steps": 15, "group_by_length": True})
    assert_resumes(lambda: sp.rewrite(captured, LoRA(r=2), where="*.query"), Examples(cut), options, pad, tmp_path)


def test_resumption_with_batch_norm(tmp_path):
    data = Examples([{"x": torch.randn(3, 8, 8), "labels": i % 3} for i in range(40)])

    def fresh() -> sp.Program:
        return sp.rewrite(sp.capture(*conv(dropout=0.2)), LoRA(r=2), where="point")

    found = assert_resumes(fresh, data, QUICK.model_copy(update={"max_steps": 15}), None, tmp_path)
    assert found["norm.num_batches_tracked"] == 15


def assert_resumes(fresh, data, options, collate, folder) -> dict[str, torch.Tensor]:
    """Interrupted in the second epoch."""

    def go(name: str, program: sp.Program, *callbacks: At) -> TrainResult:
        return train(program, data, output=folder / name, options=options, collate=collate, callbacks=callbacks)

    whole, parts = fresh(), fresh()
    expected = go("whole", whole)
    with pytest.raises(KeyboardInterrupt):
        go("parts", fresh(), At(12, interrupt))
    result = go("parts", parts)
    assert result.resumed_from == 12 and result.losses == expected.losses
    assert same(weights(parts), weights(whole))
    return weights(whole)


def test_second_interrupt_stops_without_saving(program, tmp_path):
    def twice() -> None:
        send(signal.SIGINT)
        send(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="nothing had been saved"):
        run(program, tmp_path, callbacks=[At(2, twice, "on_step_begin")])
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_not_trained_again(captured, program, tmp_path):
    first = run(program, tmp_path, eval_data=examples(5))
    again = sp.rewrite(captured, LoRA(r=2), where="*.{query,value}", trainable="classifier")
    second = run(again, tmp_path, eval_data=examples(5))
    assert (second.losses, second.evaluations, second.resumed_from) == (first.losses, first.evaluations, 7)
    assert same(weights(program), weights(again))


def test_resume_false_starts_anew(program, tmp_path):
    run(program, tmp_path, QUICK.model_copy(update={"save_every": 3}))
    options = QUICK.model_copy(update={"resume": False, "max_steps": 2})
    assert run(program, tmp_path, options).resumed_from is None
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_a_checkpoint_of_another_run_is_refused(program, tmp_path):
    run(program, tmp_path)
    with pytest.raises(CheckpointError, match=r"checkpoint-7 belongs to another run: lr was 0.01, is 0.02\. "):
        run(program, tmp_path, QUICK.model_copy(update={"lr": 2e-2}))
    with pytest.raises(CheckpointError, match="data was"):
        train(program, examples(18, seed=9), output=tmp_path, options=QUICK, collate=collate)
    run(program, tmp_path, QUICK.model_copy(update={"logging_every": 3, "eval_batch_size": 2}))


@pytest.mark.parametrize("name", ["run.json", "optimizer.safetensors", "adapter.safetensors"])
def test_a_damaged_checkpoint_is_refused(program, tmp_path, name):
    options = QUICK.model_copy(update={"max_steps": 4})
    with pytest.raises(KeyboardInterrupt):
        run(program, tmp_path, options, callbacks=[At(3, interrupt)])
    (tmp_path / "checkpoint-3" / name).write_bytes(b"{")
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*damaged|damaged.*{name}"):
        run(program, tmp_path, options)


def test_a_loss_that_is_not_finite_stops_the_run(program, tmp_path):
    options = QUICK.model_copy(update={"save_every": 2})

    def poison() -> None:
        program.module.get_parameter("classifier.weight").data.fill_(float("nan"))

    with pytest.raises(TrainError, match=r"loss is nan at step 6.*lower lr \(now 0.01\).*last good.*checkpoint-4"):
        run(program, tmp_path, options, callbacks=[At(5, poison)])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-4"]


def test_weights_that_are_not_finite_are_not_saved(program, tmp_path):
    def poison() -> None:
        program.module.get_parameter("classifier.weight").data.fill_(float("inf"))

    with pytest.raises(TrainError, match=r"classifier.weight is not finite after step 7.*No checkpoint"):
        run(program, tmp_path, callbacks=[At(6, poison, "on_optimizer_step")])
    assert not list(tmp_path.iterdir())


def test_training_in_a_thread(program, tmp_path):
    done = []
    thread = threading.Thread(target=lambda: done.append(run(program, tmp_path)))
    thread.start()
    thread.join()
    assert done[0].steps == 7


# weight decay and order


def test_weight_decay_spares_what_multiplies(captured):
    program = sp.rewrite(captured, DoRA(of=LoRA(r=2)), where="*.query", trainable="classifier")
    program = sp.rewrite(program, SSL(), where="*.value")
    decayed, kept = parameter_groups(program, 1e-3, 0.1)
    names = {id(parameter): name for name, parameter in program.module.named_parameters()}
    shown = [{names[id(parameter)] for parameter in group["params"]} for group in (decayed, kept)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert shown[0] | shown[1] == {name for name, _ in program.parameters(trainable=True)} and not shown[0] & shown[1]
    assert {name.rpartition(".")[2] for name in shown[0]} == {"A", "B", "weight"}
    assert "classifier.weight" in shown[0] and "classifier.bias" in shown[1]
    assert any(name.endswith("dora.m") for name in shown[1]) and any("_ssl." in name for name in shown[1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(1, 9), st.integers(0, 5))
def test_order_is_a_permutation_in_batches_of_similar_length(lengths, batch, epoch):
    grouped, plain = Order(len(lengths), 7, batch, lengths=lengths), Order(len(lengths), 7, batch)
    grouped.epoch = plain.epoch = epoch
    assert list(grouped) == list(grouped)
    grouped, plain = ([i for batch in order for i in batch] for order in (grouped, plain))
    assert sorted(grouped) == sorted(plain) == list(range(len(lengths)))

    def padding(order: list[int]) -> int:
        rows = [[lengths[i] for i in order[at : at + batch]] for at in range(0, len(order), batch)]
        return sum(max(row) * len(row) - sum(row) for row in rows)

    if len(lengths) <= batch * 50:
        assert padding(list(grouped)) == padding(sorted(range(len(lengths)), key=lengths.__getitem__))


def test_every_epoch_sees_every_example_in_an_order_of_its_own(program, tmp_path):
    seen = []

    def note(items: list[dict]) -> dict[str, torch.Tensor]:
        seen.extend(tuple(item["input_ids"]) for item in items)
        return collate(items)

    data, options = examples(18), QUICK.model_copy(update={"max_steps": 10})
    train(program, data, output=tmp_path, options=options, collate=note)
    first, second = seen[:18], seen[18:36]
    assert sorted(first) == sorted(second) == sorted(tuple(item["input_ids"]) for item in data) and first != second


@pytest.mark.parametrize(("warmup", "steps"), [(0.1, 10), (5, 5), (0, 0), (0.015, 2)])
def test_warmup_is_a_share_or_steps(warmup, steps):
    assert TrainOptions(warmup=warmup).warmup_steps(100) == steps


# other loops


def test_plain_loop(program):
    before = weights(program)
    assert_falls(plain(program, epochs=10))
    trained = {name for name, _ in program.parameters(trainable=True)}
    assert {name for name, value in weights(program).items() if not torch.equal(value, before[name])} == trained


def plain(program: sp.Program, epochs: int) -> list[float]:
    optimizer = torch.optim.AdamW(parameter_groups(program, 2e-2, 0.01))
    losses = []
    program.module.train()
    for _ in range(epochs):
        for batch in DataLoader(examples(24), 8, collate_fn=collate):
            loss = program.module(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    return losses


def assert_falls(losses: list[float]) -> None:
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])


def test_accelerate(program):
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.AdamW(parameter_groups(program, 2e-2, 0.01))
    loader = DataLoader(examples(24), 8, collate_fn=collate)
    module, optimizer, loader = accelerator.prepare(program.module, optimizer, loader)
    losses = []
    module.train()
    for _ in range(10):
        for batch in loader:
            loss = module(**batch).loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert_falls(losses)


def test_a_trainer_of_the_users_own(program, tmp_path):
    before = weights(program)
    arguments = transformers.TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=30, learning_rate=1e-2, logging_steps=1, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer = transformers.Trainer(program.module, arguments, collate, examples(24), examples(8, seed=1))
    trainer.train()
    assert_falls([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert trainer.evaluate()["eval_loss"] > 0
    trained = {name for name, _ in program.parameters(trainable=True)}
    assert {name for name, value in weights(program).items() if not torch.equal(value, before[name])} == trained


# evaluation


def test_evaluation_does_not_depend_on_the_batch_size():
    program = sp.capture(*gpt2())
    rows = [{"input_ids": x["input_ids"], "attention_mask": x["attention_mask"],
             "labels": [-100] * (i % 5) + x["input_ids"][i % 5 :]} for i, x in enumerate(examples(7))]  # fmt: skip
    found = [evaluate(program, Examples(rows), batch_size=size, collate=collate) for size in (1, 3, 7)]
    logits = program.run({**collate(rows)}).logits[:, :-1].log_softmax(-1)
    labels = torch.tensor([row["labels"] for row in rows])[:, 1:]
    expected = torch.nn.functional.nll_loss(logits.transpose(1, 2), labels).item()
    for values in found:
        assert values == pytest.approx({"loss": expected, "perplexity": np.exp(expected)}, rel=1e-5)
    accuracy = ((logits.argmax(-1) == labels) & (labels != -100)).sum() / (labels != -100).sum()
    found = evaluate(program, Examples(rows), metrics="accuracy", collate=collate)
    assert found["accuracy"] == pytest.approx(accuracy.item())


def test_regression_metrics():
    class Regressor(torch.nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None):
            return {"loss": torch.nn.functional.mse_loss(x.squeeze(-1), labels), "logits": x}

    x, y = torch.tensor([[0.0], [1.0], [2.0], [2.0], [9.0]]), torch.tensor([1.0, 0.0, 2.0, 3.0, 4.0])
    program = sp.capture(Regressor(), {"x": x, "labels": y})
    data = Examples([{"x": a, "labels": b} for a, b in zip(x, y, strict=True)])
    found = evaluate(program, data, batch_size=2)
    assert found["mse"] == pytest.approx(found["loss"]) == pytest.approx(((x[:, 0] - y) ** 2).mean().item())
    assert found["pearson"] == pytest.approx(np.corrcoef(x[:, 0], y)[0, 1])
    assert ranks(x[:, 0].numpy()).tolist() == [1, 2, 3.5, 3.5, 5]
    assert found["spearman"] == pytest.approx(np.corrcoef([1, 2, 3.5, 3.5, 5], [2, 1, 3, 4, 5])[0, 1])


def test_metrics_of_the_users_own(captured):
    def count(prediction: transformers.EvalPrediction) -> dict[str, float]:
        return {"rows": len(prediction.predictions), "classes": prediction.predictions.shape[1]}

    found = evaluate(captured, examples(7), metrics=count, batch_size=3, collate=collate)
    assert found == {"loss": found["loss"], "rows": 7, "classes": 3}


def test_unknown_metric(captured):
    with pytest.raises(TrainError, match="Unknown metric 'acuracy'. Did you mean 'accuracy'"):
        evaluate(captured, examples(3), metrics="acuracy", collate=collate)
    with pytest.raises(TrainError, match="mse compares one number with each label; the logits have 9 numbers for 3"):
        evaluate(captured, examples(3), metrics="mse", collate=collate)


# refusals and files


def test_nothing_to_train(captured, tmp_path):
    with pytest.raises(TrainError, match="Nothing requires gradients"):
        run(captured, tmp_path)


def test_no_loss_in_the_graph(tmp_path):
    model, inputs = mlp()
    program = sp.rewrite(sp.capture(model, {"x": inputs["x"]}), LoRA(r=2), where="first")
    with pytest.raises(TrainError, match="no loss: capture the model with labels"):
        run(program, tmp_path)


def test_tuple_outputs_train(tmp_path):
    program = sp.rewrite(sp.capture(*mlp()), LoRA(r=2), where="first")
    data = Examples([{"x": torch.randn(6), "labels": i % 3} for i in range(9)])
    result = train(program, data, data, output=tmp_path, options=QUICK)
    assert set(result.evaluations[-1][1]) == {"loss", "accuracy"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"device": "cuda"}, ConfigError, "finds no CUDA device"),
        ({"warmup": 2.5}, ConfigError, "warmup is 2.5: a whole number"),
        ({"report": "tensorboard"}, ConfigError, "pip install tensorboard"),
    ],
)
def test_options_that_cannot_be_met(program, tmp_path, monkeypatch, change, error, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        run(program, tmp_path, QUICK.model_copy(update=change))


def test_unknown_option():
    with pytest.raises(ValueError, match="learning_rate"):
        TrainOptions(learning_rate=1)


def test_empty_data(program, tmp_path):
    with pytest.raises(TrainError, match="at least one example"):
        train(program, Examples([]), output=tmp_path)


def test_output_that_cannot_be_written(program, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(TrainError, match=r"output folder .*file/run cannot be written: Not a directory"):
        run(program, tmp_path / "file" / "run")


def test_curve_is_a_picture(program, tmp_path):
    result = run(program, tmp_path / "run", eval_data=examples(5))
    result.curve(tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "run"]
    long = result.model_copy(update={"losses": [(i, 1 / i) for i in range(1, 200)], "evaluations": []})
    long.curve(tmp_path / "long.png")
    assert (tmp_path / "long.png").stat().st_size > 5_000
    with pytest.raises(TrainError, match="cannot be written"):
        result.curve(tmp_path / "loss.png" / "no.png")


def test_run_file_is_json(program, tmp_path):
    held = json.loads((run(program, tmp_path).checkpoint / "run.json").read_text())
    assert held["run"]["steps"] == 7 and len(held["losses"]) == 7
