"""Methods that a pipeline file defines by equations, against the same methods written in Python."""

import json

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from typer.testing import CliRunner

import subgraph_peft as sp
from subgraph_peft.cli import app
from subgraph_peft.method import catalogue, registry
from subgraph_peft.method.definition import named
from subgraph_peft.method.expression import FUNCTIONS, EquationError, parse
from subgraph_peft.method.formula import equations
from subgraph_peft.method.method import spell
from subgraph_peft.passes import IA3, SSB, BitFit, DoRA, LoRA, ParallelAdapter
from subgraph_peft.pipeline.config import load_config, schema
from subgraph_peft.pipeline.pipeline import Pipeline
from subgraph_peft.store.adapter_file import restore
from tests import models

LOW_RANK = {"A": {"shape": ["r", "in"], "init": "kaiming_uniform"}, "B": {"shape": ["out", "r"], "init": "zeros"}}
SCALES = {"rho": {"shape": ["out"], "init": "ones", "decay": False}, "c": {"shape": ["in"], "init": "ones"}}
LORA = {"name": "my_lora", "tensors": LOW_RANK, "weight": "W + alpha / r * B @ A", "options": {"r": 2, "alpha": 5}}
V = "(W + alpha / r * (B @ A))"

# definition, the method that it repeats
PAIRS = {
    "lora": (LORA, LoRA(r=2, alpha=5.0)),
    "ssb": ({"name": "my_ssb", "tensors": SCALES, "weight": "rho[:, None] * W * c"}, SSB()),
    "dora": (
        {
            **LORA,
            "name": "my_dora",
            "tensors": {**LOW_RANK, "m": {"shape": ["out"], "init": "norm(W)", "decay": False}},
            "weight": f"(m / detach(clamp_min(norm{V}, 1e-12)))[:, None] * {V}",
        },
        DoRA(of=LoRA(r=2, alpha=5.0)),
    ),
    "ia3": (
        {
            "name": "my_ia3",
            "tensors": {"l": {"shape": ["out"], "init": "ones", "decay": False}},
            "weight": "diag(l) @ W",
            "bias": "l * b",
        },
        IA3(),
    ),
    "bitfit": ({"name": "my_bitfit", "tensors": {"delta": {"shape": ["out"]}}, "bias": "b + delta"}, BitFit()),
    "parallel": (
        {
            "name": "my_adapter",
            "tensors": {"D": LOW_RANK["A"], "U": LOW_RANK["B"]},
            "output": "y + scale * relu(x @ D.T) @ U.T",
            "options": {"r": 4, "scale": 0.5},
        },
        ParallelAdapter(r=4, scale=0.5, biases=False),
    ),
}


def written(definition: dict, **changes) -> sp.Method:
    return registry.read_method({"method": {**definition, **changes}})


@pytest.fixture(scope="module")
def base() -> sp.Program:
    model, inputs = models.mlp()
    return sp.capture(model.double(), {"x": inputs["x"].double()})


def adapt(base: sp.Program, method: sp.Method, **options) -> sp.Program:
    is_bias = method.defines("bias") and not method.defines("weight")
    where = "*" if is_bias else ["first", "shared", "head"]
    return sp.rewrite(base, method, where=where, **options)


def shake(adapted: sp.Program) -> sp.Program:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapted.parameters(trainable=True):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return adapted


def values(program: sp.Program) -> dict[str, torch.Tensor]:
    """The adapters' tensors by site and name."""
    own = dict(program.module.named_parameters())
    return {f"{s.name} {t}": own[path].detach() for a in program.adapters for s, t, path in a.all_paths()}


def difference(one: sp.Program, other: sp.Program) -> float:
    a, b = (p.run()[1] for p in (one, other))
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", PAIRS)
def test_a_written_method_is_the_built_in_one(base, name):
    definition, twin = PAIRS[name]
    method = written(definition)
    ours, theirs = adapt(base, method, seed=3), adapt(base, twin, seed=3)
    assert difference(ours, base) < 1e-12
    assert {k: v.tolist() for k, v in values(ours).items()} == {k: v.tolist() for k, v in values(theirs).items()}
    assert difference(shake(ours), shake(theirs)) < 1e-13
    assert difference(ours, base) > 1e-3
    assert method.foldable() == twin.foldable()
    for one, other in zip(ours.lowered.values(), theirs.lowered.values(), strict=True):
        assert one.dense == other.dense and one.per_token == other.per_token
    if name != "parallel":
        assert equations(method) == equations(twin)
        assert difference(ours, sp.fold(ours)) < 1e-13


@pytest.mark.parametrize("name", PAIRS)
def test_a_checkpoint_needs_no_python_to_be_read(base, name, tmp_path):
    definition, _ = PAIRS[name]
    adapted = shake(adapt(base, written(definition)))
    sp.save(adapted, tmp_path)
    stored = json.loads((tmp_path / "adapter.json").read_text())["adapters"][0]["method"]["method"]
    assert {part: stored.get(part) for part in ("weight", "bias", "output")} == {
        part: definition.get(part) for part in ("weight", "bias", "output")
    }
    for loaded in (sp.load(base, tmp_path), restore(adapt(base, written(definition), seed=5), tmp_path)):
        assert all(torch.equal(value, values(adapted)[key]) for key, value in values(loaded).items())
        assert torch.equal(loaded.run()[1], adapted.run()[1])
        assert loaded.adapters[0].method == adapted.adapters[0].method


def test_another_definition_of_the_same_name_is_not_loaded(base, tmp_path):
    sp.save(adapt(base, written(LORA)), tmp_path)
    other = adapt(base, written(LORA, weight="W + r / alpha * B @ A"))
    with pytest.raises(sp.CheckpointError, match="another method"):
        restore(other, tmp_path)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (LORA, SSB()),
        (SSB(), LORA),
        (LORA, PAIRS["dora"][0]),
        (LORA, {"dora": {"of": {"method": PAIRS["ssb"][0]}}}),
        (PAIRS["ia3"][0], {"dora": {"of": {"method": LORA}}}),
    ],
)
def test_composition_equals_the_composed_fold(base, first, second):
    def method(spelled):
        return written(spelled) if isinstance(spelled, dict) and "name" in spelled else registry.read_method(spelled)

    one = shake(adapt(base, method(first)))
    two = adapt(one, method(second))
    assert difference(two, one) < 1e-12
    shake(two)
    assert difference(two, one) > 1e-6 and difference(two, sp.fold(two)) < 1e-12
    assert len(two.adapters) == 2


def test_dora_over_a_written_method_is_dora(base):
    wrapped = registry.read_method({"dora": {"of": {"method": LORA}}})
    ours, theirs = adapt(base, wrapped), adapt(base, PAIRS["dora"][1])
    assert difference(shake(ours), shake(theirs)) < 1e-13
    assert equations(wrapped) == equations(PAIRS["dora"][1])
    assert registry.read_method(spell(wrapped)) == wrapped


def test_the_options_are_fields():
    method = written(LORA)
    assert [(name, kind) for name, kind, *_ in catalogue.options(type(method))] == [("r", "int"), ("alpha", "float")]
    with pytest.raises(sp.MethodError, match="my_lora: option 'r': Input should be greater than 0, got 0"):
        type(method)(r=0)
    changed = type(method)(r=3, alpha=2.5)
    assert changed != method and spell(changed)["method"]["options"] == {"r": 3, "alpha": 2.5}
    assert registry.read_method(spell(changed)) == changed and hash(registry.read_method(spell(changed))) == hash(
        changed
    )
    with pytest.raises(ValidationError, match="frozen"):
        method.r = 4


def test_patterns_give_some_sites_other_options(base, tmp_path):
    adapted = shake(adapt(base, written(LORA), patterns={"first": {"r": 1}}))
    shapes = {key: list(value.shape) for key, value in values(adapted).items()}
    assert shapes["first.weight A"] == [1, 6] and shapes["shared.weight A"] == [2, 10]
    sp.save(adapted, tmp_path)
    assert torch.equal(sp.load(base, tmp_path).run()[1], adapted.run()[1])


def test_a_budget_chooses_the_rank(base):
    adapted = adapt(base, written(LORA), budget=3 * (16 + 20 + 13) + 5)
    assert adapted.adapters[0].method == written(LORA, options={"r": 3, "alpha": 5})


def test_declarations_reach_the_tensors(base):
    tensors = {
        "A": {"shape": ["r + 1", "2 * in - in"], "init": "normal(0.5)", "trainable": False},
        "B": {"shape": ["out", "1 + r"], "lr": 16, "decay": False},
        "g": {"shape": [1], "init": "alpha / 4"},
    }
    method = written(LORA, tensors=tensors, weight="W + g * B @ A")
    site = next(site for site in sp.sites(base) if site.name == "first.weight")
    declared = method.tensors(site)
    assert [t.shape for t in declared.values()] == [(3, 6), (10, 3), (1,)]
    assert (declared["A"].trainable, declared["B"].lr, declared["B"].decay) == (False, 16.0, False)
    assert catalogue.described(type(method)).trained == "out·(1 + r) + 1"
    held = values(adapt(base, method))
    assert held["first.weight g"].tolist() == [1.25] and 0.2 < held["shared.weight A"].std() < 0.8


def test_dropout_is_the_dropout_of_activations(base):
    method = written(LORA, options={**LORA["options"], "dropout": 0.5})
    assert method.activation_dropout == 0.5
    adapted = shake(adapt(base, method))
    assert "dropout" in str(adapted.graph) and not torch.equal(adapted.run(training=True)[1], adapted.run()[1])
    with pytest.raises(sp.MethodError, match="option 'dropout': Input should be less than 1"):
        written(LORA, options={**LORA["options"], "dropout": 1})


# Equations


def caret(error: sp.SubgraphPeftError) -> tuple[str, int]:
    """(the text shown, the caret's column in it)"""
    *_, shown, pointer = str(error).splitlines()
    assert shown.startswith("    ") and pointer.strip() == "^"
    return shown[4:], pointer.index("^") - 4


@pytest.mark.parametrize(
    ("text", "at", "message"),
    [
        ("W + Bb @ A", "Bb", "Unknown name 'Bb'. Did you mean 'B'. Names: W, A, B, r, alpha"),
        ("W + nrm(A)", "nrm", "Unknown function 'nrm'. Did you mean 'norm'. Functions: sqrt"),
        ("W + B(A)", "B(", "'B' is no function: write a product as *"),
        ("W + relu * A", "relu", "relu is a function: write relu"),
        ("W + dropout(B @ A, r)", "dropout", "Unknown function 'dropout'"),
        ("W.shape", "shape", "The only attribute is .T"),
        ("W.__class__", "__class__", "The only attribute is .T"),
        ("W + B.T.data", "data", "The only attribute is .T"),
        ("W[0]", "[", "The only subscripts are"),
        ("W[:, None, None]", "[", "The only subscripts are"),
        ("W[::2]", "[", "The only subscripts are"),
        ("W == A", "==", "'=' is not part of an equation: .* without comparison"),
        ("W < A", "<", "comparison"),
        ("W + 'x'", "'", "strings have no place"),
        ('W + "x"', '"', "strings have no place"),
        ("lambda W: W", "W", "An operator is expected, not 'W'"),
        ("W if r else A", "if", "An operator is expected, not 'if'"),
        ("[W for W in A]", "for", "An operator is expected, not 'for'"),
        ("[W, A]", "[", "is not part of an equation"),
        ("norm(*W)", "*", "is not part of an equation"),
        ("W.in", "in", "The only attribute is .T"),
        ("W + None", "None", "Unknown name 'None'"),
        ("W + in", "in", "Unknown name 'in'"),
        ("(W, A)", "(", "is not part of an equation"),
        ("W + {A}", "{", "'{' is not part of an equation"),
        ("W ^ A", "^", "a power is"),
        ("W // r", "// r", "'//' is not part of an equation"),
        ("W % r", "%", "'%' is not part of an equation"),
        ("W + α * A", "α", "ASCII"),
        ("W × r", "×", "a product is"),
        ("W + 2r", "r", "An operator is expected, not 'r'"),
        ("W + 1j", "j", "An operator is expected, not 'j'"),
        ("W + 1e99 * A", "1e99", "The number 1e99 is too large"),
        ("W; A", ";", "';' is not part of an equation"),
        ("W # A", "#", "'#' is not part of an equation"),
        ("W A", "A", "An operator is expected, not 'A'"),
        ("(W + A", "(", "'\\(' was never closed"),
        ("W + A)", ")", "Unmatched '\\)'"),
        ("W +", "", "A value is expected, not the end"),
        ("", "", "A value is expected, not the end"),
        ("W + * A", "* A", "'\\*' is not expected here"),
        ("norm(W, 1)", "norm", "norm takes 1 arguments, not 2"),
        ("clamp_min(W)", "clamp_min", "clamp_min takes 2 arguments, not 1"),
        ("sum(W, dim=1)", "=", "'=' is not part of an equation"),
    ],
)
def test_what_is_no_equation_is_refused_at_the_character(text, at, message):
    with pytest.raises(EquationError, match=message) as caught:
        parse(text, ["W", "A", "B", "r", "alpha"])
    column = text.index(at) if at else len(text)
    assert caret(caught.value) == (text, column) and caught.value.column == column


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        (
            "W + B @ A.T",
            6,
            r"my_lora: option 'weight': '@' cannot be applied to a tensor \[out, 2\] and a tensor \[in, 2\]",
        ),
        ("W + (A @ B)", 7, r"'@' cannot be applied to a tensor \[2, in\] and a tensor \[out, 2\]"),
        ("W + (A @ -B)", 7, r"'@' cannot be applied to a tensor \[2, in\] and a tensor \[out, 2\]"),
        ("W + 1 / (r - 2) * B @ A", 6, "'/' cannot be applied to the number 1 and the number 0: division by zero"),
        ("W + (-alpha) ** 0.5 * B @ A", 13, "the number -5.0 and the number 0.5: math domain error"),
        ("W + 9 ** 9 ** 9 ** 9 * B @ A", 11, "math range error"),
        ("W + relu(alpha) * B @ A", 4, "'relu' cannot be applied to the number 5.0"),
        ("W + (B @ A)[:, None]", 11, "it takes a vector"),
        ("W + B @ A + alpha.T", 17, "'.T' cannot be applied to the number 5.0"),
        ("W + B @ A + mean(W, 7)", 12, "'mean' cannot be applied"),
    ],
)
def test_what_does_not_fit_is_refused_at_the_operator(text, column, message):
    """When the method is read, before there is a model."""
    options = {name: value for name, value in LORA["options"].items() if name == "r" or name in text}
    definition = {**LORA, "weight": text, "options": options}
    with pytest.raises(EquationError, match=message) as caught:
        written(definition)
    assert caret(caught.value) == (text, column)


@pytest.mark.parametrize(
    "text", ["(" * 500, "-" * 900 + "W", "W ** " * 150 + "W", "relu(" * 150 + "W" + ")" * 150, "W" * 1001, "W + " * 300]
)
def test_long_and_deep_text_is_refused(text):
    with pytest.raises(EquationError, match="nested more than|characters; 1000 are allowed") as caught:
        parse(text, ["W"])
    shown, column = caret(caught.value)
    assert len(shown) <= 100 and 0 <= column <= len(shown)


@settings(max_examples=300, deadline=None)
@given(st.one_of(st.text(max_size=30), st.text("WABr012.eE+-*/@()[]:,None T", max_size=30)))
def test_any_text_parses_or_is_refused_with_its_character(text):
    try:
        parse(text, ["W", "A", "B", "r"])
    except EquationError as error:
        shown, column = caret(error)
        assert 0 <= column <= len(shown)


def grow(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    binary = st.tuples(inner, st.sampled_from([" + ", " - ", "*", " / ", "@"]), inner).map("".join)
    return st.one_of(
        binary,
        inner.map("-{}".format),
        inner.map("({})".format),
        inner.map("({}).T".format),
        inner.map("({})**2".format),
        st.tuples(st.sampled_from(["tanh", "abs", "sigmoid", "relu"]), inner).map(lambda p: f"{p[0]}({p[1]})"),
    )


GRAMMAR = st.recursive(
    st.sampled_from(["W", "A", "v[:, None]", "v[None, :]", "s", "2", ".5", "W**s"]), grow, max_leaves=9
)


@settings(max_examples=200, deadline=None)
@given(GRAMMAR)
def test_an_equation_means_what_it_means_in_python(text):
    """The oracle is Python itself, which this package never asks."""
    assume(text.count("**2") < 4)
    generator = torch.Generator().manual_seed(0)
    W, A = torch.rand(2, 3, 3, generator=generator, dtype=torch.float64)
    given_ = {"W": W, "A": A, "v": torch.rand(3, generator=generator, dtype=torch.float64), "s": 1.5}
    functions = {"tanh": torch.tanh, "abs": abs, "sigmoid": torch.sigmoid, "relu": torch.relu}
    try:
        expected = eval(text, {"__builtins__": {}}, {**functions, **given_})  # noqa: S307
    except (RuntimeError, TypeError, AttributeError, ZeroDivisionError):
        expected = None
    expression = parse(text, list(given_))
    if expected is None:
        with pytest.raises(EquationError):
            expression(given_)
    else:
        actual, expected = (torch.as_tensor(value, dtype=torch.float64) for value in (expression(given_), expected))
        torch.testing.assert_close(actual, expected, equal_nan=True)


EACH_FUNCTION = {
    "sum": "sum(A, 0)", "mean": "mean(A, 0)", "clamp_min": "clamp_min(A, 0.1)", "linear": "linear(A, A)",
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_every_function_prints(name):
    method = written(LORA, weight=f"W + alpha / r * B @ A * sum({EACH_FUNCTION.get(name, f'{name}(A)')})")
    assert "W + " in catalogue.described(type(method)).equation


# Definitions


def low_rank(name: str, declared: dict) -> dict:
    """With one tensor added or changed."""
    return {"tensors": {**LOW_RANK, name: declared}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "my-lora"}, "option 'name': 'my-lora' is no name"),
        ({"tensors": {}}, "option 'tensors': Dictionary should have at least 1 item"),
        ({"wieght": "W"}, "option 'wieght': it is unknown. Did you mean 'weight'"),
        ({"weight": None}, "it has no equation: give one or more of weight, bias, output"),
        ({"weight": "W + r * alpha"}, "option 'weight': it names no trained tensor; trained are A, B"),
        (low_rank("C", {"shape": [3]}), "option 'tensors.C': no equation names it"),
        (low_rank("r", {"shape": [3]}), "option 'options.r': 'r' is a tensor already"),
        (low_rank("W", {"shape": [3]}), "option 'tensors.W': 'W' is taken"),
        (low_rank("train", {"shape": [3]}), "option 'tensors.train': 'train' is taken"),
        (low_rank("norm", {"shape": [3]}), "option 'tensors.norm': 'norm' is taken"),
        (low_rank("ä", {"shape": [3]}), "option 'tensors.ä': 'ä' is no name"),
        ({"options": {"r": 2, "alpha": 5, "tensors": 1}}, "option 'options.tensors': 'tensors' is taken"),
        ({"options": {"r": 2, "alpha": 5, "beta": 1}}, "option 'options.beta': no equation, shape or init names it"),
        ({"options": {"r": "two", "alpha": 5}}, "option 'options.r': .*valid integer, got 'two'"),
        ({"options": {"r": True, "alpha": 5}}, "option 'options.r': .*valid integer, got True"),
        ({"options": {"r": 2, "alpha": float("nan")}}, "option 'options.alpha': .*finite number"),
        ({"options": {"r": 2.5, "alpha": 5}}, "option 'r': Input should be a valid integer"),
        ({"options": {"r": 10**20, "alpha": 5}}, "option 'tensors.A.shape': .* is no shape"),
        (low_rank("A", {}), "option 'tensors.A.shape': it is required"),
        (
            low_rank("A", {"shape": ["r", "in"], "int": "ones"}),
            "option 'tensors.A.int': it is unknown. Did you mean 'init'",
        ),
        (low_rank("A", {"shape": [1, 2, 3]}), "option 'tensors.A.shape': List should have at most 2"),
        (low_rank("A", {"shape": ["r", "inn"]}), "option 'tensors.A.shape': Unknown name 'inn'. Did you mean 'in'"),
        (low_rank("A", {"shape": ["r", "in / 2"]}), "option 'tensors.A.shape': '/' is not part of a size"),
        (low_rank("A", {"shape": ["r - 3", "in"]}), r"option 'tensors.A.shape': \[-1, in\] at W is no shape"),
        (
            low_rank("B", {"shape": ["out", "r"], "init": "kaiming"}),
            "'kaiming' begins no starting value. Did you mean 'kaiming_uniform'",
        ),
        (
            low_rank("B", {"shape": ["out", "r"], "init": "W"}),
            r"option 'tensors.B.init': its value is \[out, in\], not \[out, 2\]",
        ),
        ({"weight": "B @ A @ A.T * alpha"}, r"option 'weight': its value is \[out, 2\], not \[out, in\]"),
        (
            {"weight": None, "bias": "b + sum(alpha * B @ A, 1)", "options": {"r": 2, "alpha": 5, "dropout": 0.1}},
            "option 'options.dropout': it acts on the input of a weight's terms",
        ),
        (
            {"weight": "W + alpha * dropout * B @ A", "options": {"r": 2, "alpha": 5, "dropout": 0.1}},
            "Unknown name 'dropout'",
        ),
    ],
)
def test_a_wrong_definition_names_the_option(changes, message):
    with pytest.raises(sp.MethodError, match=message):
        written(LORA, **changes)


@pytest.mark.parametrize("spelled", ["lora", 3, {}, {1: 2}, {"name": 3}, {"name": "m", "tensors": {True: None}}])
def test_what_is_no_definition_is_refused(spelled):
    with pytest.raises(sp.MethodError, match="is required|defined by a mapping|valid string"):
        registry.read_method({"method": spelled})


def test_a_bias_has_no_in_features():
    with pytest.raises(sp.MethodError, match="option 'tensors.d.shape': Unknown name 'in'"):
        written({"name": "mine", "tensors": {"d": {"shape": ["in"]}}, "bias": "b + d"})


# Pipelines


@pytest.mark.parametrize("name", PAIRS)
def test_the_one_line_form_and_yaml_read_back(name):
    definition = {**PAIRS[name][0], "where": ["*.query", "*.{key,value}"], "exclude": "x"}
    listed = ["capture", {"method": definition}, {"dora": {"of": {"method": LORA}, "as": "second"}}, "fold"]
    pipeline = Pipeline.read(listed)
    assert Pipeline.read(str(pipeline)) == pipeline
    assert Pipeline.read(yaml.safe_load(yaml.safe_dump(listed))) == pipeline
    assert str(Pipeline.read(str(pipeline))) == str(pipeline)
    assert pipeline.passes[1].method == written(PAIRS[name][0])
    assert pipeline.passes[1].where == ["*.query", "*.{key,value}"]


TEXT = st.text(st.characters(codec="utf-8", exclude_categories=("Cs",)), max_size=8)
OPTIONS = st.dictionaries(st.sampled_from(["r", "alpha", "dropout", "of"]), st.integers(1, 9), max_size=3)


@settings(max_examples=100, deadline=None)
@given(patterns=st.dictionaries(TEXT, OPTIONS, max_size=3))
def test_mappings_survive_the_one_line_form(patterns):
    made = Pipeline.read([{"lora": {"patterns": patterns}}])
    assert Pipeline.read(str(made)) == made


PIPELINE = """model:
  factory: tests.test_cli:tiny
data:
  train: tests.test_cli:rows
  eval: tests.test_cli:rows
passes:
  - capture
  - method:
      name: my_lora
      tensors:
        A: {shape: [r, in], init: kaiming_uniform}
        B: {shape: [out, r], init: zeros}
      weight: W + alpha / r * B @ A
      options: {r: 2, alpha: 4}
      where: "*.{query,value}"
      trainable: classifier
  - dora:
      of:
        method:
          name: scaled
          tensors: {c: {shape: [in], init: ones}}
          weight: W * c
      where: "*.intermediate.dense"
  - train: {max_steps: 4, batch_size: 8, lr: 0.01}
  - fold
output: OUTPUT
"""


@pytest.fixture
def pipeline(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(PIPELINE.replace("OUTPUT", str(tmp_path / "out")))
    return path


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return result.output


def test_a_pipeline_that_defines_methods_runs_from_end_to_end(pipeline, tmp_path):
    output = call("run", pipeline, "--set", "my_lora.r=3")
    assert "4 steps" in output and "delta retained" in output
    page = (tmp_path / "out/report.md").read_text()
    assert "| my_lora | φ(W) = W + (α/r) B A |" in page
    assert "| φ(W) = diag(m/‖W diag(c)‖) W diag(c) |" in page
    assert (tmp_path / "out/merged").exists() is False and "bert_encoder_layer_0_attention_self_query_my_lora_A" in page
    stored = json.loads((tmp_path / "out/adapter/adapter.json").read_text())["adapters"]
    assert stored[0]["method"]["method"]["options"] == {"r": 3, "alpha": 4.0}
    config = load_config(tmp_path / "out/config.yaml")
    assert config.pipeline == load_config(pipeline, ["my_lora.r=3"]).pipeline
    folded = call("fold", tmp_path / "out/config.yaml")
    assert "Merged weights" in folded and (tmp_path / "out/merged/model.safetensors").exists()


def test_inspect_says_the_equation(pipeline):
    output = call("inspect", pipeline)
    assert "    φ(W) = W + (α/r) B A\n" in output and "φ(W) = diag(m/‖W diag(c)‖) W diag(c)" in output


def test_onnx_metadata_holds_the_definition(base, tmp_path):
    onnx = pytest.importorskip("onnx")
    from subgraph_peft import export

    export.to_onnx(adapt(base, written(LORA)), tmp_path / "model.onnx")
    facts = {p.key: p.value for p in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert registry.read_method(json.loads(facts["subgraph_peft.adapters"])[0]["method"]) == written(LORA)


def test_methods_lists_those_of_a_file(pipeline):
    listed = call("methods", pipeline)
    assert "my_lora" in listed and "scaled" in listed and "pissa" in listed
    assert "my_lora" not in call("methods")
    one = call("methods", pipeline, "my_lora")
    assert "weight: W + alpha / r * B @ A" in one and "[r, in]" in one and "U(±1/√in)" in one
    assert "φ(W) = W + (α/r) B A" in call("methods", pipeline, "lora")
    assert "Did you mean 'my_lora'" in call("methods", pipeline, "my_lra", code=1)
    assert "no pipeline file" in call("methods", "lora", "my_lora", code=2)


@pytest.mark.parametrize(
    ("override", "found"),
    [
        ("my_lora.r=7", {"r": 7}),
        ("method.options.alpha=1.5", {"alpha": 1.5}),
        ("my_lora.where=*.key", {"where": "*.key"}),
        ("my_lora.weight=W + r * B @ A * alpha", {"weight": "W + r * B @ A * alpha"}),
    ],
)
def test_overrides_reach_a_written_method(pipeline, override, found):
    rewrite = load_config(pipeline, [override]).pipeline.passes[1]
    have = {**rewrite.method.spelled(), **rewrite.method.spelled()["options"], "where": rewrite.where}
    assert {key: have[key] for key in found} == found


def test_a_wrong_override_names_the_options(pipeline):
    with pytest.raises(sp.ConfigError, match="'alhpa': it is unknown. Did you mean 'alpha'. Known: r, alpha, name"):
        load_config(pipeline, ["my_lora.alhpa=1"])
    with pytest.raises(sp.ConfigError, match="no 'my_lroa' in this pipeline. Did you mean 'my_lora'"):
        load_config(pipeline, ["my_lroa.r=1"])


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("weight: W + alpha / r * B @ A", "weight: W + alpha / r * B @ AA", 13, "Unknown name 'AA'. Did you mean 'A'"),
        ("init: kaiming_uniform", "init: kaiming", 11, "begins no starting value"),
        ("B: {shape", "B: {shap", 12, "option 'tensors.B.shap': it is unknown. Did you mean 'shape'"),
        ("alpha: 4}", "alpha: 4, beta: 1}", 14, "option 'options.beta': no equation, shape or init names it"),
        ("r: 2,", "r: -2,", 14, "option 'r': Input should be greater than 0"),
        ("      where: ", "      were: ", 15, "option 'were': it is unknown. Did you mean 'where'"),
        ("name: my_lora", "name: pissa", 9, "a pass is called 'pissa' already"),
        ("name: my_lora", "name: fold", 9, "a pass is called 'fold' already"),
        ("name: scaled", "name: method", 20, "a pass is called 'method' already"),
        ("weight: W * c", "weight: W * c.t", 22, "The only attribute is .T"),
        ("      name: my_lora\n", "", 8, "option 'name': it is required"),
    ],
)
def test_a_wrong_definition_names_file_and_line(pipeline, old, new, line, message):
    text = pipeline.read_text()
    assert old in text
    pipeline.write_text(text.replace(old, new))
    with pytest.raises(sp.ConfigError, match=message) as caught:
        load_config(pipeline)
    assert str(caught.value).startswith(f"{pipeline}:{line}:"), str(caught.value)
    if isinstance(caught.value.__cause__, EquationError):
        assert caret(caught.value) == (caught.value.__cause__.text, caught.value.__cause__.column)


def test_the_schema_describes_definitions():
    document = schema()
    options = document["$defs"]["method"]
    assert {"name", "tensors", "weight", "options", "where", "as"} <= set(options["properties"])
    assert options["required"] == ["name", "tensors"] and options["additionalProperties"] is False
    assert {"shape", "init", "lr"} <= set(document["$defs"]["Declared"]["properties"])


@pytest.mark.parametrize(("spelled", "message"), [
    ({"lora": 3}, "lora: its options are written as {name: value}, not 3"),
    ({"dora": {"of": {"lora": [8]}}}, r"lora: its options are written as {name: value}, not \[8\]"),
    ({"dora": {"of": "lroa"}}, "Unknown method 'lroa'. Did you mean 'lora'"),
    ({"dora": {"of": {"lora": {"rr": 2}}}}, "lora: option 'rr': it is unknown. Did you mean 'r'"),
])  # fmt: skip
def test_a_method_inside_another_is_read_as_one_by_itself(spelled, message):
    assert registry.read_method({"dora": {"of": {"dora": {"of": {"lora": {"r": 2}}}}}}).of.of.r == 2
    with pytest.raises(sp.MethodError, match=message):
        registry.read_method(spelled)


def test_sizes_have_names_where_they_are_whole_numbers():
    assert named("[30030, 60060] (2x30030 and 60060x2).") == "[out, in] (2xout and inx2)."
    assert named("130030, 300301, 0.30030, 60060.5") == "130030, 300301, 0.30030, 60060.5"
