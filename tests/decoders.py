"""Tiny random models that generate, their logits spread out so that tokens change: `model, inputs = llama()`."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import nn

from tests.models import Made

VOCABULARY = 96
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64, "initializer_range": 0.3,
    **SPECIAL,
}  # fmt: skip


def made(build: Callable[[], nn.Module], inputs: Callable[[], dict[str, torch.Tensor]]) -> Made:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build().eval()
        model.generation_config.eos_token_id = None
        return model, inputs()


def causal(architecture: str, **options: Any) -> Callable[[], Made]:
    def build() -> nn.Module:
        cls = getattr(transformers, architecture)
        model = cls(cls.config_class(**{**SIZES, **options}))
        if getattr(model.config, "num_experts_per_tok", None):
            model.set_experts_implementation("grouped_mm")
        return model

    return lambda: made(build, sentences)


def sentences() -> dict[str, torch.Tensor]:
    ids = torch.randint(3, VOCABULARY, (3, 6))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}


def t5() -> Made:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=40, num_layers=1, num_decoder_layers=1, num_heads=4,
        decoder_start_token_id=0, initializer_factor=12.0, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return made(lambda: transformers.T5ForConditionalGeneration(config), sentences)


def whisper() -> Made:
    config = transformers.WhisperConfig(
        vocab_size=VOCABULARY, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=40, decoder_ffn_dim=40, num_mel_bins=8, max_source_positions=10,
        max_target_positions=32, init_std=0.3, decoder_start_token_id=1, suppress_tokens=[], begin_suppress_tokens=[],
        **SPECIAL,
    )  # fmt: skip

    def build() -> nn.Module:
        model = transformers.WhisperForConditionalGeneration(config)
        nn.init.normal_(model.model.decoder.embed_positions.weight)
        return model

    def speech() -> dict[str, torch.Tensor]:
        return {"input_features": torch.randn(2, 8, 20), "labels": torch.randint(3, VOCABULARY, (2, 6))}

    return made(build, speech)


MODELS: dict[str, Callable[[], Made]] = {
    "llama": causal("LlamaForCausalLM", num_hidden_layers=2, head_dim=16),
    "gpt2": causal("GPT2LMHeadModel"),
    "qwen3": causal("Qwen3ForCausalLM", head_dim=8),
    "gemma3": causal(
        "Gemma3ForCausalLM", num_hidden_layers=2, head_dim=8, sliding_window=4, tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"],
    ),
    "mistral": causal("MistralForCausalLM", sliding_window=4),
    "mixtral": causal("MixtralForCausalLM", num_local_experts=4, num_experts_per_tok=2),
    "t5": t5,
    "whisper": whisper,
}  # fmt: skip
