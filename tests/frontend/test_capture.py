import copy
import warnings

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.graph.nodes import operator_name, show
from subgraph_peft.program.internals import internals
from tests import models

TRANSFORMERS = ["bert", "gpt2", "llama", "tied_llama", "albert", "deberta"]


def resized(inputs, batch=3, length=11):
    """Inputs of the same kinds with another batch and length."""
    generator = torch.Generator().manual_seed(9)
    made = {}
    for name, value in inputs.items():
        shape = (batch,) if value.ndim == 1 else (batch, length)
        made[name] = (
            torch.ones(shape, dtype=value.dtype) if "mask" in name else torch.randint(0, 2, shape, generator=generator)
        )
    return made


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_graph_equals_the_model_in_both_modes_at_another_shape(name):
    model, inputs = getattr(models, name)()
    program = sp.capture(model, inputs)
    other = resized(inputs)
    for training in (False, True):
        model.train(training)
        program.module.train(training)
        duplicate = copy.deepcopy(program.module)
        outputs = []
        for module in (model, program.module, duplicate):
            torch.manual_seed(0)
            outputs.append(module(**other))
        assert type(outputs[1]) is type(outputs[0])
        first = "loss" if "loss" in outputs[0] else "last_hidden_state"
        for output in outputs[1:]:
            torch.testing.assert_close(output[first], outputs[0][first], rtol=1e-5, atol=1e-6)
    duplicate.eval()
    torch.testing.assert_close(duplicate(**other)[0], model.eval()(**other)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_state_dict_names_are_the_models_own(name):
    model, inputs = getattr(models, name)()
    assert set(sp.capture(model, inputs).module.state_dict()) == set(model.state_dict())


def test_gradients_equal_eager():
    model, inputs = models.bert()
    program = sp.capture(model, inputs)
    program.module.requires_grad_(True)
    model.eval(), program.module.eval()
    model(**inputs).loss.backward()
    program.module(**inputs).loss.backward()
    own = dict(program.module.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(own[name].grad, parameter.grad)


def test_labels_may_be_left_out_and_unknown_arguments_may_not():
    model, inputs = models.bert()
    module = sp.capture(model, inputs).module
    without = {k: v for k, v in inputs.items() if k != "labels"}
    output = module(**without)
    assert output.loss is None and list(output) == ["logits"]
    torch.testing.assert_close(output.logits, model.eval()(**without).logits)
    positional = module(inputs["input_ids"], inputs["attention_mask"], position_ids=None)
    torch.testing.assert_close(positional.logits, output.logits)
    with pytest.raises(sp.CaptureError, match="captured without the argument 'inputs_embeds'"):
        module(**without, inputs_embeds=torch.zeros(2, 7, 32))
    with pytest.raises(sp.CaptureError, match="every output of the graph needs it"):
        module(attention_mask=inputs["attention_mask"])


def test_arguments_that_are_one_tensor_stay_apart():
    """labels=input_ids: torch.export would read both from one of them."""
    model, inputs = models.llama()
    ids = inputs["input_ids"]
    program = sp.capture(model, {"input_ids": ids, "labels": ids})
    other = torch.randint(0, 50, (3, 9), generator=torch.Generator().manual_seed(1))
    labels = torch.roll(other, 1, 1)
    torch.testing.assert_close(
        program.module(input_ids=other, labels=labels).loss, model.eval()(input_ids=other, labels=labels).loss
    )


def test_the_source_model_is_left_as_it_was():
    model, inputs = models.llama()
    model.train()
    model.lm_head.eval()
    model.config.use_cache = True
    modes = {n: m.training for n, m in model.named_modules()}
    before = {n: t.clone() for n, t in model.state_dict().items()}
    program = sp.capture(model, inputs)
    assert modes == {n: m.training for n, m in model.named_modules()} and model.config.use_cache
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in program.module.parameters())
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert program.module.get_parameter("lm_head.weight").data_ptr() == model.lm_head.weight.data_ptr(), (
        "no copy of the weights"
    )


class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.drop(self.norm(self.conv(x)).mean((2, 3))))


def test_batch_norm_trains_its_own_buffers_and_stands_still_in_eval():
    model = Norm()
    program = sp.capture(model, torch.randn(4, 3, 8, 8))
    module = program.module
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    module.eval()
    module(torch.randn(5, 3, 8, 8))
    assert all(torch.equal(b, buffers[n]) for n, b in module.named_buffers())
    x = torch.randn(5, 3, 8, 8)
    module.train(), model.train()
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(module(x), expected)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(dict(module.named_buffers())[name], buffer)
    torch.testing.assert_close(module.eval()(x), model.eval()(x))


class StochasticDepth(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        if self.training:
            return self.b(self.a(x) + x)
        return self.b(0.5 * self.a(x) + x)


def test_a_second_program_is_captured_where_eval_mode_is_another_computation():
    model = StochasticDepth()
    program = sp.capture(model, torch.randn(3, 4))
    assert internals(program.module).eval_graph is not None
    from subgraph_peft.passes import DoRA

    adapted = sp.rewrite(program, DoRA(), where=["a", "exact:b"])
    with torch.no_grad():
        for _, p in adapted.parameters(trainable=True):
            p.add_(torch.randn_like(p) * 0.1)
    folded = sp.fold(adapted)
    x = torch.randn(5, 4)
    for training in (True, False):
        assert torch.allclose(adapted.module.train(training)(x), folded.module.train(training)(x), atol=1e-5)
        sp.write_to(folded, model)
        assert torch.allclose(model.train(training)(x), folded.module.train(training)(x), atol=1e-6)


def test_other_front_ends():
    from tests.compiler.test_laws import Sites

    model, x = Sites(), torch.randn(3, 4, 7)
    expected = model(x)
    traced = torch.fx.symbolic_trace(model)
    exported = torch.export.export(
        model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    )
    for program in (sp.capture(traced, x), sp.capture(exported)):
        torch.testing.assert_close(program.run(), expected)
        assert {s.owner for s in sp.sites(program)} == {"wide", "tall", "bare", "conv1d", "head"}
    assert sp.capture(exported).module(torch.randn(5, 6, 7)).shape == (5, 6, 2)


def test_no_gradient_regions_are_inlined_and_keep_their_meaning():
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x):
            with torch.no_grad():
                h = self.a(x) * 2
            return self.b(h)

    program = sp.capture(Frozen(), torch.randn(3, 4))
    assert "wrap_with" not in show(program.graph)
    program.module.requires_grad_(True)
    program.module(torch.randn(3, 4)).sum().backward()
    assert program.module.get_parameter("a.weight").grad is None
    assert torch.is_grad_enabled()


def test_a_batch_of_one_is_widened_and_stays_dynamic():
    program = sp.capture(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(1, 4))
    assert program.module(torch.randn(7, 4)).shape == (7, 2)


def test_a_fixed_dimension_is_said_aloud():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.position = nn.Embedding(10, 4), nn.Parameter(torch.randn(5, 4))

        def forward(self, ids):
            return self.a(ids) + self.position

    ids = torch.zeros(2, 5, dtype=torch.long)
    with pytest.warns(sp.CaptureWarning, match="dimension 1 of 'ids' is fixed to 5"):
        sp.capture(Fixed(), ids)
    with pytest.raises(sp.CaptureError, match="A dimension asked to vary cannot"):
        sp.capture(Fixed(), ids, dynamic={"ids": [0, 1]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.CaptureWarning)
        sp.capture(Fixed(), ids, dynamic={"ids": [0]})


def test_a_model_that_cannot_be_captured_names_the_line_and_what_to_do():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            if x.sum() > 0:
                return self.a(x)
            return x

    with pytest.raises(sp.CaptureError) as caught:
        sp.capture(Branch(), torch.randn(3, 4))
    message = str(caught.value)
    assert "Branch cannot be captured" in message
    assert "test_capture.py" in message and "if x.sum() > 0" in message
    assert "torch.where or torch.cond" in message
    with pytest.raises(sp.CaptureError, match="do not fit the model"):
        sp.capture(Branch(), {"y": torch.randn(3, 4)})
    with pytest.raises(sp.CaptureError, match="needs example inputs"):
        sp.capture(Branch())
    with pytest.raises(sp.CaptureError, match="not int"):
        sp.capture(3, torch.randn(3, 4))


def test_moves_between_dtypes_are_exact_or_refused():
    model, inputs = models.llama()
    program = sp.capture(model.to(torch.bfloat16), inputs)
    wide = copy.deepcopy(program.module).to(torch.float32)
    expected = model.to(torch.float32).eval()(**inputs).logits
    torch.testing.assert_close(wide.eval()(**inputs).logits, expected)
    with pytest.raises(sp.CaptureError, match="would narrow"):
        wide.to(torch.bfloat16)
    assert next(wide.parameters()).dtype == torch.float32


def test_device_constants_follow_the_module():
    model, inputs = models.bert()
    module = copy.deepcopy(sp.capture(model, inputs).module).to("meta")
    devices = {d for n in internals(module).graph.nodes for d in n.kwargs.values() if isinstance(d, torch.device)}
    assert devices == {torch.device("meta")}


def test_a_meta_model_can_be_captured_listed_and_costed():
    from subgraph_peft.compiler.costs import rewrite_rows
    from subgraph_peft.passes import LoRA

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
        x = torch.randn(3, 6)
    adapted = sp.rewrite(sp.capture(model, x), LoRA(r=2), where="0")
    assert rewrite_rows(adapted)[0]["trainable"] == 2 * 6 + 10 * 2
    with pytest.raises(sp.FoldError, match="meta device"):
        sp.fold(adapted)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x, *, pair, scale: float = 2.0):
        return {"sum": self.a(x) + pair["left"], "parts": (pair["right"] * scale, x)}


class Variadic(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x, *rest):
        return self.a(x) + sum(rest)


def test_keyword_only_nested_and_variadic_inputs():
    t = torch.randn
    model, pair = Pair(), {"left": t(3, 4), "right": t(3, 4)}
    module = sp.capture(model, {"x": t(3, 4), "pair": pair}).module
    x, wide = t(5, 4), {"left": t(5, 4), "right": t(5, 4)}
    torch.testing.assert_close(module(x, pair=wide), model(x, pair=wide))
    with pytest.raises(sp.CaptureError, match="'scale'"):
        module(x, pair=wide, scale=3.0)
    with pytest.raises(sp.CaptureError, match="structure"):
        module(x, pair={"left": x})
    model, rest = Variadic(), (t(3, 4), t(3, 4))
    torch.testing.assert_close(sp.capture(model, (t(3, 4), *rest)).module(x, x, x), model(x, x, x))


def test_printed_graphs_read_as_the_model():
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 2))
    assert show(sp.capture(model, torch.randn(3, 6)).graph) == "\n".join(
        [
            "input_1 = input",
            "linear = linear(input_1, 0.weight, 0.bias)",
            "relu = relu(linear)",
            "linear_1 = linear(relu, 2.weight, 2.bias)",
            "return [linear_1]",
        ]
    )
    assert (
        operator_name(
            next(
                iter(
                    sp.capture(model, torch.randn(3, 6)).graph.find_nodes(
                        op="call_function", target=torch.ops.aten.relu.default
                    )
                )
            )
        )
        == "relu"
    )
