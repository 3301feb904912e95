"""One session on a slotted file is the base, and any adapter of it."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.method.method import Method
from subgraph_peft.passes import (
    SSL,
    AdaLoRA,
    BitFit,
    DoRA,
    FLoRA,
    Houlsby,
    LoRA,
    MoSLoRA,
    PiSSA,
    RsLoRA,
    SpectralAdditive,
    SVDiff,
    VeRA,
)
from tests import models
from tests.export.conftest import shake
from tests.models import captured

WHERE = {"bert": "*.{query,value,dense}", "gpt2": "*.{c_attn,c_fc}", "llama": "*.{q_proj,v_proj,up_proj}"}
TRAINED = {"bert": "classifier", "gpt2": (), "llama": ()}


@pytest.fixture(autouse=True)
def one_seed():
    torch.manual_seed(0)


def adapted(name: str, method: Method, **options) -> sp.Program:
    return shake(sp.rewrite(captured(name), method, **{"where": WHERE[name], "trainable": TRAINED[name], **options}))


def inputs_of(program: sp.Program) -> dict[str, torch.Tensor]:
    """Of a shape that no verification saw."""
    given = {name: value for name, value in program.example.items() if name != "labels"}
    return {name: torch.cat([value, value.flip(0)])[:, :-1] for name, value in given.items()}


def logits(program: sp.Program) -> torch.Tensor:
    return program.run(inputs_of(program))["logits"]


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def declared(graph: onnx.GraphProto) -> dict[str, list[int | str]]:
    """Input name -> shape."""
    return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}


@pytest.fixture(scope="module")
def of_lora(tmp_path_factory) -> Callable[[str], tuple[sp.Program, export.ExportReport]]:
    """A model under LoRA, by name, and the file with its slots."""

    @cache
    def made(name: str) -> tuple[sp.Program, export.ExportReport]:
        program = adapted(name, LoRA(r=2, alpha=5.0))
        return program, export.to_onnx(program, tmp_path_factory.mktemp(name) / "model.onnx", slots=True)

    return made


@pytest.mark.parametrize("name", WHERE)
def test_one_session_runs_the_base_and_adapters_of_other_ranks(of_lora, name, tmp_path):
    (lora, report), base, pissa = of_lora(name), captured(name), adapted(name, PiSSA(r=3))
    own = export.to_adapter(lora, tmp_path / "lora.onnx_adapter", report.path)
    other = export.to_adapter(pissa, tmp_path / "pissa.onnx_adapter", report.path)
    assert set(own.ranks) | set(own.whole) == set(report.slots) and max(own.errors.values()) == 0
    assert set(own.ranks.values()) == {2} and set(other.ranks.values()) == {6}
    assert list(report.inputs) == ["input_ids", "attention_mask"]
    onnx.checker.check_model(report.path, full_check=True)
    opened = export.Adapters(report.path)
    first, second = (opened.load(tmp_path / f"{which}.onnx_adapter") for which in ("lora", "pissa"))
    fed = inputs_of(base)
    for program, loaded in ((lora, [first]), (base, []), (pissa, [second]), (lora, [first]), (base, [])):
        assert_close(opened.run(fed, *loaded)["logits"], logits(program))
        arrays = {name: value.numpy() for name, value in fed.items()}
        (by_options,) = opened.session.run(["logits"], arrays, opened.options(*loaded))
        assert_close(torch.from_numpy(by_options), logits(program))
    assert (logits(lora) - logits(base)).abs().max() > 0.01
    assert (logits(lora) - logits(pissa)).abs().max() > 0.01


def test_bound_adapters_replace_those_bound_before(of_lora, tmp_path):
    (lora, report), pissa = of_lora("llama"), adapted("llama", PiSSA(r=3), where="*.q_proj")
    opened = export.Adapters(export.session(report.path))
    binding, loaded = opened.session.io_binding(), {}
    for program, name in ((lora, "lora"), (pissa, "pissa")):
        export.to_adapter(program, tmp_path / f"{name}.onnx_adapter", opened.session)
        loaded[name] = opened.load(tmp_path / f"{name}.onnx_adapter")
    for program, adapters in ((lora, [loaded["lora"]]), (pissa, [loaded["pissa"]]), (captured("llama"), [])):
        opened.bind(binding, *adapters)
        for name, value in inputs_of(lora).items():
            binding.bind_cpu_input(name, value.numpy())
        binding.bind_output("logits")
        opened.session.run_with_iobinding(binding)
        assert_close(torch.from_numpy(binding.copy_outputs_to_cpu()[0]), logits(program))


LOW_RANK = {
    "rslora": (RsLoRA(r=2, alpha=3.0), 2),
    "moslora": (MoSLoRA(r=2, alpha=5.0), 2),
    "flora": (FLoRA(r=3, alpha=5.0), 3),
    "vera": (VeRA(r=3), 3),
    "adalora": (AdaLoRA(r=3, target_r=2, alpha=5.0), 3),
    "spectral_additive": (SpectralAdditive(r=2), 4),
}


@pytest.fixture(scope="module")
def slotted(tmp_path_factory) -> Path:
    """BERT before any adapter exists."""
    path = tmp_path_factory.mktemp("slotted") / "model.onnx"
    report = export.to_onnx(captured("bert"), path, slots=WHERE["bert"])
    assert all(name.endswith(("query.weight", "value.weight", "dense.weight")) for name in report.slots)
    return path


@pytest.mark.parametrize("method, rank", LOW_RANK.values(), ids=LOW_RANK)
def test_every_method_whose_update_is_of_low_rank_fits_a_base_that_knew_none(slotted, tmp_path, method, rank):
    program = adapted("bert", method, trainable=())
    report = export.to_adapter(program, tmp_path / "adapter.onnx_adapter", slotted)
    assert set(report.ranks.values()) == {rank} and max(report.errors.values()) < 1e-6
    opened = export.Adapters(slotted)
    found = opened.run(inputs_of(program), opened.load(tmp_path / "adapter.onnx_adapter"))
    assert_close(found["logits"], logits(program))
    assert (logits(program) - logits(captured("bert"))).abs().max() > 0.01


def test_ranks_differ_by_site_and_two_adapters_on_one_weight_are_one(slotted, tmp_path):
    program = sp.rewrite(captured("bert"), LoRA(r=2), "*.query", patterns={"*.0.*": {"r": 4}})
    program = shake(sp.rewrite(program, LoRA(r=1), "*.{query,value}"))
    report = export.to_adapter(program, tmp_path / "adapter.onnx_adapter", slotted)
    assert sorted(report.ranks.values()) == [1, 1, 3, 5]
    opened = export.Adapters(slotted)
    found = opened.run(inputs_of(program), opened.load(tmp_path / "adapter.onnx_adapter"))
    assert_close(found["logits"], logits(program))


def test_a_truncated_adapter_states_its_error_and_is_checked_as_what_it_is(slotted, tmp_path):
    program, path = adapted("bert", LoRA(r=3), trainable=()), tmp_path / "adapter.onnx_adapter"
    with pytest.raises(sp.MethodError, match=r"At rank 1 the LoRA loses \d+\.\d% of the update"):
        export.to_adapter(program, path, slotted, rank=1)
    assert not path.exists()
    report = export.to_adapter(program, path, slotted, rank=1, tolerance=1.0)
    assert set(report.ranks.values()) == {1} and all(0.01 < error < 1 for error in report.errors.values())


REFUSED = {
    "dora": (DoRA(of=LoRA(r=2)), sp.MethodError, r"has rank \d+: it is not low.*fold it into plain weights"),
    "ssl": (SSL(), sp.MethodError, r"has rank \d+: it is not low.*fold it into plain weights"),
    "svdiff": (SVDiff(s=0.5), sp.MethodError, r"has rank \d+: it is not low.*fold it into plain weights"),
    "houlsby": (Houlsby(r=2), sp.ExportError, "houlsby at .* does not fold into a weight, so that it has no slot"),
}


@pytest.mark.parametrize("method, error, match", REFUSED.values(), ids=REFUSED)
def test_other_methods_are_refused_with_the_reason(slotted, tmp_path, method, error, match):
    program = shake(sp.rewrite(captured("bert"), method, "*.attention" if method.name == "houlsby" else "*.0.*.query"))
    with pytest.raises(error, match=match):
        export.to_onnx(program, tmp_path / "model.onnx", slots=True)
    with pytest.raises(error, match=match):
        export.to_adapter(program, tmp_path / "adapter.onnx_adapter", slotted)
    assert not list(tmp_path.iterdir())


def check_road(program: sp.Program, folder: Path, merge: str = "run") -> export.AdapterReport:
    """Base and adapter through a file of the program's own."""
    export.to_onnx(program, folder / "model.onnx", slots=True, merge=merge)
    report = export.to_adapter(program, folder / "adapter.onnx_adapter", folder / "model.onnx")
    opened = export.Adapters(folder / "model.onnx")
    fed = {name: value for name, value in program.example.items() if name != "labels"}
    loaded = opened.load(folder / "adapter.onnx_adapter")
    (name,) = opened.run(fed)

    def leaf(of: sp.Program) -> torch.Tensor:
        result = of.run(fed)
        return result["logits"] if isinstance(result, dict) else result[-1] if isinstance(result, tuple) else result

    assert_close(opened.run(fed)[name], leaf(program.captured))
    assert_close(opened.run(fed, loaded)[name], leaf(program))
    assert (leaf(program) - leaf(program.captured)).abs().max() > 1e-3
    return report


def test_every_call_of_a_shared_weight_reads_the_one_sum(tmp_path):
    check_road(shake(sp.rewrite(captured("mlp"), LoRA(r=2), "shared")), tmp_path)
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    assert [node.name for node in nodes if "shared" in node.name] == [
        "shared.weight.update", "shared.weight.transposed", "shared.weight.adapted"
    ]  # fmt: skip
    assert [node.name for node in nodes if "shared.weight.adapted" in node.input] == ["linear_1", "linear_2"]


class Table(nn.Module):
    """One table [vocabulary, d] for the embedding and the head."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(11, 6))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(torch.tanh(torch.nn.functional.embedding(ids, self.table)), self.table)


def test_an_embedding_and_a_head_of_one_table_read_one_sum(tmp_path):
    program = shake(sp.rewrite(sp.capture(Table(), torch.randint(11, (3, 4))), LoRA(r=2), "table"))
    assert check_road(program, tmp_path).ranks == {"table": 2}
    graph = onnx.load(tmp_path / "model.onnx").graph
    readers = [node.op_type for node in graph.node if "table.adapted" in node.input]
    assert readers == ["Gather", "Transpose"]
    shapes = declared(graph)
    assert shapes["table.lora_A"] == [11, "table.rank"] and shapes["table.lora_B"] == ["table.rank", 6]


def test_an_embedding_and_its_untied_head(tmp_path):
    program = sp.rewrite(captured("gpt2"), LoRA(r=2), ["*.wte", "*.wpe"], tied="untie")
    check_road(shake(program), tmp_path)


def test_a_tied_weight_is_not_changed_behind_its_twin(tmp_path):
    with pytest.raises(sp.SelectorError, match="tied to"):
        export.to_onnx(captured("gpt2"), tmp_path / "model.onnx", slots="*.wte")


class Products(nn.Module):
    """Row blocks, a slice of rows and one of columns, a weight stored as [in, out], one called in both directions, one
    times itself."""

    def __init__(self):
        super().__init__()
        self.qkv_proj, self.cut = nn.Linear(6, 15), nn.Linear(6, 8)
        self.stored = nn.Parameter(torch.randn(5, 7))
        self.both = nn.Parameter(torch.randn(7, 4))
        self.gram = nn.Parameter(torch.randn(4, 7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv_proj(x).split(5, -1)
        rows = torch.nn.functional.linear(x, self.cut.weight[2:7])
        columns = torch.nn.functional.linear(x[..., 1:5], self.cut.weight[:, 2:])[..., 3:]
        h = torch.tanh((q * k + v + rows + columns) @ self.stored)
        gram = torch.nn.functional.linear(self.gram, self.gram)
        return torch.tanh(h @ self.both) @ (gram @ self.both.T)


@pytest.mark.parametrize("merge", ["run", "load"])
def test_products_of_every_kind(merge, tmp_path):
    program = sp.capture(Products(), torch.randn(3, 4, 6))
    program = sp.rewrite(program, LoRA(r=2), ["qkv_proj[q,v]", "cut", "stored", "both", "gram"])
    assert check_road(shake(program), tmp_path, merge).ranks == {
        "qkv_proj.weight": 4, "cut.weight": 2, "stored": 2, "both": 2, "gram": 2
    }  # fmt: skip


class Experts(nn.Module):
    """A stack of matrices [expert, in, out], and a transposed one."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 14)), nn.Parameter(torch.randn(3, 6, 14))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(torch.einsum("eti,eio->eto", x, self.up))
        return torch.einsum("eto,eio->eti", hidden, self.down)


class Others(nn.Module):
    """Weights that operators take whole: a convolution, transposed ones, a recurrent layer, a bilinear form."""

    def __init__(self):
        super().__init__()
        self.wide, self.back = nn.Conv1d(4, 8, 3, padding=1), nn.ConvTranspose1d(8, 6, 3, padding=1)
        self.grouped = nn.ConvTranspose1d(6, 6, 3, padding=1, groups=2)
        self.cell, self.form = nn.LSTM(6, 5, batch_first=True), nn.Bilinear(5, 5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.grouped(torch.tanh(self.back(torch.tanh(self.wide(x)))))
        hidden, _ = self.cell(hidden.transpose(1, 2))
        return self.form(hidden, torch.tanh(hidden))


WHOLE = {
    "convolutions": (lambda: captured("conv"), ["stem", "grouped", "point"]),
    "others": (
        lambda: sp.capture(Others(), torch.randn(3, 4, 7), dynamic={"x": [0, 2]}),
        ["wide", "back", "grouped", "re:cell.*", "form"],
    ),
    "experts": (lambda: sp.capture(Experts(), torch.randn(3, 5, 6), dynamic={"x": [1]}), ["up", "down"]),
}


METHODS = {
    "lora": (LoRA(r=1, alpha=5.0), "run"),
    "lora merged on load": (LoRA(r=1, alpha=5.0), "load"),
    "pissa": (PiSSA(r=1), "run"),
    "moslora": (MoSLoRA(r=1), "run"),
}


@pytest.mark.parametrize("method, merge", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("made, where", WHOLE.values(), ids=WHOLE)
def test_weights_of_other_operators(made, where, method, merge, tmp_path):
    program = shake(sp.rewrite(made(), method, where), 0.3)
    report = check_road(program, tmp_path, merge)
    assert set(report.ranks.values()) == {2 if method.name == "pissa" else 1} and max(report.errors.values()) < 1e-6


def test_a_stack_of_matrices_is_truncated_together(tmp_path):
    program = shake(sp.rewrite(WHOLE["experts"][0](), LoRA(r=3), "up"))
    export.to_onnx(program, tmp_path / "model.onnx", slots=True)
    options = {"rank": 2, "tolerance": 1.0}
    report = export.to_adapter(program, tmp_path / "adapter.onnx_adapter", tmp_path / "model.onnx", **options)
    W, adapted = (of.module.get_parameter("up").detach() for of in (program.captured, sp.fold(program)))
    values = torch.linalg.svdvals((adapted - W).double())
    expected = (values[:, 2:].square().sum() / values.square().sum()).sqrt().item()
    assert report.ranks == {"up": 2} and report.errors["up"] == pytest.approx(expected, rel=1e-3)


def test_a_trained_head_biases_and_batch_norm_travel_in_the_adapter(tmp_path):
    program = sp.rewrite(captured("conv"), BitFit(), "*", trainable="head")
    program.module.train()(**program.example)
    report = check_road(shake(program), tmp_path)
    assert {"head.weight", "stem.bias", "norm.running_mean"} <= set(report.whole) and not report.ranks


def test_a_base_with_another_fresh_head_is_the_same_base_where_the_head_is_replaced(of_lora, tmp_path):
    path = of_lora("bert")[1].path
    model, inputs = models.bert()
    nn.init.normal_(model.classifier.weight)
    other = shake(sp.rewrite(sp.capture(model, inputs), PiSSA(r=1), WHERE["bert"], trainable="classifier"))
    export.to_adapter(other, tmp_path / "other.onnx_adapter", path)
    opened = export.Adapters(path)
    found = opened.run(inputs_of(other), opened.load(tmp_path / "other.onnx_adapter"))
    assert_close(found["logits"], logits(other))


def test_float16_and_external_data(tmp_path):
    model, inputs = models.MODELS["mlp"]()
    program = sp.capture(model.half(), {"x": inputs["x"].half(), "labels": inputs["labels"]})
    program = shake(sp.rewrite(program, LoRA(r=2), "*"))
    report = export.to_onnx(program, tmp_path / "model.onnx", slots=True, external_data=True)
    assert report.files == ("model.onnx", "model.onnx.data")
    export.to_adapter(program, tmp_path / "adapter.onnx_adapter", tmp_path / "model.onnx")
    stored = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "adapter.onnx_adapter")).get_parameters()
    assert {value.data_type() for value in stored.values()} == {"tensor(float16)"}


def test_slots_of_a_narrow_fused_and_quantised_file(tmp_path):
    where = {"where": "*.{q_proj,v_proj}", "trainable": ["*.input_layernorm", "lm_head"]}
    program, model = shake(sp.rewrite(captured("wide_llama"), LoRA(r=2), **where)), tmp_path / "model.onnx"
    report = export.to_onnx(program, model, slots=True, dtype="float16", optimize=True, quantize=8)
    written = export.to_adapter(program, tmp_path / "adapter.onnx_adapter", model)
    assert "lm_head.weight" in written.whole and set(written.ranks) | set(written.whole) == set(report.slots)
    assert report.fused["MultiHeadAttention"] == 2 and report.fused["MatMulNBits"] > 0
    opened = export.Adapters(model)
    loaded = opened.load(tmp_path / "adapter.onnx_adapter")
    assert {value.data_type() for value in loaded.values.values()} == {"tensor(float16)"}
    base, own = logits(captured("wide_llama")), logits(program)
    for adapters, expected in (([], base), ([loaded], own)):
        found = opened.run(inputs_of(program), *adapters)["logits"]
        assert (found.float() - expected).abs().max() < 0.1 * (own - base).abs().max()


def operators(path: Path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_a_slot_costs_a_product_and_a_sum(exported, slotted, tmp_path):
    """And a transpose, at the one product of a matrix with a bias. On loading, onnxruntime computes the transpose and
    makes one Gemm of the product and the sum."""
    own = len(export.Adapters(slotted).slots) // 2
    plain, found = operators(exported("bert").path), operators(slotted)
    assert found - plain == {"MatMul": own, "Add": own, "Transpose": 1} and not plain - found

    def optimised(path: Path) -> Counter:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return operators(tmp_path / "optimised.onnx")

    before, after = optimised(exported("bert").path), optimised(slotted)
    assert after.total() <= before.total() + own
    for fused in ("BiasGelu", "SkipLayerNormalization", "FusedMatMul"):
        assert before[fused] == after[fused] > 0


@pytest.mark.parametrize("where, sums", [("*.{query,key,value,dense}", 1), ("*.{query,value}", 2)])
def test_fused_files_keep_every_fusion(where, sums, tmp_path):
    """Of three slots at packed attention one sum is left, of two both; either way weights go side by side once."""
    config = BertConfig(**{**models.ENCODER, "hidden_size": 96})  # smaller weights are computed where they are exported
    torch.manual_seed(0)
    base = sp.capture(BertForSequenceClassification(config).eval(), models.sequences())
    program = shake(sp.rewrite(base, LoRA(r=2), where), 0.02)
    plain = export.to_onnx(base, tmp_path / "base.onnx", optimize=True)
    report = export.to_onnx(program, tmp_path / "model.onnx", optimize=True, slots=True)
    assert report.fused == plain.fused and report.fused["Attention"] == 2
    attention = sum(name.endswith(("query.weight", "key.weight", "value.weight")) for name in report.slots)
    added = {"MatMul": len(report.slots), "Add": len(report.slots) - attention + 2 * sums, "Concat": 2}
    before, after = operators(tmp_path / "base.onnx"), operators(tmp_path / "model.onnx")
    assert after - before == added and not before - after
    export.to_adapter(program, tmp_path / "adapter.onnx_adapter", tmp_path / "model.onnx")
    loading = export.to_onnx(program, tmp_path / "loading.onnx", optimize=True, slots=True, merge="load")
    merged = operators(tmp_path / "loading.onnx")
    assert loading.fused == plain.fused and merged - before == {"Concat": 2} and not before - merged


@pytest.fixture(scope="module")
def merging(tmp_path_factory) -> Path:
    """BERT with slots that are merged on load, before any adapter exists."""
    path = tmp_path_factory.mktemp("merging") / "model.onnx"
    export.to_onnx(captured("bert"), path, slots=WHERE["bert"], merge="load")
    return path


def test_one_adapter_file_serves_slots_of_both_kinds(slotted, merging, tmp_path):
    lora, pissa = (adapted("bert", method, trainable=()) for method in (LoRA(r=2, alpha=5.0), PiSSA(r=3)))
    export.to_adapter(lora, tmp_path / "lora.onnx_adapter", slotted)
    export.to_adapter(pissa, tmp_path / "pissa.onnx_adapter", merging)
    read = onnxruntime.AdapterFormat.read_adapter
    assert all(n.endswith((".lora_A", ".lora_B")) for n in read(str(tmp_path / "pissa.onnx_adapter")).get_parameters())
    for model in (slotted, merging):
        bound = export.BoundSession(model)
        opened = export.Adapters(bound.opened)
        first, second = (opened.load(tmp_path / f"{which}.onnx_adapter") for which in ("lora", "pissa"))
        assert set(first.ranks.values()) == {2} and set(second.ranks.values()) == {6}
        for program, loaded in ((lora, [first]), (captured("bert"), []), (pissa, [second]), (lora, [first])):
            assert_close(opened.run(inputs_of(program), *loaded)["logits"], logits(program))
            assert_close(bound(inputs_of(program), loaded)["logits"].cpu(), logits(program))


def test_a_file_that_merges_on_load_is_the_base_and_runs_its_nodes(merging, exported):
    """But for the transpose of the one product of a matrix with a bias, since the weight lies as it is read."""
    plain, found = operators(exported("bert").path), operators(merging)
    assert found["MatMul"] + found["Gemm"] == plain["MatMul"] + plain["Gemm"] and found.total() <= plain.total()
    held = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(merging).graph.initializer}
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    own = captured("bert").module.get_parameter(weight).detach().numpy()
    np.testing.assert_array_equal(held[f"{weight}.merged"], own.T)
    assert weight not in held and merging.stat().st_size < 1.05 * exported("bert").path.stat().st_size


def test_what_merging_on_load_refuses(merging, tmp_path):
    program = adapted("bert", LoRA(r=2), trainable=())
    export.to_adapter(program, tmp_path / "lora.onnx_adapter", merging)
    opened = export.Adapters(merging)
    with pytest.raises(
        sp.ExportError, match=r"slots are merged on load: bind its adapters .* or export with merge='run'"
    ):
        opened.options(opened.load(tmp_path / "lora.onnx_adapter"))
    unnamed = export.Adapters(onnxruntime.InferenceSession(merging.read_bytes(), providers=["CPUExecutionProvider"]))
    with pytest.raises(sp.ExportError, match=r"merged on load, with the weights of its file: Adapters\(path\)"):
        unnamed.load(tmp_path / "lora.onnx_adapter")
    short = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "lora.onnx_adapter"))
    values = {name: value for name, value in short.get_parameters().items() if "layer.0.intermediate" in name}
    down, up = sorted(values)
    for changed, match in (
        ({down: values[down].numpy()[:-1]}, r"lora_A is \[23, 2\], the model takes \[24, r\]"),
        ({up: values[up].numpy()[:, 1:]}, r"lora_B is \[2, 39\], the model takes \[r, 40\]"),
        ({up: values[up].numpy().astype(np.float16)}, r"is a tensor\(float16\), the model takes a tensor\(float\)"),
        ({up: None}, "without the other half"),
    ):
        kept = {name: changed.get(name, value.numpy()) for name, value in values.items()}
        kept = {n: onnxruntime.OrtValue.ortvalue_from_numpy(v) for n, v in kept.items() if v is not None}
        short.set_parameters(kept)
        short.export_adapter(str(tmp_path / "short.onnx_adapter"))
        with pytest.raises(sp.ExportError, match=match):
            opened.load(tmp_path / "short.onnx_adapter")
    with pytest.raises(sp.ExportError, match="merged at every 'run' or on 'load', not 'never'"):
        export.to_onnx(program, tmp_path / "model.onnx", slots=True, merge="never")


def test_half_precision_merged_on_load_in_external_data(tmp_path):
    """The sum is rounded once, as a merged file's weights are."""
    program = shake(sp.rewrite(captured("llama"), LoRA(r=2), "*.{q_proj,v_proj}"))
    for dtype, bound in (("float16", 1e-2), ("bfloat16", 5e-2)) if torch.cuda.is_available() else (("float16", 1e-2),):
        options = {"dtype": dtype, "bound": bound, "external_data": True}
        export.to_onnx(program, tmp_path / "model.onnx", slots=True, merge="load", **options)
        export.to_adapter(program, tmp_path / "adapter.onnx_adapter", tmp_path / "model.onnx", bound=bound)
        opened = export.Adapters(tmp_path / "model.onnx")
        found = opened.run(inputs_of(program), opened.load(tmp_path / "adapter.onnx_adapter"))["logits"]
        torch.testing.assert_close(found.float(), logits(program).cpu(), atol=3 * bound, rtol=3 * bound)


def test_a_file_of_rank_zero_says_so(slotted):
    graph = onnx.load(slotted).graph
    defaults = {t.name: list(t.dims) for t in graph.initializer if t.name.endswith((".lora_A", ".lora_B"))}
    weight = "bert.encoder.layer.0.intermediate.dense.weight"
    assert defaults[f"{weight}.lora_A"] == [24, 0] and defaults[f"{weight}.lora_B"] == [0, 40]
    shapes = declared(graph)
    assert shapes[f"{weight}.lora_A"] == [24, f"{weight}.rank"]
    assert shapes[f"{weight}.lora_B"] == [f"{weight}.rank", 40]
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    np.testing.assert_array_equal(weights[weight], captured("bert").module.get_parameter(weight).detach().numpy())


def test_what_has_no_adapter_and_names_no_weight_has_no_slots(tmp_path):
    with pytest.raises(sp.ExportError, match=r"has no adapters whose weights would get slots. Name weights"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx", slots=True)
    with pytest.raises(sp.SelectorError, match="querry"):
        export.to_onnx(captured("bert"), tmp_path / "model.onnx", slots="*.querry")


def test_outputs_that_do_not_read_a_slot_are_refused(tmp_path):
    model, inputs = models.bert()
    model.config.output_hidden_states = True
    program = shake(sp.rewrite(sp.capture(model, inputs), LoRA(r=2), "*.query", trainable="classifier"))
    with pytest.raises(sp.ExportError, match="classifier.weight, classifier.bias: no output in the file reads"):
        export.to_onnx(program, tmp_path / "model.onnx", slots=True, outputs=["hidden_states_2"])
