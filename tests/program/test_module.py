"""What users do with a module after the capture: move, copy, save, compile, transform, distribute it."""

import copy
import gc
import json
import linecache
import os
import pickle
import subprocess
import sys
import traceback
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils import _pytree as pytree

import subgraph_peft as sp
from subgraph_peft.graph.edit import move
from subgraph_peft.graph.nodes import fixed_size, show
from subgraph_peft.graph.portable import decoded, symbolic, value_of
from subgraph_peft.passes import SSB, DoRA, LoRA, PiSSA
from subgraph_peft.program import module_file
from subgraph_peft.program.internals import internals
from subgraph_peft.program.runners import renew
from subgraph_peft.program.tree import named_tensors
from tests import models
from tests.base.test_schema import spoiled
from tests.compiler.test_rewrite import Mixed, Turned
from tests.frontend.test_capture import StochasticDepth, resized

WHERE = {
    "bert": "*.{query,value}", "gpt2": "*.c_attn", "llama": "*.{q,v}_proj", "tied_llama": "*.q_proj",
    "deberta": "*.query_proj", "conv": ["stem", "point"], "mlp": ["first", "shared"],
}  # fmt: skip


@pytest.fixture(scope="module")
def captured():
    """name -> (model, inputs, program), captured once."""
    made = {}

    def of(name):
        if name not in made:
            model, inputs = models.MODELS[name]()
            made[name] = model, inputs, sp.capture(model, inputs)
        return made[name]

    return of


def trained(program, method, where):
    """The program under a method whose tensors are away from their start."""
    adapted = sp.rewrite(program, method, where=where)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, p in adapted.parameters(trainable=True):
            p.add_(0.1 * torch.randn(p.shape, generator=generator))
    internals(adapted.module).recompute and internals(adapted.module).recompute(adapted.module)
    return adapted


def tensors(output):
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def wide(inputs, dtype=torch.float64):
    return {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs.items()}


def assert_same(one, other, inputs):
    """Equal outputs bit for bit, of one type, in both modes under one seed."""
    for training in (False, True):
        outputs = []
        for program in (one, other):
            module = copy.deepcopy(program.module).train(training)  # batch norm writes
            torch.manual_seed(0)
            outputs.append(module(**inputs))
        assert type(outputs[0]) is type(outputs[1])
        for a, b in zip(*map(tensors, outputs), strict=True):
            assert torch.equal(a, b)


# moves


@pytest.mark.parametrize("name", ["bert", "conv", "gpt2", "llama", "deberta"])
def test_a_wider_dtype_is_exact(captured, name):
    """GPT-2, Llama and DeBERTa cast to float32 in their code, which the graph then does not: only that rounds."""
    model, inputs, program = captured(name)
    expected = tensors(copy.deepcopy(model).double().eval()(**wide(inputs)))
    got = tensors(copy.deepcopy(program.module).double().eval()(**wide(inputs)))
    bound = 1e-13 if name in ("bert", "conv") else 1e-6
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b.double(), rtol=bound, atol=bound)


@pytest.mark.parametrize("method", [LoRA(r=2), DoRA(of=PiSSA(r=2))], ids=["lora", "dora_pissa"])
def test_an_adapted_module_in_a_wider_dtype_is_its_fold(captured, method):
    _, inputs, program = captured("mlp")
    adapted = trained(program, method, WHERE["mlp"])
    adapted.module.double()
    torch.testing.assert_close(adapted.run(), sp.fold(adapted).run(), rtol=1e-12, atol=1e-12)
    again = sp.rewrite(adapted, SSB(), where="head")
    torch.testing.assert_close(again.run(), adapted.run(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrowing_is_refused_before_anything_changes(captured, dtype):
    _, inputs, program = captured("llama")
    module = trained(program, LoRA(r=2), WHERE["llama"]).module
    before, graph = {n: t.clone() for n, t in named_tensors(module)}, show(internals(module).graph)
    with pytest.raises(sp.CaptureError, match=r"embed_tokens.weight holds torch.float32 values.*would narrow.*capture"):
        module.to(dtype)
    with pytest.raises(sp.CaptureError, match="would narrow"):
        module.to("meta", dtype)
    assert all(torch.equal(t, before[n]) and t.dtype == before[n].dtype for n, t in named_tensors(module))
    assert show(internals(module).graph) == graph


def test_a_buffer_in_a_wider_dtype_is_not_narrowed_either():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4).bfloat16()
            self.register_buffer("frequencies", torch.rand(4))

        def forward(self, x):
            return self.a(x) * self.frequencies.cos().to(x.dtype)

    module = sp.capture(Scaled(), torch.randn(3, 4).bfloat16()).module
    with pytest.raises(sp.CaptureError, match="frequencies holds torch.float32 values"):
        module.to(torch.bfloat16)


def test_a_mixed_model_keeps_its_dtypes_on_a_device_and_widens_as_a_whole():
    torch.manual_seed(0)
    model, x = Mixed(), torch.randn(4, 8)
    program = trained(sp.capture(model, x), DoRA(of=LoRA(r=2)), ["body", "exact:head"])
    kinds = {n: p.dtype for n, p in program.module.named_parameters()}
    assert {n: p.dtype for n, p in copy.deepcopy(program.module).to("meta").named_parameters()} == kinds
    assert len(set(kinds.values())) == 2

    class Derived(Mixed):
        """Its casts name no dtype, so that eager moves as well."""

        def forward(self, x):
            return self.head(torch.relu(self.body(self.norm(x).to(self.body.weight.dtype))).to(self.head.weight.dtype))

    model = Derived()
    program = trained(sp.capture(model, x), LoRA(r=2), "body")
    program.module.to(torch.float32)
    sp.write_to(sp.fold(program), model.float())
    torch.testing.assert_close(program.run(), model(x))
    assert sp.rewrite(program, LoRA(r=2), where="exact:head").run().dtype == torch.float32


def test_ties_outlive_the_meta_device_and_lost_buffers_are_named(captured):
    model, inputs, program = captured("tied_llama")
    moved = copy.deepcopy(program.module).to("meta")
    with pytest.warns(sp.CaptureWarning, match=r"does not hold model.rotary_emb.inv_freq.*Set them"):
        moved.to_empty(device="cpu")
    assert moved.get_parameter("lm_head.weight") is moved.get_parameter("model.embed_tokens.weight")
    moved.load_state_dict(model.state_dict())
    for name, buffer in program.module.named_buffers():
        moved.get_buffer(name).copy_(buffer)
    assert torch.equal(moved.eval()(**inputs).logits, program.run().logits)


def test_values_of_nodes_follow_the_device():
    class Halves(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 6)

        def forward(self, x):
            a, b = self.inner(x).chunk(2, -1)
            return a * b

    program = sp.capture(Halves(), torch.randn(3, 4))

    def kinds():
        values = tensors([node.meta.get("val") for node in program.graph.nodes])
        assert len(values) == 9  # two of them of the chunk
        return {(value.device.type, value.dtype) for value in values}

    assert kinds() == {("cpu", torch.float32)}
    program.module.to("meta", torch.float64)
    assert kinds() == {("meta", torch.float64)}
    program.module.to_empty(device="cpu")
    assert kinds() == {("cpu", torch.float64)}


def test_a_device_without_an_index_follows_the_one_with(captured):
    module = copy.deepcopy(captured("bert")[2].module)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    move(internals(module).graph, {cpu: cuda})
    move(internals(module).graph, {torch.device("cuda:0"): cpu})
    assert {d for n in internals(module).graph.nodes for d in n.kwargs.values() if isinstance(d, torch.device)} == {cpu}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "deberta", "conv"])
def test_a_module_moves_to_cuda_and_back(captured, name, tmp_path):
    model, inputs, program = captured(name)
    adapted = trained(program, DoRA(of=PiSSA(r=2)), WHERE[name])
    expected = tensors(adapted.run())
    adapted.module.cuda()
    on_device = {n: t.cuda() for n, t in inputs.items()}
    for a, b in zip(tensors(adapted.module.eval()(**on_device)), expected, strict=True):
        assert a.is_cuda
        torch.testing.assert_close(a.cpu(), b, rtol=1e-3, atol=1e-3)
    tensors(adapted.module.train()(**on_device))[0].backward()
    sp.write(adapted, tmp_path / "program.safetensors")
    there, here = (sp.read(tmp_path / "program.safetensors", device=d) for d in (None, "cpu"))
    assert there.home.device.type == "cuda"
    for a, b in zip(tensors(there.run()), tensors(adapted.run()), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)  # kernels are chosen by alignment
    for a, b in zip(tensors(here.run()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    folded = sp.fold(adapted)
    adapted.module.cpu(), folded.module.cpu()
    for a, b in zip(tensors(folded.run()), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# autocast


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "deberta", "conv"])
def test_autocast_is_eager_under_autocast(captured, name):
    """Within the rounding of bfloat16, forward and backward; an adapted module like the folded eager model."""
    model, inputs, program = captured(name)
    for method in (None, LoRA(r=2), DoRA(of=LoRA(r=2))):
        adapted = copy.deepcopy(program) if method is None else trained(program, method, WHERE[name])
        eager = copy.deepcopy(model).eval()
        sp.write_to(sp.fold(adapted), eager)
        module = adapted.module.eval()
        if method is None:
            module.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16):
            got, expected = tensors(module(**inputs)), tensors(eager(**inputs))
        full = tensors(eager(**inputs))
        assert any(not torch.equal(a.float(), b) for a, b in zip(expected, full, strict=True)), "autocast does nothing"
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=0.03, atol=0.03 * b.abs().max().item())
        got[0].backward()
        for _, p in adapted.parameters(trainable=True):
            assert p.grad is None or (p.grad.dtype == torch.float32 and p.grad.isfinite().all())
        if method is None and name != "deberta":
            expected[0].backward()
            theirs = dict(eager.named_parameters())
            for n, p in module.named_parameters():
                if p.grad is not None:
                    largest = theirs[n].grad.abs().max().item()
                    torch.testing.assert_close(p.grad, theirs[n].grad, rtol=0.03, atol=0.03 * largest)


# copies


def test_a_copy_is_independent_and_outlives_the_original():
    model, inputs = models.bert(dropout=0.5)
    program = trained(sp.capture(model, inputs), PiSSA(r=2), WHERE["bert"])
    expected = program.run().logits
    duplicate = copy.deepcopy(program)
    with torch.no_grad():
        for p in program.module.parameters():
            p.zero_()
    assert torch.equal(duplicate.run().logits, expected)
    original = weakref.ref(program.module)
    del program
    gc.collect()
    assert original() is None
    module = duplicate.module.train()
    assert not torch.equal(module(**inputs).logits, module(**inputs).logits), "dropout is on"
    assert torch.equal(module.eval()(**inputs).logits, expected)
    shallow = copy.copy(module)
    assert shallow.get_parameter("classifier.weight") is module.get_parameter("classifier.weight")
    assert torch.equal(sp.fold(duplicate).run().logits, duplicate.run().logits.detach()) or torch.allclose(
        sp.fold(duplicate).run().logits, expected, atol=1e-5
    )


def test_a_deep_copy_of_a_tied_module_is_tied(captured):
    module = copy.deepcopy(captured("tied_llama")[2].module)
    assert module.get_parameter("lm_head.weight") is module.get_parameter("model.embed_tokens.weight")


# files


@pytest.mark.parametrize("name", ["conv", "tied_llama", "bert"])
def test_a_program_comes_back_bit_equal_and_goes_on(captured, tmp_path, name):
    model, inputs, program = captured(name)
    path = tmp_path / "program.safetensors"
    sp.write(program, path)
    back = sp.read(path)
    assert show(back.graph) == show(program.graph)
    assert (back.history, back.ties, back.source) == (program.history, program.ties, program.source)
    assert list(back.module.state_dict()) == list(program.module.state_dict())
    assert all(t.data_ptr() % 64 == 0 for _, t in back.tensors()), "kernels round by alignment"
    assert_same(program, back, inputs)
    for node, other in zip(program.graph.nodes, back.graph.nodes, strict=True):
        value, again = node.meta.get("val"), other.meta.get("val")
        assert node.meta.get("nn_module_stack") == other.meta.get("nn_module_stack")
        if isinstance(value, torch.Tensor):
            assert (value.dtype, value.ndim) == (again.dtype, again.ndim)
            assert list(map(fixed_size, value.shape)) == list(map(fixed_size, again.shape))
    if name != "conv":
        assert_same(program, back, resized(inputs))
        back.module.load_state_dict(model.state_dict())
    one, other = (trained(p, DoRA(of=PiSSA(r=2)), WHERE[name]) for p in (program, back))
    assert show(one.graph) == show(other.graph)
    assert_same(one, other, inputs)
    sp.save(one, tmp_path / "adapter")
    assert_same(sp.load(back, tmp_path / "adapter"), one, inputs)
    sp.write(one, path)
    again = sp.read(path)
    assert_same(one, again, inputs)
    names = [[n for n, _ in p.parameters(trainable=True)] for p in (one, again)]
    assert names[0] == names[1] and names[0]
    assert_same(sp.fold(one), sp.fold(again), inputs)
    again.module.load_state_dict(other.module.state_dict())
    folded = sp.fold(again)
    sp.write(folded, path)
    assert sp.read(path).folded == folded.folded
    assert_same(sp.read(path), folded, inputs)


def test_statistics_heads_and_a_second_graph_travel_with_the_program(tmp_path):
    model, inputs = models.conv()
    base = sp.capture(model, inputs)
    program = sp.rewrite(base, LoRA(r=2), where="point", trainable="head")
    with torch.no_grad():
        program.module.get_parameter("head.weight").add_(1.0)
    program.module.get_parameter("point.weight_lora.A").requires_grad_(False)
    program.module.train()(**inputs)
    sp.write(program, tmp_path / "program")
    back = sp.read(tmp_path / "program")
    trains = [[n for n, _ in p.parameters(trainable=True)] for p in (back, program)]
    assert trains[0] == trains[1] == ["point.weight_lora.B", "head.weight", "head.bias"]
    assert_same(program, back, inputs)
    assert_same(base, back.captured, inputs)
    assert back.module.training
    sp.save(back, tmp_path / "adapter")
    assert_same(sp.load(base, tmp_path / "adapter"), program, inputs)
    two = sp.capture(StochasticDepth(), torch.randn(3, 4))
    sp.write(two, tmp_path / "two")
    assert internals(sp.read(tmp_path / "two").module).eval_graph is not None
    assert_same(two, sp.read(tmp_path / "two"), two.example)


def test_a_moved_program_comes_back_as_it_is(captured, tmp_path):
    _, inputs, program = captured("mlp")
    adapted = trained(program, PiSSA(r=2), "first")
    adapted.module.double()
    sp.write(adapted, tmp_path / "program")
    back = sp.read(tmp_path / "program")
    assert back.home.dtype == torch.float64
    assert_same(adapted, back, wide(inputs))


def test_the_file_holds_plain_tensors_and_text(captured, tmp_path):
    model, _, program = captured("tied_llama")
    sp.write(program, tmp_path / "program.safetensors")
    held = load_file(tmp_path / "program.safetensors")
    assert torch.equal(held["model.embed_tokens.weight"], model.lm_head.weight) and "lm_head.weight" not in held
    with safe_open(tmp_path / "program.safetensors", framework="pt") as file:
        text = json.loads(file.metadata()["subgraph_peft"])
    assert text["module"]["tensors"]["lm_head.weight"] == "model.embed_tokens.weight"


FRESH = """
import pickle, sys, torch
import subgraph_peft as sp
from subgraph_peft.program.runners import renew
from subgraph_peft.program.tree import named_tensors
folder = sys.argv[1]
for name in ("transformers", "tests"):
    sys.modules[name] = None
program = sp.read(folder + "/mlp")
out = [program.run()[1]]
with open(folder + "/module.pickle", "rb") as file:
    out.append(pickle.load(file).eval()(**program.example)[1])
torch.save(out, folder + "/outputs.pt")
try:
    sp.read(folder + "/bert")
except sp.CheckpointError as error:
    print(error)
"""


def test_a_fresh_process_needs_neither_the_model_nor_transformers(captured, tmp_path):
    _, inputs, program = captured("mlp")
    adapted = trained(program, PiSSA(r=2), "first")
    adapted.module.eval()
    sp.write(adapted, tmp_path / "mlp")
    (tmp_path / "module.pickle").write_bytes(pickle.dumps(adapted.module))
    sp.write(captured("bert")[2], tmp_path / "bert")
    done = subprocess.run([sys.executable, "-c", FRESH, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for output in torch.load(tmp_path / "outputs.pt"):
        assert torch.equal(output, adapted.run()[1])
    assert "transformers.modeling_outputs.SequenceClassifierOutput" in done.stdout and "Install" in done.stdout


def test_modules_and_programs_pickle(captured):
    _, inputs, program = captured("mlp")
    for adapted in (program, trained(program, PiSSA(r=2), "first"), trained(program, DoRA(of=LoRA(r=2)), "first")):
        back = pickle.loads(pickle.dumps(adapted))
        assert_same(adapted, back, inputs)
        module = pickle.loads(pickle.dumps(adapted.module))
        assert torch.equal(module.eval()(**inputs)[1], adapted.run()[1])
        names = [[n for n, p in m.named_parameters() if p.requires_grad] for m in (module, adapted.module)]
        assert names[0] == names[1]
    with pytest.raises(sp.CheckpointError, match=r"unpickled without the equations.*constant_0.*before pickling"):
        module.load_state_dict(adapted.module.state_dict())
    own = sp.rewrite(program, Turned(), where="first")
    assert torch.equal(pickle.loads(pickle.dumps(own.module)).eval()(**inputs)[1], own.run()[1])
    with pytest.raises(sp.CheckpointError, match=r"'turned' is of Turned.*Unknown method.*register it in the"):
        pickle.dumps(own)


def test_a_method_whose_name_another_has_is_not_written_as_the_other(captured):
    class Own(LoRA):
        """LoRA with an option more."""

        extra: int = 1

    own = sp.rewrite(captured("mlp")[2], Own(r=2, extra=3), where="first")
    with pytest.raises(sp.CheckpointError, match=r"is of Own, .*: .*extra"):
        pickle.dumps(own)


def test_files_that_are_no_programs_say_so(captured, tmp_path):
    _, _, program = captured("mlp")
    path = tmp_path / "program"
    with pytest.raises(sp.CheckpointError, match="missing or damaged"):
        sp.read(path)
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(sp.CheckpointError, match="not written by sp.write"):
        sp.read(path)
    sp.write(program, path)
    held = load_file(path)
    text = program_text(path)

    def edited(old, new):
        assert old in text
        save_file(held, path, metadata={"subgraph_peft": text.replace(old, new)})

    edited('"format": 1', '"format": 9')
    with pytest.raises(sp.CheckpointError, match="format 9; this version reads format 1"):
        sp.read(path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(sp.CheckpointError, match="damaged"):
        sp.read(path)
    meta = copy.deepcopy(program)
    meta.module.to("meta")
    with pytest.raises(sp.CheckpointError, match="first.weight is on the meta device"):
        sp.write(meta, path)


def program_text(path):
    with safe_open(path, framework="pt") as file:
        return file.metadata()["subgraph_peft"]


CODE = 'z=open("ran", "w")'
STRUCTURE = json.loads(pytree.treespec_dumps(pytree.tree_structure((0,))))


def node(last, **changed):
    """An edit of the last node of a kind, by the position of what changes."""
    at = {"op": 0, "name": 1, "target": 2, "args": 3, "kwargs": 4}

    def edit(module):
        found = next(n for n in reversed(module["graphs"][0]["nodes"]) if n[0] == last)
        for field, value in changed.items():
            found[at[field]] = value

    return edit


def stack(module):
    graph = module["graphs"][0]
    first = next(n for n in graph["nodes"] if n[0] == "call_function")
    first[5]["nn_module_stack"] = len(graph["texts"])
    place = {"tuple": ['first", open("ran", "w"), "', "Linear"]}
    graph["texts"].append(json.dumps({"dict": [["L", place]]}))


def structure(type, context):
    def edit(module):
        module["signature"]["output"] = json.dumps([1, {**STRUCTURE[1], "type": type, "context": context}])

    return edit


def parameter(name, kind="KEYWORD_ONLY"):
    return lambda module: module["signature"]["parameters"].append([name, kind])


ENUM = {"__enum__": True, "fqn": "ran:Kind", "name": "A"}
FACTORY = {"default_factory_module": "ran", "default_factory_name": "main", "dict_context": ["a"]}
PART = {"graph": {"nodes": [], "texts": [], "sizes": {}}, "parts": {}}
CRAFTED = {
    "placeholder": (node("placeholder", target=CODE), r"node 'labels' of the graph is an input called .z=open"),
    "renamed": (node("placeholder", target="y"), r"node 'labels' of the graph is an input that is called 'y'"),
    "default": (node("placeholder", args={"tuple": [1]}), "'labels' of the graph is an input that .* has arguments"),
    "name": (node("call_function", name=CODE), r"open.*has no valid name"),
    "keyword": (node("call_function", name="lambda"), "'lambda' of the graph has no valid name"),
    "kwargs": (node("call_function", kwargs={"dict": [[f"{CODE}, y", 1]]}), "not named by identifiers"),
    "method": (node("call_function", op="call_method", target="backward"), "is a 'call_method'"),
    "module": (node("get_attr", op="call_module"), "is a 'call_module'"),
    "attribute": (node("get_attr", target='first", open("ran", "w"), "'), "reads .*is no qualified name"),
    "foreign": (node("get_attr", target="__class__.__init__"), "'__class__.__init__', which is no tensor of"),
    "annotation": (node("output", args={"tuple": [1, CODE]}), "'output' of the graph returns more than one"),
    "class": (lambda module: module.update({"class": CODE}), "class of the module is called"),
    "block": (lambda module: module.update(blocks=['first", open("ran", "w"), "']), "no path of a module"),
    "stack": (stack, "no path of a module"),
    "part": (lambda module: module["parts"].update({'a", open("ran", "w"), "': PART}), "no path of a module"),
    "parameter": (parameter(CODE), "signature has a parameter .*open.*which no function can have"),
    "self": (parameter("self"), "signature has a parameter 'self'"),
    "kind": (parameter("y", "empty"), r"signature has a parameter 'y' \(empty\)"),
    "defaultdict": (structure("collections.defaultdict", FACTORY), "defaultdict, which no file can hold"),
    "enumeration": (structure("builtins.dict", json.dumps([ENUM])), "enumeration among its keys"),
    "damaged": (lambda module: module.pop("graphs"), "damaged: field 'module.graphs': it is required"),
} | {
    text: (node("call_function", target=text), f"calls {text}, which {why}")
    for why, texts in {
        "this process does not know": (
            "os.system", "torch.load", "_operator.call", "_operator.attrgetter", "_operator.methodcaller",
            "torch.ops.mine.tanh.default", "torch.ops.load_library",
        ),
        "does more than compute": (
            "torch.ops.aten.save.default", "torch.ops.aten.from_file.default", "torch.ops.higher_order.call_torchbind",
            "torch.ops.aten.__class__.mro",
        ),
    }.items()
    for text in texts
}  # fmt: skip


@pytest.mark.parametrize("sort", CRAFTED)
def test_a_crafted_file_is_refused_and_nothing_of_it_runs(captured, tmp_path, monkeypatch, sort):
    path, (edit, reason) = tmp_path / "crafted", CRAFTED[sort]
    sp.write(captured("mlp")[2], path)
    described = json.loads(program_text(path))
    edit(described["module"])
    save_file(load_file(path), path, metadata={"subgraph_peft": json.dumps(described)})
    (tmp_path / "ran.py").write_text("import pathlib; pathlib.Path('ran').touch()")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sp.CheckpointError, match=f"crafted.*{reason}"):
        sp.read(path).run()
    assert not (tmp_path / "ran").exists()


def test_every_field_of_a_programs_header_is_checked(captured, tmp_path):
    path = tmp_path / "program"
    sp.write(sp.fold(trained(captured("mlp")[2], LoRA(r=2), "first")), path)
    held, good = load_file(path), json.loads(program_text(path))

    def within(outer, inner):
        return [(f"{outer}.{field}", {**good, outer: values}) for field, values in inner]

    module = good["module"]
    parts = [(f"signature.{f}", {**module, "signature": v}) for f, v in spoiled(module["signature"])]
    parts += [(f"graphs.0.{f}", {**module, "graphs": [v]}) for f, v in spoiled(module["graphs"][0])]
    cases = [*spoiled(good), *within("module", [*spoiled(module), *parts]), *within("folded", spoiled(good["folded"]))]
    for field, values in cases:
        save_file(held, path, metadata={"subgraph_peft": json.dumps(values)})
        with pytest.raises(sp.CheckpointError) as caught:
            sp.read(path)
        assert field.rpartition(".")[2] in str(caught.value) and str(caught.value).startswith(str(path)), field


def test_a_value_or_size_that_is_not_written_as_one_is_refused():
    broken = [{}, {"tuple": 1}, {"dict": [1]}, {"dict": [[[1], 2]]}, {"slice": [1]}, {"complex": ["a", 1]},
              {"device": "moon"}, {"node": "none"}, {"torch": "nn"}, {"tuple": [], "dict": []}]  # fmt: skip
    for value in broken:
        with pytest.raises(sp.CheckpointError):
            decoded(value)
    shape = {"dtype": {"torch": "float32"}, "device": "cpu"}
    for value in ({"size": "s0"}, {**shape, "shape": [-1]}, {**shape, "shape": ["a"]}, {**shape, "shape": 1}):
        with pytest.raises(sp.CheckpointError, match="not what a node's value is written as"):
            value_of(value, {}, {})
    with pytest.raises(sp.CheckpointError, match="no expression of a size"):
        symbolic({"s0 +": 3})


def test_errors_of_our_own_code_are_no_damage_of_a_file(captured, tmp_path, monkeypatch):
    sp.write(captured("mlp")[2], tmp_path / "program")
    pickled = pickle.dumps(captured("mlp")[2].module)
    monkeypatch.setattr(module_file, "build", lambda *_: None.planted)
    for read in (lambda: sp.read(tmp_path / "program"), lambda: pickle.loads(pickled)):
        with pytest.raises(AttributeError, match="planted"):
            read()


def test_names_that_are_code_are_compiled_from_no_source(captured, tmp_path):
    """Adapters bring names of their own, and so may graphs that were edited by hand."""
    _, _, program = captured("mlp")
    path = tmp_path / "program"
    sp.write(sp.rewrite(program, LoRA(r=2), where="first"), path)
    text = program_text(path).replace('"name": "lora"', '"name": "a\\", \\"b"')
    save_file(load_file(path), path, metadata={"subgraph_peft": text})
    with pytest.raises(sp.CheckpointError, match="program: the adapter's name 'a\", \"b' is no identifier"):
        sp.read(path)
    module = copy.deepcopy(program.module)
    next(iter(internals(module).graph.find_nodes(op="get_attr"))).target = 'first", print("ran"), "'
    with pytest.raises(sp.CaptureError, match="which is no qualified name"):
        renew(module)


class Branch(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.a(x), lambda x: x.sin(), (x,))


def test_branches_and_their_bodies_travel(tmp_path):
    torch.manual_seed(0)
    program = sp.capture(Branch(), torch.randn(3, 4))
    sp.write(program, tmp_path / "branch")
    back = sp.read(tmp_path / "branch")
    for x in (torch.ones(3, 4), -torch.ones(3, 4)):
        assert torch.equal(back.module.eval()(x), program.module.eval()(x))
    described = json.loads(program_text(tmp_path / "branch"))
    next(iter(described["module"]["parts"].values()))["graph"]["nodes"][0][2] = CODE
    save_file(load_file(tmp_path / "branch"), tmp_path / "branch", metadata={"subgraph_peft": json.dumps(described)})
    with pytest.raises(sp.CheckpointError, match="branch: The node .* is an input called"):
        sp.read(tmp_path / "branch")


def test_row_blocks_travel_with_the_program(captured, tmp_path):
    _, inputs, program = captured("gpt2")
    adapted = trained(program, LoRA(r=2), "*.c_attn[q,v]")
    sp.write(adapted, tmp_path / "program")
    assert_same(adapted, sp.read(tmp_path / "program"), inputs)


def test_an_unknown_config_is_named(captured, tmp_path):
    path = tmp_path / "program"
    sp.write(captured("bert")[2], path)
    described = json.loads(program_text(path))
    config = json.loads(described["module"]["config"])
    described["module"]["config"] = json.dumps({**config, "model_type": "bort2"})
    save_file(load_file(path), path, metadata={"subgraph_peft": json.dumps(described)})
    with pytest.warns(sp.CaptureWarning, match="without its config, of type 'bort2'.*does not know it"):
        assert not hasattr(sp.read(path).module, "config")


def test_adapters_and_programs_are_read_to_aligned_memory(captured, tmp_path):
    _, _, program = captured("mlp")
    adapted = trained(program, LoRA(r=3), "first")
    sp.save(adapted, tmp_path / "adapter")
    sp.write(adapted, tmp_path / "program")
    for back in (sp.load(program, tmp_path / "adapter"), sp.read(tmp_path / "program")):
        assert all(p.data_ptr() % 64 == 0 for _, p in back.parameters(trainable=True))


# torch.compile


@pytest.mark.parametrize(("name", "lower"), [("bert", "eager"), ("conv", "aot_eager")])
def test_compiled_training_equals_uncompiled_at_any_batch_size(captured, name, lower):
    _, inputs, program = captured(name)
    adapted = trained(program, DoRA(of=LoRA(r=2)), WHERE[name])
    module, compiles = adapted.module, []

    def backend(graph, example):
        compiles.append(graph)
        return torch._dynamo.lookup_backend(lower)(graph, example)

    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend=backend)
    for training in (True, False, True):
        module.train(training)
        for times in (2, 3):
            batch = {n: torch.cat([t] * times) for n, t in inputs.items()}
            gradients = []
            for run in (compiled, module):
                module.zero_grad()
                output = run(**batch)
                tensors(output)[0].backward()
                gradients.append([p.grad.clone() for _, p in adapted.parameters(trainable=True)])
            assert type(output) is type(module(**batch))
            torch.testing.assert_close(gradients[0], gradients[1])
    assert len(compiles) == 2, "one graph a mode"
    torch._dynamo.reset()


def test_compiled_calls_without_labels(captured):
    _, inputs, program = captured("mlp")
    module = copy.deepcopy(program.module).eval()
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    assert torch.equal(compiled(inputs["x"])[1], module(inputs["x"])[1])
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("method", [None, LoRA(r=2), DoRA(of=PiSSA(r=2))], ids=str)
def test_inductor(captured, method):
    _, inputs, program = captured("bert")
    adapted = program if method is None else trained(program, method, WHERE["bert"])
    compiled = torch.compile(adapted.module, fullgraph=True, dynamic=True)
    for batch in (inputs, resized(inputs)):
        for training in (True, False):
            adapted.module.train(training)
            torch.testing.assert_close(compiled(**batch).loss, adapted.module(**batch).loss, rtol=1e-4, atol=1e-5)
    if method:
        compiled(**inputs).loss.backward()
    torch._dynamo.reset()


# torch.func


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["mlp", "bert"])
def test_per_sample_gradients_under_vmap(captured, name):
    _, inputs, program = captured(name)
    adapted = trained(program, DoRA(of=PiSSA(r=2)), WHERE[name])
    module = adapted.module.eval()
    held = {n: p.detach() for n, p in adapted.parameters(trainable=True)}

    def loss(parameters, sample):
        batch = {n: t[None] for n, t in sample.items()}
        return torch.func.functional_call(module, parameters, (), batch)[0]

    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0))(held, inputs)
    for row in range(len(inputs["labels"])):
        module.zero_grad()
        module(**{n: t[row : row + 1] for n, t in inputs.items()})[0].backward()
        for n, p in adapted.parameters(trainable=True):
            torch.testing.assert_close(gradients[n][row], p.grad, rtol=1e-4, atol=1e-5)
    changed = {n: t + 1 for n, t in held.items()}
    assert not torch.equal(
        loss(changed, {n: t[0] for n, t in inputs.items()}), loss(held, {n: t[0] for n, t in inputs.items()})
    )


def test_forward_mode_and_ensembles(captured):
    _, inputs, program = captured("mlp")
    adapted = trained(program, LoRA(r=2), WHERE["mlp"])
    module, x = adapted.module.eval().double(), inputs["x"].double()
    held = {n: p.detach() for n, p in adapted.parameters(trainable=True)}
    direction = {n: torch.ones_like(t) for n, t in held.items()}

    def logits(parameters):
        return torch.func.functional_call(module, parameters, (x,))[1]

    value, slope = torch.func.jvp(logits, (held,), (direction,))
    near = logits({n: t + 1e-7 * direction[n] for n, t in held.items()})
    torch.testing.assert_close((near - value) / 1e-7, slope, rtol=1e-4, atol=1e-5)
    several = [copy.deepcopy(module).requires_grad_(True) for _ in range(3)]
    for index, member in enumerate(several):
        member.get_parameter("head.bias").data.add_(index)
    parameters, buffers = torch.func.stack_module_state(several)
    skeleton = copy.deepcopy(module).to("meta")
    together = torch.func.vmap(lambda p, b: torch.func.functional_call(skeleton, (p, b), (x,))[1], randomness="error")(
        parameters, buffers
    )
    torch.testing.assert_close(together, torch.stack([member(x)[1] for member in several]))


# distributed


def replica(rank, program, inputs, port, results):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    parallel = nn.parallel.DistributedDataParallel(program.module.eval())
    mine = {n: t[rank::2] for n, t in inputs.items()}
    optimizer = torch.optim.SGD([p for p in parallel.parameters() if p.requires_grad], lr=0.1)
    parallel(**mine)[0].backward()
    gradients = {n: p.grad.clone() for n, p in parallel.module.named_parameters() if p.grad is not None}
    optimizer.step()
    parallel.train()(**mine)[0].backward()
    optimizer.step()
    parallel.eval()(**mine)  # the buffers of the first process go to the others
    torch.save((gradients, parallel.module.state_dict()), f"{results}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_make_the_gradient_of_the_joined_batch(tmp_path):
    torch.manual_seed(0)
    model, _ = models.conv()
    inputs = {"x": torch.randn(4, 3, 8, 8), "labels": torch.arange(4) % 3}
    program = trained(sp.capture(model, inputs), DoRA(of=LoRA(r=2)), ["exact:head", "stem"])
    port = 20000 + os.getpid() % 20000
    torch.multiprocessing.spawn(replica, (program, inputs, port, str(tmp_path)), nprocs=2)
    (one, state), (two, other) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    program.module.eval()(**inputs)[0].backward()
    joined = {n: p.grad for n, p in program.parameters(trainable=True)}
    assert set(one) == set(joined), "nothing but adapters has a gradient"
    for name, gradient in joined.items():
        assert torch.equal(one[name], two[name])
        torch.testing.assert_close(one[name], gradient)
    assert all(torch.equal(t, other[n]) for n, t in state.items())
    own = program.module.state_dict()
    changed = {n for n, t in own.items() if not torch.equal(state[n], t)}
    assert changed == set(joined) | {n for n in own if n.startswith("norm.") and "running" in n or "batches" in n}
    program.module.load_state_dict(state)


# an nn.Module like any other


def test_state_dicts_travel_both_ways(captured):
    model, inputs, program = captured("tied_llama")
    module = copy.deepcopy(program.module)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    module.load_state_dict(other.state_dict())
    assert torch.equal(module.eval()(**inputs).logits, other.eval()(**inputs).logits)
    other.load_state_dict(program.module.state_dict())
    assert torch.equal(other(**inputs).logits, program.run().logits)
    with pytest.raises(RuntimeError, match="Missing key.*lm_head.weight"):
        module.load_state_dict({n: t for n, t in model.state_dict().items() if n != "lm_head.weight"})


def test_parameters_are_those_of_the_model_in_its_order(captured):
    for name in ("tied_llama", "bert", "conv"):
        model, _, program = captured(name)
        own, theirs = list(program.module.named_parameters()), list(model.named_parameters())
        assert {n for n, _ in own} == {n for n, _ in theirs}, "a tied weight once, under the same name"
        assert list(program.module.state_dict()) == list(model.state_dict())


def test_hooks_apply_and_zero_grad_work_as_on_any_module(captured):
    _, inputs, program = captured("bert")
    adapted = trained(program, LoRA(r=2), WHERE["bert"])
    module, seen = copy.deepcopy(adapted.module), []
    handle = module.register_forward_hook(lambda m, args, kwargs, out: seen.append(set(kwargs)), with_kwargs=True)
    module(**inputs).loss.backward()
    handle.remove()
    module(**inputs)
    assert seen == [set(inputs)]
    touched = [p for p in module.parameters() if p.grad is not None]
    assert touched and all(p.requires_grad for p in touched)
    module.zero_grad()
    assert all(p.grad is None for p in module.parameters())
    visited = []
    module.apply(visited.append)
    assert visited[-1] is module and len(visited) == len(list(module.modules()))
    path = "bert.encoder.layer.0.attention.self.query"
    assert module.get_submodule(path).weight is module.get_parameter(f"{path}.weight")
    module.requires_grad_(True)
    assert all(p.requires_grad for p in module.parameters())


def test_a_module_prints_its_call_its_size_and_its_groups():
    from transformers import BertConfig, BertForSequenceClassification

    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=3))
        inputs = {"input_ids": torch.ones(2, 8, dtype=torch.long), "labels": torch.zeros(2, dtype=torch.long)}
    program = sp.rewrite(sp.capture(model, inputs), LoRA(r=8), where=WHERE["bert"])
    lines = str(program.module).splitlines()
    assert lines[0] == "BertForSequenceClassification(input_ids, labels) → loss, logits"
    assert "73,728 of them train" in lines[1] and "float32 on meta, train mode" in lines[1]
    dense = next(line for line in lines if "intermediate.dense" in line)
    assert dense.split(maxsplit=1) == [
        "bert.encoder.layer.*.intermediate.dense",
        "weight [3072, 768], bias [3072]  × 3",
    ]
    adapter = next(line for line in lines if "query.weight_lora" in line)
    assert adapter.endswith("A [8, 768], B [768, 8]  × 3  trains")
    assert len(lines) < 30


def test_sources_of_dropped_programs_are_dropped():
    def kept() -> set[str]:
        gc.collect()
        return {file for file in linecache.cache if file.startswith("<Linear:")}

    before, sources = kept(), []
    for _ in range(5):
        program = sp.capture(nn.Linear(3, 2), torch.ones(4, 3), verify=False)
        program.module(torch.ones(4, 3))
        sources.append(kept() - before)
        del program
    assert all(sources) and kept() <= before
    assert len(set().union(*sources)) == sum(map(len, sources)), "a name that was used again"


def test_a_traceback_shows_the_source_of_a_graph():
    program = sp.capture(nn.Linear(3, 2), torch.ones(4, 3), verify=False)
    with pytest.raises(RuntimeError) as caught:
        program.module(torch.ones(4, 5))
    lines = [frame.line for frame in traceback.extract_tb(caught.value.__traceback__)]
    assert any("torch.ops.aten.linear.default" in line for line in lines)
