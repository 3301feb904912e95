"""What a rewrite does to the graph, shown before and after."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.compiler.costs import rewrite_rows
from subgraph_peft.graph.nodes import show
from subgraph_peft.passes import IA3, SSB, BitFit, DoRA, LoRA, ParallelAdapter, PiSSA
from tests import models


def body(program: sp.Program) -> str:
    return "\n".join(line for line in show(program.graph).splitlines() if not line.endswith("= input"))


@pytest.fixture
def base():
    torch.manual_seed(0)
    return sp.capture(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3)), torch.randn(4, 6))


SNAPSHOTS = {
    "captured": (
        None,
        """
        linear = linear(input_1, 0.weight, 0.bias)
        relu = relu(linear)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "lora": (
        LoRA(r=2, alpha=6),
        """
        _0_base = linear(input_1, 0.weight, 0.bias)
        _0_lora_A = linear(input_1, 0.weight_lora.A)
        _0_lora_scale = mul(_0_lora_A, 3.0)
        _0_lora_B = linear(_0_lora_scale, 0.weight_lora.B)
        _0_lora_sum = add(_0_base, _0_lora_B)
        relu = relu(_0_lora_sum)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "ssb": (
        SSB(),
        """
        _0_ssb_columns = mul(input_1, 0.weight_ssb.c)
        _0_base = linear(_0_ssb_columns, 0.weight)
        _0_ssb_rows = mul(_0_base, 0.weight_ssb.rho)
        _0_ssb_bias = add(_0_ssb_rows, 0.bias)
        relu = relu(_0_ssb_bias)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "pissa": (
        PiSSA(r=2),
        """
        _0_base = linear(input_1, 0.weight, 0.bias)
        _0_pissa_A = linear(input_1, 0.weight_pissa.A)
        _0_pissa_sub = sub(0.weight_pissa.B, 0.weight_pissa.B0)
        _0_pissa_sub_1 = linear(_0_pissa_A, _0_pissa_sub)
        _0_pissa_sub_2 = sub(0.weight_pissa.A, 0.weight_pissa.A0)
        _0_pissa_sub_3 = linear(input_1, _0_pissa_sub_2)
        _0_pissa_B0 = linear(_0_pissa_sub_3, 0.weight_pissa.B0)
        _0_pissa_sum = add(_0_pissa_sub_1, _0_pissa_B0)
        _0_pissa_sum_1 = add(_0_base, _0_pissa_sum)
        relu = relu(_0_pissa_sum_1)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "ia3": (
        IA3(),
        """
        _0_ia3_mul = mul(0.weight_ia3.l, 0.bias)
        _0_base = linear(input_1, 0.weight)
        _0_ia3_rows = mul(_0_base, 0.weight_ia3.l)
        _0_ia3_bias = add(_0_ia3_rows, _0_ia3_mul)
        relu = relu(_0_ia3_bias)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "dora": (
        DoRA(of=LoRA(r=2, alpha=6)),
        """
        _0_base = linear(input_1, 0.weight)
        _0_dora_A = linear(input_1, 0.weight_dora.A)
        _0_dora_scale = mul(_0_dora_A, 3.0)
        _0_dora_B = linear(_0_dora_scale, 0.weight_dora.B)
        _0_dora_sum = add(_0_base, _0_dora_B)
        _0_dora_t = t(0.weight_dora.A)
        _0_dora_matmul = matmul(0.weight, _0_dora_t)
        _0_dora_mul = mul(_0_dora_matmul, 6.0)
        _0_dora_matmul_1 = matmul(0.weight_dora.A, _0_dora_t)
        _0_dora_matmul_2 = matmul(0.weight_dora.B, _0_dora_matmul_1)
        _0_dora_mul_1 = mul(_0_dora_matmul_2, 9.0)
        _0_dora_add = add(_0_dora_mul, _0_dora_mul_1)
        _0_dora_mul_2 = mul(_0_dora_add, 0.weight_dora.B)
        _0_dora_sum_1 = sum(_0_dora_mul_2, [1])
        _0_dora_add_1 = add(0.weight_dora.constant_0, _0_dora_sum_1)
        _0_dora_clamp_min = clamp_min(_0_dora_add_1, 1.1754943508222875e-38)
        _0_dora_sqrt = sqrt(_0_dora_clamp_min)
        _0_dora_clamp_min_1 = clamp_min(_0_dora_sqrt, 1e-12)
        _0_dora_detach = detach(_0_dora_clamp_min_1)
        _0_dora_div = div(0.weight_dora.m, _0_dora_detach)
        _0_dora_rows = mul(_0_dora_sum, _0_dora_div)
        _0_dora_bias = add(_0_dora_rows, 0.bias)
        relu = relu(_0_dora_bias)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "parallel": (
        ParallelAdapter(r=2, scale=4.0, biases=False),
        """
        linear = linear(input_1, 0.weight, 0.bias)
        _0_parallel_adapter_D = linear(input_1, 0.weight_parallel_adapter.D)
        _0_parallel_adapter_relu = relu(_0_parallel_adapter_D)
        _0_parallel_adapter_U = linear(_0_parallel_adapter_relu, 0.weight_parallel_adapter.U)
        _0_parallel_adapter_mul = mul(_0_parallel_adapter_U, 4.0)
        _0_parallel_adapter_add = add(linear, _0_parallel_adapter_mul)
        relu = relu(_0_parallel_adapter_add)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
    "bitfit": (
        BitFit(),
        """
        _0_bitfit_add = add(0.bias, 0.bias_bitfit.delta)
        linear = linear(input_1, 0.weight, _0_bitfit_add)
        relu = relu(linear)
        linear_1 = linear(relu, 2.weight, 2.bias)
        return [linear_1]""",
    ),
}


@pytest.mark.parametrize("name", SNAPSHOTS)
def test_the_graph_reads_like_the_equation(base, name):
    method, expected = SNAPSHOTS[name]
    program = base if method is None else sp.rewrite(base, method, where="0")
    lines = [line.strip() for line in expected.strip().splitlines()]
    assert body(program).splitlines() == lines
    assert body(base).splitlines() == [line.strip() for line in SNAPSHOTS["captured"][1].strip().splitlines()]


def test_every_emitted_node_says_site_adapter_and_term(base):
    program = sp.rewrite(base, DoRA(of=LoRA(r=2)), where="0", name="mine")
    known = {node.name for node in base.graph.nodes}
    new = [node for node in program.graph.nodes if node.op == "call_function" and node.name not in known]
    assert len(new) == len(program.lowered["0.weight"].nodes) == 22
    for node in new:
        origin = node.meta["custom"]["subgraph_peft"]
        assert origin["site"] == "0.weight" and origin["adapter"] in ("mine", "base")
        assert node.name.startswith("_0_mine_") or node.name == "_0_base"


def test_values_are_made_once_for_all_calls_and_at_every_call():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return self.a(torch.tanh(self.a(x)))

    program = sp.rewrite(sp.capture(Twice(), torch.randn(3, 4)), DoRA(of=LoRA(r=1)), where="exact:a")
    text = show(program.graph)
    assert text.count(" sqrt(") == 1
    assert text.count("a.weight_dora.A)") == 3, "two calls, and once in one norm"


class Elementwise(sp.Method):
    """φ(W) = W ⊙ (1 + B A)"""

    name = "elementwise"
    r: int = 1

    def tensors(self, site):
        return {"A": sp.trainable(self.r, site.in_features, init=sp.ones), "B": sp.trainable(site.out_features, self.r)}

    def weight(self, W, A, B):
        return W * (1 + B @ A)


class Laws(sp.Method):
    """Every law at once: sums, differences, products of three, negation, transposes, diagonals, quotients, scalars."""

    name = "laws"

    def tensors(self, site):
        shapes = {"A": (2, site.in_features), "B": (2, site.out_features), "G": (2, 2), "v": (site.in_features,),
                  "u": (site.out_features,), "s": ()}  # fmt: skip
        return {n: sp.trainable(*shape, init=sp.normal(1.0)) for n, shape in shapes.items()}

    def weight(self, W, A, B, G, v, u, s):
        low = B.T @ G.T @ A
        both = torch.diag(u) @ W @ torch.diag(v)
        return -(W - 0.5 * low) + (A.T @ B).T / 4 + both * s - (u[:, None] * low) / v + 2 * (W + low) * v[None]


@pytest.mark.parametrize("bias", [True, False])
def test_every_law_reproduces_dense_evaluation(bias):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 7, bias=bias), nn.Tanh(), nn.Linear(7, 2)).double()
    base = sp.capture(model, torch.randn(4, 5).double())
    program = sp.rewrite(base, Laws(), where="0")
    tensors = {
        t: program.module.get_parameter(path)
        for t, path in program.adapters[0].paths(program.adapters[0].sites[0]).items()
    }
    phi = Laws().weight(model[0].weight, **tensors)
    x = base.example["input"]
    expected = model[2](torch.tanh(F.linear(x, phi, model[0].bias)))
    assert torch.allclose(program.run(), expected, rtol=1e-12, atol=1e-12)
    assert program.lowered["0.weight"].form == "factored"
    assert torch.allclose(sp.fold(program).run(), expected, rtol=1e-12, atol=1e-12)


def test_a_dense_site_is_right_and_says_why(base):
    program = sp.rewrite(base, Elementwise(), where="0")
    lowered = program.lowered["0.weight"]
    assert lowered.form == "dense" and lowered.dense == ["no law distributes over mul of full-size factors"]
    with torch.no_grad():
        program.module.get_parameter("0.weight_elementwise.B").add_(0.3)
    torch.testing.assert_close(program.run(), sp.fold(program).run())
    from subgraph_peft.compiler.costs import rewrite_table

    assert "no law distributes over mul" in str(rewrite_table(program))


class Conv(nn.Module):
    def __init__(self, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2, groups=groups)
        self.embed = nn.Embedding(11, 4)
        self.head = nn.Linear(6, 2)

    def forward(self, ids):
        return self.head(self.conv(self.embed(ids).permute(0, 3, 1, 2)).mean((2, 3)))


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(of=LoRA(r=2)), SSB(), PiSSA(r=2)], ids=lambda m: m.name)
@pytest.mark.parametrize(("where", "groups"), [("conv", 1), ("conv", 2), ("embed", 1)])
def test_convolutions_and_embeddings_are_sites(method, where, groups):
    torch.manual_seed(0)
    model = Conv(groups).double()
    base = sp.capture(model, torch.randint(0, 11, (2, 7, 9)), dynamic={"ids": [0]})
    program = sp.rewrite(base, method, where=f"exact:{where}")
    assert torch.allclose(program.run(), base.run(), rtol=1e-11, atol=1e-11)
    with torch.no_grad():
        for _, p in program.parameters(trainable=True):
            p.add_(0.3 * torch.randn_like(p))
    folded = sp.fold(program)
    assert not torch.allclose(folded.run(), base.run(), atol=1e-4)
    assert torch.allclose(program.run(), folded.run(), rtol=1e-11, atol=1e-11)
    lowered = program.lowered[f"{where}.weight"]
    if method.name == "lora":
        assert lowered.form == ("dense" if groups > 1 else "factored")
        assert groups == 1 or "grouped convolution" in lowered.dense[0]


def test_attention_in_projection_is_a_packed_site():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = attention, nn.Linear(8, 2)

        def forward(self, x):
            return self.head(self.attention(x, x, x, need_weights=False)[0])

    program = sp.capture(Model(), torch.randn(3, 5, 8))
    site = next(s for s in sp.sites(program) if s.name.endswith("in_proj_weight"))
    assert (site.kind, site.shape, site.bias) == ("packed", (24, 8), "attention.in_proj_bias")
    adapted = sp.rewrite(program, LoRA(r=2), where="attention*")
    with torch.no_grad():
        for _, p in adapted.parameters(trainable=True):
            p.add_(0.3)
    torch.testing.assert_close(adapted.run(), sp.fold(adapted).run())


def test_cost_is_read_from_the_traced_shapes(base):
    row = rewrite_rows(sp.rewrite(base, LoRA(r=2), where="0"))[0]
    assert row["trainable"] == 2 * 6 + 10 * 2
    assert row["flops_per_token"] == 2 * (2 * 6 + 10 * 2) + 2 + 10 and row["flops_per_step"] == 0, (
        "two products, scale, sum"
    )
    assert rewrite_rows(sp.rewrite(base, SSB(), where="0"))[0]["flops_per_token"] == 6 + 10
    assert row["bytes"] == row["trainable"] * (4 + 8)
    row = rewrite_rows(sp.rewrite(base, DoRA(of=LoRA(r=2)), where="0"))[0]
    assert row["flops_per_step"] >= 2 * 10 * 2 * 6


@pytest.fixture(scope="module")
def half():
    model, inputs = models.llama()
    return sp.capture(model.to(torch.bfloat16), inputs)


def test_bf16_models_keep_float32_adapters_and_compute_in_bf16(half):
    program = sp.rewrite(half, LoRA(r=2), where="*.{q,v}_proj")
    assert {p.dtype for _, p in program.parameters(trainable=True)} == {torch.float32}
    assert torch.equal(program.run().logits, half.run().logits)
    program.module.train()
    loss = program.module(**program.example).loss
    loss.backward()
    assert program.module(**program.example).logits.dtype == torch.bfloat16
    grads = [p.grad for n, p in program.parameters(trainable=True) if n.endswith(".B")]
    assert all(g is not None and g.dtype == torch.float32 and g.abs().max() > 0 for g in grads)
    halves = sp.rewrite(half, LoRA(r=2), where="*.q_proj", dtype=torch.bfloat16)
    assert {p.dtype for _, p in halves.parameters(trainable=True)} == {torch.bfloat16}
    with pytest.raises(sp.MethodError, match="cannot join them"):
        sp.rewrite(halves, LoRA(r=2), where="*.v_proj", dtype=torch.float32)


@pytest.mark.parametrize("method", [PiSSA(r=2), DoRA(of=PiSSA(r=2)), DoRA(of=SSB())], ids=str)
def test_bf16_starts_near_the_base(half, method):
    program = sp.rewrite(half, method, where="*.{q,v}_proj")
    difference = (program.run().logits - half.run().logits).abs().max() / half.run().logits.abs().max()
    assert difference < 0.05
    assert torch.isfinite(program.module.train()(**program.example).loss)


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(of=LoRA(r=2)), ParallelAdapter(r=2)], ids=lambda m: m.name)
def test_torch_compile_takes_the_whole_graph(method):
    program = sp.rewrite(models.captured("llama"), method, where="*.{q,v}_proj")
    inputs = program.example
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        program.module.train(training)
        torch.testing.assert_close(compiled(**inputs).loss, program.module(**inputs).loss)
    torch._dynamo.reset()


def test_starting_values_depend_on_the_seed_and_the_site_alone(base):
    def start(**options):
        return sp.rewrite(base, LoRA(r=2), **options).module.get_parameter("0.weight_lora.A")

    assert torch.equal(start(where="0"), start(where=["0", "2"]))
    assert not torch.equal(start(where="0"), start(where="0", seed=1))


def test_a_head_trains_beside_the_adapter_on_memory_of_its_own():
    model, inputs = models.bert()
    program = sp.rewrite(sp.capture(model, inputs), BitFit(), where="*", trainable="classifier")
    names = {n for n, _ in program.parameters(trainable=True)}
    assert {"classifier.weight", "classifier.bias"} <= names and not any("classifier.bias_" in n for n in names)
    assert ("classifier.bias", "trained in full") in program.adapters[0].left_out
    before = model.classifier.weight.clone()
    with torch.no_grad():
        program.module.get_parameter("classifier.weight").add_(1.0)
    assert torch.equal(model.classifier.weight, before)
    assert not torch.equal(program.run().logits, program.captured.run().logits)


def test_refusals_say_what_and_what_to_do(base):
    with pytest.raises(sp.MethodError, match="option 'rank': it is unknown.*Known: r, alpha"):
        LoRA(rank=3)
    with pytest.raises(sp.MethodError, match="option 'r': Input should be greater than 0, got 0"):
        LoRA(r=0)
    with pytest.raises(sp.MethodError, match=r"r = 7 exceeds min\(in, out\) = 6"):
        sp.rewrite(base, PiSSA(r=7), where="0")
    with pytest.raises(sp.SelectorError, match="trainable 'clasifier' matches no parameter"):
        sp.rewrite(base, LoRA(), where="0", trainable="clasifier")
    with pytest.raises(sp.MethodError, match="needs a weight method that folds inside"):
        DoRA(of=ParallelAdapter())
    with pytest.raises(sp.MethodError, match="has an adapter already"):
        sp.rewrite(sp.rewrite(base, LoRA(), where="0"), SSB(), where="exact:2", trainable="0.weight")


class Shrinks(sp.Method):
    name = "shrinks"

    def tensors(self, site):
        return {}

    def weight(self, W):
        return W[:1]


class Draws(sp.Method):
    name = "draws"

    def tensors(self, site):
        return {}

    def weight(self, W):
        return F.dropout(W, 0.5)


class Branches(sp.Method):
    name = "branches"

    def tensors(self, site):
        return {}

    def weight(self, W):
        return W if W.sum() > 0 else -W


@pytest.mark.parametrize(
    ("method", "message"),
    [(Shrinks(), "has to keep it"), (Draws(), "draws random numbers"), (Branches(), "cannot be traced")],
    ids=lambda value: getattr(value, "name", None),
)
def test_equations_that_are_none_are_refused(base, method, message):
    with pytest.raises(sp.MethodError, match=message):
        sp.rewrite(base, method, where="0")


def test_adapters_are_named_and_numbered(base):
    program = sp.rewrite(sp.rewrite(base, LoRA(r=1), where="0"), LoRA(r=2), where="0")
    assert [a.name for a in program.adapters] == ["lora", "lora_2"]
    assert program.history == ("capture", "lora", "lora_2")
    assert "0.weight_lora_2.A" in dict(program.module.named_parameters())


def test_programs_share_the_memory_of_weights_and_nothing_else():
    """Moving or training one leaves the other, and both still fold."""
    model, inputs = models.bert()
    base = sp.capture(model, inputs)
    adapted = sp.rewrite(base, LoRA(r=2), where="*.query", trainable="classifier")
    name = "bert.encoder.layer.0.attention.self.key.weight"
    assert adapted.module.get_parameter(name).data_ptr() == base.module.get_parameter(name).data_ptr()
    adapted.module.to(torch.float64)
    assert base.run().logits.dtype == torch.float32
    with torch.no_grad():
        for _, p in adapted.parameters(trainable=True):
            p.add_(0.1)
    folded = sp.fold(adapted)
    assert folded.run().logits.dtype == torch.float64
    torch.testing.assert_close(folded.run().logits, adapted.run().logits)
    twice = sp.rewrite(adapted, SSB(), where="*.key")
    torch.testing.assert_close(twice.run().logits, adapted.run().logits)


def dropouts(program):
    return [line for line in show(program.graph).splitlines() if "dropout(" in line]


def test_dropout_stays_under_a_later_method_and_each_adapter_has_a_mask_of_its_own(base):
    once = sp.rewrite(base, LoRA(r=2, dropout=0.5), where="0")
    for later in (SSB(), DoRA(of=SSB())):
        assert len(dropouts(sp.rewrite(once, later, where="0"))) == 1
    assert len(dropouts(sp.rewrite(once, LoRA(r=2, dropout=0.5), where="0"))) == 2
    turned = sp.rewrite(once, Turned(), where="0")
    assert dropouts(turned) == ["_0_lora_dropout = dropout(_0_turned_Q, 0.5, True)"], "on the operand of B A"


class Turned(sp.Method):
    """φ(W) = W Q"""

    name = "turned"

    def tensors(self, site):
        return {"Q": sp.trainable(site.in_features, site.in_features, init=sp.normal(1.0))}

    def weight(self, W, Q):
        return W @ Q


def test_dropout_that_has_no_operand_is_refused():
    base = sp.capture(Conv(groups=2), torch.randint(0, 11, (2, 7, 9)), dynamic={"ids": [0]})
    with pytest.raises(sp.MethodError, match="takes the weight as a whole.*dropout=0"):
        sp.rewrite(base, LoRA(dropout=0.1), where="exact:conv")
    with pytest.raises(sp.MethodError, match="no input to drop.*dropout=0"):
        sp.rewrite(base, LoRA(dropout=0.1), where="exact:embed")


class Mixed(nn.Module):
    """A float32 norm and head around a body in bfloat16."""

    def __init__(self):
        super().__init__()
        self.norm, self.body, self.head = nn.LayerNorm(8), nn.Linear(8, 6).bfloat16(), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.body(self.norm(x).bfloat16())).float())


def test_every_weight_keeps_its_own_dtype_in_a_mixed_model():
    torch.manual_seed(0)
    model = Mixed()
    base = sp.capture(model, torch.randn(4, 8))
    program = sp.rewrite(sp.rewrite(base, DoRA(of=LoRA(r=2)), where=["body", "exact:head"]), BitFit(), where="*")
    assert torch.allclose(program.run(), base.run(), atol=2e-2)
    program.module.train()(**base.example).sum().backward()
    with torch.no_grad():
        for _, p in program.parameters(trainable=True):
            p.add_(0.1)
    folded = sp.fold(program, retain=0.5)
    assert {n: p.dtype for n, p in folded.module.named_parameters()} == {
        n: p.dtype for n, p in model.named_parameters()
    }
    sp.write_to(folded, model)
    assert torch.equal(model.eval()(base.example["x"]), folded.run())


def test_a_16_bit_model_with_floating_point_inputs_folds_into_float32():
    base = sp.capture(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16(), torch.randn(3, 4).bfloat16()
    )
    folded = sp.fold(sp.rewrite(base, LoRA(r=2), where="0"))
    assert folded.run().dtype == torch.float32


def test_moves_do_not_narrow_an_adapter():
    base = sp.capture(
        nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).bfloat16(), torch.randn(3, 4).bfloat16()
    )
    adapted = sp.rewrite(base, LoRA(r=2), where="0")
    with pytest.raises(sp.CaptureError, match="torch.float32 values, which torch.bfloat16 would narrow"):
        adapted.module.to(torch.bfloat16)


def test_loading_a_state_dict_computes_the_constants_again(base):
    first, second = (sp.rewrite(base, PiSSA(r=r), where="0") for r in (2, 2))
    with torch.no_grad():
        for name, p in first.module.named_parameters():
            if "pissa" in name:
                p.mul_(1.5)
    second.module.load_state_dict(first.module.state_dict())
    torch.testing.assert_close(second.run(), sp.fold(second).run())


def test_same_padding_is_a_convolution_like_any_other():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding="same"), nn.ReLU(), nn.Conv2d(4, 2, 1))
    adapted = sp.rewrite(sp.capture(model, torch.randn(2, 3, 5, 5)), LoRA(r=2), where="0")
    assert adapted.lowered["0.weight"].form == "factored"
    with torch.no_grad():
        adapted.module.get_parameter("0.weight_lora.B").add_(0.3)
    torch.testing.assert_close(adapted.run(), sp.fold(adapted).run())


def test_wrong_arguments_are_named(base):
    with pytest.raises(sp.MethodError, match="such as LoRA.r=8., not 'lora'"):
        sp.rewrite(base, "lora")
    with pytest.raises(sp.MethodError, match="not LoRA"):
        sp.rewrite(base, LoRA)
    with pytest.raises(sp.MethodError, match="takes a captured program"):
        sp.rewrite(base.module, LoRA())
    with pytest.raises(sp.MethodError, match="defines none of"):
        sp.rewrite(base, sp.Method())


@pytest.mark.parametrize("name", ["class", "None", "1a", "ｆｕｌｌ"])
def test_an_adapter_whose_file_could_not_be_read_is_refused(name):
    program = sp.capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(sp.MethodError, match=f"No adapter can be called '{name}': name= takes an identifier"):
        sp.rewrite(program, LoRA(r=2), where="0", name=name)


def test_what_to_do_about_ties_is_one_of_two():
    program = sp.capture(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4))
    with pytest.raises(sp.MethodError, match="tied is one of refuse, untie, not 'keep'"):
        sp.rewrite(program, LoRA(r=2), where="0", tied="keep")
