"""Tokens a second of a Llama with random weights: transformers' generate, and the same model in onnxruntime.

python -m tests.benchmarks.decode --device cuda              1.2 B parameters, float16, batch 1
python -m tests.benchmarks.decode --device cuda --batch 8 --new 256
python -m tests.benchmarks.decode --tiny                     seconds on a CPU: operators, no meaningful times

Every form of the file generates the same number of tokens from the same prompt, end tokens ignored; the best of three
runs counts, after one to warm up. Beside it, the operators that the file has most of. Forms with slots run under a LoRA
of rank 16 at all linears of the blocks.
"""

import argparse
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import onnx
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.passes import LoRA

FORMS: dict[str, dict[str, Any]] = {
    "as captured": {},
    "fused": {"optimize": True},
    "fused, opset 23": {"optimize": True, "opset": 23},
    "fused, 4 bits": {"optimize": True, "quantize": 4},
    "slots": {"optimize": True, "opset": 23, "slots": True},
    "slots merged on load": {"optimize": True, "opset": 23, "slots": True, "merge": "load"},
}
SIZES = {
    "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8,
    "intermediate_size": 8192, "vocab_size": 128256, "head_dim": 64,
}  # fmt: skip
TINY = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 128, "head_dim": 16,
}  # fmt: skip


def rate(generate: Callable[[], torch.Tensor], tokens: int) -> float:
    """Tokens a second of the best of three runs."""
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        generate()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return tokens / min(seconds[1:])


def operators(path: str) -> str:
    counts = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    return f"{sum(counts.values())}: " + ", ".join(f"{name} {count}" for name, count in counts.most_common(8))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float16", choices=["float16", "float32"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--form", action="append", choices=[*FORMS], help="all by default")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(LlamaConfig(**(TINY if options.tiny else SIZES))).eval()
        ids = torch.randint(3, 128, (options.batch, options.prompt))
    model.generation_config.eos_token_id = None
    program = sp.capture(model, {"input_ids": ids[:, :8], "attention_mask": torch.ones_like(ids[:, :8])}, verify=False)
    adapted = sp.rewrite(program, LoRA(r=16), where="*_proj")
    with torch.no_grad():
        for _, parameter in adapted.parameters(trainable=True):
            parameter.normal_(std=0.01)
    narrow = LlamaForCausalLM(model.config).to(options.device, getattr(torch, options.dtype)).eval()
    narrow.generation_config.eos_token_id = None
    asked = {"max_new_tokens": options.new}

    table = Table("", "tokens/s", "× transformers", "drift", "nodes")
    tokens = options.batch * options.new
    base = rate(lambda: narrow.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, **asked), tokens)
    table.add_row("transformers", f"{base:.1f}", "1.00", "", "")
    print(f"transformers {base:.1f} tokens/s", flush=True)
    for name in options.form or FORMS:
        form = FORMS[name]
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = adapted if form.get("slots") else program
                written = export.to_decoder(made, model, folder, dtype=options.dtype, bound=10.0, **form)
                generator, own = export.Generator(folder), []
                if form.get("slots"):
                    export.to_adapter(made, f"{folder}/own.onnx_adapter", f"{folder}/model.onnx", bound=10.0)
                    own = [generator.load(f"{folder}/own.onnx_adapter")]
                found = rate(lambda: generator.generate(ids, adapters=own, **asked), tokens)  # noqa: B023
            except sp.ExportError as error:
                table.add_row(name, "", "", "", str(error)[:120])
                continue
            print(f"{name} {found:.1f} tokens/s, {found / base:.2f} times transformers'", flush=True)
            drift = max(d.relative for d in written.files["model.onnx"].drift.values())
            nodes = operators(f"{folder}/model.onnx")
            table.add_row(name, f"{found:.1f}", f"{found / base:.2f}", f"{drift:.1e}", nodes)
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
