"""What torch.export loses or fixes, and capture keeps or refuses: backward passes by hand, recurrence, vmap, branches,
writes under no_grad, inputs that are not one batch."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.base.borrowed import OpOverload
from subgraph_peft.frontend.recurrent import LAYERS
from subgraph_peft.graph.nodes import aten
from subgraph_peft.passes import LoRA


class Rounded(torch.autograd.Function):
    """A straight-through estimate."""

    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Squared(torch.autograd.Function):
    """What autograd finds too."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * ctx.saved_tensors[0] * gradient


class ByHand(nn.Module):
    def __init__(self, function: type):
        super().__init__()
        self.function, self.inner, self.outer = function, nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.outer(self.function.apply(self.inner(x)))


class Chosen(nn.Module):
    """No output has a gradient."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        return Squared.apply(self.inner(x)).argmax(-1)


class Plain(nn.Module):
    """Nothing to train."""

    def forward(self, x):
        return Squared.apply(x)


class Cut(nn.Module):
    """The backward by hand is the only one: its forward has no gradient."""

    class Sign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (x > 0).to(x.dtype)

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        return self.Sign.apply(self.inner(x))


class Layer(nn.Module):
    """A recurrent layer without its state."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)[0]


class Branch(nn.Module):
    """Dropout in the branch of negative sums."""

    def __init__(self):
        super().__init__()
        self.inner, self.drop = nn.Linear(4, 6), nn.Dropout(0.5)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.inner(x), lambda x: self.drop(self.inner(x)), (x,))


class Edges(nn.Module):
    """Six nodes, four edges."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, nodes, source):
        return self.inner(nodes)[source]


class Members(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 6, 4))

    def forward(self, x):
        return torch.vmap(lambda w: F.linear(x, w).relu())(self.w).mean(0)


def rows(count: int = 3) -> torch.Tensor:
    return torch.randn(count, 4, generator=torch.Generator().manual_seed(count))


def test_a_backward_by_hand_that_autograd_does_not_find_is_refused():
    with pytest.raises(sp.CaptureError, match=r"Rounded, whose own backward .* gradient of inner.weight differs"):
        sp.capture(ByHand(Rounded), rows())


def test_a_backward_by_hand_that_autograd_finds_is_captured():
    assert sp.capture(ByHand(Squared), rows()).module(rows(5)).shape == (5, 3)


def test_a_backward_by_hand_that_is_not_compared_is_told():
    with pytest.warns(sp.CaptureWarning, match="Rounded, whose own backward"):
        sp.capture(ByHand(Rounded), rows(), verify=False)


@pytest.mark.parametrize("model", [Chosen(), Plain()], ids=["no gradient", "no parameter"])
def test_a_backward_by_hand_of_nothing_is_told(model):
    with pytest.warns(sp.CaptureWarning, match="Squared, whose own backward .* those of its forward"):
        program = sp.capture(model, rows())
    assert torch.equal(program.module(rows(5)), model(rows(5)))


def test_a_graph_without_the_gradients_that_a_backward_by_hand_gives_is_refused():
    with pytest.raises(sp.CaptureError, match=r"Cut.Sign, whose own backward .* gradient of inner.weight differs"):
        sp.capture(Cut(), rows())


def test_applying_functions_is_as_it_was_after_a_capture():
    before = torch.autograd.Function.__dict__["apply"]
    with pytest.raises(sp.CaptureError):
        sp.capture(ByHand(Rounded), rows())
    assert torch.autograd.Function.__dict__["apply"] is before


@pytest.mark.parametrize(
    "layer",
    [
        nn.LSTM(6, 5, num_layers=2, batch_first=True, bidirectional=True, dropout=0.3),
        nn.LSTM(6, 5, proj_size=4),
        nn.GRU(6, 5, batch_first=True),
        nn.RNN(6, 5, nonlinearity="relu"),
    ],
    ids=["lstm", "projected", "gru", "rnn"],
)
def test_recurrent_layers_take_any_batch_and_length(layer):
    model = Layer(layer).train()
    program = sp.capture(model, torch.randn(3, 7, 6))
    x = torch.randn(4, 9, 6)
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    torch.testing.assert_close(program.module.train()(x), expected)
    assert any(node.target in LAYERS.values() for node in program.graph.nodes)


def test_a_body_of_an_operator_has_both_modes_also_where_the_example_does_not_go():
    model = Branch()
    program = sp.capture(model, rows().abs())
    x = -rows().abs()
    torch.testing.assert_close(program.module.eval()(x), model.eval()(x))
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(copy.deepcopy(program.module).train()(x), expected)
    assert not torch.equal(expected, model.eval()(x))


def test_a_moved_module_moves_the_bodies_of_its_operators():
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 6)

        def forward(self, x):
            y = self.inner(x)
            return torch.cond(x.sum() > 0, lambda y: y @ torch.eye(6, dtype=y.dtype), lambda y: y + 1, (y,))

    model = Constant()
    x = rows().abs().double()
    torch.testing.assert_close(sp.capture(model, rows()).module.double()(x), model.double()(x))


def test_what_is_written_without_gradient_is_written_so_and_in_training_alone():
    model = parametrizations.spectral_norm(nn.Linear(4, 6))
    program = sp.capture(nn.Sequential(model), rows())
    eager, captured = nn.Sequential(copy.deepcopy(model)).train(), program.module.requires_grad_(True).train()
    for _ in range(2):  # a second backward would meet the graph of the first
        for module in (eager, captured):
            module(rows()).square().sum().backward()
    for (name, expected), (other, found) in zip(eager.named_buffers(), captured.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(found, expected)
    before = {name: buffer.clone() for name, buffer in captured.named_buffers()}
    captured.eval()(rows())
    assert all(torch.equal(buffer, before[name]) for name, buffer in captured.named_buffers())


def test_inputs_need_not_be_one_batch():
    program = sp.capture(Edges(), {"nodes": torch.randn(6, 4), "source": torch.tensor([5, 0, 3, 3])})
    assert program.module(torch.randn(8, 4), torch.tensor([7, 0])).shape == (2, 3)


def test_a_vmap_is_the_operators_that_it_stands_for():
    model = Members()
    program = sp.capture(model, rows())
    torch.testing.assert_close(program.module(rows(5)), model(rows(5)))
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert aten.matmul.default in targets
    assert all(isinstance(target, OpOverload) for target in targets)


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_under_no_grad_stays_so_beside_a_vmap(inside: bool):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            y = self.linear(x)
            with torch.no_grad():
                scale = torch.vmap(torch.sum)(y) if inside else y.sum(1)
            return y * scale[:, None] if inside else y * scale[:, None] + torch.vmap(torch.sum)(y)[:, None]

    model, gradients = Scaled().double(), []
    program = sp.capture(model, torch.randn(5, 4, dtype=torch.float64))
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert all(isinstance(target, OpOverload) for target in calls)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for module in (model, program.module):
        gradients += torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(*gradients)


def test_arguments_without_a_number_go_by_their_name_or_in_a_row():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, *parts):
            return self.inner(sum(parts))

    parts = (rows(), rows() + 1)
    for example in (parts, {"parts": parts}):
        assert sp.capture(Sum(), example).module(*parts).shape == (3, 3)


class Sized(nn.Module):
    """Another way for short inputs."""

    def __init__(self, condition):
        super().__init__()
        self.linear, self.condition = nn.Linear(6, 6), condition

    def forward(self, x):
        return self.linear(x) if self.condition(x) else 2 * x


@pytest.mark.parametrize(("condition", "text"), [
    (lambda x: x.shape[1] > 4, r"x\.shape\[1\] > 4"), (lambda x: x.shape[1] % 2 == 0, r"\(x\.shape\[1\] % 2\) == 0"),
])  # fmt: skip
def test_a_branch_on_a_shape_is_asked_at_every_call(condition, text, tmp_path):
    model = Sized(condition)
    program = sp.capture(model, (torch.randn(3, 6, 6),))
    x = torch.randn(2, 8, 6)
    torch.testing.assert_close(program.module(x), model(x))
    sp.write(program, tmp_path / "model.safetensors")
    for module in (program.module, sp.read(tmp_path / "model.safetensors").module):
        with pytest.raises(sp.CaptureError, match=f"the model where {text}, which these inputs break"):
            module(torch.randn(2, 3, 6))
    compiled = torch.compile(program.module, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(x), model(x))
    assert re.fullmatch(text, export.to_onnx(program, tmp_path / "model.onnx").holds[0])


def test_keyword_arguments_vary_like_named_ones():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x, **others):
            return self.linear(x) + others["y"]

    model = Keywords()
    program = sp.capture(model, {"x": torch.randn(3, 5, 6), "y": torch.randn(3, 5, 6)})
    assert "forward" not in vars(model)
    x, y = torch.randn(2, 7, 6), torch.randn(2, 7, 6)
    torch.testing.assert_close(program.module(x=x, y=y), model(x, y=y))


def test_a_graph_that_writes_to_its_input_leaves_the_example_as_it_is():
    class Scaling(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return self.linear(x.mul_(2.0))

    program = sp.capture(Scaling(), (torch.randn(3, 5, 6),))
    torch.testing.assert_close(program.run(), program.run(), rtol=0, atol=0)
    assert sp.fold(sp.rewrite(program, LoRA(r=2), where="linear")).folded.output_error < 1e-6


def test_a_prediction_does_not_hang_on_the_target_that_a_loss_broadcasts_it_with():
    class Forecast(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x, target=None):
            y = self.linear(x)
            return None if target is None else F.mse_loss(y, target), y

    model = Forecast()
    program = sp.capture(model, (torch.randn(3, 6), torch.randn(3, 4)))
    x = torch.randn(5, 6)
    torch.testing.assert_close(program.module(x)[1], model(x)[1])
