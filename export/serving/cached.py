"""Models of transformers as functions of their key-value cache: tensors by name in, logits and the longer cache out."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from subgraph_peft.base.borrowed import get
from subgraph_peft.base.errors import ExportError

PAST, PRESENT = "past_key_values", "present"
Tensors = Mapping[str, torch.Tensor]
PAIRS = tuple(map(get, ("transformers.cache_utils:DynamicLayer", "transformers.cache_utils:DynamicSlidingWindowLayer")))


def decoder(model: nn.Module, keep: int) -> Callable[..., dict[str, torch.Tensor]]:
    """(input_ids [batch, length], attention_mask [batch, past + length], past_key_values {"0.key": [batch, heads, past,
    width], …}, position_ids [batch, length]) to {"logits": [batch, keep, vocabulary], "present.0.key": [batch, heads,
    past + length, width], …}. keep: of the last tokens, 0 of all"""
    forward = model.forward
    own = {"logits_to_keep": keep} if "logits_to_keep" in inspect.signature(forward).parameters else {}

    def step(
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        past_key_values: Tensors,
        position_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        positions = {} if position_ids is None else {"position_ids": position_ids}
        result = forward(
            input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache(past_key_values), use_cache=True,
            **positions, **own,
        )  # fmt: skip
        return {"logits": result.logits[:, -keep:], **named(result.past_key_values, PRESENT)}

    return step


def encoder(model: nn.Module) -> Callable[..., dict[str, torch.Tensor]]:
    """The encoder's inputs to {"last_hidden_state": [batch, source, width], "present.0.encoder.key": [batch, heads,
    source, width], …}: the keys and values of cross-attention, which no step of the decoder computes again."""
    forward = model.forward

    def encode(**inputs: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = model.get_encoder()(**inputs, return_dict=True).last_hidden_state
        past = EncoderDecoderCache(DynamicCache(), DynamicCache())
        forward(
            encoder_outputs=BaseModelOutput(hidden), attention_mask=inputs.get("attention_mask"), past_key_values=past,
            decoder_input_ids=hidden.new_zeros(hidden.shape[:1] + (1,), dtype=torch.long), use_cache=True,
        )  # fmt: skip
        return {"last_hidden_state": hidden, **named(past.cross_attention_cache, PRESENT, "encoder.")}

    names = [model.main_input_name, *(["attention_mask"] if model.main_input_name == "input_ids" else [])]
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    encode.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    return encode


def decoder_of_encoded(model: nn.Module, keep: int, width: int) -> Callable[..., dict[str, torch.Tensor]]:
    """(input_ids [batch, length], past_key_values {"0.decoder.key": …, "0.encoder.key": …}, encoder_attention_mask
    [batch, source]) to {"logits": …, "present.0.decoder.key": …}. width: of the encoder's states"""
    forward = model.forward

    def step(
        input_ids: torch.Tensor, past_key_values: Tensors, encoder_attention_mask: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        own, cross = (cache(past_key_values, f"{part}.") for part in ("decoder", "encoder"))
        past = EncoderDecoderCache(own, cross)
        past.is_updated = dict.fromkeys(range(len(cross.layers)), True)
        batch, _, source, _ = past_key_values["0.encoder.key"].shape
        unread = past_key_values["0.encoder.key"].new_zeros(batch, source, width)
        result = forward(
            encoder_outputs=BaseModelOutput(unread), attention_mask=encoder_attention_mask, decoder_input_ids=input_ids,
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        return {"logits": result.logits[:, -keep:], **named(past.self_attention_cache, PRESENT, "decoder.")}

    return step


def cache(tensors: Tensors, part: str = "") -> DynamicCache:
    """Of {"0.key": …, "0.value": …}; `part` stands between the layer and "key". Layers with a window keep all keys too:
    the mask hides them."""
    count = sum(name.endswith(f".{part}key") for name in tensors)
    return DynamicCache([(tensors[f"{i}.{part}key"], tensors[f"{i}.{part}value"]) for i in range(count)])


def named(past: Cache, prefix: str, part: str = "") -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for index, layer in enumerate(past.layers):
        found[f"{prefix}.{index}.{part}key"], found[f"{prefix}.{index}.{part}value"] = layer.keys, layer.values
    return found


def check_cache(model: nn.Module, result: Mapping[str, Any]) -> None:
    """Raises ExportError where what a model keeps of its inputs is not keys and values of every layer."""
    past = result.get(PAST)
    parts = [past.self_attention_cache, past.cross_attention_cache] if isinstance(past, EncoderDecoderCache) else [past]
    kept = [layer for part in parts for layer in getattr(part, "layers", ())]
    other = [type(layer).__name__ for layer in kept if type(layer) not in PAIRS or not layer.is_initialized]
    if not kept or other:
        what = ", ".join(sorted(set(other)) or [name for name in result if name not in ("loss", "logits")]) or "nothing"
        raise ExportError(
            f"{type(model).__name__} keeps {what} between steps, not keys and values for every layer: there is no "
            "decoder file of other states. to_onnx writes the model without a cache."
        )
