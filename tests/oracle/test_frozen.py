"""Frozen means frozen: training touches the adapter's tensors alone, and a fold gives the captured graph back."""

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.graph.nodes import show
from subgraph_peft.passes import SSB, DoRA, LoRA, PiSSA
from tests.models import MODELS
from tests.oracle.pairs import PLACES, captured, losses, paths

METHODS = [LoRA(r=3), PiSSA(r=3), SSB(), DoRA(of=PiSSA(r=3))]


def bits(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("method", METHODS, ids=lambda m: f"{m.name}-{getattr(m, 'of', m).name}")
@pytest.mark.parametrize("model", PLACES)
def test_base_and_source_are_bit_identical_after_training(model, method):
    program, source = captured(model, torch.float32)
    inputs = MODELS[model]()[1]
    adapted = sp.rewrite(program, method, where=paths(PLACES[model].weights))
    of_source, of_program, of_adapted = bits(source), bits(program.module), bits(adapted.module)
    trainable = {name for name, _ in adapted.parameters(trainable=True)}
    assert trainable and not trainable & set(of_source)

    seen = losses(adapted.module, inputs)
    assert seen[-1] < seen[0]
    for module, before in ((source, of_source), (program.module, of_program)):
        assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    for name, value in adapted.module.state_dict().items():
        assert torch.equal(value, of_adapted[name]) == (name not in trainable), name

    folded = sp.fold(adapted)
    assert all(torch.equal(value, of_source[name]) for name, value in source.state_dict().items())
    assert show(folded.graph) == show(program.graph)
    assert show(adapted.graph) != show(program.graph)
    assert sp.fold(folded) is folded
