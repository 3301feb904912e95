"""Every method that the peft library has too: the same tensors give the same function, losses and merged weights."""

import pytest
import torch

import subgraph_peft as sp
from tests.models import MODELS
from tests.oracle.pairs import METHODS, PLACES, Pair, losses, pair, take_factors

CASES = [(model, method) for model in PLACES for method in METHODS]


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float) -> bool:
    return (actual - expected).abs().max().item() <= bound * expected.abs().max().item()


def sides(model: str, method: str, dtype: torch.dtype) -> Pair:
    both = pair(model, method, dtype)
    if method == "pissa":
        take_factors(both)
    return both.share()


@pytest.mark.parametrize(("model", "method"), CASES)
def test_same_sites_and_trainable_count(model, method):
    both = pair(model, method, torch.float32)
    ours = [path for path, _, _ in both.tensors()]
    theirs = [name for name, parameter in both.theirs.named_parameters() if parameter.requires_grad]
    assert len(ours) == len(theirs) > 0
    assert both.ours.counts()[0] == both.theirs.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize(("model", "method"), CASES)
def test_same_outputs_and_merged_weights(model, method):
    """float64 to 1e-12; peft starts PiSSA in float32 only, so 1e-6 there."""
    dtype, bound = (torch.float32, 2e-6) if method == "pissa" else (torch.float64, 1e-12)
    both = sides(model, method, dtype)
    eager, inputs = MODELS[model]()
    eager = eager.to(dtype)
    base = eager(**inputs).logits
    actual, expected = both.ours.run(inputs), both.theirs(**inputs)
    assert type(actual) is type(expected)
    assert not close(base, expected.logits, 1e-2)
    assert close(actual.logits, expected.logits, bound)
    assert close(actual.loss, expected.loss, bound)

    changed = sp.write_to(sp.fold(both.ours), eager)
    merged = both.theirs.merge_and_unload()
    assert changed
    for name, weight in merged.named_parameters():
        assert close(eager.get_parameter(name), weight, bound), name
    assert close(eager(**inputs).logits, expected.logits, 10 * bound)


@pytest.mark.parametrize(
    ("model", "method", "dtype", "bound"),
    [(*case, torch.float32, 1e-6) for case in CASES if case[1] == "pissa" or case[0] == "bert"]
    + [(*case, torch.float64, 1e-11) for case in CASES if case[1] != "pissa"],
)
def test_same_losses_over_five_steps(model, method, dtype, bound):
    both = sides(model, method, dtype)
    inputs = MODELS[model]()[1]
    ours, theirs = losses(both.ours.module, inputs), losses(both.theirs, inputs)
    assert abs(theirs[-1] - theirs[0]) > 1e-2 * theirs[0]
    assert ours == pytest.approx(theirs, rel=bound)


@pytest.mark.parametrize("model", PLACES)
@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_same_starting_magnitudes_and_scales(model, method):
    both = pair(model, method, torch.float64)
    compared = 0
    for path, own, their in both.tensors():
        if path.endswith((".m", ".l", ".B")):
            torch.testing.assert_close(own, their.reshape(own.shape), rtol=1e-12, atol=0)
            compared += 1
    assert compared >= len(both.ours.adapters[0].sites)


@pytest.mark.parametrize("model", PLACES)
def test_same_pissa_factors_up_to_sign(model):
    both = pair(model, "pissa", torch.float32)
    held = {path: (own, their) for path, own, their in both.tensors()}
    for site in both.ours.adapters[0].sites:
        (A, theirs_A), (B, theirs_B) = (held[both.ours.adapters[0].path(site, name)] for name in "AB")
        assert close(B @ A, theirs_B @ theirs_A, 1e-5)
        sign = (A * theirs_A).sum(1).sign()
        assert close(sign[:, None] * A, theirs_A, 1e-4)
        assert close(B * sign, theirs_B, 1e-4)
        stored = site.matrix(both.ours.module.get_parameter(site.name))
        residual = site.matrix(both.theirs.get_parameter(f"base_model.model.{site.owner}.base_layer.weight"))
        assert close(stored - both.ours.adapters[0].method.s * B @ A, residual, 1e-5)
