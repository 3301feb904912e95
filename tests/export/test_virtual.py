"""Virtual positions in ONNX: what their equations compute from parameters alone is computed beforehand."""

import onnx
import pytest
import torch

import subgraph_peft as sp
from subgraph_peft import export
from tests.models import made
from tests.sequences import BUILD, METHODS, gap, rolled


@pytest.mark.parametrize(("name", "kind"), [("bert", "lstm"), ("llama", "projection")])
def test_onnx_agrees_and_holds_the_encoders_result_only(name, kind, tmp_path):
    net, inputs = made(*BUILD[name])
    adapted = sp.rewrite(sp.capture(net, inputs), METHODS[kind])
    path = tmp_path / "model.onnx"
    report = export.to_onnx(adapted, path)  # verified at two batches and two lengths
    assert len(report.shapes) == 2
    left = rolled(inputs)
    given = {name: left[name].numpy() for name in report.inputs}
    (logits,) = export.session(path).run(["logits"], given)
    assert gap(left, torch.from_numpy(logits), adapted.run(left).logits) < 1e-4
    graph = onnx.load(path).graph
    own = {value.name for value in graph.initializer if "tuning." in value.name}
    expected = {"projection": {"keys_prefix", "values_prefix"}}.get(kind, {"virtual"})
    assert {name.rpartition(".")[2] for name in own} == expected
    kinds = [node.op_type for node in graph.node]
    pooler = 1 if name == "bert" else 0
    assert [kinds.count(op) for op in ("LSTM", "Relu", "Tanh")] == [0, 0, pooler]
