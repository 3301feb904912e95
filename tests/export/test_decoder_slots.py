"""A decoder's file with slots generates as its base, and as any adapter of it."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from typer.testing import CliRunner

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.cli import app
from subgraph_peft.passes import Houlsby, LoRA, PiSSA
from tests import decoders
from tests.export.conftest import shake
from tests.export.test_generator import NEW, genai_tokens, prompts, reference, words

METHODS = {"lora": LoRA(r=2, alpha=5.0), "pissa": PiSSA(r=3)}


@cache
def base(name: str) -> sp.Program:
    return sp.capture(*decoders.MODELS[name]())


@cache
def adapted(name: str, which: str) -> sp.Program:
    return shake(sp.rewrite(base(name), METHODS[which]), 0.2)


@cache
def expected(name: str, which: str | None) -> list[torch.Tensor]:
    """Tokens of transformers, under an adapter or none."""
    model, _ = decoders.MODELS[name]()
    if which:
        sp.write_to(sp.fold(adapted(name, which)), model)
    return [reference(model, inputs) for inputs in prompts(name)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Callable[[str, str], Path]:
    """A folder with slots at what the LoRA changes, and an adapter file of each method."""

    @cache
    def written(name: str, merge: str) -> Path:
        path = tmp_path_factory.mktemp(name) / "decoder"
        model, _ = decoders.MODELS[name]()
        report = export.to_decoder(adapted(name, "lora"), model, path, slots=True, merge=merge)
        assert report.files["model.onnx"].slots == tuple(site.name for site in adapted(name, "lora").adapters[0].sites)
        for which in METHODS:
            export.to_adapter(adapted(name, which), path / f"{which}.onnx_adapter", path / "model.onnx")
        return path

    return written


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "mistral", "gemma3", "gpt2", "mixtral")]


@pytest.mark.parametrize("merge", ["run", "load"])
@pytest.mark.parametrize("name", ["llama", *OTHERS])
def test_one_file_generates_as_its_base_and_as_its_adapters(folder, name, merge):
    generator = export.Generator(folder(name, merge))
    loaded = {which: [generator.load(folder(name, merge) / f"{which}.onnx_adapter")] for which in METHODS}
    for which in ("lora", None, "pissa", None):
        for inputs, tokens in zip(prompts(name), expected(name, which), strict=True):
            found = generator.generate(*inputs.values(), max_new_tokens=NEW, adapters=loaded.get(which, ()))
            assert torch.equal(found.cpu(), tokens)
    assert not torch.equal(expected(name, "lora")[0], expected(name, None)[0])
    assert not torch.equal(expected(name, "lora")[0], expected(name, "pissa")[0])


def test_onnxruntime_genai_takes_the_adapter_files(folder):
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    home, ids = folder("llama", "run"), prompts("llama")[1]["input_ids"]
    model = genai.Model(str(home))
    adapters = genai.Adapters(model)
    for which in METHODS:
        adapters.load(str(home / f"{which}.onnx_adapter"), which)
    for which in ("lora", None, "pissa"):
        (found,) = genai_tokens(model, ids, lambda running: which and running.set_active_adapter(adapters, which))  # noqa: B023
        tokens = expected("llama", which)[1][0]
        ends = (tokens[ids.shape[1] :] == decoders.SPECIAL["eos_token_id"]).nonzero()
        stop = ids.shape[1] + int(ends[0]) + 1 if len(ends) else len(tokens)
        assert torch.equal(found, tokens[:stop])


def test_a_decoder_file_is_verified_later_with_and_without_an_adapter(folder):
    home = folder("llama", "run")
    for program, adapter in ((base("llama"), None), (adapted("llama", "pissa"), home / "pissa.onnx_adapter")):
        verification = export.verify(home / "model.onnx", program, adapter=adapter)
        assert verification.drift.keys() == {"logits"} and verification.drift["logits"].relative < 1e-5
        assert [run["input_ids"] for run in verification.shapes] == [(3, 6), (2, 5)]
    with pytest.raises(sp.ExportError, match="differs from torch: logits"):
        export.verify(home / "model.onnx", base("llama"), adapter=home / "lora.onnx_adapter")


def test_an_adapter_of_a_failed_call_does_not_stay(folder):
    home, inputs = folder("llama", "run"), prompts("llama")[0]
    generator = export.Generator(home)
    lora = generator.load(home / "lora.onnx_adapter")
    with pytest.raises(sp.ExportError, match="padded on the right"):
        generator.generate(inputs["input_ids"], inputs["attention_mask"].flip(1), adapters=[lora])
    found = generator.generate(*inputs.values(), max_new_tokens=NEW)
    assert torch.equal(found.cpu(), expected("llama", None)[0])


def test_what_has_no_slots_is_refused(folder, tmp_path):
    model, batch = decoders.MODELS["llama"]()
    houlsby = sp.rewrite(sp.capture(model, batch), Houlsby(r=2), "*.self_attn")
    with pytest.raises(sp.ExportError, match="does not fold into a weight, so that it has no slot"):
        export.to_decoder(houlsby, model, tmp_path / "folder", slots=True)
    with pytest.raises(sp.ExportError, match="has no adapters whose weights would get slots"):
        export.to_decoder(base("llama"), model, tmp_path / "folder", slots=True)
    with pytest.raises(sp.ExportError, match="The program still has adapters"):
        export.to_decoder(adapted("llama", "lora"), model, tmp_path / "folder")
    model, batch = decoders.MODELS["t5"]()
    with pytest.raises(sp.ExportError, match="is two files, encoder and decoder, which have no slots"):
        export.to_decoder(sp.capture(model, batch), model, tmp_path / "folder", slots="*.q")
    assert not list(tmp_path.iterdir())


def test_slots_of_a_fused_file_in_half_precision(tmp_path):
    model, _ = decoders.MODELS["llama"]()
    options = {"dtype": "float16", "optimize": True, "opset": 23, "bound": 5e-2}
    program, path = adapted("llama", "lora"), tmp_path / "half"
    plain = export.to_decoder(sp.fold(program), model, tmp_path / "plain", **options)
    report = export.to_decoder(program, model, path, slots=True, merge="load", **options)
    assert report.files["model.onnx"].fused == plain.files["model.onnx"].fused
    assert report.files["model.onnx"].nodes == plain.files["model.onnx"].nodes
    export.to_adapter(program, tmp_path / "lora.onnx_adapter", path / "model.onnx", bound=5e-2)
    generator, folded = export.Generator(path), export.Generator(tmp_path / "plain")
    lora = generator.load(tmp_path / "lora.onnx_adapter")
    for inputs in prompts("llama"):
        found = generator.generate(*inputs.values(), max_new_tokens=NEW, adapters=[lora])
        assert torch.equal(found, folded.generate(*inputs.values(), max_new_tokens=NEW))


@pytest.mark.slow
def test_a_pipeline_ends_in_a_base_that_answers_under_its_adapter(tmp_path):
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i + 3} w{i + 4}"} for i in range(3, 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decoders.MODELS["llama"]()[0].save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    decoder = {"slots": True, "merge": "load", "logits_to_keep": 0}
    config = {
        "model": {"transformers": str(tmp_path / "base"), "task": "causal-lm"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "completion": "answer", "eval_share": 0},
        "passes": [
            "capture", {"lora": {"r": 2, "where": "*.{q,v}_proj"}},
            {"train": {"max_steps": 30, "batch_size": 8, "lr": 0.05}}, {"decoder": decoder},
        ],
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    path, out = tmp_path / "pipeline.yaml", tmp_path / "out"
    path.write_text(yaml.safe_dump(config))

    def call(*arguments: object) -> str:
        ran = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert ran.exit_code == 0, ran.output + str(ran.exception)
        return ran.output

    assert "decoder.onnx_adapter: 0.0 MiB" in call("run", path)
    assert "## Decoder adapter" in (out / "report.md").read_text() and not (out / "merged").exists()
    written = (out / "decoder.onnx_adapter").read_bytes()
    assert "replaces" not in call("export", path) and (out / "decoder.onnx_adapter").read_bytes() == written
    call("fold", path)
    ask = ("generate", out / "decoder", "w5 w6 w7", "-n", "6")
    answers = [call(*ask), call(*ask, "--adapter-file", out / "decoder.onnx_adapter")]
    verify = ("verify", out / "decoder" / "model.onnx", "--against", path)
    assert "drift of logits" in call(*verify, "--adapter-file", out / "decoder.onnx_adapter")
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    ids = words()("w5 w6 w7", return_tensors="pt")["input_ids"]
    assert words().decode(merged.generate(ids, max_new_tokens=6, do_sample=False)[0, 3:]).strip() in answers[1]
    assert answers[0] != answers[1]
