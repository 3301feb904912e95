"""Merged weights elsewhere: model folders like the one that was loaded, and delta files that a base takes."""

import copy
import json
import re
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertModel, MixtralConfig, MixtralForCausalLM
from typer.testing import CliRunner

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.base import files
from subgraph_peft.cli import app
from subgraph_peft.export.delta import read_delta
from subgraph_peft.passes import BitFit, LoRA
from subgraph_peft.pipeline.passes import State
from subgraph_peft.store import merged_folder, shards
from subgraph_peft.store.merged_folder import folder_of, save_merged
from tests import models
from tests.base.test_schema import spoiled

INDEX = "model.safetensors.index.json"


def stored(folder: Path, made=models.llama, dtype=torch.float32, size="12KB"):
    """(the model as transformers loads it from a folder of shards, inputs)"""
    model, inputs = made()
    if made is models.bert:  # its forward pass sets this
        model.config.problem_type = "single_label_classification"
    model.to(dtype).save_pretrained(folder, max_shard_size=size)
    return type(model).from_pretrained(folder), inputs


def folded(model, inputs, where="*.1.*.q_proj", method=None, dtype=None, **options):
    """A fold of what a short training might have made."""
    base = sp.capture(model, inputs, verify=False)
    program = shaken(sp.rewrite(base, method or LoRA(r=2), where=where, **options))
    return sp.fold(program, dtype=dtype, verify=False)


def shaken(program):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in program.parameters(trainable=True):
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return program


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()}


def raw(path: Path) -> tuple[bytes, dict[str, bytes]]:
    """(header, bytes of every tensor) of a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    entries.pop("__metadata__")
    return data[8:start], {n: data[start:][slice(*entry["data_offsets"])] for n, entry in entries.items()}


def equal(model, program) -> None:
    """A model that was read again has the program's numbers, bit for bit, in its dtype."""
    expected = program.module.state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name


CASES = {
    "llama": (models.llama, torch.float32, {}),
    "tied": (models.tied_llama, torch.float32, {}),
    "untied": (models.tied_llama, torch.float32, {"where": ["*.1.*.q_proj", "lm_head"], "tied": "untie"}),
    "both untied": (models.tied_llama, torch.float32, {"where": ["*.embed_tokens", "lm_head"], "tied": "untie"}),
    "conv1d": (models.gpt2, torch.float32, {"where": "*.1.attn.c_attn"}),
    "bert": (models.bert, torch.float32, {"where": "*.1.*.query", "trainable": "classifier"}),
    "bf16": (models.llama, torch.bfloat16, {"dtype": torch.bfloat16}),
    "bf16 widened": (models.tied_llama, torch.bfloat16, {}),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(source folder, model, folded program, name)"""
    made, dtype, options = CASES[request.param]
    folder = tmp_path_factory.mktemp("source")
    model, inputs = stored(folder, made, dtype)
    return folder, model, folded(model, inputs, **options), request.param


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(source folder, model, folded program)"""
    folder = tmp_path_factory.mktemp("llama")
    model, inputs = stored(folder)
    return folder, model, folded(model, inputs)


def test_a_merged_folder_is_the_source_but_for_what_changed(case, tmp_path):
    source, model, program, name = case
    before = {n: t.clone() for n, t in model.state_dict().items()}
    report = save_merged(program, model, None, tmp_path / "out")
    ours, theirs = contents(tmp_path / "out"), contents(source)
    assert ours.keys() == theirs.keys() and len(report.files) > 1
    assert report.source == source and report.dtype == program.home.dtype
    differing = {file for file in ours if ours[file] != theirs[file]}
    assert differing & report.files.keys() == {file for file, same in report.files.items() if not same}
    if name == "bf16 widened":
        assert report.retyped and "float32, other than stored there" in str(report)
        assert not any(report.files.values()) and json.loads(ours["config.json"])["dtype"] == "float32"
    elif name in ("untied", "both untied"):
        assert differing - report.files.keys() == {"config.json", INDEX}
        assert json.loads(ours["config.json"])["tie_word_embeddings"] is False
        assert json.loads(ours[INDEX])["weight_map"]["lm_head.weight"] == list(report.files)[-1]
    else:
        assert differing <= report.files.keys() and any(report.files.values())
        for file in differing:
            (our_header, our_bytes), (header, held) = raw(tmp_path / "out" / file), raw(source / file)
            assert our_header == header
            assert {n for n in held if our_bytes[n] != held[n]} == report.changed & held.keys()
    equal(type(model).from_pretrained(tmp_path / "out"), program)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()), "the model keeps its weights"
    found, expected = model.config.to_diff_dict(), type(model.config).from_pretrained(source).to_diff_dict()
    assert {**found, "_name_or_path": ""} == {**expected, "_name_or_path": ""}, "and its configuration"


def test_a_delta_applied_is_write_to_bit_for_bit(case, tmp_path):
    source, model, program, name = case
    export.to_delta(program, tmp_path / "delta.safetensors")
    written, applied = (type(model).from_pretrained(source) for _ in range(2))
    if name == "bf16 widened":
        written, applied = written.float(), applied.float()
    assert sorted(export.apply_delta(tmp_path / "delta.safetensors", applied)) == sorted(sp.write_to(program, written))
    expected = written.state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in applied.state_dict().items())
    if "tied" in name or name == "bf16 widened":
        tied = "untied" not in name
        assert (applied.lm_head.weight is applied.model.embed_tokens.weight) == tied
        assert applied.config.tie_word_embeddings == written.config.tie_word_embeddings == tied


def test_a_delta_applied_to_the_folder_is_the_merged_folder_byte_for_byte(case, tmp_path):
    source, model, program, name = case
    before = contents(source)
    export.to_delta(program, tmp_path / "delta.safetensors")
    save_merged(program, model, None, tmp_path / "merged")
    done = CliRunner().invoke(app, ["apply", str(tmp_path / "delta.safetensors"), str(source), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert contents(tmp_path / "out") == contents(tmp_path / "merged")
    assert contents(source) == before


def test_no_weight_is_copied_in_memory(llama, tmp_path, monkeypatch):
    _, model, program = llama
    held = {t.data_ptr() for _, t in program.tensors()}
    together, _ = merged_folder.merged_model(program, model)
    assert all(p.data_ptr() in held for p in together.parameters())
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", lambda *_: pytest.fail("a parameter was copied"))
    save_merged(program, model, None, tmp_path / "out")


def test_experts_that_loading_joined_are_stored_apart_again(tmp_path):
    sizes = {"vocab_size": models.VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2}
    config = MixtralConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "source", max_shard_size="20KB")
    model = MixtralForCausalLM.from_pretrained(tmp_path / "source", experts_implementation="grouped_mm")
    program = folded(model, models.generation(), "*.1.*.experts.*")
    report = save_merged(program, model, None, tmp_path / "out")
    assert len(report.changed) == 12 and all(".layers.1.block_sparse_moe.experts." in name for name in report.changed)
    assert 0 < sum(report.files.values()) < len(report.files)
    equal(MixtralForCausalLM.from_pretrained(tmp_path / "out"), program)
    export.to_delta(program, tmp_path / "delta.safetensors")
    with pytest.raises(sp.CheckpointError, match=r"no tensor model.layers.1.mlp.experts.*load the model first"):
        export.apply_delta(tmp_path / "delta.safetensors", tmp_path / "source", tmp_path / "other")
    again = MixtralForCausalLM.from_pretrained(tmp_path / "source")
    export.apply_delta(tmp_path / "delta.safetensors", again)
    equal(again, program)


def test_without_a_source_that_has_everything_save_pretrained_decides_and_the_report_says_why(tmp_path):
    model, inputs = models.llama()
    report = save_merged(folded(model.bfloat16(), inputs), model, None, tmp_path / "built")
    assert report.source is None and "float32; laid out anew: the model was loaded from no folder" in str(report)
    assert json.loads((tmp_path / "built/config.json").read_text())["dtype"] == "float32"
    assert model.dtype == torch.bfloat16

    encoder, inputs = models.bert()
    BertModel(encoder.config).save_pretrained(tmp_path / "encoder")
    loaded = type(encoder).from_pretrained(tmp_path / "encoder")
    program = folded(loaded, inputs, "*.query", trainable="classifier")
    report = save_merged(program, loaded, None, tmp_path / "out")
    assert report.source is None and "encoder does not store bert.embeddings" in report.reason
    equal(type(encoder).from_pretrained(tmp_path / "out"), program)
    export.to_delta(program, tmp_path / "delta.safetensors")
    with pytest.raises(sp.CheckpointError, match="has no tensor bert.encoder.*stores it under another name"):
        export.apply_delta(tmp_path / "delta.safetensors", tmp_path / "encoder", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_model_that_was_changed_after_loading_is_saved_as_it_is(tmp_path):
    model, inputs = stored(tmp_path / "source")
    with torch.no_grad():
        model.model.norm.weight.add_(1)
    model.generation_config.max_new_tokens, model.config.pad_token_id = 7, 3
    program = folded(model, inputs)
    report = save_merged(program, model, None, tmp_path / "out")
    assert set(report.changed) == {"model.norm.weight", "model.layers.1.self_attn.q_proj.weight"}
    equal(again := type(model).from_pretrained(tmp_path / "out"), program)
    assert again.generation_config.max_new_tokens == 7 and again.config.pad_token_id == 3
    export.to_delta(program, tmp_path / "delta.safetensors")
    with pytest.raises(sp.CheckpointError, match=r"made for another base \(LlamaForCausalLM\): model.norm.weight has"):
        export.apply_delta(tmp_path / "delta.safetensors", tmp_path / "source", tmp_path / "other")


def test_what_lies_beside_the_weights_comes_along_and_other_weights_do_not(llama, tmp_path):
    source, model, program = llama
    shutil.copytree(source, tmp_path / "source")
    model = type(model).from_pretrained(tmp_path / "source")
    for name in ("tokenizer.json", "code.py", "pytorch_model.bin", "model.onnx", "stale.safetensors", ".hidden"):
        (tmp_path / "source" / name).write_text("{}")
    save_merged(program, model, None, tmp_path / "out")
    assert contents(tmp_path / "source").keys() - contents(tmp_path / "out").keys() == {
        "pytorch_model.bin", "model.onnx", "stale.safetensors", ".hidden",
    }  # fmt: skip


def test_a_source_that_stores_both_names_of_a_tie_keeps_both(tmp_path):
    model, inputs = models.tied_llama()
    model.save_pretrained(tmp_path / "source")
    held = load_file(tmp_path / "source/model.safetensors")
    held["lm_head.weight"] = held["model.embed_tokens.weight"].clone()
    save_file(held, tmp_path / "source/model.safetensors", {"format": "pt", "made": "by hand"})
    model = type(model).from_pretrained(tmp_path / "source")
    program = folded(model, inputs, "lm_head", tied="untie")
    report = save_merged(program, model, None, tmp_path / "out")
    assert report.changed == ("lm_head.weight",)
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made": "by hand"}
    equal(type(model).from_pretrained(tmp_path / "out"), program)
    delta = export.to_delta(program, tmp_path / "delta.safetensors")
    assert delta.unties() and load_file(delta.path).keys() == {"lm_head.weight"}
    export.apply_delta(delta.path, tmp_path / "source", tmp_path / "applied")
    assert contents(tmp_path / "applied") == contents(tmp_path / "out")


def test_a_tied_weight_that_changed_stays_tied(tmp_path):
    model, inputs = stored(tmp_path / "source", models.tied_llama)
    base = sp.capture(copy.deepcopy(model), inputs)
    program = sp.capture(model, inputs)
    with torch.no_grad():
        model.lm_head.weight.add_(0.1)
    delta = export.to_delta(program, tmp_path / "delta.safetensors", base=base)
    assert delta.tensors.keys() == {"model.embed_tokens.weight", "lm_head.weight"} and not delta.unties()
    export.apply_delta(delta.path, tmp_path / "source", tmp_path / "out")
    assert tensors(tmp_path / "out").keys() == tensors(tmp_path / "source").keys()
    for applied in (type(model).from_pretrained(tmp_path / name) for name in ("out", "source")):
        if not torch.equal(applied.lm_head.weight, model.lm_head.weight):
            export.apply_delta(delta.path, applied)
        equal(applied, program)
        assert applied.lm_head.weight is applied.model.embed_tokens.weight and applied.config.tie_word_embeddings


def test_models_that_are_not_of_transformers(tmp_path):
    model, inputs = models.conv()
    program = sp.rewrite(sp.capture(model, inputs), LoRA(r=2), where="point")
    program.module.train()(**inputs)
    with torch.no_grad():
        program.module.get_parameter("point.weight_lora.B").add_(0.5)
    program = sp.fold(program)
    report = save_merged(program, model, None, tmp_path / "out")
    assert "the model has no save_pretrained" in str(report)
    found = load_file(tmp_path / "out/model.safetensors")
    expected = program.module.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())

    delta = export.to_delta(program, tmp_path / "delta.safetensors")
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert delta.tensors.keys() == {"point.weight"} | statistics, "what training wrote to buffers is part of it"
    (tmp_path / "base").mkdir()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "base/model.safetensors")
    export.apply_delta(delta.path, tmp_path / "base", tmp_path / "applied")
    applied = load_file(tmp_path / "applied/model.safetensors")
    assert all(torch.equal(t, expected[n]) for n, t in applied.items())
    export.apply_delta(delta.path, model)
    assert all(torch.equal(t, expected[n]) for n, t in model.state_dict().items())


def test_the_fold_of_a_pipeline_writes_a_delta(llama, tmp_path):
    source, model, program = llama
    inputs = models.llama()[1]
    adapted = shaken(sp.rewrite(program.before, LoRA(r=2), where="*.1.*.q_proj"))
    (result,) = sp.Pipeline.read("fold{delta=true}").run(State(program=adapted, folder=tmp_path))
    assert f"{tmp_path}/delta.safetensors" in result.summary
    again = type(model).from_pretrained(source)
    export.apply_delta(tmp_path / "delta.safetensors", again)
    torch.testing.assert_close(again(**inputs).logits, adapted.run(inputs).logits)
    plain = sp.rewrite(program.before, LoRA(r=2), where="*.1.*.q_proj")
    with pytest.raises(sp.ExportError, match="there is no delta to write"):
        list(sp.Pipeline.read("fold{delta=true}").run(State(program=plain, folder=tmp_path / "none")))
    with pytest.raises(sp.ConfigError, match="give an `output` folder"):
        list(sp.Pipeline.read("fold{delta=true}").run(State(program=adapted)))


def test_a_model_of_the_hub_has_its_source_in_the_cache(llama, tmp_path, monkeypatch):
    source, model, _ = llama
    held = tmp_path / "models--someone--tiny"
    (held / "refs").mkdir(parents=True)
    (held / "refs/main").write_text("0" * 40)
    shutil.copytree(source, held / "snapshots" / ("0" * 40))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    loaded = type(model)(copy.deepcopy(model.config))
    for name, found in {
        "someone/tiny": held / "snapshots" / ("0" * 40),
        "no/one": None,
        "/gone/for/ever": None,
    }.items():
        loaded.config._name_or_path = loaded.name_or_path = name
        assert folder_of(loaded) == found


def test_a_delta_says_what_it_came_from_and_holds_nothing_else(tmp_path):
    model, inputs = models.bert()
    first = folded(model, inputs, "*.0.*.query")
    second = sp.rewrite(first, BitFit(), where="*.1.*.query", trainable="classifier")
    with torch.no_grad():
        for _, parameter in second.parameters(trainable=True):
            parameter.add_(0.5)
    delta = export.to_delta(sp.fold(second), tmp_path / "delta.safetensors")
    changed = {"bert.encoder.layer.0.attention.self.query.weight", "bert.encoder.layer.1.attention.self.query.bias"}
    assert load_file(delta.path).keys() == changed | {"classifier.weight", "classifier.bias"}, (
        "against the captured base"
    )
    assert delta.source == "BertForSequenceClassification" and delta.adapters == {"bitfit": {"bitfit": {}}}
    assert delta.dtype == torch.float32 and not delta.unties()


def test_what_no_delta_can_be_made_of(tmp_path):
    model, inputs = models.bert()
    base = sp.capture(model, inputs)
    adapted = sp.rewrite(base, LoRA(r=2), where="*.query")
    path = tmp_path / "delta.safetensors"
    with pytest.raises(sp.ExportError, match="Every weight of BertForSequenceClassification is the base's"):
        export.to_delta(sp.fold(adapted), path)
    with pytest.raises(sp.ExportError, match="does not know what it was folded from"):
        export.to_delta(base, path)
    with pytest.raises(sp.FoldError, match="still has adapters"):
        export.to_delta(adapted, path)
    program = folded(model, inputs, "*.query")
    sp.write(program, tmp_path / "program.safetensors")
    read = sp.read(tmp_path / "program.safetensors")
    with pytest.raises(sp.ExportError, match="was read from a file. Give base="):
        export.to_delta(read, path)
    assert not path.exists()
    assert export.to_delta(read, path, base=base).tensors == export.to_delta(program, path).tensors


@pytest.fixture
def delta(llama, tmp_path):
    source, model, program = llama
    shutil.copytree(source, tmp_path / "source")
    return export.to_delta(program, tmp_path / "delta.safetensors"), type(model).from_pretrained(source)


def test_another_base_is_refused_by_the_name_that_differs(delta, tmp_path):
    delta, model = delta
    name = "model.layers.1.self_attn.q_proj.weight"
    with torch.no_grad():
        model.get_parameter(name)[0, 0] += 1
    before = {n: t.clone() for n, t in model.state_dict().items()}
    with pytest.raises(sp.CheckpointError, match=rf"another base \(LlamaForCausalLM\): {name} .* LlamaForCausalLM"):
        export.apply_delta(delta.path, model)
    other, _ = models.gpt2()
    with pytest.raises(sp.CheckpointError, match=f"GPT2LMHeadModel has no tensor {name}"):
        export.apply_delta(delta.path, other)
    with pytest.raises(sp.CheckpointError, match="in the LlamaForCausalLM and .*in .*delta.safetensors"):
        export.apply_delta(delta.path, type(model).from_pretrained(tmp_path / "source").double())
    with pytest.raises(sp.CheckpointError, match=r"is torch.bfloat16 .* convert the model, model.to\(torch.float32\)"):
        narrow, inputs = stored(tmp_path / "narrow", dtype=torch.bfloat16)
        export.to_delta(folded(narrow, inputs), tmp_path / "wide.safetensors")
        export.apply_delta(tmp_path / "wide.safetensors", narrow)
    config = AutoConfig.from_pretrained(tmp_path / "source", hidden_size=16)
    with pytest.raises(sp.CheckpointError, match=rf"{name} is \[24, 16\] .* and \[24, 24\]"):
        export.apply_delta(delta.path, type(model)(config))
    with torch.device("meta"), pytest.raises(sp.CheckpointError, match="meta device"):
        export.apply_delta(delta.path, type(model)(model.config))
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_damaged_deltas_and_folders_are_refused_and_nothing_is_written(delta, tmp_path):
    delta, model = delta
    good = delta.path.read_bytes()

    def refused(data: bytes, match: str) -> None:
        delta.path.write_bytes(data)
        with pytest.raises(sp.CheckpointError, match=match):
            export.apply_delta(delta.path, tmp_path / "source", tmp_path / "out")
        assert not (tmp_path / "out").exists()

    refused(good[:-4], "delta.safetensors is missing or damaged")
    refused(good[:-4] + b"\0\0\0\1", "is damaged: model.layers.1.self_attn.q_proj.weight is .* not the tensor")
    refused(good.replace(b'\\"format\\": 1', b'\\"format\\": 9'), "format 9; this version reads format 1")
    refused(good.replace(b'\\"base\\": ', b'\\"bass\\": '), "field 'base': it is required; field 'bass': it is unknown")
    refused((tmp_path / "source/model-00001-of-00005.safetensors").read_bytes(), "is no delta")
    delta.path.write_bytes(good)
    shard = tmp_path / "source/model-00002-of-00005.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    refused(good, "model-00002-of-00005.safetensors is missing or damaged")
    shard.unlink()
    refused(good, "model-00002-of-00005.safetensors is missing or damaged")
    index = tmp_path / "source" / INDEX
    index.write_text(index.read_text().replace("model-00002", "../model-00002"))
    refused(good, "names '../model-00002-of-00005.safetensors', which is no file of that folder")
    shutil.rmtree(tmp_path / "source")
    refused(good, "is no folder with model.safetensors")


def test_every_field_of_a_deltas_header_is_checked(delta):
    path = delta[0].path
    held = load_file(path)
    with safe_open(path, framework="pt") as file:
        good = json.loads(file.metadata()["subgraph_peft_delta"])
    for field, values in (*spoiled(good), ("dtype", {**good, "dtype": "nn"})):
        save_file(held, path, metadata={"subgraph_peft_delta": json.dumps(values)})
        with pytest.raises(sp.CheckpointError, match=rf"delta.safetensors (has |is damaged.*'){field}"):
            read_delta(path)


def test_where_a_delta_writes(delta, tmp_path):
    delta, model = delta
    with pytest.raises(sp.CheckpointError, match="Give output="):
        export.apply_delta(delta.path, tmp_path / "source")
    with pytest.raises(
        sp.CheckpointError, match="source is read here, and .*source would be replaced; name a new folder"
    ):
        export.apply_delta(delta.path, tmp_path / "source", tmp_path / "source")
    with pytest.raises(sp.CheckpointError, match="output= belongs to a base folder"):
        export.apply_delta(delta.path, model, tmp_path / "out")
    with pytest.raises(sp.CheckpointError, match="delta.safetensors is read here"):
        export.apply_delta(delta.path, tmp_path / "source", tmp_path)
    export.apply_delta(delta.path, tmp_path / "source", tmp_path / "out")
    (tmp_path / "out/model-00006-of-00006.safetensors").write_text("of an earlier run")
    export.apply_delta(delta.path, tmp_path / "source", tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "source").keys()


OTHERS = (
    "thesis.txt",
    "adapter/weights",
    ".git/HEAD",
    ".hidden",
    "notes.bin",
    "pytorch_model.bin",
    "config.json/inner",
)


@pytest.mark.parametrize("other", OTHERS)
def test_a_folder_with_anything_else_in_it_is_not_replaced(delta, llama, tmp_path, other):
    delta, model = delta
    out = tmp_path / "out"
    (out / other).parent.mkdir(parents=True)
    (out / other).write_text("mine")
    if not other.startswith("config.json"):
        (out / "config.json").write_text("{}")
    before = {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")}
    message = rf"out is a folder with other files, which would be lost: {re.escape(other.split('/')[0])}"
    with pytest.raises(sp.CheckpointError, match=message):
        export.apply_delta(delta.path, tmp_path / "source", out)
    with pytest.raises(sp.FoldError, match=message):
        save_merged(llama[2], llama[1], None, out)
    assert {path: path.is_file() and path.read_bytes() for path in tmp_path.rglob("*")} == before


def test_a_merged_folder_replaces_a_former_one_but_not_the_one_that_was_loaded(delta, llama, tmp_path):
    model = type(llama[1]).from_pretrained(tmp_path / "source")
    program = folded(model, models.llama()[1])
    for name in ("config.json", "model.safetensors", "model-00001-of-00009.safetensors", "tokenizer.json"):
        (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "out" / name).write_text("{}")
    with pytest.raises(sp.FoldError, match="which would be lost: tokenizer.json. Name a new folder"):
        save_merged(program, model, None, tmp_path / "out")
    (tmp_path / "out/tokenizer.json").unlink()
    save_merged(program, model, None, tmp_path / "out")
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "source").keys()
    before = contents(tmp_path / "source")
    with pytest.raises(sp.FoldError, match="source is read here"):
        save_merged(program, model, None, tmp_path / "source")
    assert contents(tmp_path / "source") == before


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("when", ["while writing", "at the exchange"])
def test_a_failure_leaves_the_former_folder(llama, tmp_path, monkeypatch, failure, when):
    _, model, program = llama
    save_merged(program, model, None, tmp_path / "out")
    before = contents(tmp_path / "out")

    def fail(*arguments):
        raise failure

    if when == "while writing":
        monkeypatch.setattr(shards, "write_shard", fail)
    else:
        monkeypatch.setattr(files, "exchanged", fail)
    expected = (
        (sp.FoldError, "cannot be written: No space left") if isinstance(failure, OSError) else (type(failure), None)
    )
    with pytest.raises(expected[0], match=expected[1]):
        save_merged(program, model, None, tmp_path / "out")
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_tensors_of_every_width_stay_aligned_when_the_layout_changes(tmp_path):
    """A new file is laid out with wider numbers first; the rest keeps its order."""
    held = {"b": torch.ones(3, dtype=torch.bfloat16), "a": torch.arange(2), "flag": torch.tensor([True]),
            "empty": torch.empty(0, 4)}  # fmt: skip
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "out").mkdir()
    new = {"b": torch.full((5,), 2.0)}
    copied = shards.copy(shards.stored(tmp_path), tmp_path / "out", new.get, {"more": torch.zeros(2, 2)})
    assert copied.changed == ("b", "more") and copied.retyped
    found = load_file(tmp_path / "out/model.safetensors")
    expected = {**held, **new, "more": torch.zeros(2, 2)}
    assert found.keys() == expected.keys() and all(torch.equal(t, expected[n]) for n, t in found.items())
    before, after = (list(raw(folder / "model.safetensors")[1]) for folder in (tmp_path, tmp_path / "out"))
    assert [name for name in after if name in ("a", "flag")] == [name for name in before if name in ("a", "flag")]
