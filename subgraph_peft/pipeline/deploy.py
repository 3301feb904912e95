"""The passes that write what a service loads: ONNX files, folders that generate, merged weights."""

import os
from typing import Any, ClassVar, Literal

from pydantic import Field

from subgraph_peft.export import evaluate, to_adapter, to_decoder, to_onnx
from subgraph_peft.export.serving.decoder import MODEL

from ..base.errors import ConfigError
from ..base.processes import on_first
from ..base.text import Table
from ..store.merged_folder import save_merged
from .passes import Pass, State


class Deploy(Pass):
    """Base of the passes that write ONNX: the options that they share.

    written: names of the records that the pass makes, each of which has `rows`
    """

    written: ClassVar[tuple[str, ...]] = ()

    opset: int | None = Field(None, description="of ONNX; the newest that onnxruntime knows by default")
    dtype: Literal["float32", "float16", "bfloat16"] | None = Field(None, description="of the weights in the file")
    optimize: bool = Field(False, description="fuse attention, norms and activations for onnxruntime")
    quantize: Literal[4, 8] | None = Field(None, description="bits of the weights of matrix products")
    slots: bool | str | list[str] = Field(False, description="inputs for adapters; or selectors of weights")
    merge: Literal["run", "load"] = Field(
        "run", description="when slots are merged: at every run of onnxruntime, or when an adapter is loaded"
    )
    weights: bool = Field(True, description="write the merged model too, as merged/")

    def adapter_file(self, state: State, model: str | os.PathLike) -> Any:
        """What was trained as an adapter for the slots of `model`, where the pass gives it slots."""
        if not self.slots or not state.program.adapters:
            return None
        return to_adapter(state.program, state.resolve(self.adapter), model)

    def merged(self, state: State) -> Any:
        """The merged model, where the program is one, there is a folder to write to and no pass has written it yet."""
        if not self.weights or state.folder is None or state.program.adapters or "merged" in state.records:
            return None
        return save_merged(state.program, state.model, state.tokenizer, state.folder / "merged")

    def tables(self, state: State) -> list[Table]:
        found = (state.records.get(name) for name in self.written)
        titles = (name.capitalize().replace("_", " ") for name in self.written)
        return [Table(title, ("", ""), r.rows()) for title, r in zip(titles, found, strict=True) if r is not None]


class Export(Deploy):
    """Write ONNX, verified in onnxruntime, tokenizer and config beside it; with `weights`, the merged model too. With
    `slots` the file is the base, and what was trained an onnxruntime adapter beside it."""

    name: ClassVar[str] = "export"
    written: ClassVar[tuple[str, ...]] = ("export", "adapter_file")

    file: str = Field("model.onnx", description="below the results folder")
    outputs: list[str] | None = Field(None, description="names of the outputs to keep; all but the loss by default")
    adapter: str = Field("adapter.onnx_adapter", description="file of what was trained, where there are slots")

    def requires(self, state: State) -> None:
        if state.program is None:
            raise ConfigError("export needs a captured program: put `capture` before it.")

    def apply(self, state: State) -> tuple[State, str]:
        parts = (getattr(state.model, "config", None), state.tokenizer)

        def write() -> Any:
            report = to_onnx(
                state.program, state.resolve(self.file), outputs=self.outputs, opset=self.opset, dtype=self.dtype,
                optimize=self.optimize, quantize=self.quantize, slots=self.slots, merge=self.merge,
                beside=[part for part in parts if hasattr(part, "save_pretrained")],
            )  # fmt: skip
            merged = self.merged(state)
            adapter = self.adapter_file(state, report.path)
            return report, adapter, self.scores(state, adapter), merged

        report, adapter, scores, merged = on_first(write)
        drift = max((d.absolute for d in report.drift.values()), default=0.0)
        size = f"{report.nodes} nodes, {report.bytes / 2**20:.1f} MiB"
        summary = f"{report.path}: {size}, drift {drift:.1e} on {report.provider}"
        if adapter:
            state = state.with_record("adapter_file", adapter)
            summary += f"; {adapter.path}: {adapter.bytes / 2**20:.1f} MiB"
        if scores:
            before = state.scores.get("folded", {})
            state = state.with_scores(exported=scores)
            changes = (f"{n} {before[n]:.4f} → {v:.4f}" if n in before else f"{n} {v:.4f}" for n, v in scores.items())
            summary += f"; {', '.join(changes)}"
        if report.unmerged:
            summary += f"; not merged: {', '.join(report.unmerged)}, put `fold` before it"
        if merged is not None:
            state = state.with_record("merged", merged)
            summary += f"; weights: {merged}"
        return state.with_record("export", report), summary

    def scores(self, state: State, adapter: Any) -> dict[str, float]:
        """Of the file, with the adapter, where it computes otherwise than the program and there is data."""
        if not (self.dtype or self.quantize) or state.data is None or state.data.eval is None:
            return {}
        data, path = state.data, adapter and adapter.path
        return evaluate(state.resolve(self.file), data.eval, metrics=data.metrics, collate=data.collate, adapter=path)


class Decoder(Deploy):
    """Write a folder that generates: ONNX with a key-value cache, verified in onnxruntime, and the tokenizer; with
    `weights`, the merged model too. With `slots` it is the base, and what was trained an onnxruntime adapter beside
    it."""

    name: ClassVar[str] = "decoder"
    written: ClassVar[tuple[str, ...]] = ("decoder", "decoder_adapter")

    folder: str = Field("decoder", description="below the results folder")
    logits_to_keep: int = Field(1, ge=0, description="of the last tokens; 0 keeps the logits of all")
    adapter: str = Field("decoder.onnx_adapter", description="file of what was trained, where there are slots")

    def requires(self, state: State) -> None:
        if state.program is None or state.model is None:
            raise ConfigError("decoder needs a captured program and its model: give `model`, put `capture` before it.")

    def apply(self, state: State) -> tuple[State, str]:
        options = self.model_dump(exclude={"folder", "weights", "adapter"})
        target = state.resolve(self.folder)

        def write() -> Any:
            report = to_decoder(state.program, state.model, target, tokenizer=state.tokenizer, **options)
            return report, self.adapter_file(state, target / MODEL), self.merged(state)

        report, adapter, merged = on_first(write)
        size = sum(file.bytes for file in report.files.values()) / 2**20
        summary = f"{report.folder}: {', '.join(report.files)}, {size:.1f} MiB, drift {report.drift:.1e}"
        if adapter:
            state = state.with_record("decoder_adapter", adapter)
            summary += f"; {adapter.path}: {adapter.bytes / 2**20:.1f} MiB"
        if merged is not None:
            state = state.with_record("merged", merged)
            summary += f"; weights: {merged}"
        return state.with_record("decoder", report), summary
