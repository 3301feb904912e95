import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base.patterns import expand_braces
from subgraph_peft.program.selectors import select
from tests import models


def site(owner: str, kind: str = "linear", out: int = 24, head: bool = False) -> sp.Site:
    return sp.Site(f"{owner}.weight", kind, (out, 24), torch.float32, (), head=head)


@pytest.fixture(scope="module")
def bert_sites():
    layers = [f"bert.encoder.layer.{i}" for i in range(2)]
    return [
        site("bert.embeddings.word_embeddings", "embedding", 61),
        *(site(f"{layer}.attention.self.{name}") for layer in layers for name in ("query", "key", "value")),
        *(site(f"{layer}.intermediate.dense", out=40) for layer in layers),
        site("bert.pooler.dense"),
        site("classifier", out=3, head=True),
    ]


def names(selection):
    return [site.owner for site in selection.sites]


def test_braces_expand_and_nest():
    assert expand_braces("a.{b,c}.d") == ["a.b.d", "a.c.d"]
    assert expand_braces("{a,b{1,2}}.x") == ["a.x", "b1.x", "b2.x"]
    with pytest.raises(sp.SelectorError, match="unbalanced braces"):
        expand_braces("a.{b,c")


def test_glob_exact_and_regular_expressions_agree(bert_sites):
    by_glob = names(select(bert_sites, "*.attention.self.{query,value}"))
    by_regex = names(select(bert_sites, r"re:.*\.attention\.self\.(query|value)"))
    exact = names(select(bert_sites, [f"exact:{name}" for name in by_glob]))
    weights = names(select(bert_sites, "*.attention.self.{query,value}.weight"))
    assert by_glob == by_regex == exact == weights
    assert len(by_glob) == 4


def test_exclude_and_kinds(bert_sites):
    everything = names(select(bert_sites, "*"))
    less = names(select(bert_sites, "*", exclude="*.query"))
    assert set(everything) - set(less) == {n for n in everything if n.endswith("query")} != set()
    assert names(select(bert_sites, "*", kinds=["embedding"])) == [s.owner for s in bert_sites if s.kind == "embedding"]


def test_a_predicate_selects(bert_sites):
    wider = names(select(bert_sites, lambda s: s.out_features > s.in_features))
    assert wider == [s.owner for s in bert_sites if s.shape[0] > 24] != []


def test_heads_and_embeddings_are_left_out_unless_named(bert_sites):
    selection = select(bert_sites, "*")
    left_out = {site.owner: reason for site, reason in selection.left_out}
    assert left_out["classifier"] == "output head: name it to include it"
    assert left_out["bert.embeddings.word_embeddings"] == "embedding: name it to include it"
    assert names(select(bert_sites, "classifier")) == ["classifier"]
    assert names(select(bert_sites, "re:classifier")) == ["classifier"]
    assert names(select(bert_sites, "*word_embeddings")) == ["bert.embeddings.word_embeddings"]


def test_nothing_matched_is_an_error_with_the_nearest_names(bert_sites):
    with pytest.raises(sp.SelectorError, match=r"'\*.attention.self.qurey' matches none of .*attention.self.query"):
        select(bert_sites, "*.attention.self.qurey")
    with pytest.raises(sp.SelectorError, match=r"try '\*.query'"):
        select(bert_sites, "query")
    with pytest.raises(sp.SelectorError, match="'\\*.nothing' matches none"):
        select(bert_sites, ["*.query", "*.nothing"])
    with pytest.raises(sp.SelectorError, match="leaves no site"):
        select(bert_sites, "*.query", exclude="*")
    with pytest.raises(sp.SelectorError, match="not a regular expression"):
        select(bert_sites, "re:(")


def test_a_model_of_one_layer_says_that_its_head_was_left_out():
    program = sp.capture(nn.Linear(3, 2), torch.randn(2, 3))
    with pytest.raises(sp.SelectorError, match="output head"):
        select(sp.sites(program), "*")


def test_the_site_table_shows_layouts_ties_and_calls():
    text = str(sp.sites(models.captured("gpt2")))
    assert "addmm" in text and "[in, out]" in text
    assert "tied to" in text and "output head" in text
    lines = str(sp.sites(models.captured("albert"))).splitlines()
    header = [cell.strip() for cell in lines[1].split("┃")]
    query = next(line for line in lines if "query" in line).split("│")
    assert query[header.index("calls")].strip() == "2"
