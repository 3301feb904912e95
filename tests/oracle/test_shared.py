"""A weight that is called twice: DeBERTa's query_proj and key_proj read hidden states and relative positions."""

from functools import cache

import pytest
import torch

import subgraph_peft as sp
from subgraph_peft.passes import SSB, DoRA, LoRA
from tests.models import deberta

METHODS = [LoRA(r=3), DoRA(of=LoRA(r=3)), SSB()]
WHERE = "*.{query,key}_proj"


@cache
def program() -> sp.Program:
    model, inputs = deberta()
    return sp.capture(model.double(), inputs)


def adapted(method: sp.Method, where: str = WHERE) -> sp.Program:
    result = sp.rewrite(program(), method, where=where)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, parameter in result.parameters(trainable=True):
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).double())
    return result


def distance(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def test_query_and_key_are_called_twice_a_layer():
    calls = {site.name: len(site.calls) for site in sp.sites(program())}
    shared = {name: count for name, count in calls.items() if name.endswith(("query_proj.weight", "key_proj.weight"))}
    assert set(shared.values()) == {2} and len(shared) == 4
    assert all(count == 1 for name, count in calls.items() if name.endswith("value_proj.weight"))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_folds_exactly(method):
    trained = adapted(method)
    folded = sp.fold(trained)
    assert distance(trained.run().logits, program().run().logits) > 1e-2
    assert distance(folded.run().logits, trained.run().logits) <= 1e-12

    model, inputs = deberta()
    sp.write_to(folded, model.double())
    assert distance(model(**inputs).logits, trained.run().logits) <= 1e-12


@pytest.mark.parametrize(("method", "term"), [*zip(METHODS, ["B", "B", "columns"], strict=True)])
def test_every_call_is_rewritten(method, term):
    """None of the original calls is left, and the term that meets the activations is there once a call."""
    trained = adapted(method)
    names = {node.name for node in trained.graph.nodes}
    emitted = [node.meta.get("custom", {}).get("subgraph_peft", {}) for node in trained.graph.nodes]
    for site in trained.adapters[0].sites:
        assert not names & {call.node for call in site.calls}
        assert sum(tag.get("site") == site.name and tag["term"] == term for tag in emitted) == len(site.calls) == 2


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.name)
def test_only_the_first_call_would_not_fold(method, monkeypatch):
    """The law is worth having: with the second calls left bare, the program differs from its own fold."""
    trained = adapted(method)
    folded = sp.fold(trained)
    eager, inputs = deberta()
    eager.double()
    sp.write_to(folded, eager)
    layer = eager.deberta.encoder.layer[0].attention.self
    bare = program().module.get_parameter("deberta.encoder.layer.0.attention.self.key_proj.weight")
    calls = iter([layer.key_proj.weight.detach(), bare])

    def once(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, next(calls), layer.key_proj.bias)

    monkeypatch.setattr(layer.key_proj, "forward", once)
    assert distance(eager(**inputs).logits, trained.run().logits) > 1e-6
