"""Folders with a key-value cache: what is in them, what was checked, what is refused."""

import json
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
import transformers

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.export import shared
from subgraph_peft.export.serving import decoder
from subgraph_peft.passes import LoRA, PrefixTuning
from tests import decoders, models
from tests.export.conftest import shake

SIZES = {"t5": 1.0}  # of the values of a trained tensor; 0.3 by default


@cache
def folded(name: str) -> tuple[sp.Program, torch.nn.Module]:
    """The program of a LoRA that changed the weights a good deal, folded, and the model, as it was before."""
    model, batch = decoders.MODELS[name]()
    where = {"gpt2": "*.c_attn", "t5": "*.{q,v}"}.get(name, "*.{q,v}_proj")
    return sp.fold(shake(sp.rewrite(sp.capture(model, batch), LoRA(r=2), where=where), SIZES.get(name, 0.3))), model


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[Path, export.DecoderReport]:
    folder = tmp_path_factory.mktemp("decoder") / "llama"
    return folder, export.to_decoder(*folded("llama"), folder)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_folder_holds_what_runtimes_read(llama):
    folder, report = llama
    assert sorted(contents(folder)) == ["config.json", "genai_config.json", "generation_config.json", "model.onnx"]
    assert [*report.files] == ["model.onnx"] and report.files["model.onnx"].path == str(folder / "model.onnx")
    written = report.files["model.onnx"]
    past = ("batch", 2, "past_key_values_length", 16)
    assert written.inputs == {
        "input_ids": ("batch", "length"), "attention_mask": ("batch", "attention_mask_length"),
        "past_key_values.0.key": past, "past_key_values.0.value": past, "past_key_values.1.key": past,
        "past_key_values.1.value": past, "position_ids": ("batch", "length"),
    }  # fmt: skip
    names = [f"present.{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    assert written.outputs["logits"] == ("batch", 1, decoders.VOCABULARY) and [*written.outputs][1:] == names
    for batch, heads, length, width in map(written.outputs.get, names):
        assert (batch, heads, width) == ("batch", 2, 16)
        assert set(length.split(" + ")) == {"length", "past_key_values_length"}
    assert transformers.AutoConfig.from_pretrained(folder).model_type == "llama"
    genai = json.loads((folder / "genai_config.json").read_text())
    assert genai["model"]["decoder"]["num_key_value_heads"] == 2 and genai["model"]["decoder"]["head_size"] == 16


def test_weights_are_the_folded_ones_under_their_names(llama):
    program, model = folded("llama")
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(llama[0] / "model.onnx").graph.initializer}
    before = dict(model.named_parameters())
    changed = 0
    for name, value in program.module.named_parameters():
        assert torch.equal(torch.from_numpy(stored[name].copy()), value.detach())
        changed += not torch.equal(value, before[name])
    assert changed == 4


def test_prompts_single_tokens_and_padding_on_the_left_were_checked(llama):
    shapes = [
        tuple(run[name] for name in ("input_ids", "attention_mask", "past_key_values.0.key"))
        for run in llama[1].files["model.onnx"].shapes
    ]
    assert ((2, 4), (2, 4), (2, 2, 0, 16)) in shapes
    assert ((2, 1), (2, 5), (2, 2, 4, 16)) in shapes
    assert ((1, 1), (1, 1), (1, 2, 0, 16)) in shapes
    prompt = next(decoder.served(shared.over(*folded("llama")), folded("llama")[0], 1)).also[0]
    assert prompt["attention_mask"].tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]


def test_grouped_keys_are_passed_once(tmp_path):
    path = tmp_path / "llama"
    report = export.to_decoder(*folded("llama"), path, opset=23)
    graph = onnx.load(path / "model.onnx").graph
    attention = [node for node in graph.node if node.op_type == "Attention"]
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in (*graph.value_info, *graph.output)}
    assert report.files["model.onnx"].opset == 23
    assert [[shapes[name][1] for name in node.input[:3]] for node in attention] == [[4, 2, 2]] * 2


def test_a_graph_that_forgets_the_padding_is_found_out(tmp_path, monkeypatch):
    def unmasked(graph):
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default):
            node.args = (*node.args[:3], None, 0.0, False)

    monkeypatch.setattr(decoder, "group_keys", unmasked)
    with pytest.raises(sp.ExportError, match=r"differs from torch: (logits|present)"):
        export.to_decoder(*folded("gpt2"), tmp_path / "out")
    assert not contents(tmp_path)


def test_no_weight_is_copied_and_the_model_stays_as_it_is():
    program, model = folded("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    twin = shared.over(program, model)
    own = dict(program.module.named_parameters())
    assert {n: p.data_ptr() for n, p in twin.named_parameters()} == {n: p.data_ptr() for n, p in own.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not {p.data_ptr() for p in twin.parameters()} & {model.get_parameter(s).data_ptr() for s in changed(program)}


def changed(program: sp.Program) -> list[str]:
    return [*program.folded.sites]


def test_a_half_precision_model_is_written_in_the_dtype_of_its_fold():
    model, batch = decoders.MODELS["llama"]()
    model = model.bfloat16()
    program = sp.fold(shake(sp.rewrite(sp.capture(model, batch), LoRA(r=2), where="*.q_proj")))
    twin = shared.over(program, model)
    assert {p.dtype for p in twin.parameters()} == {torch.float32} and twin.config.dtype is torch.float32
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16} and model.config.dtype is not torch.float32


def test_a_head_that_was_untied_is_untied():
    model, batch = models.tied_llama()
    adapted = shake(sp.rewrite(sp.capture(model, batch), LoRA(r=2), where="lm_head", tied="untie"))
    program = sp.fold(adapted)
    twin = shared.over(program, model)
    assert torch.equal(twin.lm_head.weight, program.module.get_parameter("lm_head.weight"))
    assert torch.equal(twin.model.embed_tokens.weight, model.model.embed_tokens.weight)
    assert not torch.equal(twin.lm_head.weight, model.lm_head.weight)
    assert not twin.config.tie_word_embeddings and model.config.tie_word_embeddings


def refusal(message, program, model, folder):
    with pytest.raises(sp.ExportError, match=message):
        export.to_decoder(program, model, folder)


def test_what_cannot_be_a_decoder_is_refused(tmp_path):
    model, batch = decoders.MODELS["llama"]()
    program = sp.capture(model, batch)
    refusal(
        "still has adapters .lora.: fold it first", sp.rewrite(program, LoRA(r=2), where="*.q_proj"), model, tmp_path
    )
    refusal("prefix.*have no place", sp.rewrite(program, PrefixTuning(n=2)), model, tmp_path)
    refusal("has no transformer.wte.weight", program, decoders.MODELS["gpt2"]()[0], tmp_path)
    bert, inputs = models.bert()
    refusal("BertForSequenceClassification does not generate", sp.capture(bert, inputs), bert, tmp_path)
    assert not contents(tmp_path)


def test_recurrent_states_are_refused(tmp_path):
    config = transformers.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4)
    model = transformers.MambaForCausalLM(config)
    ids = torch.randint(3, 61, (2, 4))
    with pytest.warns(sp.CaptureWarning, match="is fixed"):
        program = sp.capture(model, {"input_ids": ids, "labels": ids})
    refusal("keeps cache_params between steps, not keys and values", program, model, tmp_path / "out")


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    refusal("is a folder with other files, which would be lost: mine.txt", *folded("llama"), tmp_path)
    refusal("mine.txt is a file", *folded("llama"), tmp_path / "mine.txt")
    assert contents(tmp_path) == {"mine.txt": b"mine"}
    folded("llama")[1].save_pretrained(tmp_path / "hub")
    for name in ("onnx/model.onnx", "model.onnx", "tokenizer.json"):
        (tmp_path / "hub" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "hub" / name).write_text("mine")
    before = contents(tmp_path)
    refusal("lost: model.safetensors, onnx/, tokenizer.json. Name a new", *folded("llama"), tmp_path / "hub")
    assert contents(tmp_path) == before


def test_a_folder_with_other_files_is_refused_before_anything_is_exported(tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text("mine")
    monkeypatch.setattr(decoder, "to_onnx", lambda *_, **__: pytest.fail("a graph was exported"))
    refusal("mine.txt", *folded("llama"), tmp_path)


def test_a_former_decoder_of_other_files_is_replaced(tmp_path):
    for name in ("encoder_model.onnx", "decoder_model.onnx.data", "model.onnx", "config.json"):
        (tmp_path / name).write_text("former")
    export.to_decoder(*folded("llama"), tmp_path)
    assert sorted(contents(tmp_path)) == ["config.json", "genai_config.json", "generation_config.json", "model.onnx"]


@pytest.mark.parametrize("error", [sp.ExportError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_former_folder_survives_a_failure(tmp_path, monkeypatch, error):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "generation_config.json").write_text("{}")
    (folder / "model.onnx").write_text("former")

    def failing(program, path, **options):
        path.write_text("half")
        raise error

    monkeypatch.setattr(decoder, "to_onnx", failing)
    with pytest.raises((sp.ExportError, KeyboardInterrupt)):
        export.to_decoder(*folded("llama"), folder)
    assert contents(tmp_path) == {"out/generation_config.json": b"{}", "out/model.onnx": b"former"}
