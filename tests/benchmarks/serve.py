"""Serving merged models: onnxruntime on CUDA beside torch, and what an export costs.

    python -m tests.benchmarks.serve --device cuda --json results.json      everything, on one GPU
    python -m tests.benchmarks.serve --device cuda --part latency           a part of it
    python -m tests.benchmarks.serve --tiny                                 a rehearsal on the CPU

latency: BERT-base with a classifier in float16 at length 128, LoRA of rank 16 on all linears: its base and its merged
         form as fused ONNX files with the same session settings, files with slots and the adapter in them, all with
         bound inputs and outputs and as CUDA graphs, beside the merged model in torch: eager, torch.compile, and
         torch.compile with reduce-overhead. Inputs are on the device; a call ends when its result is there. Sides take
         turns, call by call: medians, and medians of the turns' ratios. The profile counts the operators of the merged
         file by the provider that ran them. Beside it: milliseconds to load an adapter into each file.
export:  a Llama of 6.7 G parameters in float16 to fused files: seconds, and memory of the process beyond the model's.
"""

import gc
import json as json_
import tempfile
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import onnxruntime
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.base.files import write_json
from subgraph_peft.passes import LoRA
from tests.benchmarks.attach import machine
from tests.benchmarks.sides import ALPHA, LABELS, RANK

PARTS = ("latency", "export")
LINEARS = [f"*.{name}" for name in ("query", "key", "value", "dense")]
PAIR = ["*.query", "*.value"]
SLOTTED: dict[str, tuple[list[str], Literal["run", "load"]]] = {
    "slots": (LINEARS, "run"),
    "slots at query and value": (PAIR, "run"),
    "slots merged on load": (LINEARS, "load"),
}
Call = Callable[[], Any]


class Bench:
    def __init__(self, device: str, tiny: bool, calls: int, say: Callable[[str], None]):
        self.device, self.tiny, self.calls, self.say = device, tiny, calls, say
        self.cuda = device == "cuda"

    def timed(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    def alternate(self, sides: dict[str, Call]) -> dict[str, list[float]]:
        """Milliseconds of every side's calls, turn by turn."""
        for call in sides.values():
            for _ in range(5):
                self.timed(call)
        times: dict[str, list[float]] = {name: [] for name in sides}
        for _ in range(self.calls):
            for name, call in sides.items():
                times[name].append(self.timed(call) * 1e3)
        return times

    def fresh(self) -> None:
        torch.compiler.reset()
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()

    # latency

    def latency(self, folder: Path) -> dict[str, Any]:
        sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2} if self.tiny else {}
        torch.manual_seed(0)
        with torch.device(self.device):
            model = BertForSequenceClassification(BertConfig(**sizes, num_labels=LABELS)).eval()
        length = 16 if self.tiny else 128
        program = sp.capture(model, self.batch(2, length), verify=False)
        adapted = {name: self.adapted(program, where) for name, (where, _) in SLOTTED.items()}
        folded = sp.fold(adapted["slots"])
        files = {name: folder / f"{name}.onnx" for name in ("base", "merged", *SLOTTED)}
        options = {"dtype": "float16", "optimize": True}
        reports = {"base": export.to_onnx(program, files["base"], **options)}
        reports["merged"] = export.to_onnx(folded, files["merged"], **options)
        for name, program in adapted.items():
            reports[name] = export.to_onnx(program, files[name], slots=True, merge=SLOTTED[name][1], **options)
            export.to_adapter(program, folder / f"{name}.onnx_adapter", files[name])
        sp.write_to(folded, model)
        model = model.half() if self.cuda else model
        result = {
            "nodes": {name: report.nodes for name, report in reports.items()},
            "fused": reports["merged"].fused,
            "drift": {name: report.drift["logits"].relative for name, report in reports.items()},
            "load": {name: self.loading(files[name], folder / f"{name}.onnx_adapter") for name in SLOTTED},
            "batches": {},
        }
        for batch in (1, 4 if self.tiny else 32):
            result["batches"][batch] = times = self.alternate(self.sides(model, files, folder, batch, length))
            self.say(f"latency {batch}: " + ", ".join(f"{side} {median(t):.3f}" for side, t in times.items()))
        result["profile"] = self.profile(files["merged"], self.batch(1, length), folder)
        return result

    @staticmethod
    def adapted(program: sp.Program, where: list[str]) -> sp.Program:
        adapted = sp.rewrite(program, LoRA(r=RANK, alpha=ALPHA), where=where)
        with torch.no_grad():
            for _, parameter in adapted.parameters(trainable=True):
                parameter.normal_(std=0.01)
        return adapted

    def batch(self, size: int, length: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(1, 30000, (size, length), device=self.device)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}

    def loading(self, model: Path, adapter: Path) -> float:
        """Milliseconds, the second time."""
        served = export.Adapters(model)
        served.load(adapter)
        return 1e3 * self.timed(lambda: served.load(adapter))

    def sides(self, model: Any, files: dict[str, Path], folder: Path, batch: int, length: int) -> dict[str, Call]:
        inputs = self.batch(batch, length)
        sides: dict[str, Call] = {}
        for name, path in files.items():
            run = export.BoundSession(path)
            given = [folder / f"{name}.onnx_adapter"] if name in SLOTTED else []
            active = [export.Adapters(run.opened).load(file) for file in given]
            sides[name] = lambda run=run, active=active: run(inputs, active)
            sides[name]()
        plain = export.BoundSession(files["merged"], cuda_graph=False)
        sides["merged, no CUDA graph"] = lambda: plain(inputs)
        modes = {"torch eager": None, "torch.compile": "default", "torch.compile reduce-overhead": "reduce-overhead"}
        for name, mode in modes.items():
            if self.tiny and mode:
                continue
            torch.compiler.reset()
            run = torch.compile(model, mode=mode) if mode else model
            sides[name] = lambda run=run: self.without_gradients(run, inputs)
            sides[name]()
        return sides

    @staticmethod
    def without_gradients(run: Callable, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with torch.inference_mode():
            return run(**inputs).logits

    def profile(self, path: Path, inputs: dict[str, torch.Tensor], folder: Path) -> dict[str, dict[str, int]]:
        """Provider -> operator -> nodes of it that ran."""
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
        opened = onnxruntime.InferenceSession(str(path), options, providers=export.session(path).get_providers())
        opened.run(None, {name: tensor.cpu().numpy() for name, tensor in inputs.items()})
        events = json_.loads(Path(opened.end_profiling()).read_text())
        ran = Counter(
            (event["args"]["provider"], event["args"]["op_name"])
            for event in events
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
        )
        found: dict[str, dict[str, int]] = {}
        for (provider, operator), count in ran.most_common():
            found.setdefault(provider, {})[operator] = count
        return found

    def llama(self, width: int, feed_forward: int, layers: int, heads: int, shared: int, vocabulary: int) -> Any:
        if self.tiny:
            width, feed_forward, layers, heads, shared, vocabulary = 32, 48, 2, 4, 2, 100
        config = LlamaConfig(
            hidden_size=width, intermediate_size=feed_forward, num_hidden_layers=layers, num_attention_heads=heads,
            num_key_value_heads=shared, vocab_size=vocabulary, max_position_embeddings=4096,
        )  # fmt: skip
        torch.manual_seed(0)
        with torch.device(self.device):
            return LlamaForCausalLM._from_config(config, dtype=torch.float16 if self.cuda else torch.float32).eval()

    def once(self, action: Call) -> tuple[Any, float]:
        start = time.perf_counter()
        result = action()
        return result, time.perf_counter() - start

    # export

    def export(self, folder: Path) -> dict[str, Any]:
        model = self.llama(4096, 11008, 32, 32, 32, 32000)
        ids = torch.randint(1, 100, (2, 16), device=self.device)
        program, capture = self.once(lambda: sp.capture(model, {"input_ids": ids}, verify=False))
        size = sum(parameter.nbytes for parameter in model.parameters())
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        path = folder / "export" / "model.onnx"
        with Resident() as memory:
            report, seconds = self.once(lambda: export.to_onnx(program, path, optimize=True))
        found = {
            "model bytes": size, "file bytes": report.bytes, "capture": capture, "export": seconds,
            "memory beyond": memory.most - memory.start, "fused": report.fused,
            "drift": {name: drift.relative for name, drift in report.drift.items()},
        }  # fmt: skip
        if self.cuda:
            found["torch on the device at most"] = torch.cuda.max_memory_allocated()
        self.say(f"export: {seconds:.0f} s, {found['memory beyond'] / size:.2f} of the model's size in memory")
        return found


class Resident:
    """start, most: bytes of this process in memory, those of mapped files left out."""

    def __enter__(self) -> "Resident":
        self.start = self.most = self.now()
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        self.thread.join()

    def watch(self) -> None:
        while not self.ended.wait(0.02):
            self.most = max(self.most, self.now())

    @staticmethod
    def now() -> int:
        fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
        return int(fields["RssAnon"].split()[0]) * 1024


def tables(report: dict[str, Any]) -> list[Table]:
    found = []
    for batch, times in report.get("latency", {}).get("batches", {}).items():
        shown = Table(title=f"BERT-base, batch {batch}", title_justify="left", show_edge=False, header_style="bold")
        for column in ("", "ms", "/ merged", "a second"):
            shown.add_column(column, justify="right" if column else "left")
        for side, own in times.items():
            ratio = median(a / b for a, b in zip(own, times["merged"], strict=True))
            shown.add_row(side, f"{median(own):.3f}", f"{ratio:.2f}", f"{1e3 * int(batch) / median(own):,.0f}")
        found.append(shown)
    return found


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where models live.")] = "cpu",
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}.")] = None,
    tiny: Annotated[bool, typer.Option(help="Small models.")] = False,
    calls: Annotated[int, typer.Option(min=1, help="Timed calls of each side.")] = 100,
    json: Annotated[Path | None, typer.Option(help="Write every sample to this file.")] = None,
) -> None:
    """Measure onnxruntime and torch in one run."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    console, started = Console(width=140), time.perf_counter()
    report: dict[str, Any] = {"machine": machine(device) | {"onnxruntime": onnxruntime.__version__}}
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    bench = Bench(device, tiny, calls, lambda text: print(f"[{time.perf_counter() - started:6.1f}] {text}", flush=True))
    for name in part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            report[name] = getattr(bench, name)(Path(folder))
        bench.fresh()
        if json:
            write_json(json, report, sp.SubgraphPeftError)
    for shown in tables(report):
        console.print(shown)
    if "export" in report:
        console.print(report["export"])
    if "latency" in report:
        console.print({key: value for key, value in report["latency"].items() if key != "batches"})


if __name__ == "__main__":
    typer.run(main)
