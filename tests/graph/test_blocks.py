"""Cutting a graph into blocks: gradient checkpointing, and the unflattened view."""

import copy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import subgraph_peft as sp
from subgraph_peft.graph.partition import cut, repeated
from subgraph_peft.passes import DoRA, LoRA, PrefixTuning, PromptTuning
from subgraph_peft.program.internals import internals
from tests import models

METHODS = {"lora": LoRA(r=2, dropout=0.1), "dora": DoRA(of=LoRA(r=2))}
LAYERS = {
    "bert": ("bert.encoder.layer.0", "bert.encoder.layer.1"),
    "gpt2": ("transformer.h.0", "transformer.h.1"),
    "llama": ("model.layers.0", "model.layers.1"),
}


@pytest.fixture(scope="module")
def captured():
    made = {name: models.llama() if name == "llama" else getattr(models, name)(0.1) for name in (*LAYERS, "albert")}
    return {name: (sp.capture(model, inputs, verify=False), inputs) for name, (model, inputs) in made.items()}


def rewritten(program, method=None, where="*"):
    """Under adapters whose tensors are none of them zero."""
    adapted = sp.rewrite(program, method or LoRA(r=2), where=where)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in adapted.parameters(trainable=True):
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return adapted


def losses_and_gradients(module, inputs):
    module.train().zero_grad()
    torch.manual_seed(0)
    loss = module(**inputs)[0]
    loss.backward()
    gradients = {n.replace("_checkpoint_wrapped_module.", ""): p.grad for n, p in module.named_parameters()}
    found = {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in gradients.items() if g is not None}
    return {"loss": loss.detach(), **found}


def assert_equal(found, expected):
    assert set(found) == set(expected) and len(expected) > 1
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def saved_bytes(module, inputs):
    """Bytes that the forward pass keeps for the backward pass, parameters not counted."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*module.parameters(), *module.buffers())}
    saved = {}

    def pack(tensor):
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            saved[memory.data_ptr()] = memory.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module.train()(**inputs)[0]
    assert loss.requires_grad
    return sum(saved.values())


# gradient checkpointing


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", LAYERS)
def test_checkpointing_changes_no_bit(captured, name, method):
    program, inputs = captured[name]
    module = rewritten(program, METHODS[method]).module
    expected, before = losses_and_gradients(module, inputs), saved_bytes(module, inputs)
    module.gradient_checkpointing_enable()
    assert internals(module).checkpointing.paths == LAYERS[name] and module.is_gradient_checkpointing
    assert_equal(losses_and_gradients(module, inputs), expected)
    assert saved_bytes(module, inputs) < before / 4
    assert_equal(losses_and_gradients(copy.deepcopy(module), inputs), expected)
    module.gradient_checkpointing_disable()
    assert saved_bytes(module, inputs) == before


def test_eight_layers_keep_little_more_than_their_inputs():
    sizes = {"hidden_size": 32, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 128}
    bert = BertForSequenceClassification(BertConfig(vocab_size=61, **sizes))
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=61, **sizes))
    ids = torch.randint(1, 61, (4, 32), generator=torch.Generator().manual_seed(0))
    for model, labels in ((bert, torch.tensor([0, 1, 0, 1])), (llama, ids)):
        inputs = {"input_ids": ids, "labels": labels}
        module = rewritten(sp.capture(model, inputs, verify=False)).module
        expected, before = losses_and_gradients(module, inputs), saved_bytes(module, inputs)
        module.gradient_checkpointing_enable()
        assert_equal(losses_and_gradients(module, inputs), expected)
        after = saved_bytes(module, inputs)
        assert len(internals(module).checkpointing.paths) == 8 and after < before / 8, (before, after)


def test_nothing_is_checkpointed_in_eval_mode_and_without_gradients(captured, monkeypatch):
    calls = []
    real = torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        "subgraph_peft.program.runners.checkpoint", lambda *args, **kwargs: calls.append(args) or real(*args, **kwargs)
    )
    program, inputs = captured["bert"]
    module = rewritten(program).module
    module.gradient_checkpointing_enable()
    module.eval()(**inputs).loss.backward()
    assert not calls
    with torch.no_grad():
        module.train()(**inputs)
    assert saved_bytes(module, inputs) and len(calls) == 4


def test_the_setting_goes_from_program_to_program(captured):
    program, inputs = captured["bert"]
    first = rewritten(program)
    first.module.gradient_checkpointing_enable("*.layer.1")
    second = sp.rewrite(first, LoRA(r=1), where="*.output.dense")
    for made in (second, sp.fold(second), sp.rewrite(sp.fold(first), LoRA(r=2), where="*.key")):
        assert internals(made.module).checkpointing.paths == ("bert.encoder.layer.1",)
        made.module.requires_grad_(True)
        few = saved_bytes(made.module, inputs)
        made.module.gradient_checkpointing_disable()
        assert few < 0.8 * saved_bytes(made.module, inputs)
    assert internals(program.module).checkpointing is None


@pytest.mark.filterwarnings("error::subgraph_peft.CaptureWarning", "ignore::FutureWarning")
def test_checkpointing_of_the_source_is_kept():
    model, inputs = models.bert(0.1)
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs={"preserve_rng_state": True, "use_reentrant": False}
    )
    model.bert.encoder.layer[0].gradient_checkpointing = False
    program = sp.capture(model.train(), inputs)
    assert [layer.gradient_checkpointing for layer in model.bert.encoder.layer] == [False, True]
    assert internals(program.module).checkpointing == (("bert.encoder.layer.1",), {"preserve_rng_state": True})
    program.module.requires_grad_(True)
    found, expected = losses_and_gradients(program.module, inputs), losses_and_gradients(model, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


class Own(nn.Module):
    """Checkpoints its layers itself, or has what its own code takes for a switch of it."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1), nn.ReLU()) for _ in range(2))
        self.reentrant, self.gradient_checkpointing = reentrant, True

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


@pytest.mark.filterwarnings("error::subgraph_peft.CaptureWarning")
def test_layers_that_no_one_checkpoints_are_not(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers.modeling_layers")
    model = Own()
    assert internals(sp.capture(model, torch.randn(3, 4)).module).checkpointing is None
    assert model.gradient_checkpointing is True


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [False, True])
def test_a_model_that_checkpoints_itself_is_told(reentrant):
    model, x = Own(reentrant), torch.randn(3, 4)
    kind = r"itself \(reentrant\)" if reentrant else r"itself \(not reentrant\)"
    with pytest.warns(sp.CaptureWarning, match=f"Own calls torch.utils.checkpoint {kind}.*by module path"):
        module = sp.capture(model, x).module.requires_grad_(True)
    assert "apply" not in vars(CheckpointFunction) and saved_tensors_hooks.__enter__.__name__ == "__enter__"
    module.gradient_checkpointing_enable("layers.?")
    outputs = []
    for each in (model.train(), module.train()):
        torch.manual_seed(0)
        outputs.append(each(x.clone().requires_grad_()))
        outputs[-1].square().sum().backward()
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*(each.get_parameter("layers.0.0.weight").grad for each in (model, module)))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_trainer_switches_it(captured, tmp_path):
    program, inputs = captured["bert"]
    module = rewritten(program).module
    arguments = TrainingArguments(
        str(tmp_path), gradient_checkpointing=True, max_steps=2, use_cpu=True, report_to=[], save_strategy="no",
        gradient_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True}, disable_tqdm=True,
    )  # fmt: skip
    rows = [{name: value[i] for name, value in inputs.items()} for i in range(3)]
    Trainer(module, arguments, train_dataset=rows).train()
    assert internals(module).checkpointing == (LAYERS["bert"], {"preserve_rng_state": True})


def test_it_compiles_without_graph_breaks(captured):
    program, inputs = captured["llama"]
    program = rewritten(program, METHODS["dora"])
    expected = losses_and_gradients(program.module, inputs)
    program.module.gradient_checkpointing_enable()
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    found = losses_and_gradients(compiled, inputs)
    for name, value in expected.items():
        torch.testing.assert_close(found[name if name == "loss" else f"_orig_mod.{name}"], value)


class Residual(nn.Module):
    """Layers with batch norm, whose statistics a second computation would change."""

    def __init__(self, norm=True):
        super().__init__()
        make = (lambda: nn.BatchNorm1d(6)) if norm else (lambda: nn.ReLU(inplace=True))
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), make()) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x)
        return x.sum(), x


def test_what_cannot_be_computed_twice_is_refused():
    inputs = {"x": torch.randn(4, 6)}
    module = sp.capture(Residual(), inputs).module
    with pytest.raises(sp.CaptureError, match="layers.0 cannot be checkpointed: .* updates a buffer"):
        module.gradient_checkpointing_enable()
    assert internals(module).checkpointing is None
    module.gradient_checkpointing_enable("layers.*.0")
    inplace = sp.capture(Residual(norm=False), inputs).module
    inplace.requires_grad_(True)
    expected = losses_and_gradients(inplace, inputs)
    inplace.gradient_checkpointing_enable()
    assert_equal(losses_and_gradients(inplace, inputs), expected)
    with pytest.raises(sp.CaptureError, match="not reentrant"):
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(sp.CaptureError, match="save_on_cpu"):
        module.activation_checkpointing_enable(offload=True)


def test_paths_that_match_nothing_are_an_error(captured):
    module = captured["bert"][0].module
    with pytest.raises(sp.SelectorError, match=r"'\*\.layers\.0' matches none .* Nearest: .*layer\.0"):
        module.gradient_checkpointing_enable("*.layers.0")
    plain = sp.capture(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    with pytest.raises(sp.SelectorError, match="no repeated layers"):
        sp.unflatten(plain)
    module.gradient_checkpointing_enable(every_n_layers=2)
    assert internals(module).checkpointing.paths == ("bert.encoder.layer.0",)
    module.gradient_checkpointing_disable()


# the cut


def test_pieces_say_what_goes_in_and_out(captured):
    program = rewritten(captured["albert"][0], where="*.query")
    path = "albert.encoder.albert_layer_groups.0"
    assert repeated(program.graph) == (path,)
    whole, first, second = cut(program.graph, [path], "train")
    calls = [node for node in whole.graph.nodes if node.op == "call_module"]
    assert [(node.target, node.args[0]) for node in calls] == [(path, "train@0"), (path, "train@1")]
    assert [piece.call for piece in (first, second)] == ["train@0", "train@1"]
    inside = {str(node.target) for node in first.graph.find_nodes(op="get_attr")}
    assert "albert_layers.0.attention.query.weight_lora.A" in inside
    assert not any(str(node.target).startswith(path) for node in whole.graph.find_nodes(op="get_attr"))
    counted = [[n for n in piece.graph.nodes if n.op == "call_function"] for piece in (whole, first, second)]
    assert len(counted[1]) == len(counted[2]) > 20
    assert sum(map(len, counted)) == len([n for n in program.graph.nodes if n.op == "call_function"])


@pytest.mark.parametrize("method", [PromptTuning(n=2), PrefixTuning(n=2)], ids=lambda method: method.name)
def test_virtual_positions_cross_blocks(captured, method):
    program, inputs = captured["llama"]
    program = rewritten(program, method)
    expected = losses_and_gradients(program.module, inputs)
    program.module.gradient_checkpointing_enable()
    assert_equal(losses_and_gradients(program.module, inputs), expected)
    assert_equal(losses_and_gradients(sp.unflatten(program), inputs), expected)


class Odd(nn.Module):
    """`shared` is called inside of `a`; the weight of `b` is read outside of it; `c` and `d` are tied."""

    class Outer(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.own, self.kept = nn.Linear(4, 4), [shared]

        def forward(self, x):
            return self.kept[0](self.own(x))

    def __init__(self):
        super().__init__()
        self.shared, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))
        self.a = self.Outer(self.shared)
        self.d.weight = self.c.weight

    def forward(self, x):
        return self.d(self.c(self.b(self.a(x)))).sum() + self.b.weight.sum()


def test_blocks_that_are_none_are_refused():
    program = sp.capture(Odd(), torch.randn(3, 4))
    for where, reason in {
        ("a", "shared"): "shared is called inside of a without being part of it",
        ("b",): "b.weight is a parameter of the block b and is read outside of it, by sum",
        ("c",): "c.weight and d.weight are one parameter",
    }.items():
        with pytest.raises(sp.CaptureError, match=reason):
            sp.unflatten(program, where)
    program.module.gradient_checkpointing_enable(["b", "c"])  # where nothing is sharded, both may be blocks

    last = next(node for node in reversed(program.graph.nodes) if node.op == "call_function")
    first = next(node for node in program.graph.nodes if "a" in str(node.meta.get("nn_module_stack", "")))
    with program.graph.inserting_before(last):
        back = program.graph.call_function(torch.ops.aten.add.Tensor, (last.args[0], 1.0))
    back.meta["nn_module_stack"] = dict(first.meta["nn_module_stack"])
    last.update_arg(0, back)
    with pytest.raises(sp.CaptureError, match=f"a is no unit of the graph: its node {back.name} reads"):
        list(cut(program.graph, ["a"], "train"))


# the unflattened view


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [*LAYERS, "albert"])
def test_the_view_is_the_program(captured, name, method):
    program, inputs = captured[name]
    program = rewritten(program, METHODS[method], where="*.query" if name == "albert" else "*")
    expected = losses_and_gradients(program.module, inputs)
    view = sp.unflatten(program)
    assert_equal(losses_and_gradients(view, inputs), expected)
    assert list(view.state_dict()) == list(program.module.state_dict())
    assert all(p is view.get_parameter(n) for n, p in program.parameters(trainable=True))
    base = next(n for n, p in program.module.named_parameters() if not p.requires_grad)
    assert view.get_parameter(base).data_ptr() == program.module.get_parameter(base).data_ptr()
    called = []
    for path in view.block_paths:
        view.get_submodule(path).register_forward_hook(lambda *_, path=path: called.append(path))
    few = {key: value[:2] for key, value in inputs.items() if key != "labels"}
    for mode in (False, True):
        outputs = []
        for module in (program.module, view):
            torch.manual_seed(0)
            outputs.append(module.train(mode)(**few))
        assert type(outputs[0]) is type(outputs[1]) and torch.equal(outputs[0].logits, outputs[1].logits)
    assert len(called) == 4 and set(called) == set(view.block_paths)
    torch.optim.SGD([p for p in view.parameters() if p.requires_grad], 0.1).step()
    assert torch.equal(program.run()[1], view.eval()(**program.example)[1])


def test_blocks_within_blocks(captured):
    program, inputs = captured["bert"]
    program = rewritten(program)
    view = sp.unflatten(program, ["*.layer.1", "*.attention", "bert.embeddings", "re:.*layer.0.attention.self"])
    assert len(view.block_paths) == 5
    assert_equal(losses_and_gradients(view, inputs), losses_and_gradients(program.module, inputs))


def test_checkpoint_wrappers_take_blocks_and_the_values_come_back(captured):
    program, inputs = captured["llama"]
    program = rewritten(program)
    expected, before = losses_and_gradients(program.module, inputs), saved_bytes(program.module, inputs)
    view = sp.unflatten(program)
    blocks = [view.get_submodule(path) for path in view.block_paths]
    apply_activation_checkpointing(view, check_fn=lambda module: any(module is block for block in blocks))
    assert_equal(losses_and_gradients(view, inputs), expected)
    assert saved_bytes(view, inputs) < before / 4
    apart = copy.deepcopy(view)
    for parameter in apart.parameters():
        parameter.data += 0.01
    with pytest.raises(sp.CaptureError, match="no view of this program: .* no such tensor in the module"):
        sp.take(program, nn.Linear(2, 2))
    frozen = {n: p.clone() for n, p in program.module.named_parameters() if not p.requires_grad}
    assert sp.take(program, apart) is program
    assert all(torch.equal(p, program.module.get_parameter(n)) for n, p in frozen.items())
    for name, parameter in program.parameters(trainable=True):
        layer = name.replace("layers.0.", "layers.0._checkpoint_wrapped_module.")
        layer = layer.replace("layers.1.", "layers.1._checkpoint_wrapped_module.")
        assert torch.equal(parameter, apart.get_parameter(layer))


def sharded(rank, size, store):
    """Adapted models under FSDP2 on every block, against the program itself on the whole batch; no dropout."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
    try:
        mesh = init_device_mesh("cpu", (size,))
        for name, method in (("bert", METHODS["dora"]), ("llama", LoRA(r=2))):
            model, inputs = getattr(models, name)()
            program = rewritten(sp.capture(model, inputs, verify=False), method)
            parts = [{key: value[:2] for key, value in inputs.items()}, {k: v[1:] for k, v in inputs.items()}][:size]
            whole = [losses_and_gradients(program.module, part) for part in parts]
            mean = {n: sum(g[n] for g in whole) / size for n in whole[0] if n != "loss"}
            program.module.zero_grad()
            view = sp.unflatten(program)
            for path in view.block_paths:
                fully_shard(view.get_submodule(path), mesh=mesh)
            fully_shard(view, mesh=mesh)
            assert all(isinstance(parameter, DTensor) for parameter in view.parameters())
            optimizer = torch.optim.SGD([p for p in view.parameters() if p.requires_grad], 0.1)
            for again in (False, True):
                if again:
                    view.gradient_checkpointing_enable()
                found = losses_and_gradients(view, parts[rank])
                torch.testing.assert_close(found.pop("loss"), whole[rank]["loss"])
                torch.testing.assert_close(found, mean)
            started = {n: p.detach().clone() for n, p in program.parameters(trainable=True)}
            optimizer.step()
            sp.take(program, view)
            for path, parameter in program.parameters(trainable=True):
                torch.testing.assert_close(parameter.detach(), started[path] - 0.1 * mean[path])
            torch.testing.assert_close(program.run()[1], view.eval()(**program.example)[1])
    finally:
        dist.destroy_process_group()


def test_fsdp2_in_one_process(tmp_path):
    sharded(0, 1, tmp_path / "store")


@pytest.mark.slow
def test_fsdp2_in_two_processes(tmp_path):
    mp.spawn(sharded, (2, str(tmp_path / "store")), nprocs=2)
