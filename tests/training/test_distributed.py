"""Two processes (gloo, CPU) against one: the same steps, losses, adapters, evaluations and checkpoints.

One launch of torchrun runs every job below in two processes, and then a pipeline file; the tests run the jobs again in
this process and compare.
"""

import copy
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import nn
from torch.distributed.fsdp import FSDPModule

import subgraph_peft as sp
from subgraph_peft.base import processes
from subgraph_peft.base.errors import CheckpointError, ConfigError, TrainError
from subgraph_peft.cli import app
from subgraph_peft.passes import LoRA, PiSSA
from subgraph_peft.pipeline.data import Examples
from subgraph_peft.training.distributed import average_gradients
from subgraph_peft.training.evaluate import evaluate
from subgraph_peft.training.options import TrainOptions
from subgraph_peft.training.order import Order
from subgraph_peft.training.sharded import held_bytes
from subgraph_peft.training.train import train
from tests.models import VOCABULARY, bert, conv, gpt2
from tests.test_cli import PIPELINE

STEP = 8  # examples
OPTIONS = TrainOptions(max_steps=6, lr=1e-2, eval_every=3, save_every=None, seed=3, max_grad_norm=0.5, device="cpu")


@functools.cache
def captured(name: str) -> sp.Program:
    model, inputs = {"bert": bert, "gpt2": gpt2}[name]()
    return sp.capture(model, inputs, verify=False)


def program(name: str, method: sp.Method | None = None) -> sp.Program:
    """In float64, so that what is equal is equal to ten digits."""
    where = {"bert": "*.{query,value}", "gpt2": "*.c_attn"}[name]
    head = {"bert": "classifier", "gpt2": []}[name]
    adapted = sp.rewrite(captured(name), method or LoRA(r=2), where=where, trainable=head)
    adapted = copy.deepcopy(adapted)
    adapted.module.double()
    return adapted


def rows(name: str, count: int = 17, seed: int = 0) -> Examples:
    """17 examples are two steps and one example. Labels of gpt2 are of different number, and missing in every fifth."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(6, VOCABULARY, (count, 6), generator=generator).tolist()
    labels = [i % 3 if name == "bert" else [-100] * (i % 5 + 2) + ids[i][i % 5 + 2 :] for i in range(count)]
    return Examples(
        [{"input_ids": i, "attention_mask": [1] * 6, "labels": label} for i, label in zip(ids, labels, strict=True)]
    )


def collate(items: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([item[name] for item in items]) for name in items[0]}


class Held(transformers.TrainerCallback):
    """Notes the bytes of frozen parameters that this process holds; stops the run at a step."""

    def __init__(self, stop: int | None = None):
        self.stop, self.bytes = stop, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs) -> None:
        if isinstance(model, FSDPModule):
            model.reshard()  # the evaluation has left the embeddings whole
        self.bytes = held_bytes(model)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == self.stop:
            raise KeyboardInterrupt


def outcome(adapted: sp.Program, name: str, folder: Path, held: Held | None = None, **options) -> dict:
    """What a run gives, with `division` into accumulation for as many processes as there are."""
    held, accumulation = held or Held(), options.pop("accumulation", 1)
    batch = STEP // accumulation // processes.world()
    options = OPTIONS.model_copy(update={"batch_size": batch, "gradient_accumulation": accumulation, **options})
    objects = {id(p) for _, p in adapted.parameters(trainable=True)}
    result = train(
        adapted, rows(name), rows(name, 5, seed=1), output=folder, options=options, collate=collate, callbacks=[held]
    )
    assert objects == {id(p) for _, p in adapted.parameters(trainable=True)}
    return {
        "losses": np.array([loss for _, loss in result.losses]),
        "evaluations": [values for _, values in result.evaluations],
        "weights": {n: p.detach().clone() for n, p in adapted.parameters(trainable=True)},
        "fold": sp.fold(adapted).run(),
        "bytes": held.bytes,
        "resumed": result.resumed_from,
    }


def alike(found: dict, expected: dict, tolerance: float = 1e-9) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=tolerance)
    for one, other in zip(found["evaluations"], expected["evaluations"], strict=True):
        assert one == pytest.approx(other, rel=tolerance)
    for part in ("weights", "fold"):
        torch.testing.assert_close(dict(found[part]), dict(expected[part]), rtol=100 * tolerance, atol=tolerance)


# what both processes run: job -> (folder) -> result

JOBS = {
    "bert": lambda folder: outcome(program("bert"), "bert", folder),
    "bert, accumulated": lambda folder: outcome(program("bert"), "bert", folder, accumulation=2),
    "bert, sharded": lambda folder: outcome(program("bert"), "bert", folder, accumulation=2, shard=True),
    "gpt2": lambda folder: outcome(program("gpt2"), "gpt2", folder, accumulation=4),
    "gpt2, sharded": lambda folder: outcome(program("gpt2"), "gpt2", folder, accumulation=4, shard=True),
    "pissa, sharded": lambda folder: outcome(program("gpt2", PiSSA(r=2)), "gpt2", folder, shard=True),
}


def interrupted(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt, match="checkpoint-4"):
        outcome(program("bert"), "bert", folder, Held(stop=4))


def resumed(folder: Path) -> dict:
    return outcome(program("bert"), "bert", folder, accumulation=2)


def missing_gradients(folder: Path) -> list:
    """Rank 1 has no gradient for the second tensor, neither has one for the third."""
    tensors = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(3)),
               nn.Parameter(torch.zeros(2, dtype=torch.float64))]  # fmt: skip
    for tensor in (tensors[0], tensors[3], *([] if processes.rank() else [tensors[1]])):
        tensor.grad = torch.full_like(tensor, processes.rank() + 1)
    kept = tensors[0].grad
    average_gradients(tensors)
    return [tensor.grad for tensor in tensors], kept is tensors[0].grad


def batch_norm(folder: Path) -> dict:
    adapted = sp.rewrite(sp.capture(*conv(), verify=False), LoRA(r=2), where="point")
    generator = torch.Generator().manual_seed(0)
    data = Examples([{"x": torch.randn(3, 8, 8, generator=generator), "labels": i % 3} for i in range(16)])
    options = OPTIONS.model_copy(update={"batch_size": 4, "max_steps": 3})
    train(adapted, data, data, output=folder, options=options)
    return {name: tensor.clone() for name, tensor in adapted.module.named_buffers()}


def message(error: type[Exception], action) -> str:
    with pytest.raises(error) as caught:
        action()
    return str(caught.value)


def other_base(folder: Path) -> str:
    adapted = program("bert")
    if processes.rank():
        adapted.module.get_parameter("bert.pooler.dense.weight").data.add_(1)
    return message(TrainError, lambda: outcome(adapted, "bert", folder))


def without_layers(folder: Path) -> str:
    adapted = sp.rewrite(sp.capture(*conv(), verify=False), LoRA(r=2), where="point")
    data = Examples([{"x": torch.zeros(3, 8, 8), "labels": 0}] * 4)
    options = OPTIONS.model_copy(update={"shard": True})
    return message(ConfigError, lambda: train(adapted, data, output=folder, options=options))


def other_step(folder: Path) -> str:
    return message(CheckpointError, lambda: outcome(program("bert"), "bert", folder, batch_size=3))


def only_first(folder: Path) -> tuple:
    def refuse() -> None:
        raise ConfigError(f"by {processes.rank()}")

    return processes.on_first(processes.rank), message(ConfigError, lambda: processes.on_first(refuse))


OTHERS = {
    "interrupted": interrupted, "resumed": resumed, "missing gradients": missing_gradients, "batch norm": batch_norm,
    "other base": other_base, "without layers": without_layers, "other step": other_step, "only first": only_first,
    "no examples": lambda folder: evaluate(program("bert"), rows("bert", 1), collate=collate),
}  # fmt: skip


def launch(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *arguments]
    return subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment},
        capture_output=True, text=True,
    )  # fmt: skip


def pipeline(folder: Path, *changes: tuple[str, str]) -> Path:
    text = PIPELINE.replace("output: runs", f"output: {folder / 'out'}").replace("batch_size: 8", "batch_size: 4")
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    path = folder / "pipeline.yaml"
    path.write_text(text)
    return path


SHARDED = ("batch_size: 4", "batch_size: 4\n      shard: true")


def place(folder: Path, job: str) -> Path:
    return folder / {"resumed": "one", "other step": "one"}.get(job, job)


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> list[dict]:
    """What each of two processes found. The folder "one" holds a checkpoint of one process."""
    folder = tmp_path_factory.mktemp("two")
    pipeline(folder, SHARDED)
    interrupted(folder / "one")
    done = launch("-m", "tests.training.test_distributed", str(folder))
    assert done.returncode == 0, done.stderr[-5000:]
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]
    for job, found in results[0].items():
        assert not isinstance(found, Exception), f"{job}: {found}"
    return [{**result, "folder": folder, "told": done.stdout} for result in results]


@functools.cache
def alone(job: str, folder: Path) -> dict:
    return JOBS[job](folder / f"alone {job}")


@pytest.mark.parametrize("job", ["bert", "bert, accumulated", "gpt2"])
def test_two_processes_take_the_steps_of_one(two, job):
    """An epoch ends with a step of one example; micro-batches differ in labels, and some have none."""
    folder = two[0]["folder"]
    for found in two:
        alike(found[job], alone(job if job == "gpt2" else "bert", folder))
    assert all(torch.equal(value, two[1][job]["weights"][n]) for n, value in two[0][job]["weights"].items())
    assert [path.name for path in (folder / job).iterdir()] == ["checkpoint-6"]


@pytest.mark.parametrize("job", ["bert, sharded", "gpt2, sharded", "pissa, sharded"])
def test_a_sharded_base_takes_the_same_steps_in_half_the_memory(two, job):
    name = job.partition(",")[0]
    if name == "pissa":
        expected = outcome(program("gpt2", PiSSA(r=2)), "gpt2", two[0]["folder"] / "alone pissa")
    else:
        expected = alone(name, two[0]["folder"])
    for found in two:
        # decompositions round by the number of threads, and Adam's first steps divide small gradients by themselves
        alike(found[job], expected, 1e-6 if name == "pissa" else 1e-9)
        share = found[job]["bytes"] / expected["bytes"]
        assert share == pytest.approx(0.5, abs=0.01)


def test_a_checkpoint_resumes_on_another_number_of_processes(two):
    folder = two[0]["folder"]
    whole = alone("bert", folder)
    for found in (two[0]["resumed"], two[1]["resumed"], resumed(folder / "interrupted")):
        assert found["resumed"] == 4
        alike(found, whole)
    for found in two:
        assert "processes) was 8, is 6" in found["other step"]


def test_gradients_that_are_missing_count_as_zero(two):
    for (first, second, third, wide), kept in (found["missing gradients"] for found in two):
        assert kept and third is None
        assert first.tolist() == [1.5, 1.5] and second.item() == 0.5 and wide.tolist() == [1.5, 1.5]


def test_running_statistics_agree(two):
    one, other = (found["batch norm"] for found in two)
    assert one["norm.num_batches_tracked"] == 3
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_refusals(two):
    for found in two:
        assert "bert.pooler.dense.weight is not the same in processes 0 and 1 (1 tensors differ)" in found["other base"]
        assert "shard spreads the repeated layers of a model, and this one has none" in found["without layers"]
        assert found["only first"] == (0, "by 0")
        assert found["no examples"].keys() == {"loss", "accuracy"}


def test_shard_needs_a_launcher(tmp_path):
    with pytest.raises(ConfigError, match="start the run with torchrun"):
        outcome(program("bert"), "bert", tmp_path, shard=True)


def test_a_sharded_run_of_one_process(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        alike(JOBS["bert, sharded"](tmp_path / "sharded"), outcome(program("bert"), "bert", tmp_path / "alone"))
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("count", "batch", "accumulation"), [(17, 2, 2), (8, 1, 1), (5, 4, 1), (16, 1, 4)])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_a_step_sees_the_same_examples_however_it_is_divided(count, batch, accumulation, world):
    lengths = [i % 7 for i in range(count)]
    size = batch * accumulation * world
    expected = Order(count, 3, size, lengths=lengths)
    orders = [Order(count, 3, batch, accumulation, rank, world, lengths) for rank in range(world)]
    assert {len(order) for order in orders} == {len(list(orders[0]))}
    parts = [list(order) for order in orders]
    for step, examples in enumerate(expected):
        seen = []
        for order, part in zip(orders, parts, strict=True):
            own = part[step * accumulation : (step + 1) * accumulation]
            seen += [i for batch in (own[:-1] if order.idle(step) else own) for i in batch]
        assert sorted(seen) == sorted(examples) and len(examples) == expected.size(step)


# the pipeline file


def test_the_whole_pipeline_writes_one_set_of_files(two):
    one_set_of_files(two[0]["folder"] / "out", two[0]["told"])


@pytest.mark.slow
def test_a_pipeline_whose_base_is_whole_in_each_process(tmp_path):
    done = launch("-m", "subgraph_peft.cli", "run", str(pipeline(tmp_path)))
    assert done.returncode == 0, done.stderr[-3000:]
    one_set_of_files(tmp_path / "out", done.stdout)


def one_set_of_files(folder: Path, told: str) -> None:
    assert {item.name for item in folder.iterdir()} == {
        "config.yaml", "checkpoints", "adapter", "merged", "model.onnx", "config.json", "report.json", "report.md",
        "loss.png", "graph.diff",
    }  # fmt: skip
    for line in ("6 steps", "delta retained", "Report:", "model.onnx"):
        assert told.count(line) == 1, told
    scores = json.loads((folder / "report.json").read_text())["scores"]
    assert scores["after"]["loss"] == pytest.approx(scores["folded"]["loss"], rel=1e-5)
    assert scores["after"]["loss"] < scores["before"]["loss"]


def fails_in_the_second():
    if processes.rank():
        raise ConfigError("This process has no model.")
    return bert()[0]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["model", "everywhere"])
def test_an_error_ends_all_and_is_told_once(tmp_path, where):
    if where == "model":
        path = pipeline(tmp_path, ("tests.test_cli:tiny", "tests.training.test_distributed:fails_in_the_second"))
    else:
        path = pipeline(tmp_path, ("*.{query,value}", "*.qurey"))
    done = launch("-m", "subgraph_peft.cli", "run", str(path))
    text = done.stdout + done.stderr
    assert done.returncode == 1
    assert text.count("This process has no model." if where == "model" else "matches none of") == 1, text
    assert not (tmp_path / "out/adapter").exists()


def work(folder: Path) -> None:
    """Every job in this process of two, then the command on the pipeline file."""
    torch.set_num_threads(1)
    results = {}
    with processes.processes():
        for job, action in {**JOBS, **OTHERS}.items():
            results[job] = action(place(folder, job))
        torch.save(results, folder / f"{processes.rank()}.pt")
        with pytest.raises(SystemExit, match="0"):
            app(["run", str(folder / "pipeline.yaml")])


if __name__ == "__main__":
    work(Path(sys.argv[1]))
