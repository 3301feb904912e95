"""Tokens from onnxruntime are those of transformers."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import GenerationMixin
from typer.testing import CliRunner

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.cli import app
from subgraph_peft.export.serving.sampling import Sampler
from subgraph_peft.pipeline import builtin_passes, deploy
from subgraph_peft.store import merged_folder as saving
from tests import decoders
from tests.export.test_decoder import folded
from tests.models import captured

NEW = 10
QUICK = ("llama", "gpt2", "mixtral", "t5")


def marked(*names: str) -> list:
    return [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in names]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @cache
    def written(name: str) -> Path:
        path = tmp_path_factory.mktemp("decoders") / name
        export.to_decoder(*folded(name), path)
        return path

    return written


@pytest.fixture(scope="module")
def generator(folder):
    @cache
    def opened(name: str) -> export.Generator:
        return export.Generator(folder(name))

    return opened


@cache
def merged(name: str) -> torch.nn.Module:
    model, _ = decoders.MODELS[name]()
    sp.write_to(folded(name)[0], model)
    return model


def prompts(name: str) -> list[dict[str, torch.Tensor]]:
    """A batch whose first row is padded, on the left for a decoder, and one row."""
    _, batch = decoders.MODELS[name]()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    if name != "whisper":
        inputs["attention_mask"][0, slice(-2, None) if name == "t5" else slice(0, 2)] = 0
    return [inputs, {key: value[1:2] for key, value in inputs.items()}]


def reference(model: torch.nn.Module, inputs: dict[str, torch.Tensor], **options) -> torch.Tensor:
    return GenerationMixin.generate(model, **inputs, max_new_tokens=NEW, **{"do_sample": False, **options})


@pytest.mark.parametrize("name", marked(*decoders.MODELS))
def test_greedy_tokens(generator, name):
    base, _ = decoders.MODELS[name]()
    several, one = prompts(name)
    expected = reference(merged(name), several)
    assert torch.equal(generator(name).generate(*several.values(), max_new_tokens=NEW), expected)
    assert not torch.equal(reference(base, several), expected) and len(expected[:, -NEW:].unique()) > 4
    assert torch.equal(generator(name).generate(*one.values(), max_new_tokens=NEW), reference(merged(name), one))


def test_an_encoder_decoder_is_two_files(folder, generator):
    assert {file.name for file in folder("t5").iterdir()} == {
        "encoder_model.onnx", "decoder_model.onnx", "config.json", "generation_config.json",
    }  # fmt: skip
    opened = generator("t5")
    own, cross = ({f"0.{part}.key", f"0.{part}.value"} for part in ("decoder", "encoder"))
    assert opened.encoder.outputs.keys() == {"last_hidden_state", *(f"present.{name}" for name in cross)}
    past = {f"past_key_values.{name}" for name in own | cross}
    assert opened.decoder.inputs.keys() == {"input_ids", "encoder_attention_mask", *past}
    assert opened.decoder.outputs.keys() == {"logits", *(f"present.{name}" for name in own)}


def test_greedy_tokens_of_a_base_with_the_logits_of_all_tokens(tmp_path):
    model, batch = decoders.MODELS["gpt2"]()
    report = export.to_decoder(sp.capture(model, batch), model, tmp_path / "base", logits_to_keep=0)
    assert report.files["model.onnx"].outputs["logits"] == ("batch", "length", decoders.VOCABULARY)
    generator = export.Generator(tmp_path / "base" / "model.onnx")
    for inputs in prompts("gpt2"):
        assert torch.equal(generator.generate(*inputs.values(), max_new_tokens=NEW), reference(model, inputs))


def test_half_precision_fused(tmp_path):
    export.to_decoder(*folded("gpt2"), tmp_path / "half", dtype="float16", optimize=True, bound=5e-2)
    inputs = prompts("gpt2")[0]
    tokens = export.Generator(tmp_path / "half").generate(*inputs.values(), max_new_tokens=NEW)
    assert torch.equal(tokens, reference(merged("gpt2"), inputs))


def test_rows_end_at_the_end_token_and_are_padded(generator):
    inputs = prompts("llama")[0]
    free = reference(merged("llama"), inputs)[:, inputs["input_ids"].shape[1] :]
    first, second = int(free[0, 2]), int(free[1, 4])
    for end in (first, [first, second]):
        expected = reference(merged("llama"), inputs, eos_token_id=end, pad_token_id=5)
        actual = generator("llama").generate(*inputs.values(), max_new_tokens=NEW, eos_token_id=end, pad_token_id=5)
        assert torch.equal(actual, expected) and (expected == 5).any()
    every = free[:, 0].tolist()
    short = generator("llama").generate(*inputs.values(), max_new_tokens=NEW, eos_token_id=every)
    assert short.shape[1] == inputs["input_ids"].shape[1] + 1


class Listener:
    def __init__(self):
        self.heard, self.ended = [], False

    def put(self, tokens: torch.Tensor) -> None:
        self.heard.append(tokens)

    def end(self) -> None:
        self.ended = True


def test_a_streamer_hears_the_prompt_and_every_token(generator):
    inputs, listener = prompts("llama")[1], Listener()
    tokens = generator("llama").generate(*inputs.values(), max_new_tokens=4, streamer=listener)
    assert listener.ended and torch.equal(listener.heard[0], inputs["input_ids"])
    assert [int(token) for token in listener.heard[1:]] == tokens[0, -4:].tolist()


def test_sampling_repeats_under_a_seed(generator):
    inputs = prompts("llama")[0]
    options = {"max_new_tokens": NEW, "do_sample": True, "temperature": 2.0}
    once, again, other = (generator("llama").generate(*inputs.values(), seed=s, **options) for s in (3, 3, 4))
    assert torch.equal(once, again) and not torch.equal(once, other)
    torch.manual_seed(7)
    first = generator("llama").generate(*inputs.values(), **options)
    torch.manual_seed(7)
    assert torch.equal(generator("llama").generate(*inputs.values(), **options), first)


def wanted(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """Softmax over the likeliest tokens, by sorting."""
    order = logits.double().div(temperature).sort(descending=True)
    kept = order.values[: top_k or len(logits)].softmax(0)
    if top_p is not None:
        before = kept.cumsum(0) - kept
        kept = kept * (before < top_p)
    shares = torch.zeros(len(logits), dtype=torch.float64)
    shares[order.indices[: len(kept)]] = kept / kept.sum()
    return shares


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, None, None), (0.5, None, None), (2.0, 4, None), (1.0, None, 0.7), (1.5, 6, 0.8)],
)
def test_tokens_are_drawn_from_the_filtered_distribution(temperature, top_k, top_p):
    logits = 2 * torch.randn(12, generator=torch.Generator().manual_seed(1))
    draws = 40_000
    sampler = Sampler(True, temperature, top_k, top_p, 0, torch.device("cpu"))
    counts = Counter(sampler(logits.expand(draws, -1)).tolist())
    shares = wanted(logits, temperature, top_k, top_p)
    for token, share in enumerate(shares.tolist()):
        assert abs(counts[token] / draws - share) <= 5 * (share * (1 - share) / draws) ** 0.5


def test_refusals(generator, tmp_path):
    inputs = prompts("llama")[0]
    right = {**inputs, "attention_mask": inputs["attention_mask"].flip(1)}
    with pytest.raises(sp.ExportError, match="padded on the right: pad on the left"):
        generator("llama").generate(*right.values())
    with pytest.raises(sp.ExportError, match="need do_sample=True"):
        generator("llama").generate(*inputs.values(), top_p=0.5)
    for options, message in {
        ("temperature", -1.0): "temperature is -1.0, not above 0. For the likeliest token, do not sample",
        ("temperature", 0.0): "temperature is 0.0, not above 0",
        ("top_k", -1): "`top_k` has to be a strictly positive integer",
        ("top_p", 1.5): "`top_p` has to be a float",
    }.items():
        with pytest.raises(sp.ExportError, match=message):
            generator("llama").generate(*inputs.values(), do_sample=True, **dict([options]))
    ids = inputs["input_ids"]
    for name, given, message in (
        ("llama", (ids[0],), r"inputs has shape \[6\]: give a batch \[batch, length\] of at least one token"),
        ("llama", (ids[:, :0],), r"inputs has shape \[3, 0\]"),
        ("llama", (ids, torch.ones(3, 5)), r"attention_mask is \[3, 5\], inputs are \[3, 6\]"),
        ("t5", (ids[0],), r"inputs has shape \[6\]"),
    ):
        with pytest.raises(sp.ExportError, match=message):
            generator(name).generate(*given)
    with pytest.raises(sp.ExportError, match=r"decoder_input_ids has shape \[3, 0\]"):
        generator("t5").generate(ids, decoder_input_ids=ids[:, :0])
    (tmp_path / "model.onnx").write_text("")
    with pytest.raises(sp.ExportError, match=r"TPUExecutionProvider cannot be used here; those that can: .*CPU"):
        export.Generator(tmp_path, "TPUExecutionProvider")
    export.to_onnx(captured("mlp"), tmp_path / "plain.onnx")
    with pytest.raises(sp.ExportError, match=r"plain.onnx is no decoder with a cache .*it has x, output_1"):
        export.Generator(tmp_path / "plain.onnx")


@pytest.mark.parametrize("name", ["genai_config.json", "generation_config.json"])
@pytest.mark.parametrize("text", ["{bad", "[1]", b"\xff"])
def test_damaged_settings_are_named(folder, tmp_path, name, text):
    shutil.copytree(folder("llama"), tmp_path / "copy")
    (tmp_path / "copy" / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(sp.ExportError, match=f"{name} is damaged: .*Mend it, or write the folder again"):
        export.Generator(tmp_path / "copy")


# onnxruntime-genai


def genai_model(folder: Path) -> Any:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    return genai.Model(str(folder))


def genai_tokens(
    model: Any, ids: torch.Tensor, prepare: Callable[[Any], object] = lambda running: None
) -> torch.Tensor:
    import onnxruntime_genai as genai

    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=ids.shape[1] + NEW, batch_size=len(ids), do_sample=False)
    running = genai.Generator(model, options)
    prepare(running)
    running.append_tokens(ids.int().numpy())
    while not running.is_done():
        running.generate_next_token()
    return torch.tensor([running.get_sequence(row).tolist() for row in range(len(ids))])


@pytest.mark.parametrize("name", marked("llama", "gpt2", "gemma3"))
def test_onnxruntime_genai_gives_the_same_tokens(folder, generator, name):
    ids = prompts(name)[0]["input_ids"]
    for batch in (ids, ids[:1]):
        tokens = generator(name).generate(batch, max_new_tokens=NEW, eos_token_id=decoders.SPECIAL["eos_token_id"])
        assert torch.equal(genai_tokens(genai_model(folder(name)), batch), tokens)


def test_the_builder_of_onnxruntime_genai_takes_the_merged_folder(tmp_path):
    pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    program, model = folded("llama")
    saving.save_merged(program, model, words(), tmp_path / "merged")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-m", "merged", "-o", "built"]
    done = subprocess.run(
        [*command, "-p", "fp32", "-e", "cpu", "-c", "cache"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ids = prompts("llama")[1]["input_ids"]
    expected = reference(merged("llama"), {"input_ids": ids})
    generator = export.Generator(tmp_path / "built")
    assert generator.shared and torch.equal(generator.generate(ids, max_new_tokens=NEW, eos_token_id=[]), expected)
    assert torch.equal(genai_tokens(genai_model(tmp_path / "built"), ids), expected)
    with pytest.raises(sp.ExportError, match="takes no padding"):
        generator.generate(*prompts("llama")[0].values())


# a pipeline


def words():
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<start>", "<end>", *(f"w{i}" for i in range(3, decoders.VOCABULARY))]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(names)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<pad>", bos_token="<start>")


def test_a_pipeline_ends_in_a_folder_that_answers(tmp_path, monkeypatch):
    done = []

    def counted(module, name):
        function = getattr(module, name)

        def called(*given, **options):
            done.append((name, options.get("dtype")))
            return function(*given, **options)

        monkeypatch.setattr(module, name, called)

    counted(deploy, "save_merged")
    counted(builtin_passes, "fold")
    rows = [{"text": f"w{i} w{i + 1} w{i + 2}", "answer": f"w{i + 3} w{i + 4}"} for i in range(3, 60)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    decoders.MODELS["llama"]()[0].save_pretrained(tmp_path / "base")
    words().save_pretrained(tmp_path / "base")
    config = {
        "model": {"transformers": str(tmp_path / "base"), "task": "causal-lm"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "completion": "answer", "eval_share": 0},
        "passes": [
            "capture", {"lora": {"r": 2, "where": "*.{q,v}_proj"}}, {"train": {"max_steps": 2, "batch_size": 4}},
            {"fold": {"dtype": "float64", "delta": True}}, {"export": {"outputs": ["logits"]}}, "decoder",
        ],
        "output": str(tmp_path / "out"),
    }  # fmt: skip
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump(config))
    for command in ("run", "export"):  # the second one replaces merged/ and decoder/
        ran = CliRunner().invoke(app, [command, str(path)])
        assert ran.exit_code == 0, ran.output + str(ran.exception)
        assert done == [("fold", torch.float64), ("save_merged", None)]
        done.clear()
    (tmp_path / "out/delta.safetensors").unlink()
    verified = CliRunner().invoke(app, ["verify", str(tmp_path / "out/model.onnx"), "--against", str(path)])
    assert verified.exit_code == 0, verified.output + str(verified.exception)
    assert done == [("fold", torch.float64)] and not (tmp_path / "out/delta.safetensors").exists()
    folder = tmp_path / "out" / "decoder"
    assert {"model.onnx", "tokenizer.json", "genai_config.json"} <= {file.name for file in folder.iterdir()}
    assert "## Decoder" in (tmp_path / "out" / "report.md").read_text()
    answer = CliRunner().invoke(app, ["generate", str(folder), "w5 w6 w7", "-n", "4"])
    assert answer.exit_code == 0, answer.output
    ids = torch.tensor([[5, 6, 7]])
    tokens = export.Generator(folder).generate(ids, max_new_tokens=4)
    assert answer.output.split() == words().decode(tokens[0]).split()
    refused = {
        ("w5", "--sample", "--temperature", "0"): "temperature is 0.0, not above 0",
        ("",): "inputs has shape [1, 0]",
    }
    for arguments, message in refused.items():
        refusal = CliRunner().invoke(app, ["generate", str(folder), *arguments])
        assert refusal.exit_code == 1 and message in " ".join(refusal.output.split()), refusal.output
    (folder / "tokenizer.json").unlink(), (folder / "tokenizer_config.json").unlink()
    assert "holds no tokenizer" in CliRunner().invoke(app, ["generate", str(folder), "w5"]).output
