"""What the README says holds."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.method.catalogue import markdown
from subgraph_peft.pipeline.config import load_config

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def test_the_table_of_methods_is_the_catalogue():
    assert markdown() in README, "print it anew: subgraph_peft.method.catalogue.markdown()"


def test_the_method_in_ten_lines_works(tmp_path):
    code = next(body for kind, body in BLOCKS if kind == "python" and "class FrozenLoRA" in body)
    namespace: dict = {}
    exec(code, namespace)
    method = namespace["FrozenLoRA"](r=2)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    adapted = sp.rewrite(sp.capture(model, torch.randn(3, 6)), method, where="0")
    assert adapted.lowered["0.weight"].form == "factored"
    with torch.no_grad():
        adapted.module.get_parameter("0.weight_frozen_lora.v").add_(1.0)
    folded = sp.fold(adapted)
    assert not torch.allclose(folded.run(), adapted.captured.run())
    torch.testing.assert_close(folded.run(), adapted.run())


def test_the_api_on_one_screen_runs(tmp_path, monkeypatch):
    """As printed, on a small BERT and a small data set."""
    from tests import models
    from tests.test_cli import rows

    code = next(body for kind, body in BLOCKS if kind == "python" and "program = sp.capture(model" in body)
    model, example_inputs = models.bert()
    data = rows()
    namespace = {"model": model, "example_inputs": example_inputs, "train_data": data, "eval_data": data}
    monkeypatch.chdir(tmp_path)
    exec(code, namespace)
    assert (tmp_path / "model.onnx").exists() and (tmp_path / "adapter/adapter.json").exists()
    torch.testing.assert_close(model.eval()(**example_inputs).logits, namespace["folded"].run().logits)

    placing = next(body for kind, body in BLOCKS if kind == "python" and "Houlsby" in body)
    namespace |= {"torch": torch, "batches": [example_inputs] * 2}
    exec(placing, namespace)
    assert namespace["schedule"].number == 2 and sp.penalty(namespace["adapted"]) > 0


@pytest.mark.parametrize(("index", "start"), [(0, "capture,lora{"), (1, "capture,method{name=my_lora,")])
def test_the_pipeline_files_are_valid(tmp_path, index, start):
    body = [body for kind, body in BLOCKS if kind == "yaml"][index]
    (tmp_path / "pipeline.yaml").write_text(body)
    assert str(load_config(tmp_path / "pipeline.yaml").pipeline).startswith(start)


@pytest.mark.parametrize("purpose", ["set up and run the quickstart", "set up and run the tests"])
def test_both_commands_are_there(purpose):
    command = re.search(rf"^# {purpose}$\n(.*)$", README, re.MULTILINE)[1]
    assert command.startswith("python -m venv .venv && .venv/bin/pip install") and "-c constraints.txt" in command
