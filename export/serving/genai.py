"""genai_config.json: how onnxruntime-genai runs a decoder's file."""

from typing import Any

from torch import nn

from ..onnx.report import ExportReport
from .cached import PAST, PRESENT


def genai_config(model: nn.Module, report: ExportReport, file: str) -> dict[str, Any]:
    config, generation = model.config.get_text_config(decoder=True), model.generation_config
    _, heads, _, width = report.inputs[f"{PAST}.0.key"]
    context = getattr(config, "max_position_embeddings", None) or 2**31 - 1
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in report.inputs}

    def token(name: str) -> Any:
        own = getattr(generation, name)
        return getattr(config, name, None) if own is None else own

    end, pad = token("eos_token_id"), token("pad_token_id")
    first = end[0] if isinstance(end, list) else end
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": token("bos_token_id"),
            "eos_token_id": end,
            "pad_token_id": first if pad is None else pad,
            "context_length": context,
            "vocab_size": config.vocab_size,
            "decoder": {
                "filename": file,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": sum(name.endswith(".key") for name in report.inputs),
                "num_key_value_heads": heads,
                "inputs": {
                    **inputs,
                    "past_key_names": f"{PAST}.%d.key",
                    "past_value_names": f"{PAST}.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": f"{PRESENT}.%d.key",
                    "present_value_names": f"{PRESENT}.%d.value",
                },
            },
        },
        "search": {
            "do_sample": bool(generation.do_sample),
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": False,
            "temperature": generation.temperature or 1.0,
            "top_k": generation.top_k or 0,
            "top_p": generation.top_p or 1.0,
        },
    }
