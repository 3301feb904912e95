"""Adapter folders of huggingface/peft: written here and loaded there, written there and read here."""

import ast
import json
import shutil
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file
from torch import nn
from typer.testing import CliRunner

import subgraph_peft as sp
from subgraph_peft.cli import app
from subgraph_peft.export import from_peft, to_peft
from subgraph_peft.export.peft.options import ModuleOptions
from subgraph_peft.export.peft.targets import means
from subgraph_peft.method.adapter import targets
from subgraph_peft.passes import (
    IA3,
    SSB,
    AdaLoRA,
    BitFit,
    DoRA,
    FLoRA,
    Houlsby,
    LoRA,
    MiLoRA,
    MoSLoRA,
    MPCo,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    RsLoRA,
    SpectralAdditive,
    TriLoRA,
    VeRA,
)
from tests.models import LENGTH, MODELS
from tests.oracle.pairs import PLACES, captured, pair
from tests.test_cli import PIPELINE

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
BOUND = 1e-12
BERT = ["*.query", "*.value", "*.dense"]


def difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def logits(outputs: Any) -> torch.Tensor:
    """The logits of real tokens: peft's have those of virtual tokens before them."""
    found = outputs.logits if hasattr(outputs, "logits") else outputs[1]
    return found if found.ndim < 3 else found[:, -LENGTH:]


@cache
def base(model: str, dtype: torch.dtype = torch.float64) -> sp.Program:
    if model in PLACES:
        return captured(model, dtype)[0]
    source, inputs = MODELS[model]()
    return sp.capture(source.to(dtype), given(inputs, dtype))


def given(inputs: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def trained(program: sp.Program, seed: int = 1) -> sp.Program:
    """Away from its start, on values that float32 holds: peft keeps virtual tokens in float32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in program.parameters(trainable=True):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
            parameter.copy_(parameter.float())
    return program


def adapted(model: str, *rewrites: Mapping[str, Any] | sp.Method, where: Any = "*", **options: Any) -> sp.Program:
    """`rewrites`: a method at `where`, or arguments of `rewrite`"""
    program = base(model)
    for item in rewrites:
        arguments = {"where": where, **options, **(item if isinstance(item, dict) else {"method": item})}
        program = sp.rewrite(program, **arguments)
    return trained(program)


def theirs(model: str, folder: Path, dtype: torch.dtype = torch.float64) -> nn.Module:
    """The folder, loaded by peft on the same base, without a word about missing or unknown things."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(MODELS[model]()[0].to(dtype), folder).eval()
    said = [str(item.message) for item in seen]
    assert not any("missing adapter keys" in text or "Unexpected keyword" in text for text in said), said
    return loaded


@torch.no_grad()
def run(module: nn.Module, model: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    inputs = given(MODELS[model]()[1], dtype)
    return logits(module(**{name: value for name, value in inputs.items() if name != "labels"}))


def same_files(first: Path, second: Path) -> bool:
    return all((first / name).read_bytes() == (second / name).read_bytes() for name in (CONFIG, TENSORS))


def read(folder: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    return json.loads((folder / CONFIG).read_text()), load_file(folder / TENSORS)


def edit(folder: Path, tensors: Callable[[dict], None] | None = None, **config: Any) -> Path:
    """A copy of a folder with other contents."""
    target = folder.with_name(f"{folder.name}_edited")
    shutil.rmtree(target, ignore_errors=True)
    held, values = read(folder)
    if tensors:
        tensors(values)
    target.mkdir()
    (target / CONFIG).write_text(json.dumps({**held, **config}))
    save_file(values, target / TENSORS)
    return target


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A LoRA folder of BERT."""
    folder = tmp_path_factory.mktemp("plain") / "lora"
    to_peft(adapted("bert", LoRA(r=3, alpha=5.0), where=BERT), folder)
    return folder


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "ia3"])
@pytest.mark.parametrize("model", PLACES)
def test_same_tensors_give_the_same_folder_in_both_directions(model, method, tmp_path):
    """Loaded in peft, our folder is peft's own model bit for bit; read here, peft's folder is our program bit for bit,
    but for DoRA, whose norm has products that round by the alignment of tensors in memory; the two programs, whose
    operators differ in order, agree to 1e-12 in float64."""
    both = pair(model, method, torch.float64).share()
    to_peft(both.ours, tmp_path / "ours")
    both.theirs.save_pretrained(tmp_path / "theirs")
    expected, own = run(both.theirs, model), logits(both.ours.run())
    assert difference(expected, logits(base(model).run())) > 1e-2
    assert torch.equal(run(theirs(model, tmp_path / "ours"), model), expected)
    back = logits(from_peft(base(model), tmp_path / "theirs").run())
    assert difference(back, own) <= (1e-14 if method == "dora" else 0)
    assert difference(own, expected) <= BOUND
    ours, others = read(tmp_path / "ours")[1], read(tmp_path / "theirs")[1]
    assert set(ours) == set(others) and all(torch.equal(value, others[key]) for key, value in ours.items())


CASES: dict[str, Callable[[], tuple[str, sp.Program]]] = {
    "patterns": lambda: ("bert", adapted(
        "bert", LoRA(r=3, alpha=5.0), where=BERT,
        patterns={"*.query": {"r": 4, "alpha": 2.0}, "*.1.*.value": {"alpha": 1.5}},
    )),
    "rslora_patterns": lambda: ("bert", adapted(
        "bert", RsLoRA(r=3, alpha=5.0), where=BERT, patterns={"*.0.*.query": {"r": 5}}
    )),
    "two_loras": lambda: ("bert", adapted(
        "bert", {"method": LoRA(r=2), "where": "*.query"}, {"method": LoRA(r=4, alpha=3.0), "where": "*.key"}
    )),
    "penalty": lambda: ("bert", adapted("bert", MPCo(of=LoRA(r=2)), where=BERT)),
    "head": lambda: ("bert", adapted("bert", LoRA(r=2), where=BERT, trainable="classifier")),
    "norms": lambda: ("bert", adapted("bert", LoRA(r=2), where="*.query", trainable="*.LayerNorm")),
    "conv": lambda: ("conv", adapted("conv", LoRA(r=3, alpha=5.0), where=["stem", "point", "head"])),
    "conv_dora": lambda: ("conv", adapted("conv", DoRA(of=LoRA(r=3)), where=["stem", "point", "head"])),
    "conv_statistics": lambda: ("conv", adapted("conv", LoRA(r=3), where=["stem"], trainable="norm")),
    "embedding": lambda: ("llama", adapted("llama", LoRA(r=3), where=["*.q_proj", "*.embed_tokens"])),
    "embedding_dora": lambda: ("llama", adapted("llama", DoRA(of=LoRA(r=3)), where=["*.q_proj", "*.embed_tokens"])),
    "tied_head": lambda: ("tied_llama", adapted("tied_llama", LoRA(r=3), where="lm_head", tied="untie")),
    "all_biases": lambda: ("bert", adapted(
        "bert", {"method": LoRA(r=2), "where": ["*.key", "*.value"]}, {"method": BitFit(), "where": "*"}
    )),
    "lora_biases": lambda: ("bert", adapted(
        "bert", LoRA(r=2), where=["*.key", "*.value"], trainable=["*.key.bias", "*.value.bias"]
    )),
    "some_biases": lambda: ("bert", adapted(
        "bert", {"method": LoRA(r=2), "where": ["*.key", "*.value"]},
        {"method": BitFit(), "where": ["*.key.bias", "*.LayerNorm.bias"]},
    )),
    "vera": lambda: ("bert", adapted("bert", VeRA(r=5), where=BERT)),
    "vera_seed": lambda: ("gpt2", adapted(
        "gpt2", VeRA(r=5, projection_seed=7, save_projections=False), where=["*.c_attn", "*.c_fc"]
    )),
    "adalora": lambda: ("bert", adapted("bert", AdaLoRA(r=4, target_r=2), where=BERT, trainable="classifier")),
    "adalora_conv1d": lambda: ("gpt2", adapted("gpt2", AdaLoRA(r=4), where="*.c_attn")),
    "adalora_conv": lambda: ("conv", adapted("conv", AdaLoRA(r=4), where=["stem", "point"])),
    "ia3_conv": lambda: ("conv", adapted(
        "conv", {"method": IA3(), "where": ["stem", "grouped"]}, {"method": IA3(scale="input"), "where": "point"}
    )),
    "ia3_weight": lambda: ("llama", adapted("llama", IA3(scale="weight"), where="*.k_proj")),
    "prompt": lambda: ("llama", adapted("llama", PromptTuning(n=3))),
    "prompt_gpt2": lambda: ("gpt2", adapted("gpt2", PromptTuning(n=3))),
    "prefix": lambda: ("llama", adapted("llama", PrefixTuning(n=3))),
    "prefix_head": lambda: ("bert", adapted("bert", PrefixTuning(n=3), trainable="classifier")),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_folders_go_there_and_come_back(case, tmp_path):
    """Ours is loaded by peft with our outputs, to 1e-12 in float64; what peft saves of it reads here, and what we write
    of that again is the first folder, byte for byte."""
    model, program = CASES[case]()
    report = to_peft(program, tmp_path / "ours")
    assert report.for_peft and report.peft_type.isupper()
    own = logits(program.run())
    assert difference(own, logits(base(model).run())) > 1e-3
    loaded = theirs(model, tmp_path / "ours")
    expected = run(loaded, model)
    assert difference(own, expected) <= BOUND

    again = from_peft(base(model), tmp_path / "ours")
    assert torch.equal(logits(again.run()), own)
    to_peft(again, tmp_path / "again")
    assert same_files(tmp_path / "again", tmp_path / "ours")

    loaded.save_pretrained(tmp_path / "theirs")
    back = from_peft(base(model), tmp_path / "theirs")
    assert torch.equal(logits(back.run()), own)
    ours, others = read(tmp_path / "ours")[1], read(tmp_path / "theirs")[1]
    assert all(torch.equal(value, others[key]) for key, value in ours.items())


def test_variants_are_patterns_and_come_back_as_variants(tmp_path):
    _, program = CASES["patterns"]()
    to_peft(program, tmp_path)
    config, _ = read(tmp_path)
    assert set(config["rank_pattern"].values()) == {4} and set(config["alpha_pattern"].values()) == {2, 1.5}
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 5, ["dense", "query", "value"])
    (ours,), (back,) = program.adapters, from_peft(base("bert"), tmp_path).adapters
    assert {site.name: ours.at(site) for site in ours.sites} == {site.name: back.at(site) for site in back.sites}
    assert len(back.variants) == 3


def test_what_trains_beside_the_adapter(tmp_path):
    def written(case: str) -> tuple[dict[str, Any], sp.Program]:
        model, program = CASES[case]()
        to_peft(program, tmp_path)
        return read(tmp_path)[0], from_peft(base(model), tmp_path)

    config, program = written("head")
    assert (config["task_type"], config["modules_to_save"], config["bias"]) == ("SEQ_CLS", ["classifier"], "none")
    own = {name for name, _ in base("bert").module.named_parameters()}
    assert {n for n, _ in program.parameters(trainable=True)} & own == {"classifier.weight", "classifier.bias"}
    config, program = written("all_biases")
    assert (config["task_type"], config["modules_to_save"], config["bias"]) == (None, None, "all")
    biases = {name for name in own if name.endswith(".bias")}
    assert {n for n, _ in program.parameters(trainable=True)} & own == biases
    assert written("lora_biases")[0]["bias"] == "lora_only"
    config, _ = written("some_biases")
    assert config["bias"] == "lora_only" and "bert.encoder.layer.0.output.LayerNorm" in config["modules_to_save"]
    report = to_peft(CASES["some_biases"]()[1], tmp_path)
    assert "bert.encoder.layer.0.attention.self.value.bias" in report.more
    assert "bert.encoder.layer.0.output.LayerNorm.weight" in report.more


CONVERTED = {
    "pissa": PiSSA(r=3, alpha=5.0),
    "pissa_medium": PiSSA(r=2, components="medium"),
    "milora": MiLoRA(r=2, alpha=6.0),
    "dora_pissa": DoRA(of=PiSSA(r=3, alpha=5.0)),
}


@pytest.mark.parametrize("name", CONVERTED)
def test_pissa_is_written_as_the_lora_that_it_is(name, tmp_path):
    """Rank 2r, α doubled, on the original weights; s stays, so that the outputs do too, to 1e-12."""
    method = CONVERTED[name]
    program = adapted("gpt2", method, where=["*.c_attn", "*.c_proj"])
    to_peft(program, tmp_path)
    config, tensors = read(tmp_path)
    inner = getattr(method, "of", method)
    assert config["r"] == 2 * inner.r and config["lora_alpha"] / config["r"] == inner.s
    assert config["use_dora"] == (name == "dora_pissa") and config["init_lora_weights"] is True
    own = logits(program.run())
    assert difference(run(theirs("gpt2", tmp_path), "gpt2"), own) <= BOUND
    assert difference(logits(from_peft(base("gpt2"), tmp_path).run()), own) <= BOUND
    for adapter in program.adapters:
        for site in adapter.sites:
            A = program.module.get_parameter(adapter.path(site, "A"))
            assert torch.equal(tensors[f"base_model.model.{site.owner}.lora_A.weight"][: inner.r], A)


@pytest.fixture(scope="module")
def pissa_folders(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    """What peft writes of a trained PiSSA: raw, and converted to a LoRA; and its outputs. In float32, peft's widest."""
    folder = tmp_path_factory.mktemp("pissa")
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["query", "dense"], init_lora_weights="pissa", use_rslora=True
    )
    model = peft.get_peft_model(MODELS["bert"]()[0], config).eval()
    model.save_pretrained(folder / "start")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    outputs = run(model, "bert", torch.float32)
    model.save_pretrained(folder / "raw")
    model.save_pretrained(folder / "converted", path_initial_model_for_weight_conversion=str(folder / "start"))
    return folder, outputs


def test_peft_pissa_goes_on_the_original_weights(pissa_folders):
    """The residual is recomputed by the operators that peft uses: 2e-6 in float32, far under the size of the residual's
    own change."""
    folder, expected = pissa_folders
    program = from_peft(base("bert", torch.float32), folder / "raw")
    assert {type(adapter.method) for adapter in program.adapters} == {PiSSA}
    assert difference(logits(program.run()), expected) <= 2e-6
    assert difference(run(theirs("bert", folder / "raw", torch.float32), "bert", torch.float32), expected) <= 2e-6
    wrong = from_peft(base("bert", torch.float32), edit(folder / "raw", init_lora_weights=True))
    assert difference(logits(wrong.run()), expected) > 1e-1


def test_peft_pissa_converted_is_a_plain_lora(pissa_folders):
    folder, expected = pissa_folders
    program = from_peft(base("bert", torch.float32), folder / "converted")
    assert {(type(a.method), a.method.r) for a in program.adapters} == {(RsLoRA, 6)}
    assert difference(logits(program.run()), expected) <= 2e-6


ENCODED = {
    "mlp": PTuning(n=3, hidden=5),
    "lstm": PTuning(n=3, hidden=5, encoder="lstm"),
    "projected_prefix": PrefixTuning(n=3, projection=True),
}


@pytest.mark.parametrize("method", ENCODED.values(), ids=ENCODED)
def test_encoders_are_evaluated(method, tmp_path):
    """The folder holds virtual tokens, as peft's does: it reads back as those, in float32 as peft keeps them."""
    program = adapted("llama", method)
    to_peft(program, tmp_path)
    _, tensors = read(tmp_path)
    assert set(tensors) == {"prompt_embeddings"}
    own = logits(program.run())
    back = from_peft(base("llama"), tmp_path)
    assert {type(a.method) for a in back.adapters} <= {PromptTuning, PrefixTuning}
    assert torch.equal(logits(back.run()), own)
    assert difference(run(theirs("llama", tmp_path), "llama"), own) <= 1e-6


def test_adalora_that_peft_pruned(tmp_path):
    """peft saves the triplets that are left; they come back at their places among zeros, the scale is the first r's."""
    config = peft.AdaLoraConfig(
        init_r=5, target_r=2, tinit=1, tfinal=2, total_step=8, lora_alpha=7, target_modules=["query", "value"],
        task_type="SEQ_CLS",
    )  # fmt: skip
    source, inputs = MODELS["bert"]()
    model = peft.get_peft_model(source.double(), config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, 9):
        model(**inputs).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    model.eval().save_pretrained(tmp_path)
    written, tensors = read(tmp_path)
    ranks = {len(value) for key, value in tensors.items() if key.endswith("lora_E")}
    assert written["rank_pattern"] and sum(map(sum, written["rank_pattern"].values())) == 8 and ranks - {5}

    expected = run(theirs("bert", tmp_path), "bert")
    program = from_peft(base("bert"), tmp_path)
    assert difference(logits(program.run()), expected) <= BOUND
    (adapter,) = program.adapters
    assert (adapter.method.r, adapter.method.target_r, adapter.method.warmup, adapter.method.final) == (5, 2, 1, 2)
    for site in adapter.sites:
        kept = torch.tensor(written["rank_pattern"][f"{site.owner}.lora_E"]).flatten()
        assert torch.equal(program.module.get_parameter(adapter.path(site, "e")) != 0, kept)
        assert torch.equal(program.module.get_parameter(adapter.path(site, "A")).any(1), kept)


TARGETS = {
    "endings": {"target_modules": ["query", "attention.output.dense"]},
    "paths": {"target_modules": ["bert.encoder.layer.1.output.dense"]},
    "regex": {"target_modules": r".*\.layer\.1\..*(query|key)"},
    "excluded": {"target_modules": ["dense"], "exclude_modules": ["pooler.dense", "attention.output.dense"]},
    "excluded_regex": {"target_modules": ["dense"], "exclude_modules": r".*\.0\..*"},
    "layers": {"target_modules": ["query", "dense"], "layers_to_transform": [1]},
    "layer_pattern": {"target_modules": ["value"], "layers_to_transform": 0, "layers_pattern": "layer"},
    "not_saved": {"target_modules": ["dense"], "modules_to_save": ["pooler"]},
    "all_linear": {"target_modules": "all-linear"},
    "all_linear_head": {"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    "pattern": {"target_modules": ["query", "key"], "rank_pattern": {"layer.0.*query": 5}, "alpha_pattern": {"key": 1}},
}


@pytest.mark.parametrize("name", TARGETS)
def test_the_same_modules_are_meant(name, tmp_path):
    options = TARGETS[name]
    model = peft.get_peft_model(MODELS["bert"]()[0].double(), peft.LoraConfig(r=2, **options)).eval()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).double())
    model.save_pretrained(tmp_path)
    folder = edit(tmp_path, target_modules=options["target_modules"])  # peft replaces all-linear by a list
    program = from_peft(base("bert"), folder)
    (adapter,) = program.adapters
    assert {site.owner for site in adapter.sites} == set(model.base_model.targeted_module_names)
    assert difference(logits(program.run()), run(model, "bert")) <= BOUND
    to_peft(program, tmp_path / "again")
    assert set(theirs("bert", tmp_path / "again").base_model.targeted_module_names) == {s.owner for s in adapter.sites}


class Alike(nn.Module):
    """Modules whose paths are endings of one another, of whole names or not."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kq = nn.Linear(4, 5), nn.Linear(5, 6)
        self.inner = nn.ModuleDict({"q": nn.Linear(6, 3)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner["q"](torch.tanh(self.kq(torch.tanh(self.q(x)))))


@pytest.mark.parametrize(
    ("rewrites", "targets", "feedforward"),
    [
        ([(LoRA(r=2), "q")], "q", None),
        ([(LoRA(r=2), "inner.q")], ["inner.q"], None),
        ([(IA3(), "kq"), (IA3(scale="input"), "inner.q")], ["inner.q", "kq"], ["inner.q"]),
        ([(IA3(), "kq"), (IA3(scale="input"), "q")], "kq|q", "q"),
        ([(IA3(), ["q", "inner.q"]), (IA3(scale="input"), "kq")], ["kq", "q"], ["kq"]),
        ([(IA3(), "kq"), (IA3(scale="input"), ["q", "inner.q"])], r"inner\.q|kq|q", r"inner\.q|q"),
    ],
)
def test_paths_that_end_alike(rewrites, targets, feedforward, tmp_path):
    """A list where endings tell modules apart by peft's rules, a regular expression where they do not."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Alike().double(), torch.randn(2, 4, dtype=torch.float64)
    program = captured_once = sp.capture(model, {"x": x})
    for method, where in rewrites:
        program = sp.rewrite(program, method, where=where)
    to_peft(trained(program), tmp_path)
    config, _ = read(tmp_path)
    assert (config["target_modules"], config.get("feedforward_modules")) == (targets, feedforward)
    loaded = peft.PeftModel.from_pretrained(model, tmp_path).eval()
    assert difference(loaded(x), program.run()) <= BOUND
    assert torch.equal(from_peft(captured_once, tmp_path).run(), program.run())


def test_modules_to_save_reach_further_than_their_names(tmp_path):
    """peft saves every module whose path ends in the name, in the midst of a word too."""
    x = torch.randn(2, 4, dtype=torch.float64)
    model = Alike().double()
    program = sp.capture(model, {"x": x})
    with pytest.raises(sp.MethodError, match="kq has an adapter, and peft .LORA. would save it whole"):
        to_peft(sp.rewrite(program, LoRA(r=2), where="kq", trainable="q"), tmp_path / "no")
    wider = trained(sp.rewrite(program, LoRA(r=2), where="q", trainable="kq"))
    assert to_peft(wider, tmp_path).more == []
    assert read(tmp_path)[0]["modules_to_save"] == ["kq"]
    assert difference(peft.PeftModel.from_pretrained(model, tmp_path).eval()(x), wider.run()) <= BOUND


class TwoForSequenceClassification(nn.Module):
    """A head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(x)


def test_an_adapter_inside_a_trained_head_leaves_the_task_out(tmp_path):
    """The task type would save the head as a whole, with the module that has the adapter."""
    model, x = TwoForSequenceClassification().double(), torch.randn(2, 4, dtype=torch.float64)
    base_program = sp.capture(model, {"x": x})
    program = trained(sp.rewrite(base_program, LoRA(r=2), where="classifier.0", trainable="classifier.2"))
    to_peft(program, tmp_path)
    config, _ = read(tmp_path)
    assert (config["task_type"], config["modules_to_save"]) == (None, ["classifier.2"])
    assert torch.equal(from_peft(base_program, tmp_path).run(), program.run())
    assert difference(peft.PeftModel.from_pretrained(model, tmp_path).eval()(x), program.run()) <= BOUND


KEYS = [
    "q", "kq", "a.q", "layers.1.q", "m.layers.1.q", "m.layers.0.experts.1.q", "m.layers.1.experts.0.q",
    "m.blocks.1.x.q", "m.layers.11.q", "head.q", "m.head", "m.head.q",
]  # fmt: skip
MEANT = [
    {"target_modules": ["q"]},
    {"target_modules": ["layers.1.q", "head"]},
    {"target_modules": r".*\.q"},
    {"target_modules": ["q"], "layers_to_transform": [1]},
    {"target_modules": ["q", "m.blocks.1.x.q"], "layers_to_transform": 0},
    {"target_modules": ["q"], "layers_to_transform": [1, 11], "layers_pattern": ["blocks", "layers"]},
    {"target_modules": ["q"], "layers_to_transform": []},
    {"target_modules": ["q"], "exclude_modules": ["a.q", "experts.0.q"]},
    {"target_modules": ["q", "head"], "exclude_modules": r"m\..*", "modules_to_save": ["head"]},
]


@pytest.mark.parametrize("options", MEANT, ids=range(len(MEANT)))
def test_modules_are_meant_by_the_rules_of_peft(options):
    theirs = [key for key in KEYS if check_target_module_exists(peft.LoraConfig(**options), key)]
    assert [key for key in KEYS if means(ModuleOptions(peft_type="LORA", **options), key)] == theirs
    assert 0 < len(theirs) < len(KEYS)


REFUSED = {
    "megatron_config": ({"a": 1}, "megatron_config = .*Megatron"),
    "layer_replication": ([[0, 2]], "layer_replication = .*build the deeper model"),
    "init_lora_weights": ("olora", "init_lora_weights = 'olora': it changes the base"),
    "loftq_config": ({"loftq_bits": 4}, "loftq_config = .*changes the base"),
    "corda_config": ({"a": 1}, "corda_config = .*path_initial_model"),
    "lora_bias": (True, "lora_bias = True: B has no bias"),
    "alora_invocation_tokens": ([1], "alora_invocation_tokens = .*all tokens"),
    "target_parameters": (["a.b"], "target_parameters = .*choose modules"),
    "trainable_token_indices": ([1, 2], "trainable_token_indices = .*modules_to_save"),
    "use_qalora": (True, "use_qalora = True"),
    "kasa_config": ({"a": 1}, "kasa_config = .*merge_and_unload"),
    "of_the_future": (3, "of_the_future = 3: not known here"),
    "target_modules": (None, "target_modules is missing"),
    "r": ("many", "key 'r': .*got 'many'"),
    "bias": ("some", "key 'bias': .*got 'some'"),
    "peft_type": ("OFT", "peft_type 'OFT' is not known"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_options_are_refused_by_name(key, plain):
    value, message = REFUSED[key]
    with pytest.raises(sp.CheckpointError, match=message):
        from_peft(base("bert"), edit(plain, **{key: value}))


def test_a_fast_pissa_is_refused_for_its_random_numbers(plain):
    with pytest.raises(sp.CheckpointError, match="pissa_niter_4.*random numbers that peft drew"):
        from_peft(base("bert"), edit(plain, init_lora_weights="pissa_niter_4"))


def test_unknown_options_at_their_defaults_pass(plain):
    empty = {"of_the_future": None, "another": False, "third": [], "fourth": {}, "megatron_core": "megatron.core"}
    assert from_peft(base("bert"), edit(plain, **empty)).adapters


def test_every_key_that_does_not_fit_is_listed(plain):
    layer = "base_model.model.bert.encoder.layer.0.attention.self"

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[f"{layer}.query.lora_A.weight"]
        tensors[f"{layer}.query.lora_C.weight"] = torch.zeros(1)
        tensors[f"{layer}.value.lora_B.weight"] = torch.zeros(24, 4)

    with pytest.raises(sp.CheckpointError) as error:
        from_peft(base("bert"), edit(plain, spoil))
    for part in (f"missing {layer}.query.lora_A.weight", f"unexpected {layer}.query.lora_C.weight",
                 f"{layer}.value.lora_B.weight is [24, 4], expected [24, 3]"):  # fmt: skip
        assert part in str(error.value)
    with pytest.raises(
        sp.CheckpointError, match="missing base_model.model.bert.encoder.layer.0.attention.self.key.lora"
    ):
        from_peft(base("bert"), edit(plain, target_modules=["query", "key", "value", "dense"]))
    with pytest.raises(sp.CheckpointError, match="unexpected .*dense.lora_A.weight"):
        from_peft(base("bert"), edit(plain, target_modules=["query", "value"]))


def test_foreign_and_damaged_folders(plain, tmp_path):
    with pytest.raises(sp.CheckpointError, match="no peft adapter: adapter_config.json is missing"):
        from_peft(base("bert"), tmp_path)
    folder = edit(plain)
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(sp.CheckpointError, match="adapter_model.bin is a pickle, which is never opened here"):
        from_peft(base("bert"), folder)
    (edit(plain) / TENSORS).write_bytes(b"cut")
    with pytest.raises(sp.CheckpointError, match="safetensors is damaged"):
        from_peft(base("bert"), folder)
    (edit(plain) / CONFIG).write_text("{")
    with pytest.raises(sp.CheckpointError, match="config.json is damaged"):
        from_peft(base("bert"), folder)
    with pytest.raises(sp.CheckpointError, match="mean no module. Nearest: "):
        from_peft(base("gpt2"), plain)
    with pytest.raises(sp.CheckpointError, match="modules_to_save .'score'. mean no module"):
        from_peft(base("bert"), edit(plain, modules_to_save=["score"]))
    tied = edit(plain, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with pytest.raises(sp.CheckpointError, match="embed_tokens, whose weight is tied .*tie_word_embeddings=False"):
        from_peft(base("tied_llama"), tied)
    with pytest.raises(sp.CheckpointError, match="huggingface/peft adapter.*from_peft.*convert"):
        sp.load(base("bert"), plain)


@pytest.mark.parametrize(
    "key", ["target_modules", "exclude_modules", "layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"]
)
def test_a_malformed_pattern_is_named_with_its_folder_and_key(plain, key):
    broken = "*.query"
    value = {"modules_to_save": [broken], "rank_pattern": {broken: 4}, "alpha_pattern": {broken: 4}}.get(key, broken)
    with pytest.raises(sp.CheckpointError, match=rf"adapter_config.json: {key} = '\*.query' is no regular expression"):
        from_peft(base("bert"), edit(plain, **{key: value}))


def test_another_embedding_in_the_file_is_another_base(tmp_path):
    """peft saves the embedding beside an adapter on it; a copy of the base's passes, another one does not."""
    _, program = CASES["embedding"]()
    to_peft(program, tmp_path / "ours")
    theirs("llama", tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    key = "base_model.model.model.embed_tokens.base_layer.weight"
    assert key in read(tmp_path / "theirs")[1]
    from_peft(base("llama"), tmp_path / "theirs")
    with pytest.raises(sp.CheckpointError, match=r"embed_tokens.weight \[61, 24\], and it is not the program's"):
        from_peft(base("llama"), edit(tmp_path / "theirs", lambda tensors: tensors[key].mul_(2)))
    longer = edit(tmp_path / "theirs", lambda tensors: tensors.update({key: torch.zeros(70, 24)}))
    with pytest.raises(sp.CheckpointError, match=r"embed_tokens.base_layer.weight is \[70, 24\], expected \[61, 24\]"):
        from_peft(base("llama"), longer)


def test_prompts_before_a_model_that_reads_its_first_token(tmp_path):
    """peft's pooler reads a virtual token, ours the first real one: refused in both directions."""
    program = adapted("bert", PromptTuning(n=3))
    with pytest.raises(sp.MethodError, match="reads a token by its position .* virtual token in peft"):
        to_peft(program, tmp_path)
    config = peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    peft.get_peft_model(MODELS["bert"]()[0], config).save_pretrained(tmp_path)
    with pytest.raises(sp.CheckpointError, match="reads a token by its position"):
        from_peft(base("bert"), tmp_path)


CANNOT = {
    "stacked": (lambda: adapted("bert", LoRA(r=2), LoRA(r=3), where="*.query"), "rewritten by lora and lora_2"),
    "mixed": (lambda: adapted("bert", {"method": LoRA(r=2), "where": "*.query"},
                              {"method": RsLoRA(r=2), "where": "*.key"}), "use_rslora is False at .* and True at"),
    "kinds": (lambda: adapted("bert", {"method": LoRA(r=2), "where": "*.query"},
                              {"method": SSB(), "where": "*.key"}), "holds one adapter; the program has lora, ssb"),
    "grouped": (lambda: adapted("conv", LoRA(r=2), where="grouped"), "works in 4 groups"),
    "vera_conv": (lambda: adapted("conv", VeRA(r=2), where="stem"), "of the kind conv2d; peft has VERA for linear"),
    "ia3_weight": (lambda: adapted("bert", IA3(scale="weight"), where="*.key"), "not the bias, which peft's"),
    "ia3_bias": (lambda: adapted("bert", IA3(scale="input"), where="*.key", trainable="*.key.bias"),
                 "key has an adapter, and peft .IA3. would save it whole"),
    "prefix_kept": (lambda: adapted("llama", PrefixTuning(n=2, positions="kept")), "keeps positions"),
    "prefix_part": (lambda: adapted("llama", PrefixTuning(n=2), where="*.0.*"), "has no prefix; peft puts one"),
}  # fmt: skip


@pytest.mark.parametrize("name", CANNOT)
def test_what_the_layout_cannot_hold_is_refused(name, tmp_path):
    make, message = CANNOT[name]
    with pytest.raises(sp.MethodError, match=message):
        to_peft(make(), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


LOW = {
    "trilora": (TriLoRA(r=2), 2),
    "moslora": (MoSLoRA(r=2), 2),
    "flora": (FLoRA(r=2), 2),
    "adalora": (AdaLoRA(r=3), 3),
    "vera": (VeRA(r=3), 3),
    "pissa": (PiSSA(r=2), 4),
    "spectral": (SpectralAdditive(r=2), 4),
}


@pytest.mark.parametrize("name", LOW)
def test_low_rank_updates_as_plain_lora(name, tmp_path):
    method, rank = LOW[name]
    program = adapted("bert", method, where=BERT)
    report = to_peft(program, tmp_path, as_lora=True)
    config, _ = read(tmp_path)
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["rank_pattern"]) == ("LORA", rank, rank, {})
    assert len(report.errors) == 11 and max(report.errors.values()) < 1e-12
    own = logits(program.run())
    assert difference(run(theirs("bert", tmp_path), "bert"), own) <= BOUND
    assert {type(a.method) for a in from_peft(base("bert"), tmp_path).adapters} == {LoRA}


def test_stacked_adapters_sum_to_one_lora_with_their_biases(tmp_path):
    biases = {"method": BitFit(), "where": "*.query.bias"}
    program = adapted("bert", LoRA(r=2), TriLoRA(r=3), biases, where="*.query")
    to_peft(program, tmp_path, as_lora=True)
    config, _ = read(tmp_path)
    assert (config["r"], config["bias"]) == (5, "lora_only")
    assert difference(run(theirs("bert", tmp_path), "bert"), logits(program.run())) <= BOUND


def test_truncation_states_its_error(tmp_path):
    program = adapted("bert", DoRA(of=LoRA(r=2)), where="*.query")
    with pytest.raises(sp.MethodError, match=r"has rank 24: it is not low. Give rank="):
        to_peft(program, tmp_path / "folder", as_lora=True)
    with pytest.raises(sp.MethodError, match=r"At rank 6 the LoRA loses .*%.*more than 1.0%.*tolerance="):
        to_peft(program, tmp_path / "folder", as_lora=True, rank=6)
    assert not (tmp_path / "folder").exists()
    report = to_peft(program, tmp_path / "folder", as_lora=True, rank=6, tolerance=1.0)
    held = dict(program.tensors())
    _, tensors = read(tmp_path / "folder")
    for name, error in report.errors.items():
        owner = f"base_model.model.{name.removesuffix('.weight')}"
        written = tensors[f"{owner}.lora_B.weight"] @ tensors[f"{owner}.lora_A.weight"]
        target = next(t for t in targets(program.adapters) if t.name == name)
        update = target.evaluate(held) - held[name]
        assert error == pytest.approx(((update - written).norm() / update.norm()).item(), rel=1e-9)
        assert error == pytest.approx((torch.linalg.svdvals(update)[6:].norm() / update.norm()).item(), rel=1e-9)
    with pytest.raises(sp.MethodError, match="rank= belongs to as_lora"):
        to_peft(program, tmp_path / "folder", rank=3)
    with pytest.raises(sp.MethodError, match="houlsby at .* changes no weight"):
        to_peft(adapted("bert", Houlsby(r=2), where="*.output.dense"), tmp_path / "other", as_lora=True)


OWN = {
    "ssb": lambda: adapted("bert", SSB(), where=BERT, trainable="classifier"),
    "dora_ssb": lambda: adapted("bert", DoRA(of=SSB()), where=BERT),
    "bitfit": lambda: adapted("bert", BitFit(), where="*"),
    "houlsby": lambda: adapted("bert", Houlsby(r=3), where=["*.output.dense", "*.intermediate"]),
    "trilora": lambda: adapted("bert", TriLoRA(r=2), where=BERT, patterns={"*.query": {"r": 3}}),
}


@pytest.mark.parametrize("name", OWN)
def test_methods_unknown_to_peft_keep_their_names(name, tmp_path):
    program = OWN[name]()
    report = to_peft(program, tmp_path / "first")
    config, tensors = read(tmp_path / "first")
    assert config["peft_type"] == report.peft_type == program.adapters[0].method.name and not report.for_peft
    assert all(key.startswith("base_model.model.") for key in tensors)
    if name == "ssb":
        assert "base_model.model.bert.encoder.layer.0.attention.self.query.ssb_rho" in tensors
    back = from_peft(base("bert"), tmp_path / "first")
    assert torch.equal(logits(back.run()), logits(program.run()))
    assert back.adapters[0].method == program.adapters[0].method
    to_peft(back, tmp_path / "second")
    assert same_files(tmp_path / "first", tmp_path / "second")


def test_nothing_is_half_written(plain, monkeypatch):
    folder = edit(plain)
    before = [(folder / name).read_bytes() for name in (CONFIG, TENSORS)]

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("subgraph_peft.export.peft.folder.save_file", full)
    with pytest.raises(sp.CheckpointError, match="cannot be written: No space left"):
        to_peft(CASES["vera"]()[1], folder)
    assert [(folder / name).read_bytes() for name in (CONFIG, TENSORS)] == before
    assert {path.name for path in folder.iterdir()} == {CONFIG, TENSORS}


def test_16_bit_tensors_are_widened_and_a_wide_base_keeps_its_dtype(plain):
    halved = edit(plain, lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()}))
    for dtype in (torch.float32, torch.float64):
        program = from_peft(base("bert", dtype), halved)
        assert {p.dtype for _, p in program.parameters(trainable=True)} == {dtype}


def call(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return " ".join(result.output.split())


def test_convert_takes_runs_and_pipelines(tmp_path):
    """A run's folder says itself on which model it was trained."""
    source, inputs = MODELS["bert"]()
    program = trained(sp.rewrite(sp.capture(source, inputs), LoRA(r=2), where="*.query"))
    sp.save(program, tmp_path / "run/adapter")
    (tmp_path / "run/config.yaml").write_text(PIPELINE)
    (tmp_path / "pipeline.yaml").write_text(PIPELINE)
    call("convert", tmp_path / "run", tmp_path / "first")
    call("convert", tmp_path / "run/adapter", tmp_path / "second", tmp_path / "pipeline.yaml")
    assert same_files(tmp_path / "first", tmp_path / "second")
    expected = logits(program.run())
    assert difference(run(theirs("bert", tmp_path / "first", torch.float32), "bert", torch.float32), expected) <= 1e-5
    call("convert", tmp_path / "first", tmp_path / "back", tmp_path / "run", "--to", "native")
    assert torch.equal(logits(sp.load(program.captured, tmp_path / "back").run()), expected)


def test_the_library_does_not_import_peft():
    root = Path(__file__).parents[2]
    files = [path for folder in ("subgraph_peft", "passes", "export") for path in (root / folder).rglob("*.py")]
    assert len(files) > 60
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [item.name for item in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert not any(name.partition(".")[0] == "peft" for name in names), path


def test_convert_from_the_command_line(tmp_path):
    """A stored transformers model as the base: there and back again, and everything as a plain LoRA."""
    source, _ = MODELS["bert"]()
    source.save_pretrained(tmp_path / "model")
    program = sp.capture(source, MODELS["bert"]()[1])
    program = trained(sp.rewrite(program, TriLoRA(r=2), where="*.query", trainable="classifier"))
    sp.save(program, tmp_path / "native")
    expected = logits(program.run())

    assert "this package alone reads" in call("convert", tmp_path / "native", tmp_path / "own", tmp_path / "model")
    output = call("convert", tmp_path / "native", tmp_path / "lora", tmp_path / "model", "--to", "lora")
    assert "LORA" in output and "largest relative error" in output
    assert difference(run(theirs("bert", tmp_path / "lora", torch.float32), "bert", torch.float32), expected) <= 1e-5
    call("convert", tmp_path / "lora", tmp_path / "back", tmp_path / "model", "--to", "native")
    assert difference(logits(sp.load(program.captured, tmp_path / "back").run()), expected) <= 1e-5

    named = tmp_path / "lora"
    assert read(named)[0]["base_model_name_or_path"] == str(tmp_path / "model")
    assert "LORA" in call("convert", named, tmp_path / "again")
    assert "does not say on which model" in call("convert", tmp_path / "native", tmp_path / "no", code=1)
    assert "loses" in call("convert", tmp_path / "native", tmp_path / "no", tmp_path / "model", "--to", "lora",
                           "--rank", 1, code=1)  # fmt: skip
    assert "no task 'chat'" in call("convert", named, tmp_path / "no", tmp_path / "model", "--task", "chat", code=1)
    assert "no model that can be loaded" in call("convert", named, tmp_path / "no", tmp_path / "missing", code=1)
    assert not (tmp_path / "no").exists()
