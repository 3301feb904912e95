"""A head that is tied to the embedding: refused, or untied, never changed behind its twin's back."""

from functools import cache

import pytest
import torch

import subgraph_peft as sp
from subgraph_peft.passes import DoRA, LoRA
from tests.models import tied_llama

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
METHODS = [LoRA(r=3), DoRA(of=LoRA(r=3))]


@cache
def captured() -> sp.Program:
    model, inputs = tied_llama()
    return sp.capture(model.double(), inputs)


def trained(method: sp.Method) -> sp.Program:
    program = sp.rewrite(captured(), method, where="lm_head", tied="untie")
    with torch.no_grad():
        for _, parameter in program.parameters(trainable=True):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)).double())
    return program


@pytest.mark.parametrize("where", ["lm_head", "model.embed_tokens"])
def test_refused_by_default(where):
    other = EMBEDDING if where == "lm_head" else HEAD
    with pytest.raises(sp.SelectorError, match=rf"{where}.weight is tied to {other}.*untie"):
        sp.rewrite(captured(), LoRA(r=3), where=where)


def test_wildcards_leave_the_tied_head_out():
    program = sp.rewrite(captured(), LoRA(r=3))
    assert HEAD not in {site.name for site in program.adapters[0].sites}
    assert (HEAD, "output head: name it to include it") in program.adapters[0].left_out


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_untied_leaves_the_embedding_as_it_is(method):
    source, inputs = tied_llama()
    before = source.double().state_dict()[EMBEDDING].clone()
    program = trained(method)
    folded = sp.fold(program)
    for result in (program, folded):
        assert torch.equal(result.module.get_parameter(EMBEDDING), before)
    assert not torch.equal(folded.module.get_parameter(HEAD), before)
    assert torch.equal(program.captured.module.get_parameter(HEAD), before)
    assert not any(HEAD in group for group in folded.ties)


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_write_to_unties_the_eager_model(method):
    model, inputs = tied_llama()
    model.double()
    before = model.get_parameter(EMBEDDING).detach().clone()
    assert model.get_parameter(HEAD) is model.get_parameter(EMBEDDING)
    folded = sp.fold(trained(method))

    assert sp.write_to(folded, model) == [HEAD]
    assert model.get_parameter(HEAD) is not model.get_parameter(EMBEDDING)
    assert torch.equal(model.get_parameter(EMBEDDING), before)
    assert torch.equal(model.get_parameter(HEAD), folded.module.get_parameter(HEAD))
    assert model.config.tie_word_embeddings is False
    torch.testing.assert_close(model(**inputs).logits, folded.run(inputs).logits, rtol=1e-12, atol=1e-12)


def test_untied_head_survives_save_and_load(tmp_path):
    model, inputs = tied_llama()
    sp.write_to(sp.fold(trained(LoRA(r=3))), model.double())
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(again(**inputs).logits, expected, rtol=1e-12, atol=1e-12)
