"""What onnxruntime would fail on late, or not at all, is refused when an adapter is written and when it is loaded."""

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.export.onnx.slots import version
from subgraph_peft.passes import LoRA
from tests import models
from tests.export.conftest import shake
from tests.models import captured

A, B = "first.weight.lora_A", "first.weight.lora_B"  # of [10, 6]


def adapted(where: str = "first", r: int = 2, base: sp.Program | None = None, **options) -> sp.Program:
    return shake(sp.rewrite(base or captured("mlp"), LoRA(r=r), where, **options))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Slots at `first` and `shared`, a replaceable head."""
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    export.to_onnx(adapted(where=["first", "shared"], trainable="head"), path, slots=True)
    return path


@pytest.fixture(scope="module")
def opened(model) -> export.Adapters:
    return export.Adapters(model)


def written(folder: Path, opened: export.Adapters, made_for: int | None = None, **changed: np.ndarray | None) -> Path:
    """An adapter file by onnxruntime's own writer: a good pair at `first`, but for what is changed."""
    tensors = {A: np.ones((6, 2), np.float32), B: np.ones((2, 10), np.float32), **changed}
    file = onnxruntime.AdapterFormat()
    file.set_model_version(version(opened.identity) if made_for is None else made_for)
    values = {name: value for name, value in tensors.items() if value is not None}
    file.set_parameters({name: onnxruntime.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()})
    file.export_adapter(str(folder / "own.onnx_adapter"))
    return folder / "own.onnx_adapter"


def test_a_good_file_of_another_writer_loads(opened, tmp_path):
    assert opened.load(written(tmp_path, opened)).ranks == {"first.weight": 2}
    headed = written(tmp_path, opened, **{"head.bias": np.zeros(3, np.float32)})
    assert set(opened.load(headed).values) == {A, B, "head.bias"}


WRONG = {
    "another base": ({"made_for": 7}, r"own.onnx_adapter was made for another base: its model_version is 7"),
    "A alone": ({B: None}, r"has first.weight.lora_A without the other half"),
    "B alone": ({A: None}, r"has first.weight.lora_B without the other half"),
    "ranks": (
        {A: np.ones((6, 3), np.float32)},
        r"lora_A is \[6, 3\] and first.weight.lora_B is \[2, 10\]: their ranks",
    ),
    "in": ({A: np.ones((5, 2), np.float32)}, r"first.weight.lora_A is \[5, 2\], the model takes \[6, r\]"),
    "out": ({B: np.ones((2, 9), np.float32)}, r"first.weight.lora_B is \[2, 9\], the model takes \[r, 10\]"),
    "dimensions": ({A: np.ones(6, np.float32)}, r"first.weight.lora_A is \[6\], the model takes \[6, r\]"),
    "head": ({"head.bias": np.ones(4, np.float32)}, r"head.bias is \[4\], the model takes \[3\]"),
    "dtype": ({A: np.ones((6, 2), np.float16)}, r"lora_A is a tensor\(float16\), the model takes a tensor\(float\)"),
    "name": ({"frist.weight.lora_A": np.ones((6, 2), np.float32)}, r"'frist.weight.lora_A'.* no slot. Did you mean"),
    "input": ({"x": np.ones((3, 6), np.float32)}, r"has 'x', for which the model has no slot"),
    "empty": ({A: None, B: None}, "own.onnx_adapter is empty"),
}


@pytest.mark.parametrize("changed, match", WRONG.values(), ids=WRONG)
def test_a_file_that_does_not_fit_is_refused(opened, tmp_path, changed, match):
    with pytest.raises(sp.ExportError, match=match):
        opened.load(written(tmp_path, opened, **changed))


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.98])
def test_a_file_that_was_cut_short_is_refused(opened, tmp_path, kept):
    path = written(tmp_path, opened)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(sp.ExportError, match="own.onnx_adapter is damaged or no onnxruntime adapter"):
        opened.load(path)


def test_a_file_that_is_not_there(opened, tmp_path):
    with pytest.raises(sp.ExportError, match="There is no adapter file"):
        opened.load(tmp_path / "none.onnx_adapter")


def test_two_adapters_act_at_once_where_they_share_no_slot(model, opened, tmp_path):
    for name, program in (("one", adapted()), ("two", adapted(r=3)), ("three", adapted("shared"))):
        export.to_adapter(program, tmp_path / f"{name}.onnx_adapter", model)
    one, two, three = (opened.load(tmp_path / f"{name}.onnx_adapter") for name in ("one", "two", "three"))
    x, bound = {"x": torch.randn(4, 6)}, export.BoundSession(model)
    for use in (lambda *own: opened.run(x, *own), opened.options, lambda *own: bound(x, own)):
        with pytest.raises(sp.ExportError, match="one.onnx_adapter and two.onnx_adapter both change first.weight,"):
            use(one, two)
    network, _ = models.MODELS["mlp"]()
    for layer, program in (("first", adapted()), ("shared", adapted("shared"))):
        folded = sp.fold(program).module.get_parameter(f"{layer}.weight")
        network.get_submodule(layer).weight.data.copy_(folded)
    expected = network(x["x"])[1].detach().numpy()
    (out,) = opened.run(x, one, three).values()
    (by_options,) = opened.session.run(None, {"x": x["x"].numpy()}, opened.options(one, three))
    np.testing.assert_allclose(out.numpy(), expected, atol=1e-5)
    np.testing.assert_allclose(by_options, expected, atol=1e-5)
    np.testing.assert_allclose(bound(x, [one, three])["output_1"].cpu().numpy(), expected, atol=1e-5)
    for adapters in ([two], [], [one]):  # each shape and set of adapters has buffers of its own
        kept = bound(x, adapters)["output_1"].cpu().numpy()
        np.testing.assert_allclose(kept, opened.run(x, *adapters)["output_1"].numpy(), atol=1e-6)


def test_a_file_is_verified_with_an_adapter(model, exported, tmp_path):
    program, path = adapted(), tmp_path / "adapter.onnx_adapter"
    export.to_adapter(program, path, model)
    for reference in (program, sp.fold(program)):
        assert export.verify(model, reference, adapter=path).drift["output_1"].relative < 1e-5
    for reference, given in ((program, None), (captured("mlp"), path)):
        with pytest.raises(sp.ExportError, match="differs from torch: output_1"):
            export.verify(model, reference, adapter=given)
    with pytest.raises(sp.ExportError, match="The model has no slots"):
        export.verify(exported("mlp").path, program, adapter=path)


def test_a_model_without_slots_is_refused(exported, tmp_path):
    with pytest.raises(sp.ExportError, match="The model has no slots for adapters: export.to_onnx"):
        export.Adapters(exported("mlp").path)
    with pytest.raises(sp.ExportError, match="The model has no slots for adapters"):
        export.to_adapter(adapted(), tmp_path / "adapter.onnx_adapter", exported("mlp").path)


def refused(program: sp.Program, folder: Path, model: Path, match: str) -> None:
    """Nothing is written, and what was there stays."""
    path = folder / "adapter.onnx_adapter"
    path.write_bytes(b"former")
    with pytest.raises(sp.ExportError, match=match):
        export.to_adapter(program, path, model)
    assert [file.name for file in folder.iterdir()] == [path.name] and path.read_bytes() == b"former"


def test_an_adapter_of_another_base_is_not_written(model, tmp_path):
    network, inputs = models.MODELS["mlp"]()
    with torch.no_grad():
        network.shared.weight[0, 0] += 1e-6
    program = adapted(base=sp.capture(network, inputs))
    refused(program, tmp_path, model, "base is not the one that MLP was captured with: their weights differ")


def test_what_has_no_slot_is_not_left_out(model, tmp_path):
    refused(adapted("head"), tmp_path, model, "The model has no slot for head.weight. Export one from this program")
    refused(adapted(trainable="shared.bias"), tmp_path, model, "The model has no slot for shared.bias")


def test_a_program_without_adapters_has_no_adapter_file(model, tmp_path):
    refused(captured("mlp"), tmp_path, model, "The program has no adapters to write")
    refused(sp.fold(adapted()), tmp_path, model, "The program has no adapters to write")


def test_values_that_a_float16_model_cannot_hold(tmp_path):
    network, inputs = models.MODELS["mlp"]()
    base = sp.capture(network.half(), {"x": inputs["x"].half(), "labels": inputs["labels"]})
    export.to_onnx(base, tmp_path / "model.onnx", slots="first")
    program = adapted(base=base)
    with torch.no_grad():
        program.module.get_parameter("first.weight_lora.B")[0, 0] = 1e5
    with pytest.raises(sp.ExportError, match=r"first.weight.lora_B has values that torch.float16 cannot hold"):
        export.to_adapter(program, tmp_path / "adapter.onnx_adapter", tmp_path / "model.onnx")


def test_an_adapter_that_onnxruntime_does_not_reproduce_is_not_written(model, tmp_path):
    with pytest.raises(sp.ExportError, match="onnxruntime .* differs from torch"):
        export.to_adapter(adapted(), tmp_path / "adapter.onnx_adapter", model, bound=0.0)
    assert not list(tmp_path.iterdir())
