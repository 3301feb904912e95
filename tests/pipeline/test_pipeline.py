import importlib
import json
import re

import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base.text import Table
from subgraph_peft.method import catalogue, registry
from subgraph_peft.pipeline import pipeline
from subgraph_peft.pipeline.config import apply_override, find_config, load_config, schema, shipped_configs
from subgraph_peft.pipeline.graph_diff import summarised
from subgraph_peft.pipeline.passes import Pass, State
from subgraph_peft.pipeline.pipeline import Pipeline, names
from subgraph_peft.pipeline.report import write_report
from tests.installed import install

ONE_LINE = 'capture,lora{r=4,where=[*.query,"*.{key,value}"],trainable=classifier},dora{of={lora{r=4}},as=second},fold'


def test_the_one_line_form_reads_back_as_it_prints():
    pipeline = Pipeline.read(ONE_LINE)
    assert str(pipeline) == ONE_LINE
    assert Pipeline.read(str(pipeline)) == pipeline
    assert pipeline.passes[1].where == ["*.query", "*.{key,value}"]
    assert pipeline.passes[2].method.of.r == 4 and pipeline.passes[2].as_ == "second"


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=12)


@settings(max_examples=100, deadline=None)
@given(where=TEXT, exclude=st.lists(TEXT, max_size=3), r=st.integers(1, 999), alpha=st.floats(0.1, 1e6))
def test_any_option_survives_the_one_line_form(where, exclude, r, alpha):
    made = Pipeline.read([{"lora": {"r": r, "alpha": alpha, "where": where, "exclude": exclude}}, "fold"])
    assert Pipeline.read(str(made)) == made


def test_yaml_and_one_line_give_the_same_pipeline():
    listed = ["capture", {"lora": {"r": 4, "where": "*.query"}}, {"fold": None}]
    assert Pipeline.read(listed) == Pipeline.read("capture,lora{r=4,where=*.query},fold")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lorra", "Unknown pass 'lorra'. Did you mean 'lora'"),
        ("lora{rank=3}", "lora: option 'rank': it is unknown.*Known: r, alpha"),
        ("lora{r=many}", "option 'r': Input should be a valid integer"),
        ("fold{dtyp=float32}", "fold: option 'dtyp': it is unknown. Did you mean 'dtype'"),
        ("lora{r=3", "a brace is open, at character"),
        ("lora{r}", "option=value expected in 'r'"),
        ("lora}", "closes nothing"),
    ],
)
def test_a_wrong_pipeline_says_what_is_wrong(text, message):
    with pytest.raises(sp.SubgraphPeftError, match=message):
        Pipeline.read(text)


def test_passes_apply_to_a_captured_program_and_say_what_they_changed():
    program = sp.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
    results = list(Pipeline.read("ssb{where=0},fold").run(State(program=program)))
    rewrite, fold = results
    assert "1 sites, 10 of" in rewrite.summary
    assert "+_0_ssb_rows = mul(_0_base, 0.weight_ssb.rho)" in rewrite.difference
    assert "-_0_ssb_rows = mul(_0_base, 0.weight_ssb.rho)" in fold.difference
    assert Pipeline.read("ssb{where=0},fold").apply(program).history == ("capture", "ssb", "fold")
    with pytest.raises(sp.ConfigError, match="put `capture` before it"):
        list(Pipeline.read("fold").run(State()))


def test_a_rewrite_whose_nodes_do_not_say_where_they_come_from_is_refused():
    from dataclasses import replace

    from subgraph_peft.pipeline.builtin_passes import Fold

    class Silent(Fold):
        def apply(self, state):
            made = sp.rewrite(state.program, registry.read_method("lora"), where="0")
            for node in made.graph.nodes:
                node.meta.pop("custom", None)
            return replace(state, program=made), "silent"

    program = sp.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
    with pytest.raises(sp.SubgraphPeftError, match=r"^The pass fold: the node \w+ = .* does not say where"):
        Silent()(State(program=program))


VALID = """model:
  factory: tests.models:bert
data:
  train: rows.jsonl
passes:
  - capture
  - lora:
      r: 4
      where: "*.query"
  - fold
output: runs/x
"""


def test_a_config_is_read_and_overridden(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(VALID)
    config = load_config(path, ["lora.r=8", "fold.retain=0.5", "data.max_length=9", "seed=3"])
    passes = config.pipeline.passes
    assert passes[1].method.r == 8 and passes[2].retain == 0.5 and config.data.max_length == 9 and config.seed == 3
    with pytest.raises(sp.ConfigError, match="no 'lorra' in this pipeline. Did you mean 'lora'"):
        load_config(path, ["lorra.r=8"])
    with pytest.raises(sp.ConfigError, match="takes a.b=value"):
        load_config(path, ["lora.r"])
    raw = {"passes": ["fold"]}
    apply_override(raw, "fold.dtype=float32")
    assert raw == {"passes": [{"fold": {"dtype": "float32"}}]}


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("      r: 4", "      rank: 4", 8, "option 'rank': it is unknown"),
        ("      r: 4", "      r: -4", 8, "greater than 0"),
        ("output: runs/x", "outputs: runs/x", 11, "key 'outputs': it is unknown. Did you mean 'output'"),
        ("  train: rows.jsonl", "  trian: rows.jsonl", 4, "key 'data.trian': it is unknown. Did you mean 'train'"),
        ("  - lora:", "  - lorra:", 7, "Unknown pass 'lorra'. Did you mean 'lora'"),
        ("  factory: tests.models:bert", "  factory: [", 4, "expected ',' or"),
        ("output: runs/x", "seed: 1\nseed: 2", 12, "stands twice"),
        ("  factory: tests.models:bert", "  task: causal-lm", 1, "give one of transformers, package, factory"),
    ],
)
def test_a_wrong_config_names_file_and_line(tmp_path, old, new, line, message):
    path = tmp_path / "pipeline.yaml"
    assert old in VALID
    path.write_text(VALID.replace(old, new))
    with pytest.raises(sp.ConfigError, match=message) as caught:
        load_config(path)
    assert any(text.startswith(f"{path}:{line}:") for text in str(caught.value).splitlines()), str(caught.value)


def test_an_unknown_config_lists_the_shipped_ones():
    assert "quickstart" in shipped_configs()
    with pytest.raises(sp.ConfigError, match="Did you mean 'quickstart'"):
        load_config("quickstrat")


def test_every_shipped_config_is_valid():
    for name in shipped_configs():
        assert load_config(name).pipeline.passes


def test_the_factories_of_shipped_configs_are_there():
    texts = [find_config(name).read_text(encoding="utf-8") for name in shipped_configs()]
    named = [found for text in texts for found in re.findall(r"(subgraph_peft[\w.]+):(\w+)", text)]
    assert len(named) == 2
    for module, function in named:
        assert callable(getattr(importlib.import_module(module), function))


def listed(document):
    """(path, schema) of every field that a pipeline file may have."""
    found = [(name, field) for name, field in document["properties"].items()]
    for owner, definition in document["$defs"].items():
        found += [(f"{owner}.{name}", field) for name, field in definition.get("properties", {}).items()]
    return found


def test_every_field_of_the_schema_says_what_it_is():
    document = schema()
    described = document["$defs"]
    for path, field in listed(document):
        target = described[field["$ref"].removeprefix("#/$defs/")] if "$ref" in field else {}
        assert field.get("description") or target.get("description"), path
    options = {path for path, _ in listed(document)}
    assert {"model", "ModelSpec.task", "DataSpec.train", "train.lr", "lora.where", "method.tensors"} <= options
    assert all(definition["description"] for name, definition in described.items() if name in names())


def test_the_schema_says_what_is_shared_once():
    text = json.dumps(schema())
    assert text.count("of trained numbers") == 1 and len(text) < 60_000


def test_the_schema_takes_what_is_read_and_refuses_what_is_not(tmp_path):
    document = schema()
    valid = yaml.safe_load(VALID)
    shipped = [yaml.safe_load(path.read_text()) for path in shipped_configs().values()]
    for config in (valid, *shipped):
        assert accepted(document, document, config), config
    wrong_passes = ({"passes": [{"lora": {"rank": 4}}]}, {"passes": ["lorra"]})
    for wrong in ({"outputs": "x"}, {"data": {"trian": "x"}}, *wrong_passes):
        assert not accepted(document, document, {**valid, **wrong}), wrong


def accepted(document, schema, value):
    """Whether a value fits a schema, as far as those of pipeline files go."""
    if "$ref" in schema:
        return accepted(document, document["$defs"][schema["$ref"].removeprefix("#/$defs/")], value)
    if "anyOf" in schema:
        return any(accepted(document, choice, value) for choice in schema["anyOf"])
    kinds = {"object": dict, "array": list, "string": str, "null": type(None), "boolean": bool, "integer": int}
    kinds["number"] = (int, float)
    types = schema.get("type", [])
    if types and not any(isinstance(value, kinds[kind]) for kind in ([types] if isinstance(types, str) else types)):
        return False
    if "enum" in schema and value not in schema["enum"]:
        return False
    if isinstance(value, list):
        return all(accepted(document, schema.get("items", {}), item) for item in value)
    if isinstance(value, dict):
        known = schema.get("properties", {})
        closed = schema.get("additionalProperties", True) is False
        if closed and not value.keys() <= known.keys() or not set(schema.get("required", ())) <= value.keys():
            return False
        return all(accepted(document, known.get(name, {}), item) for name, item in value.items())
    return True


def test_the_schema_knows_every_pass_and_refuses_unknown_keys():
    document = schema()
    choices = document["properties"]["passes"]["anyOf"][1]["items"]["anyOf"]
    assert choices[0]["enum"] == names()
    assert [next(iter(choice["properties"])) for choice in choices[1:]] == [*names(), "method"]
    lora = document["$defs"]["lora"]
    assert {"r", "alpha", "where", "trainable"} <= set(lora["properties"]) and lora["additionalProperties"] is False
    assert document["additionalProperties"] is False


class Halves(sp.Method):
    """φ(W) = W + s u vᵀ: a rank-one update, as a third party would write it."""

    name = "rank_one"
    family = "extension"
    s: float = 0.5

    def tensors(self, site):
        return {"u": sp.trainable(site.out_features, 1), "v": sp.trainable(1, site.in_features, init=sp.ones)}

    def weight(self, W, u, v):
        return W + self.s * (u @ v)


@pytest.fixture
def third_party(monkeypatch, tmp_path):
    """An installed package that registers a method through the entry-point group."""
    install(monkeypatch, tmp_path / "site", registry.GROUP, "tests.pipeline.test_pipeline:Halves")


def test_third_parties_register_methods_through_an_entry_point(third_party, tmp_path):
    program = sp.capture(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2)), torch.randn(3, 4))
    adapted = Pipeline.read("rank_one{s=2,where=0}").apply(program)
    with torch.no_grad():
        adapted.module.get_parameter("0.weight_rank_one.u").add_(1.0)
    torch.testing.assert_close(sp.fold(adapted).run(), adapted.run())
    sp.save(adapted, tmp_path)
    assert torch.equal(sp.load(program, tmp_path).run(), adapted.run())
    entry = next(e for e in catalogue.catalogue() if e.name == "rank_one")
    assert entry.equation == "φ(W) = W + s u v" and entry.trained == "out·1 + 1·in"


def test_two_methods_of_one_name_are_refused(third_party, monkeypatch):
    from subgraph_peft.passes import LoRA

    monkeypatch.setattr(Halves, "name", LoRA.name)
    with pytest.raises(sp.MethodError, match="Two methods are called 'lora'"):
        registry.methods()


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def test_layers_that_change_alike_are_one_difference_with_their_paths(tmp_path):
    program = sp.capture(nn.Sequential(*(Block() for _ in range(9)), nn.Linear(4, 2)), torch.randn(3, 4))
    results = list(Pipeline.read("lora{r=2,where=*.{up,down}}").run(State(program=program)))
    lines = summarised(results[0].difference)
    layers = "{0,1,2,3,4,5,6,7,8}"
    assert [x for x in lines if x.startswith("@@")] == [f"@@ {layers}.up, 9 times", f"@@ {layers}.down, 9 times"]
    assert len(lines) < 20 < len(results[0].difference) / 5
    page = write_report(results, tmp_path).read_text()
    assert "\n".join(lines) in page and (tmp_path / "graph.diff").read_text().count("lora_A = ") == 18


def test_what_changes_otherwise_stays_a_difference_of_its_own():
    program = sp.capture(nn.Sequential(*(Block() for _ in range(3))), torch.randn(3, 4))
    ranks = '{"0.up"={alpha=1}}'
    (result,) = Pipeline.read(f"lora{{r=2,where=*.up,patterns={ranks}}}").run(State(program=program))
    found = [line for line in summarised(result.difference) if line.startswith("@@")]
    assert found == ["@@ 0.up", "@@ {1,2}.up, 2 times"]


class Count(Pass):
    """A step as a third party would write it."""

    name = "count"
    of: str = "nodes"

    def apply(self, state):
        return state.with_record("count", len(state.program.graph.nodes)), f"counted {self.of}"

    def tables(self, state):
        return [Table("Counted", ("what", ">number"), [(self.of, str(state.records["count"]))])]


def test_third_parties_register_steps_through_an_entry_point(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", pipeline.GROUP, "tests.pipeline.test_pipeline:Count")
    program = sp.capture(nn.Linear(4, 6), torch.randn(3, 4))
    results = list(Pipeline.read("lora{where=weight},count{of=places}").run(State(program=program)))
    assert results[-1].summary == "counted places" and "count" in names()
    assert str(Pipeline((results[-1].pass_,))) == "count{of=places}"
    page = write_report(results, tmp_path).read_text()
    assert "## Counted" in page and f"| places | {len(results[-1].state.program.graph.nodes)} |" in page
    choices = schema()["properties"]["passes"]["anyOf"][1]["items"]["anyOf"]
    assert any("count" in choice["properties"] for choice in choices[1:])
    with pytest.raises(sp.ConfigError, match="option 'off': it is unknown. Did you mean 'of'"):
        Pipeline.read("count{off=x}")


@pytest.mark.parametrize("name", ["train", "lora", "method"])
def test_a_step_with_the_name_of_another_pass_is_refused(monkeypatch, tmp_path, name):
    install(monkeypatch, tmp_path / "site", pipeline.GROUP, "tests.pipeline.test_pipeline:Count")
    monkeypatch.setattr(Count, "name", name)
    with pytest.raises(sp.ConfigError, match=f"Two passes are called '{name}'"):
        Pipeline.read("capture")


def test_a_registered_step_is_a_pass(monkeypatch, tmp_path):
    install(monkeypatch, tmp_path / "site", pipeline.GROUP, "tests.pipeline.test_pipeline:Halves")
    with pytest.raises(sp.ConfigError, match="tests.pipeline.test_pipeline:Halves.* is no subclass of Pass"):
        Pipeline.read("capture")


def test_the_one_line_form_in_a_file_is_the_list_that_it_spells(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("model: {factory: 'tests.models:bert'}\npasses: capture,lora{r=4,where=*.query},fold\n")
    config = load_config(path)
    assert config.passes == [{"capture": {}}, {"lora": {"r": 4, "where": "*.query"}}, {"fold": {}}]
    assert config.until("lora").pipeline == Pipeline.read("capture,lora{r=4,where=*.query}")
    assert config.pipeline is config.pipeline and config.until("fold") == config
    with pytest.raises(sp.ConfigError, match="no 'train' pass; it has capture, lora, fold"):
        config.until("train")


def test_the_core_names_no_method():
    """No file of the core imports a method; nor does a method's name appear in it, outside the quickstart's list."""
    import re
    from pathlib import Path

    import subgraph_peft

    for path in Path(subgraph_peft.__file__).parent.glob("*.py"):
        text = path.read_text()
        assert not re.search(r"(from|import) .*passes\.(reconstruction|extension|combination)", text), path
        assert "from subgraph_peft.passes" not in text and "from .passes" not in text, path


EQUATIONS = {
    "bitfit": "φ(b) = b + δ",
    "diff_pruning": "φ(W) = W + clamp(3 sigmoid(u_g + a_g) − 1.5, 0, 1) clamp(3 sigmoid(u + a) − 1.5, 0, 1) ⊙ w, "
    "φ(b) = b + clamp(3 sigmoid(u_g + a_g) − 1.5, 0, 1) clamp(3 sigmoid(u + a) − 1.5, 0, 1) ⊙ w; loss + λ Σ σ(a)",
    "ia3": "φ(W) = diag(l) W, φ(b) = l ⊙ b",
    "milora": "φ(W) = W − (α/r) B₀ A₀ + (α/r) B A",
    "p_tuning": "X = [W₃ ReLU(W₂ ReLU(W₁ P + b₁) + b₂) + b₃; X]",
    "pissa": "φ(W) = W − (α/r) B₀ A₀ + (α/r) B A",
    "prefix_tuning": "K, V = [P_k; K], [P_v; V]",
    "prompt_tuning": "X = [P; X]",
    "sam_parser": "φ(W) = U diag(s) Vh",
    "ssb": "φ(W) = diag(ρ) W diag(c)",
    "ssl": "φ(W) = W diag(c)",
    "adalora": "φ(W) = W + (α/(r + 1e-05)) B diag(e) A; loss + λ mean(‖A Aᵀ − I‖, ‖Bᵀ B − I‖)",
    "flora": "φ(W) = W + (α/r) B G A",
    "houlsby": "y = y + U GELU(D y + b_d) + b_u",
    "liera": "φ(W) = W ⊙ (1 + (α/r) B A)",
    "lora": "φ(W) = W + (α/r) B A",
    "lora_dash": "φ(W) = W + (α/r) B A + U diag(g) V",
    "moslora": "φ(W) = W + (α/r) B M A",
    "parallel_adapter": "y = y + s (U ReLU(D x + b_d) + b_u)",
    "pfeiffer": "y = f(x + U GELU(D y + b_d) + b_u)",
    "rslora": "φ(W) = W + (α/√r) B A",
    "trilora": "φ(W) = W + (α/r) B diag(e) A",
    "vera": "φ(W) = W + diag(b) B diag(d) A",
    "dora": "φ(W) = diag(m/‖W + (α/r) B A‖) (W + (α/r) B A)",
    "spectral_additive": "φ(W) = W − U diag(σ) Vᵀ + (U + A_U) diag(σ) (V + A_V)ᵀ",
    "spectral_rotational": "φ(W) = W − U diag(σ) Vᵀ + U Q(X_U) diag(σ) (V Q(X_V))ᵀ",
    "svdiff": "φ(W) = U diag(ReLU(σ + s δ)) Vh",
    "blocks": "φ(W) = [W + (α/r) B_q A_q; W; W + (α/r) B_v A_v]",
    "mpc_d": "φ(W) = W + (α/r) B A; loss + λ (‖A Aᵀ − I‖² + ‖Bᵀ B − diag(Bᵀ B)‖²)",
    "mpc_n": "φ(W) = W + (α/r) B ReLU(A·)",
    "mpc_o": "φ(W) = W + (α/r) B A; loss + λ (‖A Aᵀ − I‖² + ‖Bᵀ B − I‖²)",
}


def test_the_catalogue_is_printed_from_the_equations():
    entries = {entry.name: entry for entry in catalogue.catalogue()}
    assert {name: entry.equation for name, entry in entries.items()} == EQUATIONS
    assert entries["lora"].trained == "r·in + out·r" and entries["ssb"].trained == "out + in"
    assert not entries["parallel_adapter"].folds and entries["dora"].folds


@pytest.mark.parametrize("name", EQUATIONS)
def test_a_docstring_opens_with_its_formula_and_names_its_source(name):
    cls = registry.method_class(name)
    first = cls.__doc__.strip().splitlines()[0]
    assert "=" in first or "←" in first
    assert "Source:" in cls.__doc__ and cls.paper.startswith("arXiv") and cls.family
