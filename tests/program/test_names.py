"""What a model calls its children, parameters and buffers is its own business: every name that nn.Module takes is kept
from the capture to the file, and back into the model."""

import copy
import pickle

import onnx
import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.passes import LoRA
from subgraph_peft.program.internals import internals
from subgraph_peft.program.module import GraphModel


def holds(kind: str, name: str) -> bool:
    """Whether nn.Module lets a child, parameter or buffer have a name."""
    try:
        Named(kind, [name])
    except KeyError:
        return False
    return True


class Named(nn.Module):
    """Linear layers in a row, each a child, or a weight, of a name in `names`."""

    def __init__(self, kind: str, names: list[str]):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.kind_, self.names_ = kind, names
        for name in names:
            weight = torch.randn(5, 5, generator=generator) / 2
            if kind == "child":
                self.add_module(name, nn.Linear(5, 5))
            elif kind == "parameter":
                self.register_parameter(name, nn.Parameter(weight))
            else:
                self.register_buffer(name, weight)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        for name in self.names_:
            held = getattr(self, name)
            x = torch.tanh(held(x) if self.kind_ == "child" else nn.functional.linear(x, held))
        return self.last(x)


OURS = {name for name in dir(GraphModel) if not name.startswith("_")} - set(dir(nn.Module))
RECORD = {field for field in internals(sp.capture(nn.Linear(2, 2), torch.randn(2, 2)).module).__dict__}
FX = {name for name in dir(torch.fx.GraphModule) if not name.startswith("_")} - set(dir(nn.Module))
OTHERS = {
    "attribute", "call", "changes", "class", "config", "ex", "forward_", "from", "generate", "graphs", "in", "inputs",
    "make_runner", "matches", "meta", "moves", "renew", "self", "specialise", "tensors", "unknown", "weight",
    "with space", "naïve", "0", "held_0_in", "getattr", "torch",
}  # fmt: skip
NAMES = sorted(OURS | RECORD | FX | OTHERS)
KINDS = ("child", "parameter", "buffer")


@pytest.fixture(scope="module")
def of():
    """kind -> (model, input, program), of a model that has every name."""
    made = {}

    def of(kind):
        if kind not in made:
            model = Named(kind, [name for name in NAMES if holds(kind, name)]).double()
            x = torch.randn(2, 5, dtype=torch.float64)
            made[kind] = model, x, sp.capture(model, x)
        return made[kind]

    return of


def trained(program: sp.Program) -> sp.Program:
    """One training step of LoRA on every site, by hand."""
    adapted = sp.rewrite(program, LoRA(r=2), where=["*", "last"])
    optimizer = torch.optim.SGD([p for _, p in adapted.parameters(trainable=True)], lr=0.5)
    for _ in range(2):
        adapted.module.train()
        adapted.module(**adapted.example).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(adapted.run(), program.run())
    return adapted


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_goes_the_whole_road(of, kind, tmp_path):
    model, x, program = of(kind)
    assert {"padding", "home", "graph", "code", "meta", "in", "self"} <= set(model.names_)
    assert program.module.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(program.run(), model(x))
    adapted = trained(program)
    assert len(adapted.adapters[0].sites) == (1 if kind == "buffer" else len(model.names_) + 1)

    sp.save(adapted, tmp_path / "adapter")
    sp.write(adapted, tmp_path / "program.safetensors")
    for other in (
        sp.load(program, tmp_path / "adapter"), sp.read(tmp_path / "program.safetensors"), copy.deepcopy(adapted),
        pickle.loads(pickle.dumps(adapted)),
    ):  # fmt: skip
        assert torch.equal(other.run(), adapted.run())
    module = adapted.module
    for other in (copy.deepcopy(module), copy.copy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other.eval()(x), adapted.run())

    folded = sp.fold(adapted)
    torch.testing.assert_close(folded.run(), adapted.run(), rtol=1e-9, atol=1e-12)
    target = copy.deepcopy(model)
    sp.write_to(folded, target)
    assert torch.equal(target(x), folded.run())


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_program_keeps_the_names(of, kind):
    model, x, program = of(kind)
    again = sp.capture(torch.export.export(model, (x,), strict=False))
    assert again.module.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(again.run(), program.run())


def test_a_view_and_checkpointing_take_every_name(of):
    _, x, program = of("child")
    view = sp.unflatten(program, where=["graph", "padding", "in"])
    assert torch.equal(view.eval()(x), program.run())
    adapted = sp.rewrite(program, LoRA(r=2), where="*")
    grads = []
    for on in (False, True):
        module = copy.deepcopy(adapted.module).train()
        if on:
            GraphModel.gradient_checkpointing_enable(module, where=["home", "self", "class"])
        module(x).sum().backward()
        grads.append([p.grad for p in module.parameters() if p.requires_grad])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_a_file_for_onnxruntime_has_every_name(of, tmp_path):
    model, x, _ = of("child")
    program = sp.rewrite(sp.capture(copy.deepcopy(model).float(), x.float()), LoRA(r=2), where="*")
    export.to_onnx(program, tmp_path / "model.onnx")
    held = onnx.load(tmp_path / "model.onnx").graph.initializer
    assert {f"{name}.bias" for name in model.names_} <= {tensor.name for tensor in held}


def test_compiled_code_reads_every_name(of):
    _, x, program = of("child")
    assert torch.allclose(torch.compile(program.module.eval(), backend="eager", fullgraph=True)(x), program.run())


def test_a_method_of_ours_is_hidden_by_the_child_alone():
    plain = sp.capture(Named("child", ["inner"]), torch.randn(2, 5)).module
    named = sp.capture(Named("child", ["block_paths"]), torch.randn(2, 5)).module
    assert plain.block_paths == () and isinstance(named.block_paths, nn.Module)
    assert named.is_gradient_checkpointing is False, "a name that the model does not take stays ours"


@pytest.mark.parametrize("name", ["train", "parameters", "to", "type", "training"])
def test_a_name_that_no_module_can_hold_is_refused(name):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self._modules[name] = nn.Linear(2, 2)  # what setattr does for some of them

        def forward(self, x):
            return self._modules[name](x)

    with pytest.raises(sp.CaptureError, match=f"^{name} has the name of an attribute of nn.Module"):
        sp.capture(Model(), torch.randn(2, 2))


def test_the_one_name_of_ours_is_refused():
    with pytest.raises(sp.CaptureError, match="_subgraph.weight: an nn.Module cannot hold what has this name"):
        sp.capture(Named("child", ["_subgraph"]), torch.randn(2, 5))


@pytest.mark.parametrize("name", ['quo"te', "back\\slash", "two\nlines", "ｆｕｌｌ", "ﬁ"])
def test_a_name_that_is_no_code_is_refused(name):
    """Python reads an identifier in its NFKC form: `full`, where the module has another name."""
    model = Named("child", [name])
    with pytest.raises(sp.CaptureError, match="no qualified name"):
        sp.capture(model, torch.randn(2, 5))


def test_arguments_have_any_name():
    class Model(nn.Module):
        def forward(self, call, unknown=None, inputs=None):
            return call * 2 + unknown

    program = sp.capture(Model(), {"call": torch.ones(2, 3), "unknown": torch.ones(2, 3)})
    assert torch.equal(program.module(torch.ones(2, 3), unknown=torch.zeros(2, 3)), torch.full((2, 3), 2.0))
