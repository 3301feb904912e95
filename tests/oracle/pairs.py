"""The same adapted model twice: rewritten here, and wrapped by the peft library, with the same tensor values."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

import peft
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.compiler.constants import refresh
from subgraph_peft.passes import IA3, DoRA, LoRA, PiSSA, RsLoRA
from tests.models import MODELS

RANK, ALPHA, STEPS = 3, 5.0, 5


@dataclass(frozen=True)
class Places:
    """Last parts of module names: those that every method takes, and (IA)³'s two kinds of site."""

    weights: tuple[str, ...]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]


LLAMA_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
PLACES = {
    "bert": Places(("query", "key", "value", "dense"), ("key", "value"), ("output.dense",)),
    "gpt2": Places(("c_attn", "c_proj", "c_fc"), ("c_attn",), ("mlp.c_proj",)),
    "llama": Places((*LLAMA_ATTENTION, "gate_proj", "up_proj", "down_proj"), ("k_proj", "v_proj"), ("down_proj",)),
    "tied_llama": Places(LLAMA_ATTENTION, ("k_proj", "v_proj"), ("o_proj",)),
    "albert": Places(("query", "key", "value", "dense", "ffn", "ffn_output"), ("key", "value"), ("ffn_output",)),
}
METHODS = {
    "lora": (LoRA(r=RANK, alpha=ALPHA), {}),
    "rslora": (RsLoRA(r=RANK, alpha=ALPHA), {"use_rslora": True}),
    "dora": (DoRA(of=LoRA(r=RANK, alpha=ALPHA)), {"use_dora": True}),
    "pissa": (PiSSA(r=RANK, alpha=ALPHA), {"init_lora_weights": "pissa"}),
    "ia3": (IA3(scale="output"), {}),
}
# our tensor -> the name that peft gives it
THEIR_NAMES = {
    "A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight",
    "l": "ia3_l.default", "A0": "lora_A.default.weight", "B0": "lora_B.default.weight",
}  # fmt: skip


@dataclass(frozen=True)
class Pair:
    ours: sp.Program
    theirs: peft.PeftModel

    def tensors(self, trainable: bool = True) -> Iterable[tuple[str, nn.Parameter, nn.Parameter]]:
        """(name, our tensor, their tensor) of every adapter tensor; the frozen ones are left out if `trainable`."""
        found = dict(self.theirs.named_parameters())
        for adapter in self.ours.adapters:
            for site, tensor, path in adapter.all_paths():
                own = self.ours.module.get_parameter(path)
                if own.requires_grad or not trainable:
                    yield path, own, found[f"base_model.model.{site.owner}.{THEIR_NAMES[tensor]}"]

    @torch.no_grad()
    def share(self, seed: int = 1) -> "Pair":
        """Move our trained tensors away from their start and give them to peft."""
        generator = torch.Generator().manual_seed(seed)
        for _, own, their in self.tensors():
            own.add_(0.1 * torch.randn(own.shape, generator=generator, dtype=torch.float64).to(own.dtype))
            their.copy_(own.reshape(their.shape))
        return self


@cache
def captured(model: str, dtype: torch.dtype) -> tuple[sp.Program, nn.Module]:
    """The program, and the model that it was captured from."""
    source, inputs = MODELS[model]()
    return sp.capture(source.to(dtype), inputs), source


def paths(names: Iterable[str]) -> list[str]:
    return [f"*.{name}" for name in names]


def pair(model: str, method: str, dtype: torch.dtype) -> Pair:
    """Both sides as they start; PiSSA's factors are peft's on both, since a decomposition has no fixed signs."""
    places, (ours, options) = PLACES[model], METHODS[method]
    program, _ = captured(model, dtype)
    eager = MODELS[model]()[0].to(dtype)
    conv1d = {"fan_in_fan_out": model == "gpt2"}
    if method == "ia3":
        program = sp.rewrite(program, ours, where=paths(places.outputs))
        program = sp.rewrite(program, IA3(scale="input"), where=paths(places.inputs))
        targets, inputs = [*places.outputs, *places.inputs], [*places.inputs]
        config = peft.IA3Config(target_modules=targets, feedforward_modules=inputs, **conv1d)
    else:
        program = sp.rewrite(program, ours, where=paths(places.weights))
        targets = [*places.weights]
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, **options, **conv1d)
    theirs = peft.get_peft_model(eager, config).eval()
    return Pair(program, theirs)


@torch.no_grad()
def take_factors(pair: Pair) -> None:
    """Give our PiSSA the factors that peft found, as starting and as trained values."""
    for _, own, their in pair.tensors(trainable=False):
        own.copy_(their)
    refresh(pair.ours.module, pair.ours.constants)


def losses(module: nn.Module, inputs: Mapping[str, torch.Tensor], steps: int = STEPS) -> list[float]:
    """The loss before each of `steps` AdamW steps and after the last."""
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=5e-3)
    seen = []
    for _ in range(steps):
        loss = module(**inputs)[0]
        seen.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seen.append(module(**inputs)[0].item())
    return seen
