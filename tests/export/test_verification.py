"""The comparison itself: what it catches, what it leaves on the disk, and how sizes are chosen."""

import os
import shutil

import onnx
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.export.onnx import exporter
from subgraph_peft.export.onnx.axes import axis_names, other_sizes, resize
from subgraph_peft.export.onnx.verification import difference
from tests import models
from tests.models import captured

INF, NAN = float("inf"), float("nan")


def corrupt(parameter: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the translation see a weight that the program does not have."""
    translate = exporter.translate

    def wrong(*arguments):
        model = translate(*arguments)
        weight = model.graph.initializers[parameter]
        weight.const_value = ir.tensor(weight.const_value.numpy() * 1.01, name=parameter)
        return model

    monkeypatch.setattr(exporter, "translate", wrong)


def test_drift_leaves_no_file(tmp_path, monkeypatch):
    corrupt("first.weight", monkeypatch)
    reason = r"differs from torch: output_1 by .* where 1e-04 is allowed.*model\.onnx was not written"
    with pytest.raises(sp.ExportError, match=reason):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_drift_leaves_the_former_file(tmp_path, monkeypatch):
    export.to_onnx(captured("mlp"), tmp_path / "model.onnx", external_data=True)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    corrupt("first.weight", monkeypatch)
    with pytest.raises(sp.ExportError, match="differs from torch"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_the_bound_can_be_widened(tmp_path, monkeypatch):
    corrupt("first.weight", monkeypatch)
    report = export.to_onnx(captured("mlp"), tmp_path / "model.onnx", bound=0.5)
    assert 1e-4 < report.drift["output_1"].relative < 0.5


def test_a_file_is_verified_later_against_a_program_or_a_module(exported):
    model, inputs = models.bert()
    by_program = export.verify(exported("bert").path, captured("bert"))
    by_module = export.verify(exported("bert").path, model, inputs)
    assert by_program == by_module
    assert by_program.shapes == exported("bert").report.shapes
    model.classifier.weight.data += 1
    with pytest.raises(sp.ExportError, match="differs from torch: logits"):
        export.verify(exported("bert").path, model, inputs)


def test_a_module_brings_no_example(exported):
    model, inputs = models.bert()
    with pytest.raises(sp.ExportError, match="needs example inputs"):
        export.verify(exported("bert").path, model)
    with pytest.raises(sp.ExportError, match="takes input_ids, attention_mask; attention_mask is not among"):
        export.verify(exported("bert").path, model, {"input_ids": inputs["input_ids"]})


def test_another_models_file_is_told_apart(exported):
    with pytest.raises(sp.ExportError, match="x is not among the example inputs"):
        export.verify(exported("mlp").path, captured("bert"))
    with pytest.raises(sp.ExportError, match="differs from torch: logits"):
        export.verify(exported("gpt2").path, captured("tied_llama"))


def test_an_output_that_torch_does_not_give(exported, tmp_path):
    proto = exported("mlp").proto
    proto.graph.node[-1].output[0] = proto.graph.output[0].name = "scores"
    onnx.save(proto, tmp_path / "renamed.onnx")
    with pytest.raises(sp.ExportError, match="The file gives 'scores', torch gives output_1"):
        export.verify(tmp_path / "renamed.onnx", captured("mlp"))


def test_a_length_baked_into_the_file_is_found(exported, tmp_path):
    """The graph is right at the example's shape and wrong at the other."""
    proto = exported("bert").proto
    fixed = onnx.helper.make_tensor("seven", onnx.TensorProto.INT64, [1], [models.LENGTH])
    proto.graph.initializer.append(fixed)
    reshape = next(n for n in proto.graph.node if n.name == "view_Concat")
    reshape.input[1] = "seven"
    onnx.save(proto, tmp_path / "baked.onnx")
    with pytest.raises(sp.ExportError, match=r"cannot run the model on input_ids\[2, 6\]"):
        export.verify(tmp_path / "baked.onnx", captured("bert"))


def test_what_is_no_model(tmp_path, exported):
    with pytest.raises(sp.ExportError, match="There is no ONNX file"):
        export.session(tmp_path / "nothing.onnx")
    (tmp_path / "broken.onnx").write_bytes(exported("mlp").path.read_bytes()[:300])
    with pytest.raises(sp.ExportError, match=r"cannot open broken\.onnx"):
        export.session(tmp_path / "broken.onnx")


@pytest.mark.parametrize(
    ("expected", "actual", "absolute"),
    [
        ([1.0, -2.0], [1.0, -2.0], 0.0),
        ([1.0, -2.0], [1.5, -2.0], 0.5),
        ([1.0, INF], [1.0, INF], 0.0),
        ([1.0, -INF], [1.0, INF], INF),
        ([1.0, -INF], [1.0, -3e38], INF),
        ([1.0, NAN], [1.0, NAN], 0.0),
        ([1.0, NAN], [1.0, 0.0], INF),
        ([1.0, 2.0], [1.0, NAN], INF),
        ([1.0, 2.0], [[1.0, 2.0]], INF),
        ([1, 2], [1, 2], 0.0),
        ([1, 2], [1, 3], INF),
        ([True], [1], INF),
    ],
)
def test_difference(expected, actual, absolute):
    drift = difference(torch.tensor(expected), torch.tensor(actual))
    assert drift.absolute == absolute
    assert drift.exceeds(1e-4) == (absolute > 0)


def test_small_outputs_are_held_to_their_own_size(tmp_path):
    """Probabilities of many classes are small, and so are their differences."""

    def classes(seed: int) -> sp.Program:
        torch.manual_seed(seed)
        return sp.capture(nn.Sequential(nn.Linear(6, 30000), nn.Softmax(-1)), {"input": torch.randn(2, 6)})

    path = tmp_path / "model.onnx"
    assert export.to_onnx(classes(0), path).drift["output"].absolute < 1e-6
    with pytest.raises(sp.ExportError, match="differs from torch: output by"):
        export.verify(path, classes(1))


def test_a_drift_is_held_to_the_largest_value_and_rounding_is_none():
    assert not export.Drift(absolute=1.0, relative=1e-6).exceeds(1e-4)
    assert not export.Drift(absolute=1e-6, relative=1.0).exceeds(1e-4)
    assert export.Drift(absolute=1e-3, relative=1e-3).exceeds(1e-4)


@given(rows=st.integers(1, 5), columns=st.integers(1, 5), batch=st.integers(1, 9), length=st.integers(1, 9))
def test_resized_inputs_hold_only_values_of_the_example(rows, columns, batch, length):
    example = {"ids": torch.arange(rows * columns).reshape(rows, columns), "scale": torch.ones(3)}
    resized = resize(example, {"ids": {0: "batch", 1: "length"}}, {"batch": batch, "length": length})
    assert resized["ids"].shape == (batch, length)
    places = [(i, j) for i in range(batch) for j in range(length)]
    assert all(resized["ids"][i, j] == example["ids"][i % rows, j % columns] for i, j in places)
    assert resized["scale"] is example["scale"]


@given(st.dictionaries(st.text(min_size=1), st.integers(2, 20), min_size=1))
def test_every_axis_gets_another_size_of_at_least_two(sizes):
    others = other_sizes(sizes)
    assert others.keys() == sizes.keys()
    assert all(others[axis] != size and others[axis] >= 2 for axis, size in sizes.items())


def test_axis_names():
    sizes = {"ids": (3, 7), "mask": (3, 7), "memory": (5, 9, 4), "image": (3, 2, 8, 8)}
    example = {name: torch.zeros(size) for name, size in sizes.items()}
    shapes = {"ids": ("s0", "s1"), "mask": ("s2", "s1"), "memory": ("s3", "s4", 4), "image": ("s0", 2, "s5", "s6")}
    assert axis_names(shapes, example) == {
        "ids": {0: "batch", 1: "length"},
        "mask": {0: "batch", 1: "length"},
        "memory": {0: "memory_batch", 1: "memory_length"},
        "image": {0: "batch", 2: "height", 3: "width"},
    }


@pytest.mark.parametrize("left", [0.3, 0.9])
def test_external_data_that_is_cut_short(tmp_path, left):
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    size = export.to_onnx(captured("bert"), path, external_data=True).bytes - path.stat().st_size
    os.truncate(data, int(left * size))
    pattern = (
        rf"weights of model\.onnx are cut short: \S+ ends at byte [\d,]+, the file .* holds {int(left * size):,}\."
    )
    with pytest.raises(sp.ExportError, match=pattern):
        export.verify(path, captured("bert"))


def test_external_data_is_needed_beside_the_file(tmp_path):
    export.to_onnx(captured("mlp"), tmp_path / "model.onnx", external_data=True)
    shutil.copy(tmp_path / "model.onnx", tmp_path / "alone.onnx")
    (tmp_path / "model.onnx.data").rename(tmp_path / "elsewhere")
    with pytest.raises(sp.ExportError, match=r"cannot open alone\.onnx"):
        export.session(tmp_path / "alone.onnx")
