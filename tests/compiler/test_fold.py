import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.graph.nodes import show
from subgraph_peft.passes import SSL, LoRA, ParallelAdapter
from tests import models


def trained(base, method, where, size=0.05, **options):
    program = sp.rewrite(base, method, where=where, **options)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in program.parameters(trainable=True):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return program


def test_folding_reports_each_site_and_leaves_the_adapted_program_alone():
    adapted = trained(models.captured("bert"), LoRA(r=2), "*.{query,value}")
    before = {n: t.clone() for n, t in adapted.tensors()}
    folded = sp.fold(adapted)
    assert len(folded.folded.sites) == 4 and folded.folded.retained > 0.999
    assert all(site.relative_delta > 0.001 for site in folded.folded.sites.values())
    assert folded.folded.output_error < 1e-5
    assert all(torch.equal(t, before[n]) for n, t in adapted.tensors())
    assert folded.history[-1] == "fold" and not folded.module.training


def test_write_to_puts_plain_weights_into_the_model_and_nothing_else():
    model, inputs = models.bert()
    adapted = trained(sp.capture(model, inputs), LoRA(r=2), "*.query", trainable="classifier")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    expected = adapted.run().logits
    changed = sp.write_to(sp.fold(adapted), model)
    assert changed == [n for n in before if n.endswith("query.weight") or n.startswith("classifier")]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items() if n not in changed)
    torch.testing.assert_close(model.eval()(**inputs).logits, expected)
    torch.testing.assert_close(adapted.run().logits, expected, msg="the program keeps its own weights")


def test_write_to_refuses_before_it_writes():
    model, inputs = models.mlp()
    adapted = trained(sp.capture(model, inputs), LoRA(r=2), "first")
    with pytest.raises(sp.FoldError, match=r"sp.fold\(program\)"):
        sp.write_to(adapted, model)
    other, _ = models.conv()
    before = {n: t.clone() for n, t in other.state_dict().items()}
    with pytest.raises(sp.FoldError, match="takes the model that was captured"):
        sp.write_to(sp.fold(adapted), other)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())
    with pytest.raises(sp.FoldError, match="Convert the model"):
        sp.write_to(sp.fold(adapted), model.double())


def test_values_that_are_not_finite_are_refused_by_name():
    adapted = trained(models.captured("mlp"), LoRA(r=2), "*")
    with torch.no_grad():
        adapted.module.get_parameter("shared.weight_lora.B")[0, 0] = float("nan")
    with pytest.raises(sp.FoldError, match="lora.B at shared.weight holds 1 values"):
        sp.fold(adapted)


def test_a_16_bit_fold_that_loses_the_update_is_refused_and_float32_keeps_it():
    model, inputs = models.llama()
    base = sp.capture(model.to(torch.bfloat16), inputs)
    adapted = trained(base, LoRA(r=2, alpha=0.02), "*.{q,v}_proj")
    with pytest.raises(sp.FoldError, match=r"keeps only \d+% of the update of model.layers.*Fold into torch.float32"):
        sp.fold(adapted, dtype=torch.bfloat16)
    wide = sp.fold(adapted)
    assert wide.folded.dtype == torch.float32 and wide.folded.retained > 0.999
    assert {p.dtype for p in wide.module.parameters()} == {torch.float32}
    accepted = sp.fold(adapted, dtype=torch.bfloat16, retain=0.0)
    assert accepted.folded.retained < 0.9
    strong = sp.fold(trained(base, LoRA(r=2, alpha=16.0), "*.{q,v}_proj", size=0.5), dtype=torch.bfloat16)
    assert strong.folded.retained > 0.9
    sp.write_to(strong, model)
    torch.testing.assert_close(model.eval()(**inputs).logits, strong.run().logits)


def test_a_float32_program_is_not_narrowed_by_a_fold():
    with pytest.raises(sp.FoldError, match="would narrow every weight"):
        sp.fold(trained(models.captured("mlp"), LoRA(r=2), "first"), dtype=torch.bfloat16)


def test_what_cannot_fold_stays_and_the_rest_folds():
    model, _ = models.bert()
    base = models.captured("bert")
    mixed = trained(trained(base, LoRA(r=2), "*.query"), ParallelAdapter(r=2), "*.intermediate.dense")
    folded = sp.fold(mixed)
    assert [a.name for a in folded.adapters] == ["parallel_adapter"] == list(folded.folded.remaining)
    text = show(folded.graph)
    assert "_lora_" not in text and text.count("parallel_adapter_relu") > 0
    torch.testing.assert_close(folded.run().logits, mixed.run().logits)
    with pytest.raises(sp.FoldError, match="parallel_adapter cannot become plain weights"):
        sp.write_to(folded, model)


def test_a_wrong_equation_does_not_fold(monkeypatch):
    """The check that compares outputs can fail: here the graph and the fold disagree."""
    base = sp.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.randn(3, 4))
    adapted = trained(base, SSL(), "0")
    monkeypatch.setattr(SSL, "weight", lambda self, W, c: W * c.flip(0))
    with pytest.raises(sp.FoldError, match="differs from the unfolded one"):
        sp.fold(adapted)
