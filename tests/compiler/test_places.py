"""Where a method rewrites: around modules, at blocks of packed weights, by patterns, in a budget, in shared tensors.

The oracle for adapters around modules is the eager model with forward hooks.
"""

from collections.abc import Callable
from functools import cache
from itertools import combinations, product

import numpy as np
import onnx
import peft
import pytest
import torch
import torch.nn.functional as F
from peft.tuners.vera.model import _kaiming_init
from safetensors.torch import load_file
from torch import nn

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.compiler.budget import allowed
from subgraph_peft.passes import (
    SSB,
    SSL,
    AdaLoRA,
    BitFit,
    Blocks,
    DoRA,
    Houlsby,
    LoRA,
    LoRADash,
    MPCo,
    ParallelAdapter,
    Pfeiffer,
    PiSSA,
    VeRA,
)
from subgraph_peft.pipeline.config import load_config
from subgraph_peft.pipeline.passes import State
from subgraph_peft.pipeline.pipeline import Pipeline
from subgraph_peft.store.adapter_file import restore
from tests import models
from tests.models import MODELS


@cache
def captured(name: str, dropout: float = 0.0) -> sp.Program:
    return sp.capture(eager(name, dropout)[0], eager(name, dropout)[1])


@cache
def single() -> sp.Program:
    """BERT in float32."""
    return models.captured("bert")


def eager(name: str, dropout: float = 0.0) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """In float64."""
    model, inputs = MODELS[name](dropout) if dropout else MODELS[name]()
    return model.double(), {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}


def shake(program: sp.Program, size: float = 0.3, seed: int = 1) -> sp.Program:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in program.parameters(trainable=True):
            p.add_(size * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return program


def logits(output) -> torch.Tensor:
    return output[1] if isinstance(output, tuple) else output.logits


def close(actual: torch.Tensor, expected: torch.Tensor, bound: float = 1e-11) -> bool:
    return (actual - expected).abs().max().item() <= bound * expected.abs().max().item()


# adapters around modules

ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}
Hook = Callable[..., torch.Tensor]


def bottleneck(method, t: dict[str, torch.Tensor], h: torch.Tensor) -> torch.Tensor:
    """W_u φ(W_d h + b_d) + b_u"""
    hidden = ACTIVATIONS[method.activation](h @ t["D"].T + t.get("bd", 0))
    return hidden @ t["U"].T + t.get("bu", 0)


def hook_of(method, t: dict[str, torch.Tensor]) -> Hook:
    def change(module: nn.Module, x: torch.Tensor, y: torch.Tensor, others: tuple, named: dict) -> torch.Tensor:
        if isinstance(method, Houlsby):
            return y + bottleneck(method, t, y)
        if isinstance(method, ParallelAdapter):
            return y + method.scale * bottleneck(method, t, x)
        return first_of(module.forward(x + bottleneck(method, t, y), *others, **named))

    def hook(module, args, named, result):
        named = dict(named)
        x, *others = args if args else (named.pop("hidden_states"),)
        changed = change(module, x, first_of(result), tuple(others), named)
        return (changed, *result[1:]) if isinstance(result, tuple) else changed

    return hook


def first_of(result):
    return result[0] if isinstance(result, tuple) else result


def hooked(program: sp.Program, name: str, dropout: float = 0.0) -> nn.Module:
    """The eager model with the program's adapters as hooks, the first adapter's first."""
    model = eager(name, dropout)[0]
    for adapter in program.adapters:
        for site in adapter.sites:
            t = {n: program.module.get_parameter(path) for n, path in adapter.paths(site).items()}
            model.get_submodule(site.owner).register_forward_hook(hook_of(adapter.at(site), t), with_kwargs=True)
    return model


SERIAL, AROUND, BESIDE = Houlsby(r=5), Pfeiffer(r=5, activation="tanh"), ParallelAdapter(r=5, scale=0.7)
PLACED = {
    "bert_dense": ("bert", [(SERIAL, "*.output.dense", 4)]),
    "bert_dropout": ("bert", [(SERIAL, "*.output.dropout", 4)]),
    "bert_norm": ("bert", [(AROUND, "*.layer.*.output.LayerNorm", 4)]),
    "bert_attention": ("bert", [(BESIDE, "*.attention.self", 2)]),
    "bert_all": ("bert", [(SERIAL, "*.output.dropout", 4), (AROUND, "*.output.LayerNorm", 4),
                          (BESIDE, "*.attention.self", 2), (SERIAL, "*.attention.self", 2)]),
    "gpt2_mlp": ("gpt2", [(BESIDE, "*.mlp", 2)]),
    "gpt2_attention": ("gpt2", [(BESIDE, "*.attn", 2)]),
    "gpt2_conv1d": ("gpt2", [(SERIAL, "*.c_proj", 4), (BESIDE, "*.c_fc", 2)]),
    "gpt2_layer": ("gpt2", [(BESIDE, "transformer.h.{0,1}", 2)]),
    "gpt2_inner_and_outer": ("gpt2", [(SERIAL, ["*.mlp", "*.mlp.dropout", "*.mlp.c_proj"], 6)]),
    "gpt2_inner_after_outer": ("gpt2", [(AROUND, "*.mlp", 2), (SERIAL, "*.mlp.{act,dropout}", 4)]),
    "llama_blocks": ("llama", [(BESIDE, ["*.mlp", "*.self_attn"], 4)]),
    "llama_serial": ("llama", [(SERIAL, ["*.mlp", "*.self_attn"], 4)]),
    "llama_norm": ("llama", [(AROUND, "*.post_attention_layernorm", 2)]),
    "albert_layer_called_twice": ("albert", [(SERIAL, "*.albert_layers.0", 1)]),
    "albert_parts_called_twice": ("albert", [(AROUND, "*.full_layer_layer_norm", 1), (BESIDE, "*.attention", 1),
                                             (SERIAL, "*.{ffn_output,output_dropout}", 2)]),
    "mlp_called_twice": ("mlp", [(SERIAL, "shared", 1), (BESIDE, "shared", 1)]),
}  # fmt: skip


@pytest.mark.parametrize(("name", "placed"), PLACED.values(), ids=PLACED)
def test_adapters_around_modules_are_forward_hooks(name, placed):
    program = base = captured(name)
    for method, where, count in placed:
        program = sp.rewrite(program, method, where=where)
        assert len(program.adapters[-1].sites) == count
        if not isinstance(method, Pfeiffer):
            assert close(logits(program.run()), logits(base.run()))
    shake(program)
    model, inputs = hooked(program, name), dict(base.example)
    with torch.no_grad():
        expected = logits(model(**inputs))
    assert close(logits(program.run()), expected)
    assert not close(logits(base.run()), expected, 1e-3)
    half = {n: t[:2] for n, t in inputs.items()}
    with torch.no_grad():
        assert close(logits(program.run(half)), logits(model(**half)))


def test_pfeiffer_starts_as_the_norm_of_the_norms_input():
    """f(x + 0) is f(x): with U = 0 the wrapped module is run again on its own input."""
    program = sp.rewrite(captured("bert"), AROUND, where="*.layer.*.output.LayerNorm", exclude="*.attention.*")
    assert len(program.adapters[0].sites) == 2
    assert close(logits(program.run()), logits(captured("bert").run()))


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_gradients_and_dropout_in_training_equal_those_of_the_hooked_model(name):
    base = captured(name, 0.2)
    program = sp.rewrite(base, SERIAL, where={"bert": "*.output.dropout", "gpt2": "*.mlp.dropout"}[name])
    program = sp.rewrite(program, BESIDE, where={"bert": "*.attention.self", "gpt2": "*.mlp"}[name])
    shake(program)
    model, own = hooked(program, name, 0.2).train(), [p for _, p in program.parameters(trainable=True)]
    gradients = []
    for run in (program.module.train(), model):
        torch.manual_seed(5)
        gradients.append(torch.autograd.grad(run(**base.example)[0], own))
    assert all(close(a, b, 1e-9) for a, b in zip(*gradients, strict=True)) and all(g.any() for g in gradients[0])


def test_a_bottleneck_drops_in_training_alone():
    base = captured("mlp")
    program = shake(sp.rewrite(base, Houlsby(r=50, hidden_dropout=0.5, activation="relu"), where="first"))
    without = sp.rewrite(base, Houlsby(r=50, activation="relu"), where="first")
    without.module.load_state_dict(program.module.state_dict())
    assert torch.equal(logits(program.run()), logits(without.run()))
    torch.manual_seed(0)
    first, second = (logits(program.run(training=True)) for _ in range(2))
    assert not torch.equal(first, second)


def test_a_weight_inside_a_wrapped_module_is_rewritten_in_every_copy():
    """Pfeiffer runs the block a second time: LoRA and BitFit inside count there too, whichever came first."""
    outputs = []
    for order in (0, 1):
        program = captured("gpt2")
        passes = [(AROUND, "*.mlp"), (LoRA(r=2), "*.mlp.c_fc"), (BitFit(), "*.mlp.c_proj")]
        for method, where in passes if order else passes[::-1]:
            program = sp.rewrite(program, method, where=where)
        shake(program)
        with torch.no_grad():
            for adapter in program.adapters:
                for _, _, path in adapter.all_paths():
                    generator = torch.Generator().manual_seed(sum(map(ord, path)))
                    p = program.module.get_parameter(path)
                    p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
        folded = sp.fold(program)
        assert folded.folded.remaining == ("pfeiffer",)
        assert close(logits(program.run()), logits(folded.run()))
        model = hooked(folded, "gpt2")
        own = dict(model.named_parameters())
        with torch.no_grad():
            for path in folded.folded.sites:
                own[path].copy_(folded.module.get_parameter(path))
            assert close(logits(program.run()), logits(model(**program.example)))
        outputs.append(logits(program.run()))
    assert close(*outputs)


def test_output_adapters_do_not_fold_and_survive_a_checkpoint(tmp_path):
    base = captured("albert")
    program = sp.rewrite(base, SERIAL, where="*.albert_layers.0")
    program = shake(sp.rewrite(program, AROUND, where="*.full_layer_layer_norm"))
    assert sp.fold(program) is program
    sp.save(program, tmp_path)
    assert torch.equal(logits(sp.load(base, tmp_path).run()), logits(program.run()))


class Odd(nn.Module):
    """Modules that are no place for an adapter: two results, no activation in, a result of other positions."""

    class Pair(nn.Module):
        def forward(self, x):
            return torch.sin(x), torch.cos(x)

    class Pooled(nn.Module):
        def forward(self, x):
            return torch.tanh(x.mean(1))

    def __init__(self):
        super().__init__()
        self.embed, self.pair, self.pool = nn.Embedding(11, 6), self.Pair(), self.Pooled()
        self.conv, self.head = nn.Conv1d(6, 6, 3, padding=1), nn.Linear(6, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        a, b = self.pair(x)
        return self.head(self.pool(a * b + x))


@pytest.fixture(scope="module")
def odd() -> sp.Program:
    torch.manual_seed(0)
    return sp.capture(Odd(), torch.randint(0, 11, (2, 6)), dynamic={"ids": [0]})


@pytest.mark.parametrize(("where", "message"), [
    ("pair", "pair has no single result to rewrite .found: sin, cos"),
    ("pool", "pool reads no activation of its result's leading dimensions"),
    ("hea", "'hea' matches none of 3 sites. Nearest: head, embed, conv.$"),
])  # fmt: skip
def test_a_module_that_is_no_place_says_why(odd, where, message):
    with pytest.raises(sp.SelectorError, match=message):
        sp.rewrite(odd, SERIAL, where=where)


def test_channels_that_are_not_last_are_refused(odd):
    """A convolution's features are not its last dimension; here the last one has just their size."""
    for method in (SERIAL, BESIDE):
        with pytest.raises(sp.MethodError, match=r"conv.weight \(conv1d\).* the last dimension"):
            sp.rewrite(odd, method, where="exact:conv")


def test_an_adapter_beside_an_embedding_has_no_activation_to_read(odd):
    assert sp.rewrite(odd, SERIAL, where="exact:embed").run().shape == (2, 3)
    with pytest.raises(sp.MethodError, match="embed.weight.*reads the input.*no activation"):
        sp.rewrite(odd, BESIDE, where="exact:embed")


def test_modules_have_to_be_named():
    program = sp.rewrite(captured("bert"), SERIAL)
    assert {site.kind for site in program.adapters[0].sites} == {"linear"}
    assert ("bert.encoder.layer.0", "module: name it to include it") in program.adapters[0].left_out
    with pytest.raises(sp.SelectorError, match="matches none of"):
        sp.rewrite(captured("bert"), LoRA(), where="*.output.dropout")


def test_every_kind_of_adapter_reaches_onnx_and_folds_leave_nothing(tmp_path):
    inputs = MODELS["bert"]()[1]
    program = sp.rewrite(single(), SERIAL, where="*.output.dropout", name="serial")
    program = sp.rewrite(program, AROUND, where="*.layer.*.output.LayerNorm", exclude="*.attention.*", name="around")
    program = sp.rewrite(program, BESIDE, where="*.attention.self", name="beside")
    program = shake(sp.rewrite(program, LoRA(r=2), where="*.query", name="low"), 0.1)
    folded = sp.fold(program)
    assert folded.folded.remaining == ("serial", "around", "beside")
    report = export.to_onnx(folded, tmp_path / "model.onnx")
    graph = onnx.load(report.path).graph
    names = [node.name for node in graph.node] + [tensor.name for tensor in graph.initializer]
    for adapter, found in (("serial", True), ("around", True), ("beside", True), ("low", False)):
        assert any(f"_{adapter}" in name for name in names) == found, adapter
    fed = {n: torch.cat([t, t])[:, :5] for n, t in inputs.items() if n != "labels"}
    (actual,) = export.session(report.path).run(None, {n: t.numpy() for n, t in fed.items()})
    np.testing.assert_allclose(actual, program.run(fed).logits.numpy(), atol=1e-5)


# blocks of a packed weight


def tensors(program: sp.Program, site: sp.Site) -> dict[str, torch.Tensor]:
    paths = program.adapters[-1].paths(site)
    return {n: program.module.get_parameter(path).detach() for n, path in paths.items()}


def block_diagonal(t: dict[str, torch.Tensor], scale: float, rows: dict[str, slice], shape: tuple) -> torch.Tensor:
    """s·blockdiag(B_q, 0, B_v) [A_q; A_v], a dense matrix."""
    r = t["A_q"].shape[0]
    B = torch.zeros(shape[0], r * len(rows), dtype=torch.float64)
    for j, (name, block) in enumerate(rows.items()):
        B[block, r * j : r * (j + 1)] = t[f"B_{name}"]
    return scale * B @ torch.cat([t[f"A_{name}"] for name in rows])


def test_blocks_of_gpt2_equal_a_dense_block_diagonal():
    base = captured("gpt2")
    program = shake(sp.rewrite(base, Blocks(of=LoRA(r=3, alpha=6.0)), where="*.c_attn"))
    model, inputs = eager("gpt2")
    for site in program.adapters[0].sites:
        assert (site.out_features, site.in_features) == (72, 24)
        delta = block_diagonal(tensors(program, site), 2.0, {"q": slice(0, 24), "v": slice(48, 72)}, (72, 24))
        assert not delta[24:48].any()
        with torch.no_grad():
            model.get_parameter(site.name).add_(delta.T)
    with torch.no_grad():
        assert close(logits(program.run()), logits(model(**inputs)))
    assert close(logits(sp.fold(program).run()), logits(program.run()))
    assert program.counts()[0] == 2 * (3 * 2 * 24 + 24 * 2 * 3)
    assert {lowered.form for lowered in program.lowered.values()} == {"factored"}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)
        self.fused = nn.Linear(8, 14)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.attention(x, x, x, need_weights=False)[0] + x
        q, k, v = self.fused(h).split([8, 4, 2], -1)
        return self.head(torch.tanh(q) + k.sum(-1, keepdim=True) * v.mean(-1, keepdim=True))


@pytest.fixture(scope="module")
def attention() -> sp.Program:
    torch.manual_seed(0)
    return sp.capture(Attention().double(), torch.randn(2, 5, 8).double())


def test_blocks_of_torch_attention_equal_a_dense_block_diagonal(attention):
    program = shake(sp.rewrite(attention, Blocks(of=LoRA(r=2, alpha=6.0)), where="*.in_proj_weight"))
    (site,) = program.adapters[0].sites
    assert site.kind == "packed" and program.lowered[site.name].form == "factored"
    delta = block_diagonal(tensors(program, site), 3.0, {"q": slice(0, 8), "v": slice(16, 24)}, (24, 8))
    model = Attention().double()
    model.load_state_dict(attention.module.state_dict())
    with torch.no_grad():
        model.attention.in_proj_weight.add_(delta)
        assert close(program.run(), model.eval()(attention.example["x"]))
    assert close(sp.fold(program).run(), program.run())


UNEQUAL = {"sizes": (8, 4, 2), "only": ("q", "v")}
INSIDE = {
    "lora": LoRA(r=2, alpha=6.0), "dora": DoRA(of=LoRA(r=2)), "pissa": PiSSA(r=2), "ssb": SSB(), "vera": VeRA(r=3),
    "mpc_o": MPCo(of=LoRA(r=2)), "adalora": AdaLoRA(r=2, target_r=1),
}  # fmt: skip


@pytest.mark.parametrize("name", INSIDE)
def test_unequal_blocks_by_any_method_equal_the_method_on_each(attention, name):
    inner = INSIDE[name]
    program = sp.rewrite(attention, Blocks(of=inner, **UNEQUAL), where="fused")
    assert close(program.run(), attention.run())
    shake(program)
    (site,) = program.adapters[0].sites
    W = attention.module.get_parameter("fused.weight").detach()
    t, expected = tensors(program, site), W.clone()
    for block, rows in (("q", slice(0, 8)), ("v", slice(12, 14))):
        own = {n.removesuffix(f"_{block}"): v for n, v in t.items() if n.endswith(f"_{block}")}
        assert name == "vera" or own
        shared = {n: v for n, v in t.items() if n in ("A", "B")}
        expected[rows] = inner.evaluate("weight", W[rows], tensors={**shared, **own})
    folded = sp.fold(program)
    assert close(folded.module.get_parameter("fused.weight"), expected, 1e-13)
    assert torch.equal(folded.module.get_parameter("fused.weight")[8:12], W[8:12])
    assert close(folded.run(), program.run()) and not close(program.run(), attention.run(), 1e-3)


def test_blocks_share_veras_projections_of_their_own_size(attention, tmp_path):
    program = shake(sp.rewrite(attention, Blocks(of=VeRA(r=3), **UNEQUAL), where="fused"))
    t = tensors(program, program.adapters[0].sites[0])
    assert {n: tuple(v.shape) for n, v in t.items()} == {
        "b_q": (8,), "d_q": (3,), "b_v": (2,), "d_v": (3,), "A": (3, 8), "B": (8, 3)
    }  # fmt: skip
    sp.save(program, tmp_path)
    assert torch.equal(sp.load(attention, tmp_path).run(), program.run())


@pytest.mark.parametrize(("options", "message"), [
    ({"sizes": (8, 4, 4)}, r"14 rows are not 8 \+ 4 \+ 4; give `sizes`"),
    ({}, r"14 rows are not 4 \+ 4 \+ 4; give `sizes`"),
    ({"sizes": (8, 6)}, "`sizes` gives one number a name"),
    ({"only": ("q", "w")}, "there is no block 'w'.*Blocks: q, k, v"),
    ({"only": ()}, "`only` names at least one block"),
    ({"names": ("q", "q", "v")}, "`names` are distinct"),
    ({"of": ParallelAdapter()}, "needs a weight method that folds inside"),
    ({"of": PiSSA(r=3), "sizes": (8, 4, 2)}, r"fused.weight\[v\].*3.*min"),
])  # fmt: skip
def test_wrong_blocks_are_refused(attention, options, message):
    with pytest.raises(sp.MethodError, match=message):
        sp.rewrite(attention, Blocks(**options), where="fused")


# options that differ by site


@pytest.fixture(scope="module")
def bert() -> sp.Program:
    return captured("bert")


PATTERNS = {"*.query": {"r": 2}, "*.layer.1.*.query": {"r": 6, "alpha": 3.0}, "exact:bert.pooler.dense": {"alpha": 1.0}}
EVERY = "*.{query,key,dense}"


def test_patterns_set_rank_and_scale_of_their_sites(bert):
    program = sp.rewrite(bert, LoRA(r=4, alpha=8.0), where=EVERY, patterns=PATTERNS)
    adapter = program.adapters[0]
    found = {site.owner.removeprefix("bert."): adapter.at(site) for site in adapter.sites}
    assert found["encoder.layer.0.attention.self.query"] == LoRA(r=2, alpha=8.0)
    assert found["encoder.layer.1.attention.self.query"] == LoRA(r=6, alpha=3.0)
    assert found["pooler.dense"] == LoRA(r=4, alpha=1.0)
    assert found["encoder.layer.0.attention.self.key"] == LoRA(r=4, alpha=8.0)
    assert program.counts()[0] == sum(
        adapter.at(s).r * (s.in_features + s.out_features) for s in adapter.sites
    )  # fmt: skip
    assert set(dict(adapter.variants)) == {s.name for s in adapter.sites if "query" in s.name or "pooler" in s.name}


def test_patterns_equal_rewrites_of_their_own(bert):
    together = shake(sp.rewrite(bert, LoRA(r=4, alpha=8.0), where="*.{query,key}", patterns=PATTERNS_ON_QUERY))
    apart = bert
    for where, method in (
        ("*.key", LoRA(r=4, alpha=8.0)), ("*.0.*.query", LoRA(r=2, alpha=8.0)), ("*.1.*.query", LoRA(r=6, alpha=3.0)),
    ):  # fmt: skip
        apart = sp.rewrite(apart, method, where=where)
    fresh = sp.rewrite(bert, LoRA(r=4, alpha=8.0), where="*.{query,key}", patterns=PATTERNS_ON_QUERY)
    pairs = []
    for adapter in apart.adapters:
        for site, name, path in adapter.all_paths():
            ours = f"{site.name}_lora.{name}"
            assert torch.equal(fresh.module.get_parameter(ours), apart.module.get_parameter(path)), "same start"
            pairs.append((apart.module.get_parameter(path), together.module.get_parameter(ours)))
    assert len(pairs) == len(list(together.parameters(trainable=True)))
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours)
    assert close(logits(together.run()), logits(apart.run()))
    assert close(logits(sp.fold(together).run()), logits(together.run()))


PATTERNS_ON_QUERY = {"*.query": {"r": 2}, "*.layer.1.*.query": {"r": 6, "alpha": 3.0}}


def test_patterns_survive_a_checkpoint_and_a_pipeline(bert, tmp_path):
    program = shake(sp.rewrite(bert, DoRA(of=LoRA(r=4)), where=EVERY, patterns=PATTERNS_ON_QUERY))
    assert program.adapters[0].at(program.adapters[0].sites[0]) == DoRA(of=LoRA(r=2))
    sp.save(program, tmp_path)
    rebuilt = sp.load(bert, tmp_path)
    assert torch.equal(logits(rebuilt.run()), logits(program.run()))
    assert rebuilt.adapters[0].variants == program.adapters[0].variants
    restore(sp.rewrite(bert, DoRA(of=LoRA(r=4)), where=EVERY, patterns=PATTERNS_ON_QUERY, seed=3), tmp_path)
    with pytest.raises(sp.CheckpointError, match="another variants than the program's"):
        restore(sp.rewrite(bert, DoRA(of=LoRA(r=4)), where=EVERY), tmp_path)
    pipeline = Pipeline.read([{"lora": {"r": 4, "where": EVERY, "patterns": PATTERNS_ON_QUERY}}])
    assert Pipeline.read(str(pipeline)) == pipeline
    assert (
        pipeline.apply(bert).counts() == sp.rewrite(bert, LoRA(r=4), where=EVERY, patterns=PATTERNS_ON_QUERY).counts()
    )


@pytest.mark.parametrize(("patterns", "error", "message"), [
    ({"*.value": {"r": 2}}, sp.SelectorError, r"'\*.value' matches none of the 2 selected sites. Nearest: .*query"),
    ({"*.query": {"rank": 2}}, sp.MethodError, "option 'rank': it is unknown"),
    ({"*.query": {}}, sp.MethodError, "needs options, such as"),
    ({"*.query": 4}, sp.MethodError, "needs options, such as"),
    ({"*.query": {"r": 0}}, sp.MethodError, "option 'r'"),
])  # fmt: skip
def test_wrong_patterns_are_refused(bert, patterns, error, message):
    with pytest.raises(error, match=message):
        sp.rewrite(bert, LoRA(), where="*.query", patterns=patterns)


def test_a_pattern_cannot_change_what_all_sites_share(bert):
    with pytest.raises(sp.MethodError, match="changes tensors that all sites of vera share"):
        sp.rewrite(bert, VeRA(r=4), where="*.query", patterns={"*.0.*": {"r": 2}})
    own = sp.rewrite(bert, VeRA(r=4), where="*.query", patterns={"*.0.*": {"d_initial": 0.3}})
    assert [own.module.get_parameter(f"{s.name}_vera.d")[0].item() for s in own.adapters[0].sites] == pytest.approx(
        [0.3, 0.1]
    )


# budgets


@pytest.mark.parametrize(("budget", "numbers"), [
    ("0.02%", 36_884), (" 1.5e-1 % ", 276_635), (0.0002, 36_884), (0.5, 92_211_841), (1, 1), (40_000, 40_000),
    ("40000", 40_000), ("100%", 184_423_682), ("0.0002", 36_884),
])  # fmt: skip
def test_a_budget_is_a_percentage_a_share_or_a_count(budget, numbers):
    assert allowed(budget, 184_423_682) == numbers


@pytest.mark.parametrize("budget", ["", "a lot", "0%", 0, -3, "-1%", "101%", "nan", float("inf"), "1%%"])
def test_what_is_no_budget_is_refused(budget):
    with pytest.raises(sp.MethodError, match="A budget is a percentage such as '0.02%', a share below 1 or a count"):
        allowed(budget, 1000)


@pytest.mark.parametrize("method", [
    LoRA(), DoRA(of=LoRA()), AdaLoRA(), VeRA(), PiSSA(r=3), Houlsby(), MPCo(of=LoRA()),
], ids=lambda m: m.name)  # fmt: skip
@pytest.mark.parametrize("budget", [1500, "8%", 0.3])
def test_the_rank_is_the_largest_that_fits(bert, method, budget):
    total = bert.counts()[1]
    limit = allowed(budget, total)
    program = sp.rewrite(bert, method, where="*.{query,value,dense}", exclude="*.pooler.*", budget=budget)
    adapter, inner = program.adapters[0], program.adapters[0].method.layers()[-1]
    spent, r = program.counts()[0], inner.r
    assert spent <= limit
    if r < 24:
        more = type(inner)(**{**dict(inner), "r": r + 1})
        more = type(method)(**{**dict(method), "of": more}) if inner is not adapter.method else more
        next_one = sp.rewrite(bert, more, where="*.{query,value,dense}", exclude="*.pooler.*")
        assert next_one.counts()[0] > limit or len(adapter.sites) < 10
    assert f"r = {r}" in adapter.chosen and f"{spent:,}" in adapter.chosen and f"{limit:,}" in adapter.chosen


def test_without_a_rank_the_kinds_of_sites_that_come_closest(bert):
    """Every choice of kinds, worked out here: SSL costs `in` a site, and both layers go together."""
    kinds = {
        "query": 24,
        "key": 24,
        "value": 24,
        "attention.output.dense": 24,
        "intermediate.dense": 24,
        "output.dense": 40,
    }
    for limit in (48, 50, 100, 128, 150, 250, 319, 320, 10_000):
        costs = [
            2 * sum(kinds[k] for k in chosen)
            for size in range(1, 7)
            for chosen in combinations(kinds, size)
            if 2 * sum(kinds[k] for k in chosen) <= limit
        ]
        program = sp.rewrite(bert, SSL(), where="*.layer.*", budget=limit)
        assert program.counts()[0] == max(costs)
        layers = [
            {s.owner.replace("layer.0", "layer.1") for s in program.adapters[0].sites if f"layer.{i}." in s.name}
            for i in (0, 1)
        ]
        assert layers[0] == layers[1]
        over = [name for name, why in program.adapters[0].left_out if why == "over the budget"]
        assert len(over) + len(program.adapters[0].sites) == 12


def test_a_rank_of_one_at_fewer_sites_where_it_is_too_much_at_all(bert):
    program = sp.rewrite(bert, LoRA(r=8), where="*.layer.*", budget=200)
    assert program.adapters[0].method.r == 1 and program.counts()[0] == 2 * 2 * 48
    assert len({s.owner.rpartition(".")[2] for s in program.adapters[0].sites}) == 2


@pytest.mark.parametrize(("method", "smallest"), [(SSL(), 48), (LoRA(), 96)])
def test_too_small_a_budget_names_the_least(bert, method, smallest):
    with pytest.raises(
        sp.MethodError, match=f"needs at least {smallest} numbers at the selected sites. Raise the budget to"
    ):
        sp.rewrite(bert, method, where="*.layer.*", budget=smallest - 1)
    assert sp.rewrite(bert, method, where="*.layer.*", budget=smallest).counts()[0] == smallest


def test_a_budget_and_patterns_keep_each_to_their_sites(bert):
    program = sp.rewrite(bert, LoRA(), where="*.{query,key}", budget=1000, patterns={"*.query": {"r": 1}})
    adapter = program.adapters[0]
    assert [adapter.at(s).r for s in adapter.sites] == [1, 9, 1, 9] and program.counts()[0] == 48 * 20


def test_a_chosen_rank_is_in_the_checkpoint(bert, tmp_path):
    program = shake(sp.rewrite(bert, LoRA(), where="*.query", budget=500))
    assert program.adapters[0].method.r == 5
    sp.save(program, tmp_path)
    assert torch.equal(logits(sp.load(bert, tmp_path).run()), logits(program.run()))


def test_a_pipeline_says_what_a_budget_chose(bert):
    (result,) = Pipeline.read("lora{where=*.query,budget=1%}").run(State(program=bert))
    limit = int(bert.counts()[1] * 0.01)
    assert result.summary.startswith(f"budget 1% of {bert.counts()[1]:,} = {limit:,}: r = {limit // 96} at 2 sites, ")
    (result,) = Pipeline.read([{"ssl": {"where": "*.layer.*", "budget": 100}}]).run(State(program=bert))
    assert "budget 100 of 11,963 = 100: 4 of 12 sites (bert.encoder.layer.*.attention.self.query, " in result.summary


def test_a_budget_can_be_set_from_the_command_line(bert, tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text("model: {factory: 'tests.models:bert'}\npasses:\n- lora: {r: 8, where: '*.query'}\n")
    config = load_config(path, ["lora.budget=0.5%", "lora.patterns={'*.0.*': {r: 1}}"])
    (rewrite,) = config.pipeline.passes
    assert rewrite.budget == "0.5%" and rewrite.patterns == {"*.0.*": {"r": 1}}
    with pytest.raises(sp.ConfigError, match="option 'bugdet': it is unknown. Did you mean 'budget'"):
        load_config(path, ["lora.bugdet=0.5%"])


# tensors that all sites share


def vera(program: sp.Program, **options) -> sp.Program:
    return sp.rewrite(program, VeRA(r=6, **options), where="*.layer.*.{query,dense}")


def test_veras_projections_are_one_tensor_counted_and_saved_once(bert, tmp_path):
    program = shake(vera(bert))
    adapter = program.adapters[0]
    held = {name: {id(program.module.get_parameter(adapter.path(s, name))) for s in adapter.sites} for name in "ABbd"}
    assert [len(held[n]) for n in "ABbd"] == [1, 1, 8, 8]
    names = [n for n, _ in program.module.named_parameters(remove_duplicate=False)]
    assert names.count("shared_vera.A") == 1 and len([n for n in names if n.endswith(".A")]) == 1
    reads = [node for node in program.graph.find_nodes(op="get_attr") if node.target == "shared_vera.A"]
    assert len(reads) == 1
    assert program.counts()[0] == sum(site.out_features + 6 for site in adapter.sites)
    assert not any(p.requires_grad for n, p in program.parameters() if n.startswith("shared_vera"))
    sp.save(program, tmp_path)
    saved = load_file(tmp_path / "adapter.safetensors")
    assert [n for n in saved if n.endswith((".A", ".B"))] == ["shared_vera.A", "shared_vera.B"]
    assert torch.equal(logits(sp.load(bert, tmp_path).run()), logits(program.run()))


def test_vera_reads_its_slice_of_the_projections(bert):
    program = shake(vera(bert))
    A, B = (program.module.get_parameter(f"shared_vera.{n}") for n in "AB")
    assert A.shape == (6, 40) and B.shape == (40, 6)
    folded = sp.fold(program)
    for site in program.adapters[0].sites:
        t = tensors(program, site)
        W = bert.module.get_parameter(site.name)
        expected = W + torch.diag(t["b"]) @ B[: W.shape[0]] @ torch.diag(t["d"]) @ A[:, : W.shape[1]]
        assert close(folded.module.get_parameter(site.name), expected, 1e-13)
    assert close(logits(folded.run()), logits(program.run()))


def test_reload_from_the_seed_equals_reload_from_the_file(bert, tmp_path):
    outputs = []
    for kept in (True, False):
        program = shake(vera(bert, projection_seed=11, save_projections=kept))
        folder = tmp_path / str(kept)
        sp.save(program, folder)
        assert any(n.startswith("shared") for n in load_file(folder / "adapter.safetensors")) == kept
        for again in (sp.load(bert, folder), restore(vera(bert, projection_seed=11, save_projections=kept), folder)):
            own = dict(program.module.named_parameters())
            assert all(torch.equal(p, own[n]) for n, p in again.module.named_parameters())
            outputs.append(logits(again.run()))
    assert all(torch.equal(outputs[0], other) for other in outputs)
    other = shake(vera(bert, projection_seed=12))
    assert not torch.equal(logits(other.run()), outputs[0])


def test_a_wider_site_changes_what_all_share(bert):
    narrow = sp.rewrite(bert, VeRA(r=6), where="*.query")
    wide = sp.rewrite(bert, VeRA(r=6), where=["*.query", "*.layer.*.dense"])
    A, B = (narrow.module.get_parameter(f"shared_vera.{n}") for n in "AB")
    wide_A, wide_B = (wide.module.get_parameter(f"shared_vera.{n}") for n in "AB")
    assert A.shape == (6, 24) and wide_A.shape == (6, 40) and wide_B.shape == (40, 6)
    assert not torch.equal(wide_A[:, :24], A) and not torch.equal(wide_B[:24], B)


@pytest.mark.parametrize("seed", [0, 7])
def test_projections_are_drawn_as_peft_draws_them(seed):
    inputs = MODELS["bert"]()[1]
    program = sp.rewrite(single(), VeRA(r=6, projection_seed=seed), where="*.encoder.*.{query,dense}")
    config = peft.VeraConfig(
        r=6, target_modules=r".*encoder.*\.(query|dense)", projection_prng_key=seed, vera_dropout=0.0
    )
    theirs = peft.get_peft_model(MODELS["bert"]()[0], config).base_model
    assert torch.equal(program.module.get_parameter("shared_vera.A"), theirs.vera_A["default"])
    assert torch.equal(program.module.get_parameter("shared_vera.B"), theirs.vera_B["default"])
    own = dict(theirs.named_parameters())
    for site in program.adapters[0].sites:
        t = tensors(program, site)
        lambda_b, lambda_d = (own[f"model.{site.owner}.vera_lambda_{n}.default"] for n in "bd")
        assert torch.equal(lambda_b, t["b"]) and torch.equal(lambda_d, t["d"])
    shake(program)
    with torch.no_grad():
        for site, n in product(program.adapters[0].sites, "bd"):
            own[f"model.{site.owner}.vera_lambda_{n}.default"].copy_(tensors(program, site)[n])
    with torch.no_grad():
        assert close(program.run().logits, theirs.eval()(**inputs).logits, 2e-6)


def test_projections_do_not_disturb_the_global_generator(bert):
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    vera(bert)
    assert torch.equal(torch.rand(4), expected)
    drawn = _kaiming_init((6, 40), torch.Generator().manual_seed(0)).double()
    assert torch.equal(vera(bert, projection_seed=0).module.get_parameter("shared_vera.A"), drawn)


def test_f_is_the_layer_itself_at_a_layer_selected_by_its_weight(bert):
    class Scaled(sp.Method):
        """y = f(x ⊙ c)"""

        name = "scaled_input"

        def tensors(self, site):
            return {"c": sp.trainable(site.in_features, init=sp.ones)}

        def output(self, x, y, c, f):
            return f(x * c)

    where = "*.self.{query,value}"
    ours, known = sp.rewrite(bert, Scaled(), where), sp.rewrite(bert, SSL(), where)
    with torch.no_grad():
        for site in known.adapters[0].sites:
            c = torch.rand(site.in_features, dtype=torch.float64)
            for program in (ours, known):
                program.module.get_parameter(program.adapters[0].path(site, "c")).copy_(c)
    assert torch.equal(ours.run().logits, known.run().logits)


def test_a_pattern_may_not_change_what_one_schedule_decides_for_all(bert):
    with pytest.raises(sp.MethodError, match="changes switch, but the schedule of lora_dash is one for all its sites"):
        sp.rewrite(bert, LoRADash(r=2, directions=2), "*.{query,value}", patterns={"*.query": {"switch": 6}})
