"""Trained numbers as integers on the real architectures, built without weights. The head is never counted."""

from functools import cache

import pytest
import torch
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import subgraph_peft as sp
from subgraph_peft.compiler.budget import trained
from subgraph_peft.compiler.places import candidates
from subgraph_peft.method.adapter import Adapter
from subgraph_peft.passes import (
    IA3,
    SSB,
    SSL,
    AdaLoRA,
    BitFit,
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
    RsLoRA,
    SAMParser,
    SpectralAdditive,
    SpectralRotational,
    SVDiff,
    TriLoRA,
    VeRA,
)
from subgraph_peft.program.selectors import select

ROBERTA = {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1, "num_labels": 2}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
DEBERTA = {
    "vocab_size": 128_100, "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
    "intermediate_size": 3072, "max_position_embeddings": 512, "type_vocab_size": 0, "relative_attention": True,
    "position_buckets": 256, "norm_rel_ebd": "layer_norm", "share_att_key": True, "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False, "pooler_hidden_size": 768, "num_labels": 2,
}  # fmt: skip
MODELS = {
    "deberta-v3-base": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**DEBERTA)),
    "roberta-base": lambda: RobertaForSequenceClassification(RobertaConfig(**ROBERTA)),
    "roberta-large": lambda: RobertaForSequenceClassification(RobertaConfig(**ROBERTA, **LARGE)),
    "llama-2-7b": lambda: LlamaForCausalLM(LlamaConfig()),
    "llama-2-7b, two layers": lambda: LlamaForCausalLM(LlamaConfig(num_hidden_layers=2)),
}
TOTAL = {
    "deberta-v3-base": 184_423_682, "roberta-base": 124_647_170, "roberta-large": 355_361_794,
    "llama-2-7b": 6_738_415_616,
}  # fmt: skip
ENCODERS = ["deberta-v3-base", "roberta-base", "roberta-large"]


@pytest.fixture(scope="module", autouse=True)
def captured_once():
    yield
    program.cache_clear()
    sites.cache_clear()


@cache
def program(name: str) -> sp.Program:
    ids = torch.zeros(2, 7, dtype=torch.long, device="meta")
    with torch.device("meta"):
        return sp.capture(MODELS[name](), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, verify=False)


@cache
def sites(name: str, kind: type[sp.Method]) -> tuple[sp.Site, ...]:
    return tuple(candidates(program(name), kind()))


def places(name: str, which: str) -> tuple[str, str]:
    """(where, exclude), in the names of each architecture."""
    end = "_proj" if name.startswith("deberta") else ""
    attention = f"query{end},key{end},value{end}"
    return {
        "all": (f"*.encoder.layer.*.{{{attention},dense}}", ()),
        "qkv": (f"*.encoder.layer.*.{{{attention}}}", ()),
        "kvi": (f"*.encoder.layer.*.{{key{end},value{end},intermediate.dense}}", ()),
        "backbone": (f"{name.partition('-')[0]}.*", ()),
        "blocks": ("*.encoder.layer.*.output.dropout", ()),
        "norms": ("*.encoder.layer.*.output.LayerNorm", "*.attention.*"),
    }[which]


def count(name: str, method: sp.Method, which: str) -> int:
    """What the adapter declares as trained, without the graph."""
    where, exclude = places(name, which)
    chosen = select(sites(name, type(method)), where, exclude)
    return trained(Adapter("adapter", method, chosen.sites))


# METHODS: what, options, sites, and the numbers on DeBERTaV3-base, RoBERTa-base, RoBERTa-large
ROWS: list[tuple[sp.Method, str, tuple[int, int, int]]] = [
    (SSL(), "kvi", (27_648, 27_648, 73_728)),
    (IA3(), "kvi", (55_296, 55_296, 147_456)),
    (SSB(), "kvi", (82_944, 82_944, 221_184)),
    (SSL(), "all", (82_944, 82_944, 221_184)),
    (SAMParser(), "all", (55_296, 55_296, 147_456)),
    (SVDiff(), "all", (55_296, 55_296, 147_456)),
    (BitFit(), "backbone", (102_912, 102_144, 271_360)),
    *((LoRA(r=r), "all", (165_888 * r, 165_888 * r, 442_368 * r)) for r in (2, 4, 8, 16)),
    *((method, "all", (331_776, 331_776, 884_736)) for method in (
        RsLoRA(r=2), PiSSA(r=2), MiLoRA(r=2), LieRA(r=2), SpectralAdditive(r=2), MPCo(of=LoRA(r=2)),
        MPCd(of=LoRA(r=2)), MPCn(of=LoRA(r=2)))),
    (ParallelAdapter(r=2, biases=False), "all", (331_776, 331_776, 884_736)),
    (LoRA(r=8), "qkv", (442_368, 442_368, 1_179_648)),
    *((DoRA(of=LoRA(r=r)), "all", (165_888 * r + 82_944, 165_888 * r + 82_944, 442_368 * r + 221_184))
      for r in (2, 16)),
    *((kind(r=r), "all", (165_888 * r + 72 * r * r, 165_888 * r + 72 * r * r, 442_368 * r + 144 * r * r))
      for kind in (FLoRA, MoSLoRA) for r in (2, 8)),
    *((kind(r=r), "all", (165_960 * r, 165_960 * r, 442_512 * r)) for kind in (AdaLoRA, TriLoRA) for r in (2, 8)),
    (LoRADash(r=2), "all", (331_776 + 8 * 72, 331_776 + 8 * 72, 884_736 + 8 * 144)),
    (VeRA(r=256), "all", (82_944 + 72 * 256, 82_944 + 72 * 256, 221_184 + 144 * 256)),
    (SpectralRotational(r=4), "all", (2 * 16 * 72, 2 * 16 * 72, 2 * 16 * 144)),
    *((Houlsby(r=b), "blocks", (n, n, 24 * 2 * (2 * 1024 * b + b + 1024)))
      for b, n in ((8, 313_536), (16, 608_640), (32, 1_198_848), (64, 2_379_264))),
    (Houlsby(r=8), "blocks", (313_536, 313_536, 835_968)),
    *((Pfeiffer(r=b), "norms", (n, n, 24 * (2 * 1024 * b + b + 1024)))
      for b, n in ((16, 304_320), (32, 599_424), (64, 1_189_632), (128, 2_370_048))),
]  # fmt: skip
NAMED = [f"{method.name}-{getattr(method, 'r', '')}-{which}" for method, which, _ in ROWS]


@pytest.mark.parametrize("name", ENCODERS)
def test_the_architectures_are_the_published_ones(name):
    assert program(name).counts() == (0, TOTAL[name])


@pytest.mark.parametrize(("method", "which", "numbers"), ROWS, ids=NAMED)
def test_trained_numbers_on_the_encoders(method, which, numbers):
    assert tuple(count(name, method, which) for name in ENCODERS) == numbers


REWRITTEN = [
    ("deberta-v3-base", SSL(), "kvi", 27_648), ("deberta-v3-base", IA3(), "kvi", 55_296),
    ("deberta-v3-base", SSB(), "kvi", 82_944), ("deberta-v3-base", SAMParser(), "all", 55_296),
    ("deberta-v3-base", LoRA(r=2), "all", 331_776), ("deberta-v3-base", BitFit(), "backbone", 102_912),
    ("deberta-v3-base", Houlsby(r=8), "blocks", 313_536), ("roberta-base", DoRA(of=LoRA(r=2)), "all", 414_720),
    ("roberta-base", Pfeiffer(r=16), "norms", 304_320), ("roberta-large", SSB(), "kvi", 221_184),
]  # fmt: skip


@pytest.mark.parametrize(("name", "method", "which", "expected"), REWRITTEN, ids=lambda v: getattr(v, "name", v))
def test_the_rewritten_program_trains_as_many(name, method, which, expected):
    where, exclude = places(name, which)
    rewritten = sp.rewrite(program(name), method, where=where, exclude=exclude)
    assert rewritten.counts() == (expected, TOTAL[name])
    held = sum(p.numel() for n, p in rewritten.module.named_parameters() if p.requires_grad)
    assert held == expected and all(p.is_meta for p in rewritten.module.parameters())


def test_a_budget_on_the_real_model():
    """0.02% of DeBERTaV3-base: SSL at the cheapest kinds of sites; 0.2% is LoRA of rank 2 at all six."""
    lora = sp.rewrite(program("deberta-v3-base"), LoRA(), where=places("deberta-v3-base", "all")[0], budget="0.2%")
    assert lora.adapters[0].method.r == 2 and lora.counts()[0] == 331_776
    ssl = sp.rewrite(program("deberta-v3-base"), SSL(), where=places("deberta-v3-base", "kvi")[0], budget="0.02%")
    assert ssl.counts()[0] == 27_648


LLAMA = [
    ("all linear, PiSSA r=128", PiSSA(r=128), "*", 319_815_680),
    ("LoRA", LoRA(r=32), "*.{q,k,v,up,down}_proj", 56_098_816),
    ("DoRA", DoRA(of=LoRA(r=32)), "*.{q,k,v,up,down}_proj", 56_098_816 + 876_544),
    ("LoRA-Dash", LoRADash(r=32), "*.{q,k,v,up,down}_proj", 56_098_816 + 1_280),
    ("FLoRA", FLoRA(r=32), "*.{q,k,v,up,down}_proj", 56_098_816 + 163_840),
    ("AdaLoRA", AdaLoRA(r=32), "*.{q,k,v,up,down}_proj", 56_098_816 + 5_120),
]


@pytest.mark.parametrize(("method", "where", "expected"), [row[1:] for row in LLAMA], ids=[row[0] for row in LLAMA])
def test_two_of_32_llama_layers(method, where, expected):
    rewritten = sp.rewrite(program("llama-2-7b, two layers"), method, where=where)
    assert 16 * rewritten.counts()[0] == expected


@pytest.mark.slow
def test_pissa_on_llama_2_7b():
    rewritten = sp.rewrite(program("llama-2-7b"), PiSSA(r=128), where="*")
    assert rewritten.counts() == (319_815_680, TOTAL["llama-2-7b"]) and len(rewritten.adapters[0].sites) == 32 * 7
