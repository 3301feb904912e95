"""What the file holds: names, dynamic dimensions, and the model's own answers."""

import json
import warnings
from dataclasses import asdict

import numpy as np
import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

import subgraph_peft as sp
from subgraph_peft import export
from tests import models
from tests.models import captured

NAMES = ["bert", "gpt2", "tied_llama", "conv", "mlp"]


def dims(value: onnx.ValueInfoProto) -> list[str | int]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def larger(inputs: dict[str, torch.Tensor], taken: list[str]) -> dict[str, torch.Tensor]:
    """A batch and a length that no verification saw."""
    grown = {}
    for name in taken:
        tensor = torch.cat([inputs[name], inputs[name].flip(0)])
        grown[name] = torch.cat([tensor, tensor], 1) if not tensor.is_floating_point() else tensor
    return grown


@pytest.mark.parametrize("name", NAMES)
def test_the_file_answers_like_the_eager_model_at_a_third_shape(exported, name):
    model, inputs = models.MODELS[name]()
    opened = export.session(exported(name).path)
    fed = larger(inputs, [value.name for value in opened.get_inputs()])
    assert "labels" not in fed
    with torch.no_grad():
        expected = model(**fed)
    (actual,) = opened.run(None, {n: t.numpy() for n, t in fed.items()})
    expected = expected["logits"] if isinstance(expected, dict) else expected[1]
    np.testing.assert_allclose(actual, expected.numpy(), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_file_is_valid_and_holds_nothing_of_the_machine_that_made_it(exported, name):
    onnx.checker.check_model(exported(name).path, full_check=True)
    assert b"pkg.torch" not in exported(name).path.read_bytes()
    assert b"site-packages" not in exported(name).path.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_weights_keep_their_names_and_values(exported, name):
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in exported(name).proto.graph.initializer}
    weights = dict(captured(name).module.named_parameters())
    assert weights.keys() <= stored.keys()
    for path, weight in weights.items():
        np.testing.assert_array_equal(stored[path], weight.detach().numpy())


def test_tied_weights_are_stored_once(exported):
    proto = exported("tied_llama").proto
    table = [t for t in proto.graph.initializer if list(t.dims) == [models.VOCABULARY, 24]]
    assert [t.name for t in table] == ["model.embed_tokens.weight"]
    assert not [t for t in proto.graph.initializer if list(t.dims) == [24, models.VOCABULARY]]


def test_the_reference_evaluator_agrees(exported):
    """An implementation of ONNX that is not onnxruntime."""
    model, inputs = models.MODELS["mlp"]()
    (actual,) = ReferenceEvaluator(exported("mlp").proto).run(None, {"x": inputs["x"].numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(actual, model(inputs["x"])[1].numpy(), atol=1e-5)


def test_signature_of_a_classifier(exported):
    graph = exported("bert").proto.graph
    assert {value.name: dims(value) for value in graph.input} == {
        "input_ids": ["batch", "length"],
        "attention_mask": ["batch", "length"],
    }
    assert {value.name: dims(value) for value in graph.output} == {"logits": ["batch", 3]}


def test_report(exported):
    done = exported("conv")
    report = done.report
    assert report.inputs == {"x": ("batch", 3, 8, 8)}
    assert report.fixed == {"x[1]": 3, "x[2]": 8, "x[3]": 8}
    assert report.left_out == ("labels",)
    assert report.files == ("model.onnx",)
    assert report.bytes == done.path.stat().st_size
    assert report.nodes == len(done.proto.graph.node)
    assert report.opset == done.proto.opset_import[0].version
    assert report.merged and not report.remaining
    assert report.provider == ("CUDAExecutionProvider" if torch.cuda.is_available() else "CPUExecutionProvider")
    assert json.loads(json.dumps(asdict(report)))["drift"]["output_1"]["absolute"] == report.drift["output_1"].absolute
    rows = dict(report.rows())
    assert rows["fixed dimensions"] == "x[1] = 3, x[2] = 8, x[3] = 8"
    assert rows["inputs left out"] == "labels"


def test_two_batch_sizes_and_two_lengths_are_checked(exported):
    shapes = exported("bert").report.shapes
    assert [run["input_ids"] for run in shapes] == [(3, 7), (2, 6)]
    assert all(run["attention_mask"] == run["input_ids"] for run in shapes)


def test_nodes_are_named_after_the_captured_graph(exported):
    names = [node.name for node in exported("mlp").proto.graph.node]
    calls = [node.name for node in captured("mlp").graph.nodes if node.op == "call_function"]
    assert names == [name for name in calls if name.startswith(("linear", "tanh"))]


def test_chosen_outputs(tmp_path):
    model, inputs = models.bert()
    model.bert.config.output_hidden_states = True
    program = sp.capture(model.bert, {"input_ids": inputs["input_ids"]})
    wanted = ["pooler_output", "hidden_states_2", "last_hidden_state"]
    report = export.to_onnx(program, tmp_path / "model.onnx", outputs=wanted)
    assert list(report.outputs) == list(report.drift) == wanted
    with pytest.raises(sp.ExportError, match=r"no output 'last_hiden_state'. Did you mean 'last_hidden_state'\?"):
        export.to_onnx(program, tmp_path / "model.onnx", outputs=["last_hiden_state"])


def test_the_loss_can_be_asked_for(tmp_path):
    report = export.to_onnx(captured("mlp"), tmp_path / "model.onnx", outputs=["output_0"])
    assert list(report.inputs) == ["x", "labels"] and report.outputs == {"output_0": ()}


class Odd(nn.Module):
    """Nested inputs, a constant, an in-place edit, an output twice, an input and a weight as outputs."""

    def __init__(self):
        super().__init__()
        self.outputs = nn.Linear(4, 4)

    def forward(self, pair: dict, mask: torch.Tensor, flag: bool = True) -> dict:
        h = self.outputs(pair["a"]) if flag else pair["a"]
        h[:, 0] = mask
        weight = self.outputs.weight
        return {"h": h, "linear": h, "given": pair["b"], "weight": weight, "place": h.argmax(-1), "loss": h.mean()}


def test_unusual_signatures(tmp_path):
    pair = {"a": torch.randn(3, 5, 4), "b": torch.randn(3, 4)}
    program = sp.capture(Odd(), {"pair": pair, "mask": torch.randn(3, 4), "flag": True})
    report = export.to_onnx(program, tmp_path / "model.onnx")
    assert list(report.inputs) == ["pair.a", "pair.b", "mask"] and report.left_out == ("flag",)
    assert list(report.outputs) == ["h", "linear", "given", "weight", "place"]
    assert report.drift["place"] == export.Drift(0.0, 0.0)
    onnx.checker.check_model(tmp_path / "model.onnx", full_check=True)


def test_a_dimension_that_the_capture_fixed_is_fixed_and_reported(tmp_path):
    with pytest.warns(sp.CaptureWarning, match="dimension 1 of 'x' is fixed to 5"):
        program = sp.capture(Recurrent(), torch.randn(3, 5, 4))
    report = export.to_onnx(program, tmp_path / "model.onnx")
    assert report.inputs == {"x": ("batch", 5, 4)}
    assert report.fixed == {"x[1]": 5, "x[2]": 4}
    assert [run["x"] for run in report.shapes] == [(3, 5, 4), (2, 5, 4)]


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.RNNCell(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x.new_zeros(x.shape[0], 4)
        for step in range(x.shape[1]):
            h = self.cell(x[:, step], h)
        return h


def test_source_and_target_lengths_are_two_axes(tmp_path):
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(9, 4)

        def forward(self, input_ids: torch.Tensor, decoder_input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(decoder_input_ids) @ self.table(input_ids).transpose(1, 2)

    inputs = {"input_ids": torch.randint(9, (3, 5)), "decoder_input_ids": torch.randint(9, (3, 5))}
    report = export.to_onnx(sp.capture(Cross(), inputs), tmp_path / "model.onnx")
    assert report.outputs == {"output": ("batch", "decoder_input_ids_length", "length")}


@pytest.mark.parametrize("opset", [18, 21])
def test_opset(tmp_path, opset):
    assert export.to_onnx(captured("mlp"), tmp_path / "model.onnx", opset=opset).opset == opset


def test_a_further_case_without_an_input_is_refused(tmp_path):
    with pytest.raises(sp.ExportError, match=r"A case of also= lacks x: give every input of the file \(x\)"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx", also=[({"labels": torch.zeros(2)}, {})])
    assert not (tmp_path / "model.onnx").exists()


def test_an_old_opset_is_refused(tmp_path):
    with pytest.raises(sp.ExportError, match="Opset 17 is too old; the oldest that can be written is 18"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx", opset=17)


def test_an_operator_without_translation_is_named(tmp_path):
    class Spectrum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.svdvals(self.layer(x))

    with pytest.raises(sp.ExportError, match=r"Spectrum cannot be exported: aten\._linalg_svd has no ONNX translation"):
        export.to_onnx(sp.capture(Spectrum(), torch.randn(3, 4)), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_it_is_quiet(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")


def test_the_program_is_left_as_it_was(exported):
    program = captured("bert")
    program.module.train()
    before = {name: tensor.clone() for name, tensor in program.tensors()}
    exported("bert")
    assert program.module.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.tensors())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_other_dtypes(tmp_path, dtype):
    model, inputs = models.MODELS["mlp"]()
    program = sp.capture(model.to(dtype), {"x": inputs["x"].to(dtype), "labels": inputs["labels"]})
    report = export.to_onnx(program, tmp_path / "model.onnx")
    assert report.bound == {torch.float64: 1e-6, torch.float16: 1e-2}[dtype]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CUDA provider has bfloat16 kernels")
def test_a_missing_kernel_is_named(tmp_path):
    model, inputs = models.MODELS["mlp"]()
    program = sp.capture(model.bfloat16(), {"x": inputs["x"].bfloat16(), "labels": inputs["labels"]})
    with pytest.raises(sp.ExportError, match=r"no Gemm kernel for bfloat16 \(node linear\).*convert a 16-bit model"):
        export.to_onnx(program, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_bfloat16_tensors_pass_through_onnxruntime(tmp_path):
    program = sp.capture(nn.LayerNorm(4).bfloat16(), torch.randn(3, 4).bfloat16())
    assert export.to_onnx(program, tmp_path / "model.onnx").bound == 5e-2


def test_a_program_without_weights_is_refused(tmp_path):
    with torch.device("meta"):
        program = sp.capture(nn.Linear(4, 4), torch.randn(3, 4))
    with pytest.raises(sp.ExportError, match="meta device has no weights"):
        export.to_onnx(program, tmp_path / "model.onnx")
