"""Training steps beside the peft library and the limit of the chip, in one run.

    python -m tests.benchmarks.speed --device cuda --json results.json      everything, on one GPU
    python -m tests.benchmarks.speed --device cuda --part llama-8           a part of it
    python -m tests.benchmarks.speed --tiny                                 a rehearsal on the CPU

bfloat16, rank 16 at every linear layer but the head; a step is forward, backward and AdamW (fused for both libraries),
on random tokens without a mask, which is the fastest case of both. Ours is `TrainStep`: compiled and recorded. Sides
take turns, step by step: numbers are medians, ratios are medians of the turns' ratios. Peaks are what torch allocated
at most from the rewrite (the attachment) to the third step, the base weights included, ours measured before peft is
attached. A cold start is everything from the model to the end of the first compiled step: capture, rewrite, compilation
here; attachment and compilation there. The matmul limit is the time of the frozen layers' own products (forward, and
the gradient of their input), launched back to back for as long as a step, in turns with the steps.
"""

import gc
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import peft
import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import subgraph_peft as sp
from subgraph_peft.base.files import write_json
from subgraph_peft.graph.passes import optimisations
from subgraph_peft.passes import IA3, SSB, SSL, DoRA, LoRA
from tests.benchmarks.attach import machine
from tests.benchmarks.sides import ATTENTION_AND_MLP, LABELS

RANK, ALPHA, MIB = 16, 16.0, 2**20
OFF = dict.fromkeys(optimisations(), False)
Inputs = dict[str, torch.Tensor]
Step = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Work:
    """modes: of torch.compile, for peft; "" is eager.    methods: more of our methods, beside LoRA."""

    kind: Literal["llama", "bert"]
    layers: int
    width: int
    feed_forward: int
    heads: int
    batch: tuple[int, int]
    modes: tuple[str, ...] = ("", "default")
    methods: tuple[str, ...] = ()
    checkpointing: bool = False

    def tiny(self) -> "Work":
        return Work(self.kind, 2, 64, 160, 4, (2, 16), self.modes[:1], self.methods, self.checkpointing)

    def make(self, device: str) -> tuple[nn.Module, Inputs]:
        torch.manual_seed(0)
        sizes = {
            "hidden_size": self.width, "intermediate_size": self.feed_forward, "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads, "vocab_size": 32000 if self.width > 64 else 100,
        }  # fmt: skip
        with torch.device(device):
            ids = torch.randint(1, sizes["vocab_size"], self.batch)
            if self.kind == "llama":
                model = LlamaForCausalLM._from_config(LlamaConfig(**sizes, use_cache=False), dtype=torch.bfloat16)
                return model.train(), {"input_ids": ids, "labels": ids.clone()}
            config = BertConfig(**sizes, num_labels=LABELS)
            model = BertForSequenceClassification._from_config(config, dtype=torch.bfloat16)
            labels = torch.arange(self.batch[0]) % LABELS
            return model.train(), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}

    @property
    def linears(self) -> tuple[str, ...]:
        return ATTENTION_AND_MLP if self.kind == "llama" else ("query", "key", "value", "dense")


BERT_MODES = ("", "reduce-overhead")
WORKS = {
    "llama-32": Work("llama", 32, 4096, 11008, 32, (4, 1024), methods=("dora",)),
    "llama-8": Work("llama", 8, 4096, 11008, 32, (4, 1024), ("",), ("dora", "ssl", "ssb", "ia3"), True),
    "llama-8 long": Work("llama", 8, 4096, 11008, 32, (2, 4096)),
    "bert-base": Work("bert", 12, 768, 3072, 12, (32, 128), BERT_MODES),
    "minilm": Work("bert", 6, 384, 1536, 12, (32, 64), BERT_MODES),
}
METHODS = {
    "lora": LoRA(r=RANK, alpha=ALPHA), "dora": DoRA(of=LoRA(r=RANK, alpha=ALPHA)), "ssl": SSL(), "ssb": SSB(),
    "ia3": IA3(),
}  # fmt: skip


class Bench:
    def __init__(self, device: str, steps: int, log: Callable[[str], None]):
        self.device, self.steps, self.log = device, steps, log
        self.alive: list[sp.TrainStep] = []

    def wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def fresh(self) -> None:
        gc.collect()
        torch.compiler.reset()
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak(self) -> float:
        return torch.cuda.max_memory_allocated() / MIB if self.device == "cuda" else 0.0

    def timed(self, action: Callable[[], Any]) -> tuple[Any, float]:
        self.wait()
        start = time.perf_counter()
        result = action()
        self.wait()
        return result, time.perf_counter() - start

    def alternate(self, steps: dict[str, Step]) -> dict[str, list[float]]:
        """Milliseconds of every side's steps, turn by turn."""
        times: dict[str, list[float]] = {name: [] for name in steps}
        for index in range(self.steps + 3):
            for name, step in steps.items():
                _, seconds = self.timed(step)
                if index >= 3:
                    times[name].append(seconds * 1e3)
        return times

    def warm(self, step: Step, count: int = 4) -> dict[str, float]:
        """Seconds of the first step, peak MiB up to the last, and its loss."""
        held = self.held()
        _, first = self.timed(step)
        for _ in range(count - 1):
            loss = step()
        self.wait()
        return {"first": first, "peak": self.peak() - held, "loss": float(loss)}

    def ours(self, program: sp.Program, method: str, where: list[str], inputs: Inputs) -> tuple[Step, dict[str, float]]:
        adapted, rewrite = self.timed(lambda: sp.rewrite(program, METHODS[method], where=where))
        adapted.module.train()
        step = sp.TrainStep(adapted, lr=1e-4)
        found = self.warm(lambda: step(inputs))
        found |= {"rewrite": rewrite, "recorded": len(step.recorded), "functions": count(step)}
        self.alive.append(step)
        return lambda: step(inputs), found

    def peft(self, wrapped: nn.Module, inputs: Inputs, mode: str) -> Step:
        run = wrapped if not mode else torch.compile(wrapped, mode=None if mode == "default" else mode)
        trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=self.device == "cuda")

        def step() -> torch.Tensor:
            loss = run(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss.detach().clone()

        return step

    def work(self, name: str, work: Work) -> dict[str, Any]:
        self.alive.clear()
        self.fresh()
        model, inputs = work.make(self.device)
        where = [f"*.{linear}" for linear in work.linears]
        program, capture = self.timed(lambda: sp.capture(model, inputs, verify=False))
        result: dict[str, Any] = {"capture": capture, "sides": {}}
        sides, steps = result["sides"], {}
        for method in ("lora", *work.methods):
            self.fresh()
            steps[method], sides[method] = self.ours(program, method, where, inputs)
            self.log(f"{name} {method} {sides[method]}")
        if work.checkpointing:
            self.fresh()
            program.module.gradient_checkpointing_enable()
            _, sides["lora, checkpointed"] = self.ours(program, "lora", where, inputs)
            program.module.gradient_checkpointing_disable()
            self.log(f"{name} checkpointed {sides['lora, checkpointed']}")
        if work.kind == "llama" and self.device == "cuda":
            steps["limit"] = matmuls(work, self.device)
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(work.linears))
        wrapped, attach = self.timed(lambda: peft.get_peft_model(model, config))
        for mode in work.modes:
            self.fresh()
            side = f"peft {mode or 'eager'}"
            steps[side] = self.peft(wrapped.train(), inputs, mode)
            sides[side] = self.warm(steps[side]) | {"attach": attach}
            self.log(f"{name} {side} {sides[side]}")
        if work.checkpointing:
            self.fresh()
            wrapped.gradient_checkpointing_enable({"use_reentrant": False})
            sides["peft eager, checkpointed"] = self.warm(self.peft(wrapped, inputs, ""))
            wrapped.gradient_checkpointing_disable()
        result["times"] = self.alternate(steps)
        self.log(f"{name} " + ", ".join(f"{side} {median(t):.2f} ms" for side, t in result["times"].items()))
        return result

    def held(self) -> float:
        """MiB that other sides of ours hold between steps: adapters, gradients and two moments; not recordings, which
        torch does not count as allocated."""
        own = sum(4 * parameter.nbytes for step in self.alive for parameter in step.parameters)
        return own / MIB if self.device == "cuda" else 0.0

    def losses(self, tiny: bool, count: int = 200) -> dict[str, Any]:
        """Losses of `count` steps of the plain eager graph and of the optimised, compiled one, in both dtypes."""
        sizes = (64, 160, 2, 4, 100) if tiny else (1024, 2816, 4, 16, 32000)
        found: dict[str, list[float]] = {}
        for dtype in (torch.float32, torch.bfloat16):
            for fast in (False, True):
                self.fresh()
                torch.manual_seed(0)
                names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
                config = LlamaConfig(**dict(zip(names, sizes, strict=True)), use_cache=False)
                with torch.device(self.device):
                    model = LlamaForCausalLM(config).to(dtype)
                    batches = [torch.randint(1, sizes[-1], (4, 16 if tiny else 256)) for _ in range(8)]
                program = sp.capture(model, {"input_ids": batches[0], "labels": batches[0]}, verify=False)
                adapted = sp.rewrite(program, METHODS["lora"], where=[f"*.{n}" for n in ATTENTION_AND_MLP])
                adapted = adapted if fast else sp.optimise(adapted, **OFF)
                adapted.module.train()
                step = sp.TrainStep(adapted, lr=1e-3, compile=fast, record=fast and self.device == "cuda")
                taken = [step({"input_ids": ids, "labels": ids}) for _ in range(count // 8) for ids in batches]
                found[f"{str(dtype)[6:]} {'fast' if fast else 'plain'}"] = torch.stack(taken).tolist()
        return found


def count(step: sp.TrainStep) -> int:
    return len(step.compiled_loss.functions) if step.compile else 0


def matmuls(work: Work, device: str) -> Step:
    """The products of the frozen layers in a step: x Wᵀ and g W, on four sets of operands in turn."""
    tokens, d, f, vocabulary = work.batch[0] * work.batch[1], work.width, work.feed_forward, 32000
    shapes = [(d, d)] * 4 + [(f, d)] * 2 + [(d, f)]

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    inputs = {n: random(tokens, n) for n in (d, f, vocabulary)}
    weights = [[random(*shape) for shape in shapes] for _ in range(4)]
    head = random(vocabulary, d)

    def step() -> torch.Tensor:
        for layer in range(work.layers):
            for W in weights[layer % 4]:
                inputs[W.shape[1]] @ W.T
        inputs[d] @ head.T
        inputs[vocabulary] @ head
        for layer in range(work.layers):
            for W in weights[layer % 4]:
                inputs[W.shape[0]] @ W
        return head

    return step


def tables(report: dict[str, Any]) -> list[Table]:
    speed = Table(title="A step, ours (LoRA) and peft", title_justify="left", show_edge=False, header_style="bold")
    for column in ("", "ours ms", "peft eager", "peft compiled", "/ eager", "/ compiled", "/ matmul limit",
                   "peak MiB", "/ eager", "cold start s", "peft's"):  # fmt: skip
        speed.add_column(column, justify="left" if not column else "right")
    methods = Table(title="Our methods beside our LoRA", title_justify="left", show_edge=False, header_style="bold")
    for column in ("", "method", "ms", "/ lora", "peak MiB", "/ lora"):
        methods.add_column(column, justify="right" if column not in ("", "method") else "left")
    for name, result in report["works"].items():
        times, sides = result["times"], result["sides"]
        ours, eager = times["lora"], times["peft eager"]
        best = min((s for s in times if s.startswith("peft ") and s != "peft eager"), default="",
                   key=lambda side: median(times[side]))  # fmt: skip

        def ratio(side: str, of: list[float] = ours, times: dict = times) -> str:
            return f"{median(a / b for a, b in zip(of, times[side], strict=True)):.2f}" if side in times else ""

        cold = result["capture"] + sides["lora"]["rewrite"] + sides["lora"]["first"]
        theirs = f"{sides[best]['first'] + sides[best]['attach']:.1f}" if best else ""
        speed.add_row(
            name, f"{median(ours):.2f}", f"{median(eager):.1f}", f"{median(times[best]):.1f}" if best else "",
            ratio("peft eager"), ratio(best), ratio("limit"), f"{sides['lora']['peak']:.0f}",
            f"{sides['lora']['peak'] / max(sides['peft eager']['peak'], 1):.2f}", f"{cold:.1f}", theirs,
        )  # fmt: skip
        for method in ("dora", "ssl", "ssb", "ia3"):
            if method in times:
                peak = sides[method]["peak"]
                methods.add_row(name, method, f"{median(times[method]):.2f}", ratio("lora", times[method]),
                                f"{peak:.0f}", f"{peak / max(sides['lora']['peak'], 1):.3f}")  # fmt: skip
        if "lora, checkpointed" in sides:
            own, peer = (sides[f"{side}, checkpointed"]["peak"] for side in ("lora", "peft eager"))
            methods.add_row(name, "lora, checkpointed", "", "", f"{own:.0f}", f"{own / max(peer, 1):.2f} of peft's")
    return [speed, methods]


def main(
    device: Annotated[Literal["cpu", "cuda"], typer.Option(help="Where models live.")] = "cpu",
    part: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(WORKS)}, losses.")] = None,
    tiny: Annotated[bool, typer.Option(help="Small models.")] = False,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps of each side.")] = 15,
    json: Annotated[Path | None, typer.Option(help="Write every sample to this file.")] = None,
) -> None:
    """Compare with the peft library and with the chip."""
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    console, started = Console(width=160), time.perf_counter()
    report: dict[str, Any] = {"machine": machine(device), "works": {}}
    console.print(", ".join(f"{key} {value}" for key, value in report["machine"].items()), highlight=False)
    bench = Bench(device, steps, lambda text: print(f"[{time.perf_counter() - started:6.1f}] {text}", flush=True))
    for name in part or [*WORKS, "losses"]:
        if name == "losses":
            report["losses"] = found = bench.losses(tiny)
            pairs = [(f"{dtype} plain", f"{dtype} fast") for dtype in ("float32", "bfloat16")]
            for one, two in (*pairs, ("float32 plain", "bfloat16 plain")):
                apart = max(abs(x - y) for x, y in zip(found[one], found[two], strict=True))
                ends = f"{found[one][0]:.4f} to {found[one][-1]:.4f} in {len(found[one])} steps"
                console.print(f"losses, {one} ({ends}) and {two}: {apart:.1e} apart at most")
        else:
            report["works"][name] = bench.work(name, WORKS[name].tiny() if tiny else WORKS[name])
        if json:
            write_json(json, report, sp.SubgraphPeftError)
    for table in tables(report):
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
