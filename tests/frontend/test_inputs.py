"""Graphs that other tools made of a model come in as the model itself does: same sites, trained and folded alike."""

import copy
import warnings
import zipfile

import pytest
import torch
from torch import nn
from torch.export import Dim
from transformers import BertConfig, BertForSequenceClassification

import subgraph_peft as sp
from subgraph_peft.graph.nodes import aten
from subgraph_peft.passes import LoRA
from tests import models

ORIGINALS: dict[str, sp.Program] = {}
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*traced in eval mode:subgraph_peft.CaptureWarning"),
    pytest.mark.filterwarnings("ignore:.*is fixed to:subgraph_peft.CaptureWarning"),
]


def bert():
    config = BertConfig(**{**models.ENCODER, "num_hidden_layers": 1}, hidden_dropout_prob=0.0)
    return models.made(lambda: BertForSequenceClassification(config), models.classification)


def made(name, dropout=0.0):
    return bert() if name == "bert" else getattr(models, name)(dropout)


def exported(model, inputs, strict=False, dynamic=False):
    shapes = None
    if dynamic:
        shapes = {n: dict.fromkeys((0, 1) if n.endswith(("ids", "mask")) else (0,), Dim.DYNAMIC) for n in inputs}
    return torch.export.export(model, (), dict(inputs), dynamic_shapes=shapes, strict=strict)


def by_dynamo(model, inputs, aten_graph):
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch._dynamo.export(model, aten_graph=aten_graph)(**inputs)[0]


FRONTS = {
    "export": lambda m, i: (exported(m, i),),
    "dynamic": lambda m, i: (exported(m, i, dynamic=True),),
    "strict": lambda m, i: (exported(m, i, strict=True, dynamic=True),),
    "core_aten": lambda m, i: (exported(m, i, dynamic=True).run_decompositions(),),
    "inference_ir": lambda m, i: (exported(m, i).run_decompositions({}),),
    "export_module": lambda m, i: (exported(m, i).module(), i),
    "dynamo": lambda m, i: (by_dynamo(m, i, aten_graph=False), i),
    "dynamo_aten": lambda m, i: (by_dynamo(m, i, aten_graph=True), i),
    "compiled": lambda m, i: (torch.compile(m), i),
    "symbolic_trace": lambda m, i: (torch.fx.symbolic_trace(m), i),
}
FAST = {
    "mlp": ("core_aten", "dynamo", "dynamo_aten", "symbolic_trace"),
    "conv": ("dynamic", "strict", "core_aten", "inference_ir", "dynamo_aten", "export_module"),
    "bert": ("core_aten",),
}
COMBINATIONS = [
    pytest.param(model, front, marks=[] if front in FAST[model] else pytest.mark.slow)
    for model in FAST
    for front in FRONTS
    # fx cannot trace BERT; a graph of one length looks its positions up at constants
    if model != "bert" or front not in ("symbolic_trace", "export", "inference_ir", "export_module")
]


def original(name):
    if name not in ORIGINALS:
        ORIGINALS[name] = sp.capture(*made(name))
    return ORIGINALS[name]


def listed(program):
    return {(site.name, site.kind, site.shape, len(site.calls)) for site in sp.sites(program)}


def loss_of(output):
    return output.loss if hasattr(output, "loss") else output[0]


@pytest.mark.parametrize(("name", "front"), COMBINATIONS)
def test_the_same_sites_train_and_fold(name, front):
    model, inputs = made(name)
    model.train()
    program = sp.capture(*FRONTS[front](model, inputs))
    assert listed(program) == listed(original(name))
    adapted = sp.rewrite(program, LoRA(r=2), where=lambda s: s.kind != "embedding" and not s.reserved)
    module = adapted.module.train()
    optimizer = torch.optim.SGD([p for _, p in adapted.parameters(trainable=True)], lr=0.05)
    losses = []
    for _ in range(3):
        loss = loss_of(module(**inputs))
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    folded = sp.fold(adapted)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(folded.module.eval()(**inputs)), loss_of(adapted.module.eval()(**inputs)))
    model.eval()
    sp.write_to(folded, model)
    with torch.no_grad():
        torch.testing.assert_close(loss_of(model(**inputs)), loss_of(folded.module(**inputs)))


@pytest.mark.parametrize("name", ["mlp", "conv"])
@pytest.mark.parametrize("front", ["export", "core_aten", "inference_ir", "dynamo", "dynamo_aten"])
@pytest.mark.parametrize("training", [True, False])
def test_train_and_eval_switch_what_the_trace_holds(name, front, training):
    model, inputs = made(name, dropout=0.5)
    program = sp.capture(*FRONTS[front](model.train(training), inputs))
    assert program.module.training == training
    module = program.module.eval()
    buffers = {n: b.clone() for n, b in module.named_buffers()}
    torch.testing.assert_close(module(**inputs), model.eval()(**inputs))
    assert all(torch.equal(b, buffers[n]) for n, b in module.named_buffers()), "eval mode writes nothing"
    if training:
        module.train(), model.train()
        torch.manual_seed(0)
        expected = model(**inputs)
        torch.manual_seed(0)
        torch.testing.assert_close(module(**inputs), expected)
        own = dict(module.named_buffers())
        for buffer, value in model.named_buffers():
            if buffer in own and value.is_floating_point():
                torch.testing.assert_close(own[buffer], value)


def test_a_trace_of_eval_mode_is_said_aloud_and_keeps_what_can_be_switched():
    model, inputs = made("conv", dropout=0.5)
    kept, decomposed = exported(model.eval(), inputs), exported(model, inputs).run_decompositions()
    with pytest.warns(sp.CaptureWarning, match=r"ConvNet was traced in eval mode: train\(\) switches on the 2 dropout"):
        module = sp.capture(kept).module
    assert not torch.equal(module.train()(**inputs)[1], module(**inputs)[1]), "dropout draws anew"
    with pytest.warns(sp.CaptureWarning, match="switches on the 1 dropout and batch norm operators"):
        module = sp.capture(decomposed).module
    before = module.get_buffer("norm.running_mean").clone()
    output = module.train()(**inputs)[1]
    assert torch.equal(output, module(**inputs)[1]), "the dropout that the trace removed does not come back"
    assert not torch.equal(before, module.get_buffer("norm.running_mean"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.CaptureWarning)
        sp.capture(exported(model.train(), inputs).run_decompositions())


class Frozen(nn.Module):
    """A layer that is off while its model trains, and one that is on while it does not."""

    def __init__(self):
        super().__init__()
        self.a, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        norm = self.norm
        x = nn.functional.batch_norm(self.a(x), norm.running_mean, norm.running_var, norm.weight, norm.bias, False)
        return nn.functional.dropout(nn.functional.dropout(x, 0.5, self.training), 0.5, True)


def test_layers_that_do_not_follow_the_mode_stay_as_they_are():
    model, x = Frozen(), torch.randn(6, 4)
    for program in (sp.capture(model, x), sp.capture(exported(model.train(), {"x": x}))):
        norm = program.graph.find_nodes(op="call_function", target=aten.batch_norm.default)[0]
        assert norm.args[5] is False
        before = program.module.get_buffer("norm.running_mean").clone()
        program.module.train()(x=x)
        assert torch.equal(before, program.module.get_buffer("norm.running_mean"))
    program = sp.capture(model, x)
    torch.manual_seed(0)
    expected = model.eval()(x)
    torch.manual_seed(0)
    torch.testing.assert_close(program.module.eval()(x), expected)


class Noise(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.drop = nn.Linear(4, 4), nn.AlphaDropout(0.5)

    def forward(self, x):
        return self.drop(self.a(x))


def test_randomness_that_eval_cannot_switch_off_is_said_aloud():
    program = exported(Noise().train(), {"x": torch.randn(6, 4)}).run_decompositions()
    with pytest.warns(sp.CaptureWarning, match="Noise draws random numbers at .* in eval mode too"):
        sp.capture(program)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    model, inputs = made("bert")
    path = tmp_path_factory.mktemp("file") / "model.pt2"
    torch.export.save(exported(model, inputs, dynamic=True), path)
    return model, inputs, path


def test_a_file_of_torch_export(file):
    model, inputs, path = file
    program = sp.capture(str(path))
    assert listed(program) == listed(original("bert"))
    assert program.source == "BertForSequenceClassification"
    torch.testing.assert_close(program.module.eval()(**inputs).logits, model.eval()(**inputs).logits)
    adapted = sp.rewrite(sp.capture(path), LoRA(r=2), where="*query")
    sp.fold(adapted)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids):
        return self.head(self.table(ids))


def test_ties_survive_a_file(tmp_path):
    torch.export.save(exported(Tied(), {"ids": torch.arange(6).reshape(2, 3)}), tmp_path / "model.pt2")
    program = sp.capture(tmp_path / "model.pt2")
    assert program.ties == (frozenset({"table.weight", "head.weight"}),)
    assert program.module.get_parameter("head.weight") is program.module.get_parameter("table.weight")
    assert [(s.name, s.kind) for s in sp.sites(program)] == [("table.weight", "embedding"), ("head.weight", "linear")]


class Evil:
    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def test_a_file_that_is_none_is_refused(file, tmp_path, capfd):
    with pytest.raises(sp.CaptureError, match="nowhere.pt2 is no file"):
        sp.capture("nowhere.pt2")
    (tmp_path / "foreign.pt2").write_text("weights")
    with pytest.raises(sp.CaptureError, match=r"foreign.pt2 cannot be read as an exported program"):
        sp.capture(tmp_path / "foreign.pt2")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "state.pt")
    with pytest.raises(sp.CaptureError, match="a file that torch.export.save wrote"):
        sp.capture(tmp_path / "state.pt")
    poisoned = tmp_path / "poisoned.pt2"
    torch.save((Evil(), {}), tmp_path / "evil.pt")
    with zipfile.ZipFile(file[2]) as source, zipfile.ZipFile(poisoned, "w") as target:
        for entry in source.infolist():
            example = "sample_inputs" in entry.filename
            target.writestr(entry, (tmp_path / "evil.pt").read_bytes() if example else source.read(entry))
    with pytest.raises(sp.CaptureError, match="poisoned.pt2 cannot be read"):
        sp.capture(poisoned)
    assert not capfd.readouterr().err


def test_the_example_inputs_of_a_program():
    model, inputs = made("mlp")
    program = exported(model, inputs, dynamic=True)
    other = {"x": torch.randn(5, 6), "labels": torch.tensor([0, 1, 2, 0, 1])}
    own = sp.capture(program, other)
    assert own.example["x"].shape == (5, 6)
    torch.testing.assert_close(own.run(), model.eval()(**other))
    program.example_inputs = None
    with pytest.raises(sp.CaptureError, match="carries no example inputs: pass them"):
        sp.capture(program)
    torch.testing.assert_close(sp.capture(program, other).run(), model(**other))
    with pytest.raises(sp.CaptureError, match="vary as it was exported: give dynamic_shapes"):
        sp.capture(program, other, dynamic={"x": [0]})


def test_names_that_dynamo_does_not_tell_stay_its_own():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.a = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 4)

        def forward(self, x):
            return self.a(x) @ self.w

    x = torch.randn(3, 4)
    model = Bare()
    names = {site.name for site in sp.sites(sp.capture(by_dynamo(model, {"x": x}, aten_graph=False), x))}
    assert names == {"w", "a.weight"}
    program = sp.capture(by_dynamo(model, {"x": x}, aten_graph=True), x)
    names = {site.name for site in sp.sites(program)}
    assert "a.weight" in names and len(names) == 2 and not any(name == "w" for name in names)
    torch.testing.assert_close(program.run(), model(x))


def test_a_capture_leaves_buffers_and_random_numbers_alone():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls.add_(1)
            return self.a(x) * self.calls

    model, x = Counter(), torch.randn(3, 4)
    state = torch.get_rng_state()
    program = sp.capture(model, x)
    assert torch.equal(state, torch.get_rng_state())
    assert model.calls == 0 and program.module.get_buffer("calls") == 0
    graph = exported(copy.deepcopy(model), {"x": x})
    assert sp.capture(graph).module.get_buffer("calls") == 0 and graph.state_dict["calls"] == 0
