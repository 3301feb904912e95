"""A folder that generates: one graph for prompt and continuation with its key-value cache, and what runtimes read."""

import inspect
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers.cache_utils import Cache

from subgraph_peft.base.borrowed import attention_of
from subgraph_peft.base.errors import ExportError
from subgraph_peft.base.files import TOKENIZER, check_former, replacing_folder, write_json
from subgraph_peft.frontend.capture import capture
from subgraph_peft.frontend.contexts import unwritten
from subgraph_peft.program.kernels import group_keys
from subgraph_peft.program.program import Program
from subgraph_peft.program.runners import make_runners
from subgraph_peft.program.selectors import Where
from subgraph_peft.store.adapter_file import onto

from ..onnx.exporter import to_onnx
from ..onnx.inference import axes_of
from ..onnx.reference import full_precision
from ..onnx.report import ExportReport
from ..onnx.slots import slots_of
from ..shared import over
from . import cached
from .cached import PAST, PRESENT
from .genai import genai_config

MODEL, ENCODER, DECODER = "model.onnx", "encoder_model.onnx", "decoder_model.onnx"
FILES = *(f"{name}{data}" for name in (MODEL, ENCODER, DECODER) for data in ("", ".data")), "genai_config.json"
BATCH, LENGTH, BEFORE = 2, 3, 4
Inputs = dict[str, Any]


@dataclass(frozen=True)
class DecoderReport:
    """folder: what was written;  files: file name -> what its export wrote and how far it is from torch"""

    folder: str
    files: Mapping[str, ExportReport]

    @property
    def drift(self) -> float:
        """The largest of any output, absolute."""
        return max(d.absolute for report in self.files.values() for d in report.drift.values())

    def rows(self) -> list[tuple[str, str]]:
        return [row for report in self.files.values() for row in report.rows()]


@dataclass(frozen=True)
class Served:
    """One file: the function that it holds, example inputs, the dimensions that vary, further inputs to compare at."""

    file: str
    function: Callable[..., dict[str, torch.Tensor]]
    example: Inputs
    dynamic: Mapping[str, list[int]]
    also: tuple[Inputs, ...] = ()


def to_decoder(
    program: Program,
    model: nn.Module,
    folder: str | os.PathLike,
    *,
    tokenizer: Any = None,
    logits_to_keep: int = 1,
    slots: bool | Where = False,
    **options: Any,
) -> DecoderReport:
    """Write `program` as a decoder with a key-value cache, for `Generator`, onnxruntime-genai and others.

    program:         captured from `model` in training, and folded, but with slots; its weights are written, those of
                     `model` stay
    model:           the transformers model that it was captured from, with a language model head
    tokenizer:       saved beside, if given
    logits_to_keep:  of the last tokens; 0 keeps the logits of all
    slots:           write the base that was captured, with inputs through which `Generator` and onnxruntime-genai
                     change it by an adapter file, see `to_onnx`; of a decoder, not of an encoder-decoder
    options:         of `to_onnx`: dtype, optimize, quantize, opset, bound, external_data, merge

    A decoder is `model.onnx`: input_ids [batch, length], attention_mask [batch, past + length], position_ids [batch,
    length] and past_key_values.N.key, .value [batch, heads, past, width] to logits [batch, kept, vocabulary] and
    present.N.key, .value. An encoder-decoder is `encoder_model.onnx`, which gives the keys and values of
    cross-attention as present.N.encoder.key, and `decoder_model.onnx`, which takes them and
    past_key_values.N.decoder.key. Prompt and continuation are the same graph. Beside it: config.json,
    generation_config.json and, for a decoder, genai_config.json.

    The folder appears once onnxruntime has reproduced the model at a prompt padded on the left, at a single token after
    it, at a batch of one, and at the sizes that `to_onnx` checks; a former one stays otherwise. No weight is copied.
    Raises ExportError: what `to_onnx` does; for adapters that are not folded; for a model that keeps other things than
    keys and values; for a folder with other files in it.
    """
    target, earlier = Path(folder), (*FILES, *(TOKENIZER if tokenizer is not None else ()))
    twin = over(slots_of(program, slots).base if slots else program, model)
    check_model(twin)
    if slots and twin.config.is_encoder_decoder:
        raise ExportError(f"{type(model).__name__} is two files, encoder and decoder, which have no slots: fold it.")
    reports: dict[str, ExportReport] = {}
    with replacing_folder(target, ExportError, earlier=earlier) as made:
        twin.config.to_json_file(made / "config.json")
        twin.generation_config.to_json_file(made / "generation_config.json")
        if tokenizer is not None:
            tokenizer.save_pretrained(made)
        check_former(target, made, ExportError, earlier)
        for part in served(twin, program, logits_to_keep):
            cached_program = capture_of(twin, part)
            if program.adapters:
                cached_program = onto(cached_program, program)
            also = [(flat(inputs), real(inputs, run(twin, part.function, inputs))) for inputs in part.also]
            report = to_onnx(cached_program, made / part.file, also=also, slots=slots, **options)
            reports[part.file] = replace(report, path=str(target / part.file))
        if MODEL in reports:
            write_json(made / "genai_config.json", genai_config(twin, reports[MODEL], MODEL), ExportError)
    return DecoderReport(str(target), reports)


def check_model(model: nn.Module) -> None:
    if not (hasattr(model, "can_generate") and model.can_generate()):
        raise ExportError(
            f"{type(model).__name__} does not generate: to_decoder takes a language model of transformers."
        )
    if attention_of(model.config) not in ("eager", "sdpa"):
        model.set_attn_implementation("sdpa")


def capture_of(model: nn.Module, part: Served) -> Program:
    """The function captured as the model's own forward, so that weights keep their qualified names, grouped keys as
    they are."""
    held = vars(model).get("forward")
    try:
        model.forward = part.function
        with sdpa_kernel(SDPBackend.MATH):
            program = capture(model, part.example, dynamic=part.dynamic)
    finally:
        del model.forward
        if held is not None:
            model.forward = held
    for graph in program.graphs():
        group_keys(graph)
    make_runners(program.module)
    return program


def run(model: nn.Module, function: Callable[..., Inputs], inputs: Inputs) -> dict[str, torch.Tensor]:
    with torch.no_grad(), full_precision(), sdpa_kernel(SDPBackend.MATH), unwritten(model):
        return function(**inputs)


def real(inputs: Inputs, outputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What every runtime has to give: where a query sees no key, as padding on the left does not, softmax may give any
    number, and so may what comes from it in the layers above."""
    if "attention_mask" not in inputs or inputs["attention_mask"][:, 0].all():
        return dict(outputs)
    seen = inputs["attention_mask"].cumsum(1).bool().cpu()

    def where(seen: torch.Tensor, tensor: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda given: torch.where(seen, tensor, given.nan_to_num()) if given.shape == tensor.shape else tensor

    kept = outputs["logits"].shape[1]
    places = {name: seen[:, -kept:, None] if name == "logits" else seen[:, None, :, None] for name in outputs}
    return {name: where(places[name], tensor.cpu()) for name, tensor in outputs.items()}


def flat(inputs: Inputs) -> dict[str, torch.Tensor]:
    past = {f"{PAST}.{name}": tensor for name, tensor in inputs.get(PAST, {}).items()}
    return {**{name: value for name, value in inputs.items() if name != PAST}, **past}


def served(model: nn.Module, program: Program, keep: int) -> Iterator[Served]:
    return encoded(model, program, keep) if model.config.is_encoder_decoder else causal(model, keep)


def causal(model: nn.Module, keep: int) -> Iterator[Served]:
    function, draw = cached.decoder(model, keep), tokens(model)
    result = run(model, model.forward, {"input_ids": draw(BATCH, LENGTH), "use_cache": True})
    cached.check_cache(model, result)
    positions = "position_ids" in inspect.signature(model.forward).parameters

    def inputs(ids: torch.Tensor, before: Mapping[str, torch.Tensor], padding: int) -> Inputs:
        """`before`: the cache;  padding: of the first row, on the left"""
        length = before["0.key"].shape[2]
        mask = ids.new_ones(len(ids), length + ids.shape[1])
        mask[0, :padding] = 0
        given = {"input_ids": ids, "attention_mask": mask, PAST: before}
        return given | ({"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, length:]} if positions else {})

    none = empty(result.past_key_values)
    prompt = inputs(draw(BATCH, BEFORE), none, 2)
    alone = inputs(draw(1, 1), {name: tensor[:1] for name, tensor in none.items()}, 0)
    past = presents(run(model, function, prompt))
    example, token = inputs(draw(BATCH, LENGTH), past, 2), inputs(draw(BATCH, 1), past, 2)
    dynamic = {name: [0, 2] if name == PAST else [0, 1] for name in example}
    yield Served(MODEL, function, example, dynamic, (prompt, token, alone))


def encoded(model: nn.Module, program: Program, keep: int) -> Iterator[Served]:
    encode, name = cached.encoder(model), model.main_input_name
    source = program.at_home(program.example)[name]
    source = torch.cat([source, source]) if len(source) == 1 else source
    given = {name: source}
    if name == "input_ids":
        given["attention_mask"] = torch.ones_like(source)
        given["attention_mask"][0, -1] = 0
    draw = tokens(model)
    result = run(model, model.forward, {**given, "decoder_input_ids": draw(len(source), LENGTH), "use_cache": True})
    cached.check_cache(model, result)
    varying = list(axes_of(program)[name])
    yield Served(ENCODER, encode, given, dict.fromkeys(given, varying), ({n: t[:1] for n, t in given.items()},))

    states = run(model, encode, given)
    function = cached.decoder_of_encoded(model, keep, states["last_hidden_state"].shape[-1])
    fixed = {"encoder_attention_mask": given["attention_mask"]} if name == "input_ids" else {}

    def inputs(length: int, before: Mapping[str, torch.Tensor]) -> Inputs:
        return {"input_ids": draw(len(source), length), PAST: {**before, **presents(states)}, **fixed}

    none = empty(result.past_key_values.self_attention_cache, "decoder.")
    prompt, first = inputs(BEFORE, none), inputs(1, none)
    example, token = (inputs(length, presents(run(model, function, prompt))) for length in (LENGTH, 1))
    dynamic = {n: [0, 2] if n == PAST else [0, 1] for n in example}
    yield Served(DECODER, function, example, dynamic, (prompt, first, token))


def tokens(model: nn.Module) -> Callable[[int, int], torch.Tensor]:
    """Draws token ids [batch, length], the same ones every time."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randint(len(weight), shape, generator=generator).to(weight.device)


def presents(outputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The cache that a step gives, as the next one takes it."""
    start = f"{PRESENT}."
    return {name.removeprefix(start): tensor for name, tensor in outputs.items() if name.startswith(start)}


def empty(past: Cache, part: str = "") -> dict[str, torch.Tensor]:
    """A cache like `past` without any token."""
    return {name: tensor[:, :, :0] for name, tensor in presents(cached.named(past, PRESENT, part)).items()}
