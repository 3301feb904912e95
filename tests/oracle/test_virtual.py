"""The peft library, with the same tensors, gives the same outputs and the same losses."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.passes.reconstruction.prefix_tuning import PrefixTuning
from tests.models import LENGTH
from tests.sequences import EXACT, HIDDEN, METHODS, N, adapt, gap, losses, model, tensor

CONFIGS: dict[str, tuple[Callable[..., peft.PeftConfig], dict]] = {
    "prompt": (peft.PromptTuningConfig, {}),
    "mlp": (peft.PromptEncoderConfig, {"encoder_hidden_size": HIDDEN}),
    "lstm": (
        peft.PromptEncoderConfig, {"encoder_hidden_size": HIDDEN, "encoder_reparameterization_type": "LSTM"},
    ),
    "prefix": (peft.PrefixTuningConfig, {}),
    "projection": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": HIDDEN}),
}  # fmt: skip
PAIRS = [("gpt2", kind) for kind in METHODS] + [("llama", "prompt"), ("llama", "prefix"), ("llama", "projection")]
PAIRS += [("bert_tokens", "prefix"), ("bert", "projection"), ("gemma", "prompt")]
TASKS = {"bert": "SEQ_CLS", "bert_tokens": "TOKEN_CLS"}


@torch.no_grad()
def take_over(adapted: sp.Program, encoder: nn.Module) -> None:
    """The tensors of peft's encoder into ours."""
    adapter = adapted.adapters[0]
    theirs = {name: value for name, value in encoder.named_parameters()}
    if not isinstance(adapter.method, PrefixTuning):
        tensor(adapted, "P").copy_(theirs.pop("embedding.weight"))
        heads = [name for name in theirs if name.startswith("mlp_head") and name.endswith("weight")]
        for number, name in enumerate(heads, 1):
            tensor(adapted, f"W{number}").copy_(theirs[name])
            tensor(adapted, f"b{number}").copy_(theirs[name.replace("weight", "bias")])
        for name in theirs:
            if name.startswith("lstm_head"):
                tensor(adapted, name.partition(".")[2]).copy_(theirs[name])
        return
    layers = 2 * len(adapter.sites)
    shape = adapter.sites[0].shape
    if adapter.method.projection:
        for name, path in {"P": "embedding.weight", "W": "transform.0.weight", "b": "transform.0.bias"}.items():
            tensor(adapted, name).copy_(theirs[path])
        parts = {
            "W": theirs["transform.2.weight"].view(layers, *shape, -1),
            "b": theirs["transform.2.bias"].view(layers, *shape),
        }
        for index in range(layers):
            for name, values in parts.items():
                tensor(adapted, f"{name}_{'kv'[index % 2]}", index // 2).copy_(values[index])
        return
    values = theirs["embedding.weight"].view(N, layers, *shape)
    for index in range(layers):
        tensor(adapted, ("keys", "values")[index % 2], index // 2).copy_(values[:, index])


@pytest.mark.parametrize(("name", "kind"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
@pytest.mark.filterwarnings("ignore")
def test_the_peft_library_gives_the_same_outputs_and_losses(name, kind):
    config, options = CONFIGS[kind]
    net, inputs = model(name)
    theirs = peft.get_peft_model(
        copy.deepcopy(net), config(task_type=TASKS.get(name, "CAUSAL_LM"), num_virtual_tokens=N, **options)
    ).double().eval()  # fmt: skip
    adapted = adapt(name, METHODS[kind])
    encoder = theirs.prompt_encoder["default"]
    take_over(adapted, encoder)
    with torch.no_grad():
        expected = theirs(**inputs).logits
    expected = expected[:, N:] if expected.shape[1:2] == (N + LENGTH,) else expected
    assert gap(inputs, adapted.run().logits, expected) < EXACT
    if "labels" in inputs:
        own = [p for _, p in adapted.parameters(trainable=True)]
        adapted.module.eval()
        ours = losses(adapted.module, own, inputs)
        assert ours == pytest.approx(losses(theirs, list(encoder.parameters()), inputs), abs=EXACT)
        assert abs(ours[0] - ours[-1]) > 1e-3
