"""Tiny random transformers models from their class names, and inputs of the usual kinds."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers

from tests.models import BATCH, LENGTH, VOCABULARY, made, sequences
from tests.zoo.entry import Entry, Inputs

HIDDEN, LAYERS, HEADS, INNER = 24, 2, 4, 40
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def tiny(
    name: str, group: str, architecture: str, inputs: Callable[[], Inputs], config: Mapping[str, Any], **options: Any
) -> Entry:
    """An entry for the transformers class `architecture` with the settings `config`.

    experts: (option) the implementation of a mixture of experts to choose before capture
    """
    experts = options.pop("experts", None)

    def model() -> torch.nn.Module:
        cls = getattr(transformers, architecture)
        built = cls(cls.config_class(**config))
        for part in built.modules():
            if getattr(getattr(part, "config", None), "use_cache", False):
                part.config.use_cache = False
        if experts is not None:
            built.set_experts_implementation(experts)
        return built

    return Entry(name, group, lambda: made(model, inputs), **options)


def plain_generation() -> Inputs:
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": ids, "labels": ids.clone()}


def token_classification() -> Inputs:
    return {**sequences(), "labels": torch.randint(0, 3, (BATCH, LENGTH))}


def masked_words() -> Inputs:
    return {**sequences(), "labels": torch.randint(0, VOCABULARY, (BATCH, LENGTH))}


def translation() -> Inputs:
    """Another length on the decoder's side than on the encoder's."""
    inputs = sequences()
    labels = torch.randint(3, VOCABULARY, (BATCH, LENGTH - 2))
    return {**inputs, "decoder_input_ids": labels.roll(1, 1), "labels": labels}


def images(size: int = 32, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(BATCH, channels, size, size)}


def labelled_images(size: int = 32) -> Callable[[], Inputs]:
    return lambda: {**images(size)(), "labels": torch.arange(BATCH) % 3}
