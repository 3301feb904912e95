"""Virtual positions in the input sequence, against models run by hand on [P; E(ids)]."""

import copy
import functools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base.errors import MethodError
from subgraph_peft.passes import LoRA
from subgraph_peft.passes.reconstruction.p_tuning import PTuning
from subgraph_peft.passes.reconstruction.prefix_tuning import PrefixTuning
from subgraph_peft.passes.reconstruction.prompt_tuning import PromptTuning
from subgraph_peft.store.adapter_file import restore
from tests import models
from tests.models import BATCH, ENCODER, LENGTH, VOCABULARY, made
from tests.sequences import (
    BUILD,
    DECODER,
    EXACT,
    HIDDEN,
    METHODS,
    STILL,
    Inputs,
    N,
    adapt,
    captured,
    full,
    gap,
    losses,
    model,
    other,
    real,
    rolled,
    tensor,
    tokens,
    typed,
)


def with_virtual(name: str, inputs: Inputs, P: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
    """(loss, logits) of the eager model on [P; E(ids)], the first or last token taken by hand where it pools one."""
    net = model(name)[0]
    ids, mask, labels = inputs["input_ids"], inputs["attention_mask"], inputs.get("labels")
    batch, length = ids.shape
    ones = torch.ones(batch, N, dtype=torch.long)
    given = {
        "inputs_embeds": torch.cat([P.expand(batch, -1, -1), net.get_input_embeddings()(ids)], 1),
        "attention_mask": torch.cat([ones, mask], 1),
    }
    if "token_type_ids" in inputs:
        given["token_type_ids"] = torch.cat([0 * ones, inputs["token_type_ids"]], 1)
    if "position_ids" in inputs:
        given["position_ids"] = torch.arange(N + length).expand(batch, -1)
    if name == "bart":
        found = net(**given, labels=labels)
        return found.loss, found.logits
    if labels is None or labels.ndim == 2:
        found = net(**given, labels=None if labels is None else torch.cat([-100 * ones, labels], 1))
        return found.loss, found.logits[:, N:]
    hidden = getattr(net, net.base_model_prefix)(**given).last_hidden_state[:, N:]
    pooled = {
        "bert": lambda: net.classifier(net.bert.pooler(hidden)),
        "albert": lambda: net.classifier(torch.tanh(net.albert.pooler(hidden[:, 0]))),
        "roberta": lambda: net.classifier(hidden),
        "deberta": lambda: net.classifier(net.pooler(hidden)),
        "modernbert": lambda: net.classifier(net.head(hidden[:, 0])),
        "llama_classes": lambda: net.score(hidden[torch.arange(batch), mask.sum(1) - 1]),
    }
    logits = pooled[name]()
    return F.cross_entropy(logits, labels), logits


@pytest.mark.parametrize("name", BUILD)
def test_prompt_tuning_is_the_model_on_longer_embeddings(name):
    adapted = adapt(name, PromptTuning(n=N))
    P = tensor(adapted, "P").detach()
    for inputs in (model(name)[1], other(model(name)[1])):
        with torch.no_grad():
            loss, logits = with_virtual(name, inputs, P)
        found = adapted.run(inputs)
        assert found.logits.shape == logits.shape
        assert gap(inputs, found.logits, logits) < EXACT
        assert loss is None or abs(found.loss - loss) < EXACT
    base = captured(name).run()
    assert gap(model(name)[1], adapted.run().logits, base.logits) > 1e-4
    assert adapted.counts()[0] == N * tensor(adapted, "P").shape[1]


@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_the_pooled_token_is_the_first_real_one(name):
    """At 0, where the base model looks, stands a virtual position; its own pooled result is another."""
    adapted = adapt(name, PromptTuning(n=N))
    net, inputs = model(name)
    ones = torch.ones(BATCH, N, dtype=torch.long)
    embeds = torch.cat(
        [tensor(adapted, "P").detach().expand(BATCH, -1, -1), net.get_input_embeddings()(inputs["input_ids"])], 1
    )
    with torch.no_grad():
        first = net(inputs_embeds=embeds, attention_mask=torch.cat([ones, inputs["attention_mask"]], 1)).logits
    assert (adapted.run().logits - first).abs().max() > 1e-3


@pytest.mark.parametrize("method", [PromptTuning(n=N), PrefixTuning(n=N)], ids=["prompt", "prefix"])
@pytest.mark.parametrize("name", ["llama", "mistral", "llama_classes", "modernbert"])
def test_padding_on_either_side_changes_nothing_on_rotary_models(name, method):
    adapted = adapt(name, method)
    inputs = model(name)[1]
    left = rolled(inputs)
    row = inputs["attention_mask"][-1].bool()
    alone = {k: v[-1:, row] if v.shape == inputs["attention_mask"].shape else v[-1:] for k, v in inputs.items()}
    found = adapted.run(inputs).logits
    if name != "modernbert" or isinstance(method, PromptTuning):  # the base model itself pools [:, 0], here padding
        expected = found[inputs["attention_mask"].bool()] if found.ndim == 3 else found
        assert (real(left, adapted.run(left).logits) - expected).abs().max() < 1e-5  # angles are float32
    single = adapted.run(alone).logits[0]
    assert (single - (found[-1][row] if found.ndim == 3 else found[-1])).abs().max() < 1e-5


def test_outputs_stand_where_their_inputs_do():
    """A row padded on the left is [padding; P; tokens]: its outputs skip P, those of padding included."""
    adapted = adapt("llama", PromptTuning(n=N))
    net, inputs = model("llama")
    left = rolled(inputs)
    padding = (inputs["attention_mask"] == 0).sum(1).tolist()
    P, table = tensor(adapted, "P").detach(), net.get_input_embeddings()

    def inserted(row: torch.Tensor, virtual: torch.Tensor, at: int) -> torch.Tensor:
        return torch.cat([row[:at], virtual, row[at:]])

    with torch.no_grad():
        embeds = torch.stack([inserted(table(ids), P, p) for ids, p in zip(left["input_ids"], padding, strict=True)])
        mask = torch.stack(
            [inserted(m, m.new_ones(N), p) for m, p in zip(left["attention_mask"], padding, strict=True)]
        )
        long = net(inputs_embeds=embeds, attention_mask=mask).logits
    expected = torch.stack([torch.cat([row[:p], row[p + N :]]) for row, p in zip(long, padding, strict=True)])
    assert max(padding) == 2
    assert (adapted.run(left).logits - expected).abs().max() < EXACT


def test_positions_that_are_passed_continue_behind_the_virtual_ones():
    """Rows padded on the left with positions that say so."""
    adapted = adapt("llama_positions", PromptTuning(n=N))
    inputs = model("llama_positions")[1]
    left = rolled(inputs)
    left["position_ids"] = (left["attention_mask"].cumsum(1) - 1).clamp_min(0)
    expected = adapted.run(inputs).logits[inputs["attention_mask"].bool()]
    assert (real(left, adapted.run(left).logits) - expected).abs().max() < EXACT
    counting_padding = {**left, "position_ids": inputs["position_ids"]}
    assert (real(left, adapted.run(counting_padding).logits) - expected).abs().max() < 1e-5
    starting_late = {**inputs, "position_ids": inputs["position_ids"] + 5}
    assert gap(inputs, adapted.run(starting_late).logits, adapted.run(inputs).logits) < 1e-5


def test_p_tuning_counts_its_encoder():
    d, e = 24, 7
    mlp = adapt("llama", PTuning(n=N, hidden=e))
    assert mlp.counts()[0] == N * d + (d * e + e) + (e * e + e) + (e * d + d)
    lstm = adapt("llama", PTuning(n=N, hidden=e, encoder="lstm"))
    first, second = 2 * 4 * e * (d + e + 2), 2 * 4 * e * (2 * e + e + 2)
    assert lstm.counts()[0] == N * d + first + second + (4 * e * e + 2 * e) + (2 * e * d + d)


def test_fold_leaves_virtual_positions_and_folds_the_rest():
    prompt = adapt("llama", PromptTuning(n=N))
    assert sp.fold(prompt) is prompt
    mixed = sp.rewrite(prompt, LoRA(r=2), where=["*.q_proj", "*.embed_tokens"], dtype=torch.float64)
    mixed = sp.rewrite(mixed, PrefixTuning(n=2), dtype=torch.float64)
    with torch.no_grad():
        for site in range(len(mixed.adapters[1].sites)):
            tensor(mixed, "B", site, adapter=1).normal_()
    folded = sp.fold(mixed)
    assert [adapter.name for adapter in folded.adapters] == ["prompt_tuning", "prefix_tuning"]
    assert gap(model("llama")[1], folded.run().logits, mixed.run().logits) < EXACT
    assert gap(model("llama")[1], mixed.run().logits, prompt.run().logits) > 1e-3
    left = rolled(model("llama")[1])
    expected = mixed.run().logits[model("llama")[1]["attention_mask"].bool()]
    assert (real(left, mixed.run(left).logits) - expected).abs().max() < 1e-5


def test_lora_under_virtual_positions_is_the_folded_model_with_them():
    lora = sp.rewrite(captured("bert"), LoRA(r=2), where="*.{query,word_embeddings}", dtype=torch.float64)
    both = sp.rewrite(lora, PromptTuning(n=N), dtype=torch.float64)
    with torch.no_grad():
        for _, parameter in both.parameters(trainable=True):
            parameter.normal_(generator=torch.Generator().manual_seed(1))
        for name, parameter in lora.parameters(trainable=True):
            parameter.copy_(both.module.get_parameter(name))
    after = sp.rewrite(sp.fold(lora), PromptTuning(n=N), dtype=torch.float64)
    with torch.no_grad():
        tensor(after, "P").copy_(tensor(both, "P", adapter=1))
    assert gap(model("bert")[1], both.run().logits, after.run().logits) < EXACT


@pytest.mark.parametrize("method", [PromptTuning, PrefixTuning])
def test_two_of_a_kind_stand_one_before_the_other(method):
    """[P₂; P₁; X] is one prompt of the length of both."""
    both = sp.rewrite(adapt("llama", method(n=3)), method(n=1), dtype=torch.float64)
    one = adapt("llama", method(n=4))
    with torch.no_grad():
        for site in range(len(one.adapters[0].sites)):
            for name in one.adapters[0].tensors(one.adapters[0].sites[site]):
                parts = [tensor(both, name, site, adapter) for adapter in (1, 0)]
                tensor(one, name, site).copy_(torch.cat(parts))
    assert gap(model("llama")[1], both.run().logits, one.run().logits) < EXACT


def test_only_the_prompt_trains_and_both_modes_are_the_models():
    net, inputs = made(lambda: models.bert(dropout=0.5)[0], typed)
    adapted = sp.rewrite(sp.capture(net.train(), inputs), PromptTuning(n=N))
    before = {name: value.clone() for name, value in adapted.module.named_parameters()}
    first, second = (adapted.module.train()(**inputs).logits for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(*(adapted.module.eval()(**inputs).logits for _ in range(2)))
    parameters = [p for _, p in adapted.parameters(trainable=True)]
    losses(adapted.module.train(), parameters, inputs)
    changed = {name for name, value in adapted.module.named_parameters() if not torch.equal(value, before[name])}
    assert changed == {"bert.embeddings.word_embeddings.weight_prompt_tuning.P"}


def test_the_table_itself_may_train_beside_a_prompt():
    net, inputs = made(*BUILD["bert"])
    program = sp.capture(net.to(torch.bfloat16), inputs)
    adapted = sp.rewrite(program, PromptTuning(n=N), trainable="*.word_embeddings")
    adapted = sp.rewrite(adapted, LoRA(r=2), where="*.query")
    table = adapted.module.get_parameter("bert.embeddings.word_embeddings.weight")
    adapted.module.train()(**inputs).loss.backward()
    assert table.dtype == torch.float32  # cast where it is read
    assert table.grad[inputs["input_ids"][0]].any(1).all()
    assert tensor(adapted, "P").grad.any(1).all()


def runs_lstm_in_bfloat16() -> bool:
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(HIDDEN, HIDDEN, bidirectional=True)(torch.zeros(1, N, HIDDEN, requires_grad=True))
    except RuntimeError:
        return False
    return True


@functools.cache
def single_precision() -> sp.Program:
    return sp.capture(*made(*BUILD["llama"]))


@pytest.mark.parametrize("kind", METHODS)
def test_every_kind_trains_under_autocast(kind):
    if kind == "lstm" and not runs_lstm_in_bfloat16():
        pytest.skip("torch has no LSTM in bfloat16 for this processor")
    adapted = sp.rewrite(single_precision(), METHODS[kind])
    with torch.autocast("cpu", torch.bfloat16):
        loss = adapted.module.train()(**adapted.example).loss
    loss.backward()
    assert loss.item() == pytest.approx(adapted.run().loss.item(), rel=0.05)
    assert all(p.grad.isfinite().all() and p.grad.any() for _, p in adapted.parameters(trainable=True))


def test_labels_may_be_missing():
    for name in ("llama", "bert"):
        adapted = adapt(name, PromptTuning(n=N))
        inputs = {k: v for k, v in model(name)[1].items() if k != "labels"}
        found = adapted.module.eval()(**inputs)
        assert found.loss is None
        assert torch.equal(found.logits, adapted.run().logits)


@pytest.mark.parametrize("kind", METHODS)
def test_checkpoint_round_trip(kind, tmp_path):
    adapted = adapt("albert", METHODS[kind])
    sp.save(adapted, tmp_path)
    fresh = adapt("albert", METHODS[kind], seed=1)
    assert not torch.equal(fresh.run().logits, adapted.run().logits)
    assert torch.equal(restore(fresh, tmp_path).run().logits, adapted.run().logits)
    assert torch.equal(copy.deepcopy(adapted.module).eval()(**adapted.example).logits, adapted.run().logits)


def test_starting_values_from_the_vocabulary():
    table = model("llama")[0].get_input_embeddings().weight
    drawn = tensor(adapt("llama", PromptTuning(n=N, init="vocabulary")), "P")
    assert all(any(torch.equal(row, entry) for entry in table) for row in drawn)
    assert not torch.equal(drawn, tensor(adapt("llama", PromptTuning(n=N, init="vocabulary", seed=1)), "P"))
    text = tensor(adapt("llama", PromptTuning(n=N, tokens=(7, 9, 11))), "P")
    assert torch.equal(text, table[[7, 9, 11, 7]])
    with pytest.raises(MethodError, match=f"token {VOCABULARY} is none of the {VOCABULARY}"):
        adapt("llama", PromptTuning(n=N, tokens=(VOCABULARY,)))
    scaled = model("gemma")[0].get_input_embeddings()
    text = tensor(adapt("gemma", PromptTuning(n=N, tokens=(7,))), "P")
    with torch.no_grad():
        assert torch.allclose(text[0], scaled(torch.tensor([7]))[0], atol=1e-12)
    assert not torch.allclose(text[0], scaled.weight[7])


def test_a_program_on_meta_is_rewritten_unseen():
    config = transformers.LlamaConfig(**DECODER)
    with torch.device("meta"):
        net = transformers.LlamaForCausalLM(config)
    inputs = {name: value.to("meta") for name, value in tokens().items()}
    program = sp.capture(net, inputs)
    for method in (PromptTuning(n=N, init="vocabulary"), PTuning(n=N), PrefixTuning(n=N)):
        assert all(p.is_meta for _, p in sp.rewrite(program, method).parameters(trainable=True))


class Encoder(nn.Module):
    """Reads tokens by `look`, a function of (self, ids, embedded) and of the further inputs that are given."""

    def __init__(self, look: Callable):
        super().__init__()
        self.tokens, self.second, self.head = nn.Embedding(VOCABULARY, 8), nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.look = look

    def forward(self, ids: torch.Tensor, attention_mask=None, speed=None, at=None) -> torch.Tensor:
        further = [value for value in (attention_mask, speed, at) if value is not None]
        return self.head(self.look(self, ids, self.tokens(ids), *further))


def mixed(x: torch.Tensor) -> torch.Tensor:
    return x + x.cumsum(1) / 8


PICKS: dict[str, Callable] = {
    "first": lambda net, ids, x: mixed(x)[:, 0],
    "third": lambda net, ids, x: mixed(x)[:, 2],
    "first two": lambda net, ids, x: mixed(x)[:, :2].sum(1),
    "last": lambda net, ids, x: mixed(x)[:, -1],
    "all but the last": lambda net, ids, x: mixed(x)[:, :-1].amax(1),
    "by id": lambda net, ids, x: mixed(x)[torch.arange(ids.shape[0]), (ids == 3).int().argmax(1)],
}


@pytest.mark.parametrize("pick", PICKS)
def test_picked_positions_are_real_ones(pick):
    net = Encoder(PICKS[pick]).double().eval()
    ids = torch.randint(4, VOCABULARY, (2, 5))
    ids[:, 3] = 3
    adapted = sp.rewrite(sp.capture(net, ids), PromptTuning(n=N))
    P = tensor(adapted, "P").detach()
    x = mixed(torch.cat([P.expand(2, -1, -1), net.tokens(ids)], 1))
    expected = {
        "first": x[:, N], "third": x[:, N + 2], "first two": x[:, N : N + 2].sum(1), "last": x[:, -1],
        "all but the last": x[:, :-1].amax(1), "by id": x[:, N + 3],
    }[pick]  # fmt: skip
    with torch.no_grad():
        assert (adapted.run() - net.head(expected)).abs().max() < EXACT


def of(look: Callable, **inputs: torch.Tensor) -> Callable[[], sp.Program]:
    return lambda: sp.capture(Encoder(look), {"ids": torch.randint(3, VOCABULARY, (2, 5)), **inputs})


def embedded() -> sp.Program:
    inputs = {"inputs_embeds": torch.randn(BATCH, LENGTH, 24), "attention_mask": tokens()["attention_mask"]}
    return sp.capture(transformers.LlamaModel(transformers.LlamaConfig(**DECODER)), inputs)


def span() -> sp.Program:
    ends = {"start_positions": torch.tensor([1, 2, 3]), "end_positions": torch.tensor([2, 3, 4])}
    config = transformers.BertConfig(**{**ENCODER, **STILL, "num_labels": 2})
    return sp.capture(transformers.BertForQuestionAnswering(config), {**tokens(), **ends})


def four_dimensional() -> sp.Program:
    net = transformers.BertModel(transformers.BertConfig(**ENCODER, **STILL))
    inputs = {
        "input_ids": tokens()["input_ids"],
        "attention_mask": torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool),
    }
    return sp.capture(net, inputs, dynamic={"input_ids": [0, 1], "attention_mask": [0, 2, 3]})


ONES = torch.ones(2, 5, dtype=torch.long)


def third_of_masked(net: Encoder, ids: torch.Tensor, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (x * mask[..., None])[:, 2]


REFUSED: dict[str, tuple[Callable[[], sp.Program], str]] = {
    "embeddings as input": (embedded, "No input is a sequence of token ids.*not with inputs_embeds"),
    "span": (span, "chooses among positions, as the loss of a span does"),
    "full table": (full, "does not run on the example inputs.*positions end at 32.*fewer virtual positions"),
    "4-d mask": (four_dimensional, r"attention_mask \[.*Pass attention_mask as \[batch, length\]"),
    "fixed length": (
        lambda: sp.capture(Encoder(PICKS["first"]), ONES, dynamic={"ids": [0]}), "sequence length is fixed to 5",
    ),
    "three dimensions": (
        lambda: sp.capture(Encoder(lambda net, ids, x: x), torch.ones(2, 3, 5, dtype=torch.long)),
        r"3 dimensions; virtual positions need \[batch, length\]",
    ),
    "two tables": (of(lambda net, ids, x: x + net.second(ids)), r"looked up 2 times \(tokens.weight, second.weight\)"),
    "ids as numbers": (of(lambda net, ids, x: x * ids[..., None]), "reads token ids as numbers"),
    "unknown input": (
        of(lambda net, ids, x, speed: x * speed[..., None], speed=ONES), "What the input speed .* is unknown",
    ),
    "positions as input": (
        of(lambda net, ids, x, at: x[torch.arange(ids.shape[0]), at], at=torch.tensor([1, 2])),
        "picks positions of the sequence by at",
    ),
    "flipped": (of(lambda net, ids, x: x.flip(1)), "flip at flip counts positions"),
    "without the first": (of(lambda net, ids, x: x[:, 1:].amax(1)), "counts positions from the start"),
    "flat output": (of(lambda net, ids, x: x.flatten(0, 1)), "cannot be cut back"),
    "fixed position under a mask": (of(third_of_masked, attention_mask=ONES), "padding on the left would move"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused_with_the_reason(case):
    program, reason = REFUSED[case]
    with pytest.raises(MethodError, match=reason):
        sp.rewrite(program(), PromptTuning(n=N))
