"""The command line, as a user types it."""

import json
import os
import subprocess
import sys

import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from subgraph_peft.cli import app
from tests import models

PIPELINE = """model:
  factory: tests.test_cli:tiny
data:
  train: tests.test_cli:rows
  eval: tests.test_cli:rows
passes:
  - capture
  - lora:
      r: 2
      where: "*.{query,value}"
      trainable: classifier
  - train:
      max_steps: 6
      batch_size: 8
      lr: 0.01
  - fold
  - export
output: runs
"""


def tiny():
    return models.bert()[0]


def rows():
    """Finished inputs: the class is the first token modulo three."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, models.VOCABULARY, (32, 7), generator=generator)
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


@pytest.fixture
def pipeline(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.replace("output: runs", f"output: {tmp_path / 'out'}"))
    return path


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_run_with_slots_writes_the_base_and_an_adapter(pipeline, tmp_path):
    from subgraph_peft.export import Adapters, evaluate

    pipeline.write_text(pipeline.read_text().replace("  - fold\n  - export\n", "  - export: {slots: true}\n"))
    output = call("run", pipeline)
    folder = tmp_path / "out"
    assert "adapter.onnx_adapter: 0.0 MiB" in output and not (folder / "merged").exists()
    assert "## Adapter file" in (folder / "report.md").read_text()
    loaded = Adapters(folder / "model.onnx").load(folder / "adapter.onnx_adapter")
    assert set(loaded.ranks.values()) == {2} and "classifier.weight" in loaded.values
    scores = json.loads((folder / "report.json").read_text())["scores"]
    for stage, adapter in (("before", None), ("after", folder / "adapter.onnx_adapter")):
        found = evaluate(folder / "model.onnx", rows(), adapter=adapter)
        assert found["loss"] == pytest.approx(scores[stage]["loss"], abs=1e-5)
    verify = ("verify", folder / "model.onnx", "--against", pipeline)
    assert "drift of logits" in call(*verify, "--adapter-file", folder / "adapter.onnx_adapter")
    assert "differs from torch" in call(*verify, code=1)
    again = call("export", pipeline, "--set", "export.file=again.onnx", "--set", "export.adapter=again.onnx_adapter")
    assert "replaces" in again
    assert (folder / "again.onnx_adapter").read_bytes() == (folder / "adapter.onnx_adapter").read_bytes()


def test_run_writes_everything_and_the_parts_agree_with_it(pipeline, tmp_path):
    output = call("run", pipeline, "--set", "train.max_steps=7")
    folder = tmp_path / "out"
    assert "7 steps" in output and "delta retained" in output and "report.md" in output
    for name in ("config.yaml", "adapter/adapter.json", "merged/model.safetensors", "model.onnx", "report.json",
                 "report.md", "loss.png", "graph.diff"):  # fmt: skip
        assert (folder / name).stat().st_size > 0, name
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads((folder / "report.json").read_text())
    assert set(report["scores"]) == {"before", "after", "folded"}
    assert report["scores"]["after"]["accuracy"] == report["scores"]["folded"]["accuracy"]
    assert len(report["sites"]) == 4 and report["fold"]["output_error"] < 1e-5
    assert "max_steps: 7" in (folder / "config.yaml").read_text()
    page = (folder / "report.md").read_text()
    for part in ("![loss curve](loss.png)", "## Sites", "## Fold", "+bert_encoder_layer_0_attention_self_query_lora_A"):
        assert part in page

    merged = load_file(folder / "merged/model.safetensors")
    model = tiny()
    model.load_state_dict(merged)
    inputs = models.bert()[1]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    assert "labels" not in feed
    logits = torch.from_numpy(session.run(["logits"], feed)[0])
    torch.testing.assert_close(logits, model.eval()(**inputs).logits, rtol=1e-4, atol=1e-5)

    (folder / "merged/model.safetensors").unlink()
    assert "delta retained" in call("fold", pipeline)
    assert all(torch.equal(t, merged[n]) for n, t in load_file(folder / "merged/model.safetensors").items())
    assert "CPUExecutionProvider" in call("verify", folder / "model.onnx", "--against", pipeline)
    call("export", pipeline, "--set", "export.file=again.onnx")
    assert (folder / "again.onnx").exists()
    # running again goes on from the last checkpoint: nothing is left to train
    assert "7 steps" in call("run", pipeline, "--set", "train.max_steps=7")


def test_train_stops_after_training(pipeline, tmp_path):
    assert "Adapter:" in call("train", pipeline)
    assert (tmp_path / "out/adapter/adapter.safetensors").exists() and not (tmp_path / "out/model.onnx").exists()
    assert "has no 'train' pass" in call("train", pipeline, "--set", "passes=[capture]", code=1)


def test_inspect_shows_sites_costs_and_differences_and_writes_nothing(pipeline, tmp_path):
    output = call("inspect", pipeline, "--graph", "--sites")
    assert "bert.encoder.layer.*.attention.self.query" in output and "output head" in output
    assert "+bert_encoder_layer_0_attention_self_query_lora_A = linear(" in output
    everywhere = call("inspect", pipeline, "--set", "lora.where=*")
    assert "left out by lora: classifier.weight (output head: name it to include it)" in everywhere
    assert "word_embeddings.weight (embedding: name it to include it)" in everywhere
    assert not (tmp_path / "out").exists()


def test_methods_and_schema_print():
    assert "W + (α/r) B A" in call("methods")
    detail = call("methods", "lora")
    assert "[r, in]" in detail and "Hu et al. 2021" in detail and "alpha" in detail
    assert json.loads(call("schema"))["title"] == "Pipeline"
    assert "Did you mean 'lora'" in call("methods", "lorra", code=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--set", "lora.where=*.qurey"], "matches none of"),
        (["--set", "lora.rank=3"], "option 'rank': it is unknown"),
        (["--set", "model.factory=tests.test_cli:absent"], "absent"),
        (["--set", "data.train=/nowhere/rows.jsonl"], "/nowhere/rows.jsonl"),
        (["--output", "/proc/nowhere/out"], "cannot be written"),
    ],
)
def test_refusals_are_one_message_and_exit_code_1(pipeline, change, message):
    output = call("run", pipeline, *change, code=1)
    assert message in output.replace("\n", "") or message in " ".join(output.split())
    assert "Traceback" not in output


def test_wrong_usage_is_exit_code_2():
    call("run", code=2)
    call("no-such-command", code=2)


# a run whose own process gets SIGINT right after its first checkpoint
INTERRUPTED = """
import signal
from subgraph_peft.training import resume
from subgraph_peft.cli import main

write = resume.write_checkpoint

def writing(*given):
    write(*given)
    signal.raise_signal(signal.SIGINT)

resume.write_checkpoint = writing
main()
"""


def test_an_interrupted_run_goes_on_where_it_stopped(pipeline, tmp_path):
    arguments = ["run", str(pipeline), "--set", "train.max_steps=12", "--set", "train.save_every=5"]
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    stopped = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *arguments], env=environment, capture_output=True, text=True
    )
    assert stopped.returncode == 130, stopped.stderr
    assert "Interrupted" in stopped.stderr and "run the same command again" in " ".join(stopped.stderr.split())
    assert not (tmp_path / "out/model.onnx").exists() and not (tmp_path / "out/adapter").exists()
    assert "12 steps" in call(*arguments)
    report = json.loads((tmp_path / "out/report.json").read_text())
    assert 5 <= report["records"]["train"]["resumed_from"] < 12
