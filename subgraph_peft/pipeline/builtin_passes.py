"""The package's own passes, those that deploy apart: capture, one rewrite pass for every method, train, fold."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field

from subgraph_peft.export import to_delta

from ..base.errors import ConfigError, suggestion
from ..base.processes import on_first
from ..base.text import Table
from ..compiler.fold import difference_text, fold, fold_table
from ..compiler.rewrite import rewrite
from ..compiler.switches import check_switches, optimise
from ..frontend.capture import capture
from ..graph.passes import optimisations
from ..method import registry
from ..method.definition import Definition
from ..method.method import Method
from ..method.written import WRITTEN
from ..program.internals import internals
from ..program.runners import changes
from ..store.adapter_file import save
from ..training.collation import example_batch
from ..training.evaluate import evaluate
from ..training.options import TrainOptions
from ..training.train import train
from .passes import Pass, State

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Capture(Pass):
    """Capture the model as a graph, with an example batch of the data."""

    name: ClassVar[str] = "capture"

    dynamic: dict[str, list[int]] | None = Field(
        None, description="dimensions that vary, by input; by default those of batch and length"
    )
    verify: bool = Field(True, description="compare the graph with the model on the example inputs")
    padding: Literal["right"] | None = Field(
        None, description="where attention masks promise to be padded, which frees faster kernels"
    )

    def requires(self, state: State) -> None:
        if state.program is None and (state.model is None or state.data is None):
            raise ConfigError("capture needs a model, and data for an example batch: give `model` and `data`.")

    def apply(self, state: State) -> tuple[State, str]:
        if state.program is not None:
            return state, "captured already"
        device = next(state.model.parameters()).device
        batch = {name: value.to(device) for name, value in example_batch(state.data.train, state.data.collate).items()}
        program = capture(state.model, batch, dynamic=self.dynamic, verify=self.verify, padding=self.padding)
        return replace(state, program=program), f"{program.source}: {len(program.graph.nodes)} nodes"


class Rewrite(Pass):
    """φ(W) at the selected sites, for one method; its options stand beside the method's own."""

    name: ClassVar[str] = "rewrite"

    method: Method = Field(description="φ")
    where: str | list[str] = Field("*", description="selector of the weights to rewrite")
    exclude: str | list[str] = Field(default_factory=list, description="selector of weights that stay")
    kinds: list[str] | None = Field(None, description="of sites, such as linear; all by default")
    as_: str | None = Field(None, alias="as", description="name of the adapter")
    trainable: str | list[str] = Field(default_factory=list, description="parameters that train too, such as a head")
    tied: Literal["refuse", "untie"] = Field("refuse", description="what to do with a weight that is tied to another")
    patterns: dict[str, dict[str, Any]] | None = Field(
        None, description="other options of the method at some weights, by selector"
    )
    budget: str | float | None = Field(None, description='of trained numbers: "0.02%", a share below 1 or a count')
    cache: str | None = Field(None, description="folder for decompositions of weights, to be found again by a rerun")

    def requires(self, state: State) -> None:
        if state.program is None:
            raise ConfigError(f"{self.option_name()} rewrites a captured program: put `capture` before it.")

    def apply(self, state: State) -> tuple[State, str]:
        program = rewrite(
            state.program, self.method, self.where, exclude=self.exclude, kinds=self.kinds, name=self.as_,
            trainable=self.trainable, tied=self.tied, patterns=self.patterns, budget=self.budget, seed=state.seed,
            cache=None if self.cache is None else state.resolve(self.cache),
        )  # fmt: skip
        adapter = program.adapters[-1]
        trainable, everything = program.counts()
        dense = sum(bool(lowered.dense) for lowered in program.lowered.values())
        summary = (
            f"{len(adapter.sites)} sites, {trainable:,} of {everything:,} numbers train ({trainable / everything:.3%})"
        )
        if adapter.chosen:
            summary = f"{adapter.chosen}; {summary}"
        if dense:
            summary += f"; {dense} sites evaluate a full-size matrix each step"
        if adapter.left_out:
            summary += f"; left out: {', '.join(f'{name} ({why})' for name, why in adapter.left_out[:3])}"
            summary += " …" if len(adapter.left_out) > 3 else ""
        return replace(state, program=program), summary

    def option_name(self) -> str:
        return self.method.spelling

    def options(self) -> dict[str, Any]:
        own = self.model_dump(mode="json", exclude_defaults=True, exclude={"method"}, by_alias=True)
        return {**self.method.model_dump(mode="json", exclude_defaults=True), **own}

    @classmethod
    def of(cls, name: str, options: Mapping[str, Any]) -> "Rewrite":
        """By the installed method of that name, or, for "method", by the one that the options define."""
        own = cls.own_options()
        described = Definition if name == WRITTEN else registry.method_class(name)
        known = [*described.model_fields, *sorted(own)]
        for option in options:
            if option not in known:
                raise ConfigError(
                    f"{name}: option {option!r}: it is unknown.{suggestion(option, known)} Known: {', '.join(known)}.",
                    option=(option,),
                )
        method = registry.read_method({name: {key: value for key, value in options.items() if key not in own}})
        return cls(method=method, **{key: value for key, value in options.items() if key in own})

    @classmethod
    def own_options(cls) -> set[str]:
        """The options that stand beside a method's."""
        return {(field.alias or name) for name, field in cls.model_fields.items()} - {"method"}


class Optimise(Pass):
    """Switch optimising passes, which are all on, by name; for the whole of the pipeline from here on."""

    model_config = ConfigDict(frozen=True, extra="allow", json_schema_extra=lambda schema: schema.update(switches()))

    name: ClassVar[str] = "optimise"

    def model_post_init(self, context: Any) -> None:
        check_switches(self.options())

    def requires(self, state: State) -> None:
        if state.program is None:
            raise ConfigError("optimise switches passes of a captured program: put `capture` before it.")

    def apply(self, state: State) -> tuple[State, str]:
        program = optimise(state.program, **self.options())
        changed = changes(program.module)[True, frozenset()]
        places = ", ".join(f"{name} {count}" for name, count in changed.items())
        without = internals(program.module).without
        off = f"off: {', '.join(sorted(without))}" if without else "all on"
        return replace(state, program=program), f"{off}; places changed in the training graph: {places or 'none'}"

    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def switches() -> dict[str, Any]:
    described = {n: (type(p).__doc__ or "").partition("\n")[0] for n, p in optimisations().items()}
    return {"properties": {n: {"type": "boolean", "default": True, "description": d} for n, d in described.items()}}


class Train(Pass, TrainOptions):
    """Train what requires gradients, and evaluate before and after."""

    name: ClassVar[str] = "train"

    def requires(self, state: State) -> None:
        if state.program is None or state.data is None:
            raise ConfigError("train needs a program and data: put `capture` before it and give `data`.")
        if state.folder is None:
            raise ConfigError("train writes checkpoints: give an `output` folder.")

    def apply(self, state: State) -> tuple[State, str]:
        options = TrainOptions(
            **{**self.model_dump(), **({} if "seed" in self.model_fields_set else {"seed": state.seed})}
        )
        data = state.data
        result = train(
            state.program,
            data.train,
            data.eval,
            output=state.folder / "checkpoints",
            options=options,
            collate=data.collate,
            metrics=data.metrics,
        )
        on_first(lambda: save(state.program, state.folder / "adapter"))
        state = state.without_record("merged")  # its weights have changed
        least = sum(p.nbytes * (4 if p.requires_grad else 1) for _, p in state.program.parameters())
        summary = f"{result.steps} steps in {result.seconds:.1f} s"
        summary += f"; weights, gradients and moments alone take {least / 2**20:,.0f} MiB"
        if result.evaluations:
            before, after = result.evaluations[0][1], result.evaluations[-1][1]
            state = state.with_scores(before=before, after=after)
            summary += "; " + ", ".join(f"{name} {before[name]:.4f} → {value:.4f}" for name, value in after.items())
        return state.with_record("train", result), summary


class Fold(Pass):
    """Fold every adapter that folds into plain weights, and compare outputs and accuracy; with `delta`, write what
    changed as `delta.safetensors`, for `subgraph-peft apply`."""

    name: ClassVar[str] = "fold"

    dtype: Literal["float32", "float64", "float16", "bfloat16"] | None = Field(
        None, description="of the folded weights; that of the base by default"
    )
    retain: float = Field(0.9, ge=0, le=1, description="share of each update that the dtype must keep")
    delta: bool = Field(False, description="write what changed as delta.safetensors")

    def requires(self, state: State) -> None:
        if state.program is None:
            raise ConfigError("fold needs a captured program: put `capture` before it.")
        if self.delta and state.folder is None:
            raise ConfigError("fold writes a delta: give an `output` folder.")

    def apply(self, state: State) -> tuple[State, str]:
        program = fold(state.program, dtype=DTYPES[self.dtype] if self.dtype else None, retain=self.retain)
        if self.delta:
            on_first(lambda: to_delta(program, state.folder / "delta.safetensors"))
        if program.folded is None:
            return state, "nothing to fold"
        report = program.folded
        summary = f"{len(report.sites)} weights, {difference_text(report)}, {report.retained:.2%} of the delta retained"
        if report.remaining:
            summary += f"; {', '.join(report.remaining)} cannot fold and stays in the graph"
        if self.delta:
            summary += f"; {state.folder / 'delta.safetensors'}"
        after = replace(state.without_record("merged"), program=program)
        if state.data is not None and state.data.eval is not None and "train" in state.records:
            scores = evaluate(program, state.data.eval, metrics=state.data.metrics, collate=state.data.collate)
            after = after.with_scores(folded=scores)
        return after, summary

    def tables(self, state: State) -> list[Table]:
        return [fold_table(state.program)] if state.program.folded is not None else []
