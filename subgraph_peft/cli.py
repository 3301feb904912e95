"""The command line. Exit codes: 0 done, 1 refused with a message, 2 wrong usage, 130 interrupted."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from . import __version__
from .base.errors import ConfigError
from .pipeline.console import announce, print_rows, print_table, refusals, together

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="A compiler for parameter-efficient fine-tuning.",
    pretty_exceptions_enable=False,
)
Config = Annotated[str, typer.Argument(help="a pipeline file, or the name of a shipped one", metavar="PIPELINE")]
Set = Annotated[
    list[str], typer.Option("--set", help="override, e.g. --set lora.r=16 --set train.epochs=1", metavar="A.B=C")
]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="results folder, in place of the file's")]


class Layout(StrEnum):
    """Of an adapter folder."""

    native = "native"
    peft = "peft"
    lora = "lora"


@app.command()
def run(pipeline: Config, set_: Set = [], output: Output = None) -> None:  # noqa: B006
    """Run a whole pipeline: capture, rewrite, train, fold, export; writes a folder with a report.

    On several GPUs: torchrun --nproc_per_node=GPUS -m subgraph_peft.cli run PIPELINE
    """
    from .pipeline.command_state import configured
    from .pipeline.run import run as run_

    with together():
        config = configured(pipeline, set_, output)
        run_(config, announce)
        announce(f"\nReport: {config.output}/report.md")


@app.command()
def train(pipeline: Config, set_: Set = [], output: Output = None) -> None:  # noqa: B006
    """Run a pipeline up to its training; the adapter is saved. Under torchrun too."""
    from .pipeline.command_state import configured
    from .pipeline.run import run as run_

    with together():
        config = configured(pipeline, set_, output).until("train")
        run_(config, announce)
        announce(f"\nAdapter: {config.output}/adapter")


@app.command()
def inspect(
    pipeline: Config,
    set_: Set = [],  # noqa: B006
    output: Output = None,
    graph: Annotated[bool, typer.Option("--graph", help="print what each pass changes in the graph")] = False,
    all_sites: Annotated[bool, typer.Option("--sites", help="print every site, rewritten or not")] = False,
) -> None:
    """Dry run: each site, what matched it, what the method will cost. Nothing is trained or written."""
    import tempfile

    from .compiler.costs import rewrite_table
    from .method import catalogue
    from .pipeline.builtin_passes import Capture, Optimise, Rewrite
    from .pipeline.command_state import configured
    from .pipeline.graph_diff import summarised
    from .pipeline.run import prepare
    from .program.sites import site_table, sites

    with refusals(), tempfile.TemporaryDirectory() as scratch:
        config = configured(pipeline, set_, output)
        state = prepare(config, Path(scratch), announce)
        for item in config.pipeline.passes:
            if isinstance(item, (Capture, Rewrite, Optimise)):
                result = item(state)
                state = result.state
                announce(f"{item.spelled()}  {result.summary}  ({result.cost})")
                if isinstance(item, Rewrite):
                    announce(f"    {catalogue.described(item.method).equation}")
                if graph and result.difference:
                    announce("\n".join(summarised(result.difference)))
        if all_sites or not state.program.adapters:
            print_table(site_table(sites(state.program)))
        if state.program.adapters:
            print_table(rewrite_table(state.program))
            for adapter in state.program.adapters:
                for name, why in adapter.left_out:
                    announce(f"left out by {adapter.name}: {name} ({why})")


Adapter = Annotated[Path | None, typer.Option("--adapter", help="adapter folder; the pipeline's own by default")]


@app.command()
def fold(pipeline: Config, set_: Set = [], output: Output = None, adapter: Adapter = None) -> None:  # noqa: B006
    """Fold a trained adapter into plain weights and write them to OUTPUT/merged."""
    from .compiler.fold import fold_table
    from .pipeline.command_state import configured, fold_pass, with_adapter
    from .store.merged_folder import save_merged

    with refusals():
        config = configured(pipeline, set_, output)
        state = with_adapter(config, adapter)
        result = fold_pass(config)(state)
        report = save_merged(result.state.program, state.model, state.tokenizer, Path(config.output) / "merged")
        print_table(fold_table(result.state.program))
        announce(f"{result.summary}\nMerged weights: {report}")


@app.command()
def export(pipeline: Config, set_: Set = [], output: Output = None, adapter: Adapter = None) -> None:  # noqa: B006
    """Fold a trained adapter and write the merged model as ONNX, checked in onnxruntime: what the pipeline's `export`
    and `decoder` passes say; with --set export.slots=true the base and an onnxruntime adapter."""
    from .pipeline.command_state import configured, fold_pass, with_adapter
    from .pipeline.deploy import Deploy
    from .pipeline.deploy import Export as ExportPass

    with refusals():
        config = configured(pipeline, set_, output)
        state = with_adapter(config, adapter)
        items = [item for item in config.pipeline.passes if isinstance(item, Deploy)] or [ExportPass()]
        slotted = [item for item in items if item.slots]
        folded = state if slotted == items else fold_pass(config)(state).state
        for item in items:
            after = item(state if item in slotted else folded).state
            for table in item.tables(after):
                print_table(table)
            if item not in slotted:
                folded = after


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(help="an ONNX file")],
    against: Annotated[str, typer.Option("--against", help="the pipeline whose model it should equal")],
    set_: Set = [],  # noqa: B006
    output: Output = None,
    adapter: Adapter = None,
    file: Annotated[Path | None, typer.Option("--adapter-file", help="onnxruntime adapter in the file's slots")] = None,
) -> None:
    """Compare an ONNX file with the pipeline's torch model, adapter folded in, in onnxruntime."""
    from subgraph_peft.export import verify as verify_

    from .pipeline.command_state import configured, fold_pass, with_adapter

    with refusals():
        config = configured(against, set_, output)
        folding = fold_pass(config).model_copy(update={"delta": False})
        folded = folding(with_adapter(config, adapter)).state.program
        print_rows("Verified", verify_(model, folded, adapter=file).rows())


@app.command()
def generate(
    folder: Annotated[Path, typer.Argument(help="folder of the `decoder` pass, with its tokenizer")],
    prompt: str,
    tokens: Annotated[int, typer.Option("--tokens", "-n", help="at most so many new ones", min=1)] = 50,
    sample: Annotated[bool, typer.Option("--sample", help="draw tokens; else take the likeliest")] = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    file: Annotated[list[Path], typer.Option("--adapter-file", help="onnxruntime adapter in the file's slots")] = [],  # noqa: B006
) -> None:
    """Continue a prompt in onnxruntime; an encoder-decoder answers it."""
    from transformers import TextStreamer

    from subgraph_peft.export import Generator

    from .pipeline.models import ModelSpec, load_tokenizer

    with refusals():
        tokenizer = load_tokenizer(ModelSpec(transformers=str(folder), task="causal-lm"))
        if tokenizer is None:
            raise ConfigError(f"{folder} holds no tokenizer: save one there, or call export.Generator with token ids.")
        encoded = tokenizer(prompt, return_tensors="pt")
        generator = Generator(folder)
        generator.generate(
            encoded["input_ids"], encoded["attention_mask"], max_new_tokens=tokens, do_sample=sample, seed=seed,
            temperature=temperature, top_k=top_k, top_p=top_p, streamer=TextStreamer(tokenizer),
            adapters=[generator.load(path) for path in file],
        )  # fmt: skip


@app.command()
def analyze(
    what: Annotated[
        str, typer.Argument(help="a run's folder, a pipeline file or a shipped one", metavar="RUN_OR_PIPELINE")
    ],
    set_: Set = [],  # noqa: B006
    adapter: Adapter = None,
    other: Annotated[Path | None, typer.Option("--other", help="adapter or run folder to compare with")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="folder of tables and pictures; RUN/analysis by default")
    ] = None,
    where: Annotated[list[str], typer.Option("--where", help="selector of weights; may be given again")] = ["*"],  # noqa: B006
    k: Annotated[int | None, typer.Option("-k", help="directions to look at; each update's rank by default")] = None,
    site: Annotated[str | None, typer.Option("--site", help="weight whose φ(i, j) is drawn")] = None,
) -> None:
    """What training did to each weight: spectra, amplification, inside and outside the base's subspace, similarity."""
    from .analysis.analyze import analyze as analyze_
    from .analysis.report import write_analysis
    from .analysis.results import findings, tables
    from .pipeline.command_state import adapter_folder, configured, run_folder, with_adapter
    from .store.adapter_file import load

    with refusals():
        run = run_folder(what)
        config = configured(what if run is None else str(run / "config.yaml"), set_, run)
        program = with_adapter(config, adapter and adapter_folder(adapter)).program
        twin = other and load(program.captured, adapter_folder(other))
        analysis = analyze_(program, twin, k=k, where=where)
        page = write_analysis(analysis, output or Path(config.output) / "analysis", site)
        for table in tables(analysis):
            print_table(table)
            announce("")
        for sentence in findings(analysis):
            announce(sentence)
        announce(f"\nTables and pictures: {page.parent} (start with {page.name})")


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="adapter folder of this package or of huggingface/peft, or a run's")],
    target: Annotated[Path, typer.Argument(help="folder to write")],
    base: Annotated[
        str | None,
        typer.Argument(
            help="what it was trained on: a run's folder, a pipeline, or a transformers model; by default SOURCE, "
            "where it is a run, or the model that it names",
            metavar="BASE",
        ),
    ] = None,
    to: Annotated[Layout, typer.Option("--to", help="lora: every update as a plain LoRA of peft")] = Layout.peft,
    rank: Annotated[int | None, typer.Option("--rank", help="of that LoRA at most; exact by default")] = None,
    tolerance: Annotated[float, typer.Option("--tolerance", help="relative error that a truncation may have")] = 0.01,
    task: Annotated[str | None, typer.Option("--task", help="which head a transformers model has")] = None,
    set_: Set = [],  # noqa: B006
) -> None:
    """Turn an adapter of this package into one of huggingface/peft, or one of peft into one of this package."""
    from .pipeline import convert as convert_
    from .pipeline.command_state import adapter_folder, configured, run_folder, with_model
    from .pipeline.config import shipped_configs

    with refusals():
        folder = adapter_folder(source)
        base = base or (str(source) if run_folder(str(source)) else convert_.base_named(folder))
        if run := run_folder(base):
            program = with_model(configured(str(run / "config.yaml"), set_, run)).program
        elif Path(base).is_file() or base.removesuffix(".yaml") in shipped_configs():
            program = with_model(configured(base, set_, None)).program
        else:
            program = convert_.captured_model(base, task)
        print_rows("Converted", convert_.convert(program, folder, target, to.value, rank, tolerance))


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(help="a delta file, which the pass `fold: {delta: true}` writes")],
    base: Annotated[Path, typer.Argument(help="folder of the model that it was made for")],
    output: Annotated[Path, typer.Argument(help="folder to write")],
) -> None:
    """Write a copy of the model folder BASE with the tensors of DELTA in their places, without loading the model."""
    from subgraph_peft.export import apply_delta

    with refusals():
        changed = apply_delta(delta, base, output)
        announce(f"{output}: {base} with {len(changed)} tensors of {delta}")


@app.command()
def methods(
    what: Annotated[str | None, typer.Argument(help="one method, or a pipeline file", metavar="NAME_OR_FILE")] = None,
    name: Annotated[str | None, typer.Argument(help="after a pipeline file: one method")] = None,
) -> None:
    """The catalogue of methods, printed from their equations; with a pipeline file, the methods it defines too."""
    from .method import catalogue, registry
    from .pipeline.config import load_config

    with refusals():
        is_file = what is not None and what.endswith((".yaml", ".yml"))
        if name and not is_file:
            raise typer.BadParameter(f"{what!r} before a method's name is no pipeline file (.yaml).")
        beside = load_config(what).written() if is_file else {}
        name = name if is_file else what
        if name is None:
            print_table(catalogue.table(beside.values()))
            return
        cls = registry.method_class(name, beside)
        entry = catalogue.described(cls)
        announce(f"{entry.name}  {entry.equation}\n\n{entry.text}\n")
        print_rows("Options", catalogue.options(cls), ("option", "type", "default", ""))
        print_rows("Tensors at a site", catalogue.tensors(cls), ("tensor", "shape", "", "starts at"))


@app.command()
def schema() -> None:
    """The JSON schema of pipeline files, for editors."""
    from .pipeline.config import schema as schema_

    sys.stdout.write(json.dumps(schema_(), indent=1, ensure_ascii=False) + "\n")


@app.command()
def quickstart(
    output: Annotated[Path, typer.Option("--output", "-o", help="results folder")] = Path("runs/quickstart"),
) -> None:
    """MiniLM, five methods, one table: minutes on a CPU, no downloads."""
    from .pipeline import quickstart as quickstart_

    with refusals():
        rows, best = quickstart_.quickstart(output, announce)
        announce("")
        print_table(quickstart_.table(rows))
        announce(f"\nBest: {best.method}. Its folder {best.folder} has adapter/, merged/, model.onnx and report.md.")


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="print the version")] = False) -> None:
    if version:
        announce(__version__)
        raise typer.Exit


def main() -> None:
    app()


if __name__ == "__main__":
    main()
