"""What the READMEs say holds."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.graph import passes
from subgraph_peft.method.catalogue import markdown
from subgraph_peft.pipeline import pipeline
from subgraph_peft.pipeline.config import load_config
from subgraph_peft.pipeline.report import write_report
from subgraph_peft.program.runners import changes

ROOT = Path(__file__).parent.parent
READMES = {path.parent.name if path.parent != ROOT else "": path.read_text(encoding="utf-8")
           for path in (ROOT / "README.md", *ROOT.glob("*/README.md"))}  # fmt: skip
README = READMES[""]
BLOCKS = {name: re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL) for name, text in READMES.items()}


def block(readme: str, kind: str, holds: str) -> str:
    (body,) = (body for found, body in BLOCKS[readme] if found == kind and holds in body)
    return body


def test_the_table_of_methods_is_the_catalogue():
    assert markdown() in README, "print it anew: subgraph_peft.method.catalogue.markdown()"


def test_the_method_in_ten_lines_works(tmp_path):
    code = block("passes", "python", "class FrozenLoRA")
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

    code = block("", "python", "program = sp.capture(model")
    model, example_inputs = models.bert()
    data = rows()
    namespace = {"model": model, "example_inputs": example_inputs, "train_data": data, "eval_data": data}
    monkeypatch.chdir(tmp_path)
    exec(code, namespace)
    assert (tmp_path / "model.onnx").exists() and (tmp_path / "adapter/adapter.json").exists()
    torch.testing.assert_close(model.eval()(**example_inputs).logits, namespace["folded"].run().logits)

    placing = block("passes", "python", "Houlsby")
    namespace |= {"torch": torch, "batches": [example_inputs] * 2}
    exec(placing, namespace)
    assert namespace["schedule"].number == 2 and sp.penalty(namespace["adapted"]) > 0


@pytest.mark.parametrize(("readme", "start"), [("", "capture,lora{"), ("passes", "capture,method{name=my_lora,")])
def test_the_pipeline_files_are_valid(tmp_path, readme, start):
    (tmp_path / "pipeline.yaml").write_text(block(readme, "yaml", "passes:"))
    assert str(load_config(tmp_path / "pipeline.yaml").pipeline).startswith(start)


@pytest.mark.parametrize("purpose", ["set up and run the quickstart", "set up and run the tests"])
def test_both_commands_are_there(purpose):
    command = re.search(rf"^# {purpose}$\n(.*)$", README, re.MULTILINE)[1]
    assert command.startswith("python -m venv .venv && .venv/bin/pip install") and "-c constraints.txt" in command


def test_the_pass_of_your_own_works(monkeypatch):
    monkeypatch.setattr(passes.INSTALLED, "registered", [])
    namespace: dict = {}
    exec(block("passes", "python", "class Square"), namespace)
    passes.register(namespace["Square"])

    class Squares(nn.Module):
        def forward(self, x):
            return (x**2 + x**3).sum(-1)

    program = sp.capture(Squares(), torch.randn(3, 4, dtype=torch.float64))
    assert changes(program.module)[True, frozenset()]["square"] == 1
    x = program.example["x"]
    torch.testing.assert_close(program.run(), (x * x + x**3).sum(-1), rtol=1e-12, atol=0)


def test_the_pass_of_pipelines_works(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline.INSTALLED, "registered", [])
    namespace: dict = {}
    exec(block("passes", "python", "class Count"), namespace)
    pipeline.INSTALLED.register(namespace["Count"])
    with pytest.raises(sp.ConfigError, match="put capture before it"):
        list(sp.Pipeline.read("count").run(sp.State()))
    program = sp.capture(nn.Linear(4, 6), torch.randn(3, 4))
    results = list(sp.Pipeline.read("count").run(sp.State(program=program)))
    assert results[-1].summary == f"{len(program.graph.nodes)} nodes"
    assert "## Counted" in write_report(results, tmp_path).read_text()


@pytest.mark.parametrize("name", sorted(READMES))
def test_what_a_readme_names_is_there(name):
    """Links, and files of the tree; places in this package are given from the README's own folder."""
    text, folder = READMES[name], ROOT / name
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text):
        assert (folder / target).exists(), target
    for path in re.findall(r"`([\w./]+/[\w.]+\.py|[\w/]+\.pyi)`", text):
        assert any((root / path).exists() for root in (ROOT, folder, ROOT / "subgraph_peft")), path
    for module in re.findall(r"python -m (tests[\w.]*)", text):
        assert find_spec(module), module
    for heading in re.findall(r"README\.md#([\w-]+)\)", text):
        headings = {re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for other in READMES.values() for line in other.splitlines() if line.startswith("#")}  # fmt: skip
        assert heading in headings, heading
