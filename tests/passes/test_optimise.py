"""Optimising passes: the graph before and after, the same results and gradients, and where they have to keep off."""

import copy
import operator
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import subgraph_peft as sp
from subgraph_peft.export.onnx.inference import inference
from subgraph_peft.graph.nodes import aten, show
from subgraph_peft.graph.passes import GraphPass, optimisations
from subgraph_peft.graph.rewriter import META, Rewriter
from subgraph_peft.passes import (
    SSB,
    AdaLoRA,
    DoRA,
    LieRA,
    LoRA,
    MoSLoRA,
    MPCo,
    PiSSA,
    SpectralAdditive,
    SpectralRotational,
    VeRA,
)
from subgraph_peft.passes.optimise import Attention, Gram, Rotary, Scalars, Siblings, Sums, Tidy
from subgraph_peft.passes.optimise.gram import Product, norm
from subgraph_peft.pipeline.config import apply_override, load_config, schema
from subgraph_peft.pipeline.passes import State
from subgraph_peft.pipeline.pipeline import Pipeline
from subgraph_peft.program.internals import internals
from subgraph_peft.program.runners import changes, specialise
from tests import models

BOTH = (True, frozenset())  # the runner of train mode with every input
PASSES = ["gram", "changes", "attention", "tidy", "scalars", "sums", "siblings", "rotary"]
OFF = dict.fromkeys(PASSES, False)


@pytest.fixture(scope="module")
def captured():
    """name -> (inputs, program) in float64, captured once."""
    made = {}

    def of(name: str) -> tuple[dict, sp.Program]:
        if name not in made:
            model, inputs = SOURCES[name]()
            inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
            made[name] = inputs, sp.capture(model.double(), inputs, verify=False)
        return made[name]

    return of


class Experts(nn.Module):
    """A stack of weights, each of which sees every position."""

    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(3, 9, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bsd,efd->bsef", x, self.gate_up).tanh().sum(2)


def experts() -> models.Made:
    return models.made(Experts, lambda: {"x": torch.randn(3, 4, 6)})


def shaken(program: sp.Program, seed: int = 1) -> sp.Program:
    """The program with random values in everything that trains."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, p in program.parameters(trainable=True):
            p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=p.dtype))
    return program


def results(program: sp.Program, inputs: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a step in train mode, buffers after it."""
    module = copy.deepcopy(program.module).train()
    torch.manual_seed(seed)
    outputs = [leaf for leaf in torch.utils._pytree.tree_leaves(module(**inputs)) if isinstance(leaf, torch.Tensor)]
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    loss = sum(torch.sin(leaf).sum() for leaf in outputs if leaf.is_floating_point())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    grads = {f"gradient of {n}": g for n, g in zip(named, found, strict=True) if g is not None}
    buffers = {n: b.clone() for n, b in module.named_buffers() if b.is_floating_point() and "constant" not in n}
    return {f"output {i}": leaf.detach() for i, leaf in enumerate(outputs)} | grads | buffers


def assert_same(program: sp.Program, other: sp.Program, inputs: dict, tolerance: float = 1e-12) -> None:
    found, expected = results(program, inputs), results(other, inputs)
    assert found.keys() == expected.keys() and any(name.startswith("gradient") for name in found)
    for name, value in expected.items():
        scale = value.abs().max().clamp_min(1.0)
        assert (found[name] - value).abs().max() <= tolerance * scale, name


def running(program: sp.Program, *passes: GraphPass) -> fx.Graph:
    """The graph of train mode, under some passes alone."""
    graph = specialise(program.module, True)
    for each in passes:
        each(graph, internals(program.module))
    return graph


def places(each: GraphPass, graph: fx.Graph, program: sp.Program) -> int:
    return each(graph, internals(program.module)).places


def of_term(graph: fx.Graph, term: str, adapter: str, target: object = None) -> list[fx.Node]:
    """The nodes that a rewrite added for a term of an adapter's equation."""
    nodes = ((n, n.meta.get("custom", {}).get(META, {})) for n in graph.nodes)
    return [n for n, m in nodes if (m.get("term"), m.get("adapter")) == (term, adapter) and target in (None, n.target)]


def lines(graph: fx.Graph, *words: str) -> list[str]:
    """The lines of a printed graph in which one of the words stands, without the paths of the model."""
    text = show(graph)
    for long in ("model_layers_0_", "model.layers.0.", "self_attn_", "self_attn."):
        text = text.replace(long, "")
    return [line for line in text.splitlines() if any(word in line for word in words)]


# graphs before and after


def layer_of_llama(captured, method: sp.Method = LoRA(r=2, alpha=6.0), names: str = "{q,v}") -> sp.Program:  # noqa: B008
    return sp.rewrite(captured("llama")[1], method, where=f"model.layers.0.self_attn.{names}_proj")


def test_scalars_multiply_the_factor(captured):
    program = layer_of_llama(captured, names="q")
    before, after = running(program), running(program, Scalars())
    assert lines(before, "lora_A", "lora_scale") == [
        "q_proj_lora_A = linear(mul_4, q_proj.weight_lora.A)",
        "q_proj_lora_scale = mul(q_proj_lora_A, 3.0)",
        "q_proj_lora_B = linear(q_proj_lora_scale, q_proj.weight_lora.B)",
    ]
    assert lines(after, "lora_A", "lora_scale") == [
        "q_proj_lora_scale_mul = mul(q_proj.weight_lora.A, 3.0)",
        "q_proj_lora_A = linear(mul_4, q_proj_lora_scale_mul)",
        "q_proj_lora_B = linear(q_proj_lora_A, q_proj.weight_lora.B)",
    ]


def test_scalars_keep_a_product_that_others_read(captured):
    program = layer_of_llama(captured, names="q")
    graph = running(program)
    (product,) = of_term(graph, "A", "lora")
    output = graph.output_node()
    output.args = ((*output.args[0], product),)
    assert places(Scalars(), graph, program) == 0


def pissa_lines(graph: fx.Graph) -> list[str]:
    return [line for line in lines(graph, "q_proj_pissa") if line.startswith("q_proj")]


def test_changes_are_what_is_computed(captured):
    plain = sp.optimise(captured("llama")[1], changes=False)
    before = sp.rewrite(plain, PiSSA(r=2), where="model.layers.0.self_attn.q_proj")
    assert pissa_lines(running(before)) == [
        "q_proj_pissa_A0 = linear(mul_4, q_proj.weight_pissa.A0)",
        "q_proj_pissa_B0 = linear(q_proj_pissa_A0, q_proj.weight_pissa.B0)",
        "q_proj_pissa_sum = sub(q_proj_base, q_proj_pissa_B0)",
        "q_proj_pissa_A = linear(mul_4, q_proj.weight_pissa.A)",
        "q_proj_pissa_B = linear(q_proj_pissa_A, q_proj.weight_pissa.B)",
        "q_proj_pissa_sum_1 = add(q_proj_pissa_sum, q_proj_pissa_B)",
    ]
    assert pissa_lines(running(layer_of_llama(captured, PiSSA(r=2), "q"))) == [
        "q_proj_pissa_A = linear(mul_4, q_proj.weight_pissa.A)",
        "q_proj_pissa_sub = sub(q_proj.weight_pissa.B, q_proj.weight_pissa.B0)",
        "q_proj_pissa_sub_1 = linear(q_proj_pissa_A, q_proj_pissa_sub)",
        "q_proj_pissa_sub_2 = sub(q_proj.weight_pissa.A, q_proj.weight_pissa.A0)",
        "q_proj_pissa_sub_3 = linear(mul_4, q_proj_pissa_sub_2)",
        "q_proj_pissa_B0 = linear(q_proj_pissa_sub_3, q_proj.weight_pissa.B0)",
        "q_proj_pissa_sum = add(q_proj_pissa_sub_1, q_proj_pissa_B0)",
        "q_proj_pissa_sum_1 = add(q_proj_base, q_proj_pissa_sum)",
    ]
    assert pissa_lines(running(before, Sums())) == [
        "q_proj_pissa_B0_neg = neg(q_proj.weight_pissa.B0)",
        "q_proj_pissa_A0_cat = cat([q_proj.weight_pissa.A0, q_proj.weight_pissa.A])",
        "q_proj_pissa_B0_cat = cat([q_proj_pissa_B0_neg, q_proj.weight_pissa.B], 1)",
        "q_proj_pissa_A0_linear = linear(mul_4, q_proj_pissa_A0_cat)",
        "q_proj_pissa_B0_linear = linear(q_proj_pissa_A0_linear, q_proj_pissa_B0_cat)",
        "q_proj_pissa_sum_1 = add(q_proj_base, q_proj_pissa_B0_linear)",
    ]


def test_sums_of_products_are_one_product(captured):
    program = layer_of_llama(captured, PiSSA(r=2), "q")
    assert pissa_lines(running(program, Sums())) == [
        "q_proj_pissa_sub = sub(q_proj.weight_pissa.B, q_proj.weight_pissa.B0)",
        "q_proj_pissa_sub_2 = sub(q_proj.weight_pissa.A, q_proj.weight_pissa.A0)",
        "q_proj_pissa_A_cat = cat([q_proj.weight_pissa.A, q_proj_pissa_sub_2])",
        "q_proj_pissa_sub_1_cat = cat([q_proj_pissa_sub, q_proj.weight_pissa.B0], 1)",
        "q_proj_pissa_A_linear = linear(mul_4, q_proj_pissa_A_cat)",
        "q_proj_pissa_sub_1_linear = linear(q_proj_pissa_A_linear, q_proj_pissa_sub_1_cat)",
        "q_proj_pissa_sum_1 = add(q_proj_base, q_proj_pissa_sub_1_linear)",
    ]
    graph = running(program)
    inner = of_term(graph, "sub", "pissa", aten.linear.default)[-1]
    graph.output_node().args = ((*graph.output_node().args[0], inner),)
    assert places(Sums(), graph, program) == 0


def test_changes_below_the_digits_of_the_factors_count_in_bfloat16():
    """PiSSA starts at the model's own outputs, bit for bit, and an update too small for A in bfloat16 is seen."""
    torch.manual_seed(0)
    model, inputs = nn.Sequential(nn.Linear(64, 48)).bfloat16(), torch.randn(32, 64).bfloat16()
    base = sp.capture(model, inputs)
    program = sp.rewrite(base, PiSSA(r=8), where="0")
    assert torch.equal(program.run(), base.run())
    held = dict(program.tensors())
    A, B, A0, B0 = (held[f"0.weight_pissa.{name}"] for name in ("A", "B", "A0", "B0"))
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.zero_()
        A0.copy_(A0.bfloat16())
        A.copy_(A0 * (1 + 2**-12))
        assert torch.equal(A.bfloat16(), A0.bfloat16())
        expected = inputs.double() @ (B.double() @ A.double() - B0.double() @ A0.double()).T
    assert (program.run() - expected).norm() <= 2**-7 * expected.norm()


def test_siblings_share_one_product(captured):
    program = layer_of_llama(captured, LoRA(r=2, alpha=2.0))
    assert lines(running(program), "lora_A") == [
        "q_proj_lora_A = linear(mul_4, q_proj.weight_lora.A)",
        "q_proj_lora_B = linear(q_proj_lora_A, q_proj.weight_lora.B)",
        "v_proj_lora_A = linear(mul_4, v_proj.weight_lora.A)",
        "v_proj_lora_B = linear(v_proj_lora_A, v_proj.weight_lora.B)",
    ]
    assert lines(running(program, Siblings()), "lora_A") == [
        "q_proj_lora_A_cat = cat([q_proj.weight_lora.A, v_proj.weight_lora.A])",
        "q_proj_lora_A_linear = linear(mul_4, q_proj_lora_A_cat)",
        "q_proj_lora_A_split_with_sizes = split_with_sizes(q_proj_lora_A_linear, [2, 2], -1)",
        "q_proj_lora_A_part = getitem(q_proj_lora_A_split_with_sizes, 0)",
        "v_proj_lora_A_part = getitem(q_proj_lora_A_split_with_sizes, 1)",
        "q_proj_lora_B = linear(q_proj_lora_A_part, q_proj.weight_lora.B)",
        "v_proj_lora_B = linear(v_proj_lora_A_part, v_proj.weight_lora.B)",
    ]


def test_nodes_of_passes_say_site_and_adapter(captured):
    program = layer_of_llama(captured)
    known = {node.name for node in running(program).nodes}
    graph = running(program, Scalars(), Siblings())
    new = [node for node in graph.nodes if node.name not in known and node.op == "call_function"]
    assert {node.target for node in new} == {
        aten.mul.Tensor, aten.cat.default, aten.linear.default, aten.split_with_sizes.default, operator.getitem,
    }  # fmt: skip
    for node in new:
        assert node.meta["custom"]["subgraph_peft"]["adapter"] == "lora"
        assert node.meta["custom"]["subgraph_peft"]["site"].startswith("model.layers.0.self_attn.")
        assert node.meta["nn_module_stack"]


COUNTS = {
    ("llama", "*.{q,k,v}_proj", LoRA(r=2)): {"attention": 0, "scalars": 6, "siblings": 2},
    ("llama", "*.{gate,up,q}_proj", LoRA(r=2)): {"scalars": 6, "siblings": 2},
    ("llama", "*.{q,k,v}_proj", LoRA(r=2, alpha=2.0)): {"scalars": 0, "siblings": 2},
    ("llama", "*.{q,k,v}_proj", LoRA(r=2, dropout=0.5)): {"scalars": 6, "siblings": 0},
    ("llama", "*.{q,v}_proj", DoRA(of=LoRA(r=2))): {"scalars": 4, "siblings": 2},
    ("llama", "*.{q,k}_proj", LoRA(r=9)): {"scalars": 0, "siblings": 0},
    ("llama", "*.q_proj", LoRA(r=2)): {"scalars": 2, "siblings": 0},
    ("bert", "*.{query,key,value}", LoRA(r=2)): {"attention": 0, "scalars": 6, "siblings": 2},
    ("albert", "*.{query,key,value}", LoRA(r=2)): {"scalars": 6, "siblings": 2},
    ("gpt2", "*.{c_attn,c_fc}", LoRA(r=2)): {"sums": 0, "siblings": 0},
    ("llama", "*.{q,k,v}_proj", PiSSA(r=2)): {"scalars": 0, "sums": 6, "siblings": 2},
    ("llama", "*.{q,k,v}_proj", PiSSA(r=3, alpha=6.0)): {"scalars": 12, "sums": 6, "siblings": 2},
    ("llama", "*.{q,k}_proj", PiSSA(r=7)): {"sums": 0, "siblings": 0},
    ("llama", "*.{q,k}_proj", SpectralAdditive(r=2)): {"sums": 4, "siblings": 2},
    ("llama", "*.{q,k}_proj", SpectralRotational(r=2)): {"sums": 0, "siblings": 2},
}


@pytest.mark.parametrize("case", COUNTS, ids=lambda case: f"{case[0]}-{case[2].name}-{list(COUNTS).index(case)}")
def test_how_often_passes_match(captured, case):
    source, where, method = case
    program = sp.rewrite(captured(source)[1], method, where=where)
    matched = changes(program.module)[BOTH]
    assert {name: matched[name] for name in COUNTS[case]} == COUNTS[case]
    assert list(matched) == ["attention", "tidy", "scalars", "sums", "siblings"]


def test_a_causal_mask_goes(captured):
    program = sp.promise(captured("llama")[1], "right")
    assert changes(program.module)[BOTH]["attention"] == 2
    assert "scaled_dot_product_attention(" in show(running(program, Attention()))
    assert " = le(" in show(running(program)) and " = le(" not in show(running(program, Attention()))


# equal results

SOURCES = {
    "llama": models.llama, "bert": lambda: models.bert(dropout=0.3), "gpt2": models.gpt2, "albert": models.albert,
    "conv": models.conv, "experts": experts,
}  # fmt: skip
LORA = LoRA(r=2, alpha=5.0)
EQUAL = {
    "lora": ("llama", "*.{q,k,v,gate,up}_proj", LORA),
    "lora_dropout": ("llama", "*.{q,k,v}_proj", LoRA(r=2, alpha=5.0, dropout=0.4)),
    "model_dropout": ("bert", "*.{query,key,value}", LORA),
    "dora": ("llama", "*.{q,k,v}_proj", DoRA(of=LORA)),
    "dora_dropout": ("llama", "*.{q,v}_proj", DoRA(of=LoRA(r=2, alpha=5.0, dropout=0.4))),
    "dora_norm_gradient": ("llama", "*.{q,k,v}_proj", DoRA(of=LORA, norm_gradient=True)),
    "dora_pissa": ("llama", "*.{q,v}_proj", DoRA(of=PiSSA(r=2), norm_gradient=True)),
    "pissa": ("llama", "*.{q,k,v}_proj", PiSSA(r=2, alpha=5.0)),
    "spectral": ("llama", "*.{q,v}_proj", SpectralAdditive(r=2)),
    "packed_pissa": ("gpt2", "*.c_attn[q,v]", PiSSA(r=2)),
    "experts_pissa": ("experts", "gate_up", PiSSA(r=2)),
    "dora_moslora": ("llama", "*.{q,v}_proj", DoRA(of=MoSLoRA(r=2), norm_gradient=True)),
    "dora_adalora": ("llama", "*.{q,v}_proj", DoRA(of=AdaLoRA(r=2), norm_gradient=True)),
    "dora_vera": ("llama", "*.{q,v}_proj", DoRA(of=VeRA(r=3), norm_gradient=True)),
    "moslora": ("llama", "*.{q,k,v}_proj", MoSLoRA(r=2)),
    "adalora": ("llama", "*.{q,k,v}_proj", AdaLoRA(r=3, target_r=2)),
    "vera": ("llama", "*.{q,k,v}_proj", VeRA(r=3)),
    "mpc": ("llama", "*.{q,k,v}_proj", MPCo(of=LORA)),
    "conv1d": ("gpt2", "*.{c_attn,c_fc,c_proj}", DoRA(of=LORA, norm_gradient=True)),
    "packed": ("gpt2", "*.c_attn[q,v]", LORA),
    "shared": ("albert", "*.{query,key,value}", LoRA(r=2, alpha=2.0)),
    "shared_dora": ("albert", "*.{query,key,value}", DoRA(of=LORA, norm_gradient=True)),
    "experts": ("experts", "gate_up", LORA),
    "experts_dora": ("experts", "gate_up", DoRA(of=LORA, norm_gradient=True)),
    "convolutions": ("conv", ["stem", "point"], DoRA(of=LORA, norm_gradient=True)),
}


SLOW = ("dora", "dora_dropout", "dora_moslora", "moslora", "vera", "mpc", "packed", "experts")


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in EQUAL])
def test_results_and_gradients_are_those_of_the_captured_graph(captured, name):
    source, where, method = EQUAL[name]
    inputs, base = captured(source)
    program = shaken(sp.rewrite(base, method, where=where))
    plain = sp.optimise(program, **OFF)
    assert not any(changes(plain.module)[BOTH].values())
    assert_same(program, plain, inputs)


@pytest.mark.parametrize("name", PASSES[:-1])  # the last one sees compiled graphs alone
def test_every_pass_alone(captured, name):
    inputs, base = captured("llama")
    inner = LORA if name in ("gram", "scalars") else PiSSA(r=2)
    program = shaken(sp.rewrite(base, DoRA(of=inner, norm_gradient=True), where="*layers.0*.{q,v}_proj"))
    plain = sp.optimise(program, **OFF)
    one = sp.optimise(plain, **{name: True})
    assert name == "attention" or one.lowered != plain.lowered or changes(one.module)[BOTH][name] > 0
    assert_same(one, plain, inputs)


def test_rotary_turns_by_products(captured):
    inputs, base = captured("llama")
    program = shaken(sp.rewrite(base, SSB(), where="*.{q,k}_proj"))
    graph = running(program, Tidy())
    joined = graph.find_nodes(op="call_function", target=aten.cat.default)
    halves = [node for node in joined if node.args[0][0].target is aten.neg.default]
    cat = halves[0]
    assert show(graph, [cat.args[0][1], cat.args[0][0].args[0], cat.args[0][0], cat]).splitlines() == [
        "slice_4 = slice(transpose, 3, 0, 3)",
        "slice_5 = slice(transpose, 3, 3, 9223372036854775807)",
        "neg = neg(slice_5)",
        "cat_1 = cat([neg, slice_4], -1)",
    ]
    before = set(graph.nodes)
    assert places(Rotary(), graph, program) == len(halves) == 4
    added = [n for n in graph.nodes if n not in before][:10]
    assert show(graph, added).splitlines() == [
        "cat_1_arange = arange(2, dtype=torch.float64, device=device(type='cpu'))",
        "cat_1_unsqueeze = unsqueeze(cat_1_arange, -1)",
        "cat_1_unflatten = unflatten(transpose, 3, [2, 3])",
        "cat_1_slice = slice(cat_1_unflatten, 3, 0, 1)",
        "cat_1_slice_1 = slice(cat_1_unflatten, 3, 1, 2)",
        "cat_1_sub = sub(cat_1_unsqueeze, 1)",
        "cat_1_mul = mul(cat_1_slice_1, cat_1_sub)",
        "cat_1_mul_1 = mul(cat_1_slice, cat_1_unsqueeze)",
        "cat_1_add = add(cat_1_mul, cat_1_mul_1)",
        "cat_1_flatten = flatten(cat_1_add, 3, 4)",
    ]


def test_rotary_changes_no_number(captured, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    inputs, base = captured("llama")
    found = []
    for rotary in (False, True):
        program = sp.optimise(shaken(sp.rewrite(base, SSB(), where="*_proj")), rotary=rotary)
        step = sp.TrainStep(program, lr=1e-2, compile=True)
        found.append([step(inputs).item() for _ in range(4)])
        assert changes(program.module)[BOTH].get("rotary") == (4 if rotary else None)
    assert found[0] == found[1] and found[0][0] != found[0][-1]


def test_rotary_leaves_other_concatenations_alone():
    class Turns(nn.Module):
        def forward(self, x):
            a, b, c = x[..., :4], x[..., 4:], x[..., :3]
            return torch.cat([-a, b], -1), torch.cat([-b, c], -1), torch.cat([-b, a], 0), torch.cat([b, -a], -1)

    program = sp.capture(Turns(), {"x": torch.randn(2, 5, 8)}, verify=False)
    assert places(Rotary(), specialise(program.module, True), program) == 0


def test_several_adapters_at_one_site(captured):
    inputs, base = captured("llama")
    program = base
    for method in (LoRA(r=2), LoRA(r=1), DoRA(of=LoRA(r=2), norm_gradient=True)):
        program = sp.rewrite(program, method, where="*.{q,v}_proj")
    shaken(program)
    matched = changes(program.module)[BOTH]
    assert (matched["sums"], matched["siblings"]) == (4, 2)
    assert not any(lowered.dense for lowered in program.lowered.values())
    assert_same(program, sp.optimise(program, **OFF), inputs)


def test_the_order_in_which_dropout_draws_stays(captured):
    inputs, base = captured("bert")
    program = shaken(sp.rewrite(base, LoRA(r=2, dropout=0.3), where="*.{query,key,value}"))
    assert changes(program.module)[BOTH]["siblings"] == 0
    assert_same(program, sp.optimise(program, **OFF), inputs)
    assert not torch.equal(*(results(program, inputs, seed)["output 0"] for seed in (0, 1)))


# the norm


def norms(shape: tuple[int, int], products: list[tuple[float, int]], zero: bool, seed: int) -> SimpleNamespace:
    """‖C + Σ s B A‖ by the pass and by torch, each with the gradients of all factors."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    C, factors = drawn(*shape), [(s, drawn(shape[0], r), drawn(r, shape[1])) for s, r in products]
    if zero:
        C[0] = 0
        for _, B, _ in factors:
            B[0] = 0
    given = [C, *(each.requires_grad_() for _, B, A in factors for each in (B, A))]
    graph = fx.Graph()
    nodes = [graph.placeholder(f"x{i}") for i in range(len(given))]
    for node, value in zip(nodes, given, strict=True):
        node.meta["val"] = value.detach()
    pairs = zip(nodes[1::2], nodes[2::2], strict=True)
    found = [Product(s, B, A) for (s, _), (B, A) in zip(products, pairs, strict=True)]
    output = graph.output(nodes[0])
    add = partial(Rewriter(graph, valued=True).add, like=nodes[0], before=output)
    output.args = (norm(add, nodes[0], found),)
    ours = fx.Interpreter(nn.Module(), graph=graph).run(*given)
    theirs = torch.linalg.vector_norm(C + sum(s * B @ A for s, B, A in factors), dim=1)
    weights = drawn(shape[0])
    grads = [torch.autograd.grad((value * weights).sum(), given[1:]) for value in (ours, theirs)]
    return SimpleNamespace(ours=ours, theirs=theirs, grads=grads)


@settings(max_examples=20, deadline=None)
@given(
    out=st.integers(1, 9),
    inner=st.integers(1, 9),
    products=st.lists(st.tuples(st.floats(-4, 4), st.integers(1, 4)), min_size=1, max_size=3),
    zero=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_grams_norm_is_the_norm(out, inner, products, zero, seed):
    found = norms((out, inner), products, zero, seed)
    condition = (found.theirs[int(zero) :].min().item() if out > zero else 1.0) or 1.0
    assert torch.allclose(found.ours, found.theirs, rtol=1e-9 / min(condition, 1.0) ** 2, atol=1e-18)
    for ours, theirs in zip(*found.grads, strict=True):
        assert ours.isfinite().all()
        assert torch.allclose(ours, theirs, rtol=1e-7 / min(condition, 1.0) ** 3, atol=1e-9 / min(condition, 1.0) ** 3)


def test_a_row_of_zeros_has_no_norm_and_no_gradient():
    found = norms((3, 5), [(2.0, 2)], zero=True, seed=0)
    assert 0 < found.ours[0] < 1e-18 and not found.grads[0][0][0].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("own", [None, "the model's"])
def test_norms_of_16_bits(dtype, own):
    """Squares are summed in float32: those of rows with a norm of 400 overflow float16, those of 0 have no gradient."""
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 3))
    model[0].weight.data.fill_(50.0)[0] = 0
    inputs = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    base = sp.capture(model.to(dtype), inputs, verify=False)
    method = DoRA(of=LoRA(r=2), norm_gradient=True)
    program = sp.rewrite(base, method, where="0", dtype=dtype if own else None)
    assert {p.dtype for _, p in program.parameters(trainable=True)} == {dtype if own else torch.float32}
    assert (program.run() - base.run()).abs().max() <= 0.02 * base.run().abs().max()
    program.module.train()(inputs).sum().backward()
    assert all(p.grad.isfinite().all() for _, p in program.parameters(trainable=True))


class Normed(sp.Method):
    """φ(W) = W + B A, divided by some norm of it"""

    name = "normed"
    r: int = 2
    kind: str = "rows"

    def tensors(self, site):
        A = sp.trainable(self.r, site.in_features, init=sp.normal(1.0))
        return {"A": A, "B": sp.trainable(site.out_features, self.r)}

    def weight(self, W, A, B):
        others = {"twice": 2 * (W + B @ A), "elementwise": W * (1 + B @ A), "wide": W + B @ B.T @ W}
        V = others.get(self.kind, W + B @ A)
        if self.kind == "columns":
            return V / torch.linalg.vector_norm(V, dim=0).detach()
        if self.kind == "all":
            return V / torch.linalg.vector_norm(V).detach()
        if self.kind == "kept":
            return V / torch.linalg.vector_norm(V, dim=1, keepdim=True).detach()
        order = 1 if self.kind == "sum" else 2
        return V / torch.linalg.vector_norm(V, ord=order, dim=1).detach()[:, None]


@pytest.mark.parametrize("kind", ["rows", "columns", "all", "kept", "sum", "twice", "elementwise", "wide"])
def test_gram_takes_the_euclidean_norm_of_rows_alone(kind):
    base = sp.capture(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double(), torch.randn(4, 6).double())
    program = sp.rewrite(base, Normed(kind=kind), where="0")
    assert bool(program.lowered["0.weight"].dense) == (kind != "rows")
    assert ("linalg_vector_norm" in show(program.graph)) == (kind != "rows")
    shaken(program)
    assert torch.allclose(program.run(), sp.fold(program).run(), rtol=1e-12)


@pytest.mark.parametrize("method", [DoRA(of=LieRA(r=2)), DoRA(of=LoRA(r=24))], ids=["liera", "full rank"])
def test_what_is_not_low_rank_stays_dense(captured, method):
    inputs, base = captured("llama")
    program = shaken(sp.rewrite(base, method, where="*.q_proj"))
    assert all(lowered.dense for lowered in program.lowered.values())
    assert "linalg_vector_norm" in show(program.graph)
    assert_same(program, sp.optimise(program, **OFF), inputs)


def test_the_report_of_dora_is_dense_without_gram(captured):
    _, base = captured("llama")
    program = sp.rewrite(base, DoRA(of=LoRA(r=2)), where="*.q_proj")
    assert {lowered.form for lowered in program.lowered.values()} == {"factored"}
    without = sp.optimise(program, gram=False)
    assert {tuple(lowered.dense) for lowered in without.lowered.values()} == {
        ("linalg_vector_norm reads a full-size matrix",)
    }
    assert sp.optimise(without, gram=True).lowered == program.lowered


# where passes keep off


class Pair(nn.Module):
    """Two layers over `first` and `second` of the inputs."""

    def __init__(self, second: str = "same", dtype: torch.dtype = torch.float32):
        super().__init__()
        self.a, self.b = nn.Linear(16, 6), nn.Linear(16, 6).to(dtype)
        self.second, self.dtype = second, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x if self.second == "same" else x.tanh()
        other = other if self.dtype == x.dtype else other.to(self.dtype)
        return self.a(x) + self.b(other).to(x.dtype)


@pytest.mark.parametrize(
    ("second", "dtype", "joined"),
    [("same", torch.float32, 1), ("other", torch.float32, 0), ("same", torch.float64, 0)],
)
def test_siblings_have_one_input_of_one_dtype(second, dtype, joined):
    base = sp.capture(Pair(second, dtype), torch.randn(3, 16), verify=False)
    program = shaken(sp.rewrite(base, LoRA(r=2), where=["a", "b"]))
    assert changes(program.module)[BOTH]["siblings"] == joined
    assert_same(program, sp.optimise(program, **OFF), {"x": torch.randn(3, 16)}, 1e-6)


def test_siblings_of_a_layer_that_is_called_twice(captured):
    """What a factor is computed from is made once, before the first call: it may not move behind that."""
    inputs, base = captured("albert")
    program = shaken(sp.rewrite(base, VeRA(r=3), where="*.{query,key,value}"))
    graph = running(program)
    assert {len(node.users) for node in of_term(graph, "alias", "vera", aten.alias.default)} == {2}
    assert changes(program.module)[BOTH]["siblings"] == 2
    assert_same(program, sp.optimise(program, **OFF), inputs)


@pytest.mark.parametrize(
    ("blocks", "joined"),
    [("*.{q,v}_proj", 0), ("*.q_proj", 2), ("*.self_attn", 2), (r"re:model\.layers\.\d+", 2)],
)
def test_siblings_keep_to_blocks(captured, blocks, joined):
    inputs, base = captured("llama")
    program = shaken(sp.rewrite(base, LoRA(r=2), where="*.{q,k,v}_proj"))
    expected = results(program, inputs)
    view = sp.unflatten(program, blocks)
    assert changes(view)[BOTH]["siblings"] == joined
    assert torch.allclose(view.train()(**inputs).loss, expected["output 0"])
    other = copy.deepcopy(program)
    other.module.gradient_checkpointing_enable(blocks)
    assert changes(other.module)[BOTH]["siblings"] == joined
    assert_same(other, program, inputs)


def tidied(forward, *inputs: torch.Tensor) -> tuple[list[str], int, fx.GraphModule]:
    """(the graph under tidy, its count, the graph as a module) of a function."""

    class Module(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 4))
            self.norm = nn.BatchNorm1d(4)

        def forward(self, *given):
            return forward(self, *given)

    exported = torch.export.export(Module().train(), inputs, strict=False)
    program = sp.capture(exported, verify=False)
    graph = specialise(program.module, True)
    count = places(Tidy(), graph, program)
    return [line for line in show(graph).splitlines() if not line.endswith("= input")], count, program


def normed(m: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Batch norm that counts no batches, so that nothing says that it writes."""
    return nn.functional.batch_norm(x, m.norm.running_mean, m.norm.running_var, training=True)


X, N = torch.randn(3, 4), torch.arange(6).reshape(2, 3)
TIDY = {
    "twice": (lambda m, x: (x @ m.w).tanh() + (x @ m.w).tanh(), X, 2),
    "twice with other arguments": (lambda m, x: x.softmax(0) + x.softmax(1), X, 0),
    "whole slice": (lambda m, x: x[:].tanh(), X, 1),
    "slice": (lambda m, x: x[1:].tanh(), X, 0),
    "cast of whole numbers": (lambda m, n: n.to(torch.int64) * 2, N, 1),
    "plus 0": (lambda m, n: (n + 0) * 2, N, 1),
    "plus 0.0": (lambda m, n: (n + 0.0) * 2, N, 0),
    "a mask plus 0": (lambda m, n: ((n > 2) + 0) * 2, N, 0),
    "floats plus 0": (lambda m, x: (x + 0).tanh(), X, 0),
    "float cast": (lambda m, x: x.tanh().to(torch.float32) + 1, X, 0),
    "cast of a cast": (lambda m, x: x.to(torch.float64).to(torch.float64).tanh(), X, 1),
    "two dropouts": (lambda m, x: nn.functional.dropout(x, 0.5) + nn.functional.dropout(x, 0.5), X, 0),
    "two draws": (lambda m, x: torch.rand_like(x) + torch.rand_like(x), X, 0),
    "1 and 1.0": (lambda m, n: (n * 1) + (n * 1.0), N, 0),
    "a graph that writes": (lambda m, x: (x @ m.w).tanh() + (x @ m.w).tanh() + x.clone().add_(1), X, 0),
    "two batch norms": (lambda m, x: m.norm(x) + m.norm(x), X, 0),
    "two batch norms without a count": (lambda m, x: normed(m, x) + normed(m, x), X, 0),
}


@pytest.mark.filterwarnings("ignore:Module draws random numbers")
@pytest.mark.parametrize("name", TIDY)
def test_tidy(name):
    forward, given, expected = TIDY[name]
    lines, count, program = tidied(forward, given)
    assert count == expected, "\n".join(lines)
    with_it, without = (copy.deepcopy(sp.optimise(program, tidy=on)).module.train() for on in (True, False))
    outputs = []
    for module in (with_it, without):
        torch.manual_seed(0)
        outputs.append(module(given))
    assert outputs[0].dtype == outputs[1].dtype and torch.equal(*outputs)
    for (name, one), (_, other) in zip(with_it.named_buffers(), without.named_buffers(), strict=True):
        assert torch.equal(one, other), name


def test_tidy_reads_like_this():
    lines, count, _ = tidied(lambda m, x: (x[:] @ m.w).tanh() + (x @ m.w).tanh(), X)
    assert lines == [
        "matmul = matmul(given_0, w)", "tanh = tanh(matmul)", "add = add(tanh, tanh)", "return [add]",
    ]  # fmt: skip
    assert count == 3


# switches


@pytest.fixture(scope="module")
def adapted(captured) -> sp.Program:
    inputs, base = captured("bert")
    return shaken(sp.rewrite(base, DoRA(of=LoRA(r=2)), where="*.{query,value}", trainable="classifier"))


def test_a_switched_program_shares_the_tensors(captured, adapted):
    inputs, _ = captured("bert")
    adapted.module.train()
    other = sp.optimise(adapted, siblings=False, gram=False)
    adapted.module.eval()
    assert other.module.training and not other.captured.module.training
    assert internals(other.module).without == {"siblings", "gram"}
    assert list(changes(other.module)[BOTH]) == ["attention", "tidy", "scalars", "sums"]
    assert (other.history, other.counts()) == (adapted.history, adapted.counts())
    theirs = dict(other.module.named_parameters())
    assert theirs.keys() == dict(adapted.module.named_parameters()).keys()
    for name, parameter in adapted.module.named_parameters():
        assert theirs[name].data_ptr() == parameter.data_ptr(), name
        assert theirs[name].requires_grad == parameter.requires_grad, name
    assert_same(other, adapted, inputs)


def test_nothing_switched_is_the_program_itself(adapted):
    assert sp.optimise(adapted) is sp.optimise(adapted, siblings=True, tidy=True) is adapted
    assert internals(adapted.module).without == frozenset()


def test_switches_of_a_program_without_adapters(captured):
    inputs, base = captured("llama")
    other = sp.optimise(base, tidy=False)
    assert internals(other.module).without == {"tidy"} and other.adapters == () and other.base is None
    assert torch.equal(other.run(inputs).logits, base.run(inputs).logits)
    heads = [each.module.get_parameter("lm_head.weight") for each in (other, base)]
    assert heads[0].data_ptr() == heads[1].data_ptr()


def test_switches_stay_with_the_program(captured, adapted, tmp_path):
    inputs, _ = captured("bert")
    other = sp.optimise(adapted, siblings=False, gram=False)
    sp.write(other, tmp_path / "program.safetensors")
    sp.save(other, tmp_path / "adapter")
    carried = {
        "rewritten": sp.rewrite(other, LoRA(r=1), where="*.key"),
        "folded": sp.fold(other),
        "copied": copy.deepcopy(other),
        "read": sp.read(tmp_path / "program.safetensors"),
        "loaded": sp.load(other.captured, tmp_path / "adapter"),
        "base": other.captured,
        "partly on again": sp.optimise(sp.optimise(other, siblings=True), siblings=False),
    }
    for how, program in carried.items():
        assert internals(program.module).without == {"siblings", "gram"}, how
        assert "siblings" not in changes(program.module)[BOTH], how
    assert internals(sp.optimise(other, siblings=True, gram=True).module).without == frozenset()
    assert_same(carried["read"], other, inputs)


def test_moved_programs():
    inputs = {"x": torch.randn(3, 16)}
    program = shaken(sp.rewrite(sp.capture(Pair(), inputs, verify=False), DoRA(of=LoRA(r=2)), where=["a", "b"]))
    before, inputs = changes(program.module)[BOTH], {"x": inputs["x"].double()}
    assert before == {"attention": 0, "tidy": 0, "scalars": 2, "sums": 0, "siblings": 1}
    program.module.to(torch.float64)
    assert changes(program.module)[BOTH] == before
    other = sp.optimise(program, **OFF)
    assert {p.dtype for p in other.module.parameters()} == {torch.float64}
    assert_same(program, other, inputs)


def test_functional_calls_take_other_tensors(captured):
    inputs, base = captured("llama")
    program = shaken(sp.rewrite(base, LoRA(r=2), where="*.{q,k,v}_proj"))
    name = "model.layers.0.self_attn.k_proj.weight_lora.B"
    changed = {name: torch.zeros_like(program.module.get_parameter(name))}
    found, expected = (
        torch.func.functional_call(each.module, changed, kwargs=inputs).logits
        for each in (program, sp.optimise(program, **OFF))
    )
    assert torch.allclose(found, expected, rtol=1e-10) and not torch.allclose(found, program.run(inputs).logits)


def test_wrong_switches(adapted):
    with pytest.raises(sp.ConfigError, match="optimise: unknown option 'sibling'. Did you mean 'siblings'.*gram, cha"):
        sp.optimise(adapted, sibling=False)
    with pytest.raises(sp.ConfigError, match="option 'tidy' is true or false, not 'no'"):
        sp.optimise(adapted, tidy="no")


def test_folding_and_export_see_the_captured_graph(captured):
    inputs, base = captured("bert")
    program = shaken(sp.rewrite(base, LoRA(r=2), where="*.{query,value}"))
    assert show(sp.fold(program).graph) == show(base.graph)
    assert "_part = getitem" not in show(program.graph)
    assert changes(program.module)[BOTH]["siblings"] == 2
    assert not any("_part" in node.name for node in inference(program).graph.nodes)


def test_the_pipeline_step(tmp_path):
    pipeline = Pipeline.read("capture,optimise{siblings=false},lora{r=2,where=*.query},fold")
    assert str(Pipeline.read(str(pipeline))) == str(pipeline)
    assert pipeline == Pipeline.read(
        ["capture", {"optimise": {"siblings": False}}, {"lora": {"r": 2, "where": "*.query"}}, "fold"]
    )
    assert pipeline.passes[1].options() == {"siblings": False}
    for wrong, message in (("optimise{sibling=false}", "mean 'siblings'"), ("optimise{tidy=3}", "true or false")):
        with pytest.raises(sp.ConfigError, match=message):
            Pipeline.read(wrong)
    with pytest.raises(sp.ConfigError, match="put `capture` before it"):
        list(Pipeline.read("optimise").run(State()))


def test_the_pipeline_step_says_what_it_switches(captured):
    steps = Pipeline.read("lora{r=2,where=*.{q,v}_proj},optimise{siblings=false},optimise{siblings=true}")
    _, off, on = steps.run(State(program=captured("llama")[1]))
    assert off.summary.startswith("off: siblings; places changed in the training graph: attention 0, tidy ")
    assert on.summary.startswith("all on;") and "siblings 2" in on.summary


def test_configs_switch_passes(tmp_path):
    path = tmp_path / "pipeline.yaml"
    path.write_text(
        "model:\n  factory: tests.models:bert\ndata:\n  train: rows.jsonl\npasses:\n  - capture\n"
        "  - optimise:\n      siblings: false\n  - lora:\n      r: 4\noutput: runs/x\n"
    )
    assert load_config(path).pipeline.passes[1].options() == {"siblings": False}
    switched = load_config(path, ["optimise.tidy=false"]).pipeline.passes[1]
    assert switched.options() == {"siblings": False, "tidy": False}
    raw = {"passes": ["capture", "optimise"]}
    apply_override(raw, "optimise.siblings=false")
    assert raw == {"passes": ["capture", {"optimise": {"siblings": False}}]}
    described = schema()["$defs"]["optimise"]["properties"]
    assert list(described) == PASSES and all(p["type"] == "boolean" and p["description"] for p in described.values())


def test_installed_passes():
    assert list(optimisations()) == PASSES
    assert [optimisations()[name].stage for name in PASSES] == [*["equation"] * 2, *["graph"] * 5, "compiled"]
    assert isinstance(optimisations()["gram"], Gram)
