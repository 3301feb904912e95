"""Generation in onnxruntime over torch tensors: the cache stays where the model runs."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from subgraph_peft.base.errors import ExportError

from ..onnx.runtime import device_of, dtype_of, provider, session
from .adapters import Adapters, LoadedAdapter, bind
from .bound import memory
from .cached import PAST, PRESENT
from .decoder import DECODER, ENCODER, MODEL
from .sampling import Sampler


class Graph:
    """A session over torch tensors: inputs and outputs are bound by their memory, which is held until others take their
    place."""

    def __init__(self, path: Path, on: str | None):
        self.session = session(path, on)
        self.device = device_of(self.session)
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.io = self.session.io_binding()
        self.held: dict[str, torch.Tensor] = {}
        self.dtypes = {name: dtype_of(value) for name, value in (self.inputs | self.outputs).items()}

    def feed(self, name: str, tensor: torch.Tensor, shape: Sequence[int] | None = None) -> None:
        self.io.bind_input(name, *memory(tensor, shape))
        self.held[name] = tensor

    def fetch(self, name: str, tensor: torch.Tensor, shape: Sequence[int] | None = None) -> None:
        self.io.bind_output(name, *memory(tensor, shape))
        self.held[name] = tensor

    def release(self) -> None:
        self.io.clear_binding_inputs()
        self.io.clear_binding_outputs()
        self.held.clear()

    def run(self) -> None:
        """Raises ExportError."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        try:
            self.session.run_with_iobinding(self.io)
        except Exception as error:
            raise ExportError(f"onnxruntime ({provider(self.session)}) cannot run the model: {error}") from error


class Memory:
    """Keys and values of one generation, `room` tokens at most.

    Where the file writes the present over the past (`shared`), one tensor of each, bound once. Else two, which turn by
    turn are read as the past and written as the present.
    """

    def __init__(self, graph: Graph, heads: Mapping[str, tuple[int, int]], batch: int, room: int, shared: bool):
        self.graph, self.heads, self.batch, self.shared = graph, heads, batch, shared
        self.length, self.turn, self.room = 0, 0, room
        sizes = {name: (1 if shared else 2, batch * count * room * width) for name, (count, width) in heads.items()}
        self.held = {n: torch.zeros(s, dtype=graph.dtypes[n], device=graph.device) for n, s in sizes.items()}

    def bind(self, new: int) -> None:
        """For a step over `new` tokens."""
        if not (self.shared and self.length):
            past, present = (self.room, self.room) if self.shared else (self.length, self.length + new)
            for name, (count, width) in self.heads.items():
                held = self.held[name]
                self.graph.feed(name, held[self.turn], (self.batch, count, past, width))
                after = name.replace(PAST, PRESENT, 1)
                self.graph.fetch(after, held[self.turn - 1], (self.batch, count, present, width))
        self.length, self.turn = self.length + new, 0 if self.shared else 1 - self.turn


class Generator:
    """Generates from a folder that `to_decoder` or the builder of onnxruntime-genai wrote.

    folder:    a folder, or an ONNX file in one, with generation_config.json or genai_config.json
    provider:  of onnxruntime; by default CUDA where torch sees a GPU, else the CPU

    Raises ExportError for other files and damaged ones.
    """

    def __init__(self, folder: str | os.PathLike, provider: str | None = None):
        path = Path(folder)
        home = path.parent if path.is_file() else path
        encoder = None if path.is_file() else home / ENCODER
        self.encoder = Graph(encoder, provider) if encoder is not None and encoder.is_file() else None
        self.decoder = Graph(path if path.is_file() else home / (DECODER if self.encoder else MODEL), provider)
        self.device = self.decoder.device
        self.options = read_settings(file) if (file := home / "genai_config.json").is_file() else {}
        part = ".decoder" if self.encoder else ""
        self.heads = {n: self.size(n) for n in self.decoder.inputs if n.startswith(f"{PAST}.") and part in n}
        self.shared = self.options.get("search", {}).get("past_present_share_buffer", False)
        if not self.heads or "logits" not in self.decoder.outputs:
            given = ", ".join([*self.decoder.inputs, *self.decoder.outputs])
            raise ExportError(f"{path} is no decoder with a cache ({PAST}.0.key …, logits); it has {given}.")
        self.config = self.configured(home)

    def load(self, path: str | os.PathLike) -> LoadedAdapter:
        """An adapter file for the file's slots. Raises ExportError where it has none, or they do not fit."""
        return Adapters(self.decoder.session).load(path)

    def size(self, name: str) -> tuple[int, int]:
        """(heads, width) of keys or values. The files of onnxruntime-genai's builder leave the width open."""
        _, count, _, width = self.decoder.inputs[name].shape
        if not isinstance(width, int):
            width = self.options.get("model", {}).get("decoder", {}).get("head_size")
        if width is None:
            raise ExportError(f"The file leaves the width of {name} open, and no genai_config.json gives a head_size.")
        return count, width

    def configured(self, home: Path) -> GenerationConfig:
        if (file := home / "generation_config.json").is_file():
            return read_settings(file, GenerationConfig.from_dict)
        known = self.options.get("model", {})
        return GenerationConfig(**{name: known.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})

    def generate(
        self,
        inputs: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        *,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = None,
        seed: int | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        adapters: Sequence[LoadedAdapter] = (),
        streamer: Any = None,
    ) -> torch.Tensor:
        """Token ids [batch, length + new], int64, where `inputs` are, as `generate` of transformers gives them.

        inputs:          token ids [batch, length], shorter rows padded on the left; what an encoder takes, for an
                         encoder-decoder, whose result starts with `decoder_input_ids` (by default its start token)
        attention_mask:  [batch, length], 0 at padding; all ones by default
        do_sample:       draw from softmax(logits / temperature), of the `top_k` likeliest tokens, of the fewest that
                         have `top_p` of the probability; else take the likeliest token
        eos_token_id:    ends a row, which is padded with `pad_token_id` then; by default the model's own, [] for none
        seed:            of the draws; torch's own random state by default
        adapters:        of the file's slots, from `load`
        streamer:        of transformers: `put` takes the prompt and every token, `end` is called at the end

        Raises ExportError for a prompt without tokens or of another shape, padding on the right, and options of
        sampling that do not fit.
        """
        sampler = Sampler(do_sample, temperature, top_k, top_p, seed, self.device)
        self.decoder.release()
        bind(self.decoder.io, adapters)
        ends, pad = self.endings(eos_token_id, pad_token_id)
        prompt, mask = self.prompt(inputs, attention_mask, decoder_input_ids)
        batch, length = prompt.shape
        tokens = torch.full((batch, length + max_new_tokens), pad, dtype=torch.int64, device=self.device)
        tokens[:, :length] = prompt
        seen = torch.ones_like(tokens)
        seen[:, :length] = mask
        places = (seen.cumsum(1) - 1).clamp(min=0)
        memory = Memory(self.decoder, self.heads, batch, length + max_new_tokens, self.shared)
        done = torch.zeros(batch, dtype=torch.bool, device=self.device)
        if streamer is not None:
            streamer.put(prompt.cpu())
        start, end = 0, length
        while end < tokens.shape[1]:
            logits = self.step(tokens[:, start:end], seen[:, :end], places[:, start:end], memory)
            new = sampler(logits)
            tokens[:, end] = new = torch.where(done, pad, new)
            start, end = end, end + 1
            if streamer is not None:
                streamer.put(new.cpu())
            if len(ends):
                done |= torch.isin(new, ends)
                if done.all():
                    break
        self.decoder.release()
        if streamer is not None:
            streamer.end()
        return tokens[:, :end].to(inputs.device)

    def endings(self, eos: int | Sequence[int] | None, pad: int | None) -> tuple[torch.Tensor, int]:
        """(tokens that end a row, the one that pads it)"""
        eos = self.config.eos_token_id if eos is None else eos
        ends = torch.tensor([] if eos is None else eos, dtype=torch.int64, device=self.device).flatten()
        pad = self.config.pad_token_id if pad is None else pad
        return ends, (int(ends[0]) if len(ends) else 0) if pad is None else pad

    def prompt(
        self, inputs: torch.Tensor, mask: torch.Tensor | None, decoder_input_ids: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(token ids, mask) that the decoder starts from, once an encoder has run."""
        check_batch("inputs", inputs, inputs.dim() if self.encoder else 2)
        inputs = inputs.to(self.device)
        mask = inputs.new_ones(inputs.shape[:2], dtype=torch.int64) if mask is None else mask
        mask = mask.to(self.device, torch.int64)
        if mask.shape != inputs.shape[:2]:
            raise ExportError(f"attention_mask is {list(mask.shape)}, inputs are {list(inputs.shape)}.")
        if self.encoder:
            self.encode(inputs, mask)
            inputs = self.start(len(inputs)) if decoder_input_ids is None else decoder_input_ids.to(self.device)
            check_batch("decoder_input_ids", inputs, 2)
            mask = torch.ones_like(inputs)
        if not mask[:, -1].all():
            raise ExportError("A row of the prompt is padded on the right: pad on the left (padding_side='left').")
        if self.shared and not mask.all():
            raise ExportError("This file's attention (GroupQueryAttention) takes no padding: generate row by row.")
        return inputs, mask

    def step(self, tokens: torch.Tensor, seen: torch.Tensor, places: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Logits [batch, vocabulary] of the last token."""
        graph = self.decoder
        given = {"input_ids": tokens, "attention_mask": seen, "position_ids": places}
        for name, tensor in given.items():
            if name in graph.inputs:
                graph.feed(name, tensor.contiguous().to(graph.dtypes[name]))
        memory.bind(tokens.shape[1])
        _, kept, vocabulary = graph.outputs["logits"].shape
        shape = len(tokens), kept if isinstance(kept, int) else tokens.shape[1], vocabulary
        logits = torch.empty(shape, dtype=graph.dtypes["logits"], device=graph.device)
        graph.fetch("logits", logits)
        graph.run()
        return logits[:, -1]

    def encode(self, inputs: torch.Tensor, mask: torch.Tensor) -> None:
        """Bind the keys and values of cross-attention, and the mask, to the decoder."""
        graph = self.encoder
        main, *masked = graph.inputs
        graph.feed(main, inputs.to(graph.dtypes[main]).contiguous())
        for name in masked:
            graph.feed(name, mask.contiguous())
        for name in graph.outputs:
            graph.io.bind_output(name, graph.device.type, graph.device.index or 0)
        graph.run()
        for name, value in zip(graph.outputs, graph.io.get_outputs(), strict=True):
            if (past := name.replace(PRESENT, PAST, 1)) in self.decoder.inputs:
                self.decoder.io.bind_ortvalue_input(past, value)
        if "encoder_attention_mask" in self.decoder.inputs:
            self.decoder.feed("encoder_attention_mask", mask.contiguous())

    def start(self, batch: int) -> torch.Tensor:
        token = self.config.decoder_start_token_id
        if token is None:
            raise ExportError("generation_config.json names no decoder_start_token_id: give decoder_input_ids.")
        return torch.full((batch, 1), token, dtype=torch.int64, device=self.device)


def check_batch(name: str, given: torch.Tensor, dims: int) -> None:
    """Raises ExportError for anything but a batch, of `dims` dimensions, of one token or more."""
    if given.dim() != max(dims, 2) or not given.numel():
        raise ExportError(f"{name} has shape {list(given.shape)}: give a batch [batch, length] of at least one token.")


def read_settings(path: Path, make: Callable[[dict[str, Any]], Any] = dict) -> Any:
    """What `make` gives of a JSON file. Raises ExportError."""
    try:
        return make(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ExportError(f"{path} is damaged: {error}. Mend it, or write the folder again.") from error
