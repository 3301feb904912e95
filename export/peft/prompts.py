"""Prompt tuning, P-tuning and prefix tuning in peft's layout: one tensor, `prompt_embeddings`, evaluated."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from subgraph_peft.base.errors import CheckpointError, MethodError
from subgraph_peft.compiler.lowering.virtual_positions import carriers, picks
from subgraph_peft.compiler.places import candidates
from subgraph_peft.graph.sequence.token_embedding import embedding_entry
from subgraph_peft.graph.site import Site
from subgraph_peft.method.adapter import Adapter
from subgraph_peft.method.method import Method
from subgraph_peft.passes import PrefixTuning, PromptTuning, PTuning
from subgraph_peft.program.program import Program

from ..pieces import Piece
from .folder import WRAPPER, FolderContents, Slot
from .form import PeftForm, one
from .options import ABOUT, Options

KEY = "prompt_embeddings"
SEQUENCE_TO_SEQUENCE = "SEQ_2_SEQ_LM"
TWO = "virtual tokens of an encoder and a decoder at once are not known; use it in peft"


class PromptOptions(Options):
    """PromptLearningConfig. How the virtual tokens started, or were computed, says nothing about their values."""

    ignored: ClassVar[frozenset[str]] = ABOUT | {
        "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "init_weights",
        "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
        "prefix_projection",
    }  # fmt: skip

    num_virtual_tokens: int
    token_dim: int
    num_transformer_submodules: int | None = 1
    num_attention_heads: int | None = None
    num_layers: int | None = None

    def problems(self) -> list[str]:
        fits = self.num_transformer_submodules in (None, 1) and self.task_type != SEQUENCE_TO_SEQUENCE
        return [] if fits else [f"task_type = {SEQUENCE_TO_SEQUENCE!r}: {TWO}"]


class VirtualForm(PeftForm):
    """Virtual tokens: one tensor, beside no module."""

    options = PromptOptions
    prefix = WRAPPER
    needs_task = True


class PromptForm(VirtualForm):
    """prompt_embeddings [n, d], before the embedded sequence. On rows padded on the left peft puts them before the
    padding, this package behind it."""

    peft_type = "PROMPT_TUNING"
    written_by: ClassVar[type[Method]] = PromptTuning

    def takes(self, method: Method) -> bool:
        return type(method) is self.written_by

    def layout(self, captured: Program, options: PromptOptions, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        check_picks(captured, CheckpointError)
        method = PromptTuning(n=options.num_virtual_tokens)
        (site,) = candidates(captured, method)
        check_sequence(site.out_features == options.token_dim, "token_dim", options.token_dim, site.out_features)
        adapter = Adapter(method.name, method, (site,))
        slot = Slot(KEY, (options.num_virtual_tokens, options.token_dim))
        return FolderContents((adapter,), {adapter.path(site, "P"): slot})

    def written(self, captured: Program, pieces: Sequence[Piece]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        if len(pieces) > 1:
            raise MethodError("The program has several prompts; a peft folder has one. Save them with sp.save.")
        check_picks(captured, MethodError)
        (piece,) = pieces
        tokens = piece.method.evaluate("embeddings", tensors=piece.tensors)
        n, d = tokens.shape
        config = {"num_virtual_tokens": n, "token_dim": d, "num_transformer_submodules": 1, **self.about(piece.method)}
        return config, {KEY: tokens}

    def about(self, method: Method) -> dict[str, Any]:
        return {"prompt_tuning_init": "RANDOM"}


class PTuningForm(PromptForm):
    """prompt_embeddings = g(P) [n, d]: the encoder is not in the file, so that it reads back as a prompt."""

    peft_type = "P_TUNING"
    written_by = PTuning

    def about(self, method: PTuning) -> dict[str, Any]:
        return {"encoder_reparameterization_type": method.encoder.upper(), "encoder_hidden_size": method.hidden}


class PrefixForm(VirtualForm):
    """prompt_embeddings [n, 2 · layers · heads · width]: keys and values of every attention in turn."""

    peft_type = "PREFIX_TUNING"

    def takes(self, method: Method) -> bool:
        return type(method) is PrefixTuning

    def layout(self, captured: Program, options: PromptOptions, tensors: Mapping[str, torch.Tensor]) -> FolderContents:
        method = PrefixTuning(n=options.num_virtual_tokens)
        sites = tuple(candidates(captured, method))
        shape = alike(sites, CheckpointError)
        check_sequence(options.num_layers in (None, len(sites)), "num_layers", options.num_layers, len(sites))
        check_sequence(
            options.num_attention_heads in (None, shape[0]),
            "num_attention_heads",
            options.num_attention_heads,
            shape[0],
        )
        size = shape[0] * shape[1]
        check_sequence(options.token_dim == size, "token_dim", options.token_dim, size)
        adapter = Adapter(method.name, method, sites)
        whole = (method.n, 2 * len(sites) * size)
        slots = {}
        for layer, site in enumerate(sites):
            for half, name in enumerate(("keys", "values")):
                slots[adapter.path(site, name)] = Slot(
                    KEY, whole, columns((2 * layer + half) * size, (method.n, *shape))
                )
        return FolderContents((adapter,), slots)

    def written(self, captured: Program, pieces: Sequence[Piece]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        n = one("the number of virtual tokens", pieces, lambda method: method.n)
        if len({piece.adapter for piece in pieces}) > 1:
            raise MethodError("The program has several prefixes; a peft folder has one. Save them with sp.save.")
        every = candidates(captured, pieces[0].method)
        by_site = {piece.site.name: piece for piece in pieces}
        if missing := [site.name for site in every if site.name not in by_site]:
            raise MethodError(
                f"{missing[0]} has no prefix; peft puts one before every attention. Use sp.save(program, folder)."
            )
        if one("positions", pieces, lambda method: method.positions) == "kept":
            raise MethodError('prefix_tuning keeps positions; peft starts them at n. Use positions="shifted".')
        heads, width = alike(every, MethodError)
        halves = []
        for site in every:
            piece = by_site[site.name]
            pair = piece.method.evaluate("keys_values", tensors={**piece.tensors, **piece.shared})
            halves += [half.reshape(n, heads * width) for half in pair]
        config = {
            "num_virtual_tokens": n, "token_dim": heads * width, "num_transformer_submodules": 1,
            "num_attention_heads": heads, "num_layers": len(every), "prefix_projection": False,
        }  # fmt: skip
        return config, {KEY: torch.cat(halves, dim=1)}


def check_picks(captured: Program, error: type[Exception]) -> None:
    """Where the model picks a position by its number, peft lets it pick a virtual token."""
    graph = captured.graphs()[0]
    found = embedding_entry(graph)
    held = carriers(graph, found, {})
    if picked := next((node for node in graph.nodes if node in held and picks(node, found)), None):
        raise error(
            f"{captured.source} reads a token by its position ({picked.name}): behind a prompt that is a virtual token "
            "in peft, and the real one in this package. Use sp.save(program, folder) in place of a peft folder; or "
            "capture the model without its pooled output."
        )


def columns(start: int, shape: tuple[int, int, int]) -> Any:
    return lambda stored: stored[:, start : start + shape[1] * shape[2]].reshape(shape)


def alike(sites: Sequence[Site], error: type[Exception]) -> tuple[int, int]:
    """[heads, width] of every attention."""
    if len({site.shape for site in sites}) > 1:
        raise error("The model's attentions have keys of different sizes; peft's layout has one for all.")
    return sites[0].shape


def check_sequence(fits: bool, name: str, theirs: Any, ours: Any) -> None:
    if not fits:
        raise CheckpointError(f"{name} is {theirs}; the model has {ours}. Load the model that it was trained on.")
