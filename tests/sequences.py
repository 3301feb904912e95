"""Small sequence models in float64 with padded inputs, captured once, and what compares their outputs."""

from collections.abc import Callable
from functools import cache

import torch
import transformers
from torch import nn

import subgraph_peft as sp
from subgraph_peft.passes.reconstruction.p_tuning import PTuning
from subgraph_peft.passes.reconstruction.prefix_tuning import PrefixTuning
from subgraph_peft.passes.reconstruction.prompt_tuning import PromptTuning
from tests import models
from tests.models import BATCH, ENCODER, LENGTH, VOCABULARY, made

N, EXACT, PAD = 4, 1e-12, 1
DECODER = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "intermediate_size": 40, "max_position_embeddings": 64, "initializer_range": 0.2,
    "pad_token_id": PAD, "num_labels": 3,
}  # fmt: skip
BART = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "max_position_embeddings": 32,
    "dropout": 0.0, "pad_token_id": PAD, "decoder_start_token_id": 2, "init_std": 0.2,
}  # fmt: skip
STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": PAD}
MODERNBERT = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_labels": 3, "local_attention": 6, "pad_token_id": PAD, "initializer_range": 0.2,
    "initializer_cutoff_factor": 9.0,
}  # fmt: skip
Inputs = dict[str, torch.Tensor]


def tokens() -> Inputs:
    """Token ids, none of them padding but where the last row is padded on the right."""
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[-1, -2:] = 0
    ids = torch.randint(3, VOCABULARY, (BATCH, LENGTH))
    return {"input_ids": ids.masked_fill(mask == 0, PAD), "attention_mask": mask}


def classes() -> Inputs:
    return {**tokens(), "labels": torch.arange(BATCH) % 3}


def typed() -> Inputs:
    return {**classes(), "token_type_ids": torch.randint(0, 2, (BATCH, LENGTH))}


def per_token() -> Inputs:
    inputs = tokens()
    labels = torch.randint(0, 3, (BATCH, LENGTH)).masked_fill(inputs["attention_mask"] == 0, -100)
    return {**inputs, "labels": labels}


def next_token() -> Inputs:
    inputs = tokens()
    return {**inputs, "labels": inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)}


def positioned() -> Inputs:
    return {**next_token(), "position_ids": torch.arange(LENGTH).expand(BATCH, LENGTH).clone()}


def translation() -> Inputs:
    return {**tokens(), "labels": torch.randint(3, VOCABULARY, (BATCH, 5))}


def of(model: str, config: str, inputs: Callable[[], Inputs], **options) -> tuple[Callable[[], nn.Module], Callable]:
    return lambda: getattr(transformers, model)(getattr(transformers, config)(**options)), inputs


ALBERT = {"embedding_size": 16, "classifier_dropout_prob": 0.0}
BUILD: dict[str, tuple[Callable[[], nn.Module], Callable[[], Inputs]]] = {
    "bert": of("BertForSequenceClassification", "BertConfig", typed, **ENCODER, **STILL),
    "bert_tokens": of("BertForTokenClassification", "BertConfig", per_token, **ENCODER, **STILL),
    "roberta": of("RobertaForSequenceClassification", "RobertaConfig", classes, **ENCODER, **STILL),
    "albert": of("AlbertForSequenceClassification", "AlbertConfig", classes, **ENCODER, **STILL, **ALBERT),
    "deberta": (lambda: models.deberta()[0], classes),
    "modernbert": of("ModernBertForSequenceClassification", "ModernBertConfig", classes, **MODERNBERT),
    "gpt2": (lambda: models.gpt2()[0], next_token),
    "llama": of("LlamaForCausalLM", "LlamaConfig", next_token, **DECODER),
    "llama_positions": of("LlamaForCausalLM", "LlamaConfig", positioned, **DECODER),
    "llama_classes": of("LlamaForSequenceClassification", "LlamaConfig", classes, **DECODER),
    "mistral": of("MistralForCausalLM", "MistralConfig", next_token, **DECODER, sliding_window=3),
    "gemma": of("Gemma3ForCausalLM", "Gemma3TextConfig", tokens, **DECODER, head_dim=8),
    "bart": of("BartForConditionalGeneration", "BartConfig", translation, **BART),
}


@cache
def model(name: str) -> tuple[nn.Module, Inputs]:
    built, inputs = made(*BUILD[name])
    return built.double().eval(), inputs


@cache
def captured(name: str) -> sp.Program:
    return sp.capture(*model(name))


def adapt(name: str, method: sp.Method, **options) -> sp.Program:
    return sp.rewrite(captured(name), method, dtype=torch.float64, **options)


def tensor(program: sp.Program, name: str, site: int = 0, adapter: int = 0) -> nn.Parameter:
    found = program.adapters[adapter]
    return program.module.get_parameter(found.path(found.sites[site], name))


def full() -> sp.Program:
    """30 of 32 positions in use."""
    ids = torch.randint(3, VOCABULARY, (2, 30))
    return sp.capture(transformers.BertModel(transformers.BertConfig(**ENCODER, **STILL)), {"input_ids": ids})


def other(inputs: Inputs, rows: int = 2, length: int = 6) -> Inputs:
    return {k: v[:rows, :length] if v.shape[:2] == (BATCH, LENGTH) else v[:rows] for k, v in inputs.items()}


def rolled(inputs: Inputs) -> Inputs:
    """The same rows, padded on the left."""
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    along = {k for k, v in inputs.items() if v.shape == inputs["attention_mask"].shape and k != "position_ids"}
    return {
        k: torch.stack([row.roll(p) for row, p in zip(v, padding, strict=True)]) if k in along else v
        for k, v in inputs.items()
    }


def real(inputs: Inputs, value: torch.Tensor) -> torch.Tensor:
    """What an output holds for tokens that are not padding."""
    mask = inputs["attention_mask"].bool()
    return value[mask] if value.shape[:2] == mask.shape else value


def gap(inputs: Inputs, actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (real(inputs, actual) - real(inputs, expected)).abs().max().item()


def losses(call: Callable, parameters: list[nn.Parameter], inputs: Inputs) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    found = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = call(**inputs).loss
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


HIDDEN = 5
METHODS: dict[str, sp.Method] = {
    "prompt": PromptTuning(n=N),
    "mlp": PTuning(n=N, hidden=HIDDEN),
    "lstm": PTuning(n=N, hidden=HIDDEN, encoder="lstm"),
    "prefix": PrefixTuning(n=N),
    "projection": PrefixTuning(n=N, projection=True, hidden=HIDDEN),
}
