"""What cannot be captured, trained or folded is refused with the line of the model's source and what to do."""

import inspect
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.passes import LoRA
from subgraph_peft.store.adapter_file import restore
from tests import models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(torch.relu(self.a(x)))


def line_of(cls, text):
    """`file:line: text` of the only line of a class that holds `text`."""
    lines, first = inspect.getsourcelines(cls)
    [(number, line)] = [(i, line.strip()) for i, line in enumerate(lines, first) if text in line]
    return f"{__file__}:{number}: {line}"


def refusal(model, x=None, match=None):
    with pytest.raises(sp.CaptureError, match=match) as caught:
        sp.capture(model, torch.randn(3, 4) if x is None else x)
    return str(caught.value)


class Branch(Net):
    def forward(self, x):
        if x.sum() > 0:
            return self.a(x)
        return x


class Item(Net):
    def forward(self, x):
        scale = x.abs().sum().item()
        return self.a(x) * (2 if scale > 3 else 1)


class While(Net):
    def forward(self, x):
        while x.norm() > 1:
            x = x / 2
        return self.a(x)


class Mask(Net):
    def forward(self, x):
        positive = x[x > 0]
        if positive.shape[0] > 3:
            positive = positive * 2
        return self.a(x) * positive.sum()


class Region(Net):
    def forward(self, x):
        with torch.no_grad():
            x = x * 2 if x.mean() > 0 else x
        return self.a(x)


DATA_DEPENDENT = {
    Branch: "if x.sum() > 0", Item: "if scale > 3", While: "while x.norm()", Mask: "if positive.shape[0]",
    Region: "if x.mean() > 0",
}  # fmt: skip


@pytest.mark.parametrize("cls", DATA_DEPENDENT)
def test_control_flow_on_values_names_its_line_and_prints_nothing(cls, capfd):
    message = refusal(cls())
    assert f"{cls.__name__} cannot be captured" in message
    assert f"at {line_of(cls, DATA_DEPENDENT[cls])}\n" in message
    assert "torch.where or torch.cond" in message
    assert torch.is_grad_enabled()
    printed = capfd.readouterr()
    assert printed.err == printed.out == ""


class Numpy(Net):
    def forward(self, x):
        return self.a(x) * float(x.detach().numpy().sum())


def test_values_taken_out_of_torch():
    message = refusal(Numpy())
    assert line_of(Numpy, "numpy()") in message and "takes values out of torch" in message


class Narrow(Net):
    def forward(self, x):
        return self.a(x[:, :3])


def test_a_forward_that_fails_itself_is_told_apart():
    message = refusal(Narrow())
    assert "mat1 and mat2 shapes cannot be multiplied" in message and line_of(Narrow, "x[:, :3]") in message
    assert "The model itself raises this on the example inputs" in message


class Wrapper(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(input_ids=x).logits


def test_the_users_line_comes_before_the_librarys():
    from transformers import GPT2Config, GPT2ForSequenceClassification

    options = {"vocab_size": 11, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    inner = GPT2ForSequenceClassification(GPT2Config(**options, bos_token_id=0, eos_token_id=0))
    message = refusal(Wrapper(inner), torch.ones(2, 4, dtype=torch.long))  # no padding token for a batch
    user, library = message.splitlines()[-3:-1]
    assert user == f"  at {line_of(Wrapper, 'self.inner(input_ids')}"
    assert "modeling_gpt2.py" in library


class Talkative(Net):
    def forward(self, x):
        import sys

        print("seen", file=sys.stderr)
        return self.a(x)


def test_what_the_model_itself_prints_stays(capfd):
    sp.capture(Talkative(), torch.randn(3, 4), verify=False)
    assert capfd.readouterr().err == "seen\n"


class Quantised(Net):
    def __init__(self, dtype, parameter):
        super().__init__()
        table = torch.randint(-9, 9, (2, 4)).to(dtype)
        self.table = nn.Parameter(table, requires_grad=False) if parameter else nn.Buffer(table)
        self.scale = nn.Buffer(torch.rand(2, 1))

    def forward(self, x):
        return F.linear(self.a(x), self.table.to(x.dtype) * self.scale)


@pytest.mark.parametrize("parameter", [True, False])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_weights(dtype, parameter):
    message = refusal(Quantised(dtype, parameter))
    assert "table" in message and str(dtype) in message
    assert "Load the model unquantised" in message
    assert line_of(Quantised, "self.table =" if parameter else "F.linear") in message


class Pruned(Net):
    """Small integers that are no weight: a mask over one, indices, a table that is added."""

    def __init__(self):
        super().__init__()
        self.mask = nn.Buffer(torch.randint(0, 2, (4, 4), dtype=torch.int8))
        self.order, self.offset = nn.Buffer(torch.tensor([3, 2, 1, 0])), nn.Buffer(torch.ones(3, 4, dtype=torch.uint8))

    def forward(self, x):
        return self.b(F.linear(x[:, self.order] + self.offset, self.a.weight * self.mask))


def test_integer_buffers_are_no_quantised_weights():
    model = Pruned()
    program = sp.capture(model, torch.randn(3, 4), dynamic={})
    assert {site.name for site in sp.sites(program)} == {"a.weight", "b.weight"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_packed_weights():
    model = torch.ao.quantization.quantize_dynamic(Net(), {nn.Linear})
    message = refusal(model, match=r"a \(DynamicQuantizedLinear\) holds packed, quantised weights")
    assert line_of(Net, "self.a, self.b =") in message


class Wrapped(torch.Tensor):
    """A tensor type of its own, as quantisation libraries make them."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return Wrapped(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        result = func(*torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, args), **(kwargs or {}))
        return Wrapped(result) if func is torch.ops.aten.detach.default else result


def test_weights_of_a_tensor_type_of_their_own():
    model = Net()
    model.b.weight = nn.Parameter(Wrapped(torch.randn(2, 4)), requires_grad=False)
    assert line_of(Net, "self.a, self.b =") in refusal(model, match=r"b.weight .* \(Wrapped\) is quantised")


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.rotation = nn.Parameter(torch.randn(4, 2, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.rotation).real


class Rotary(Net):
    def __init__(self):
        super().__init__()
        self.freqs_cis = nn.Buffer(torch.polar(torch.ones(2), torch.rand(2)))

    def forward(self, x):
        rotated = torch.view_as_complex(self.a(x).reshape(-1, 2, 2)) * self.freqs_cis
        return self.b(torch.view_as_real(rotated).flatten(1))


def test_complex_weights_are_refused_and_complex_buffers_are_not():
    message = refusal(Complex(), match=r"rotation \[4, 2\] torch.complex64 is complex")
    assert line_of(Complex, "self.rotation =") in message and "torch.view_as_real" in message
    model, x = Rotary(), torch.randn(3, 4)
    adapted = sp.rewrite(sp.capture(model, x), LoRA(r=2))
    adapted.module.train()(x).sum().backward()
    sp.write_to(sp.fold(adapted), model)
    torch.testing.assert_close(model(x), adapted.run({"x": x}))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.late = nn.LazyLinear(4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_models_that_are_not_ready():
    message = refusal(Lazy(), match="late.weight is not initialised: call the model once")
    assert line_of(Lazy, "self.late") in message
    refusal(torch.jit.script(Net()), match="is a TorchScript module: capture the Python model")
    model = Net()
    model.b = torch.jit.script(model.b)
    assert line_of(Net, "self.a, self.b =") in refusal(model, match=r"b \(RecursiveScriptModule\) is a TorchScript")
    refusal(nn.DataParallel(Net()), match="DataParallel.* wraps a model for several devices: capture its .module")
    model = Net()
    model.b.to("meta")
    refusal(model, match="spread over devices .a.weight on cpu, b.weight on meta.")
    refusal(Net(), torch.randn(3, 4, device="meta"), match="Input 'x' is on meta, the model on cpu. Move one")


@pytest.fixture(scope="module")
def process_group(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_sharded_and_wrapped_models(process_group):
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor import Replicate, distribute_tensor

    sharded = "holds a shard of its weights .FSDP.: capture the model before it is sharded"
    refusal(FullyShardedDataParallel(Net(), device_id=torch.device("cpu")), match=rf"The model .*{sharded}")
    model = Net()
    fully_shard(model.b, mesh=process_group)
    assert line_of(Net, "self.a, self.b =") in refusal(model, match=rf"b \(FSDPLinear\) {sharded}")
    model = Net()
    model.a.weight = nn.Parameter(distribute_tensor(model.a.weight.data, process_group, [Replicate()]))
    refusal(model, match="a.weight is a DTensor, a shard of a weight")
    parallel = nn.parallel.DistributedDataParallel(Net())
    refusal(parallel, match="wraps a model for several processes: capture its .module")
    assert len(sp.sites(sp.capture(parallel.module, torch.randn(3, 4)))) == 2


def test_models_that_others_wrapped_are_taken():
    import peft

    x, model = torch.randn(3, 4), Net()
    compiled = torch.compile(model)
    program = sp.capture(compiled, x)
    assert [site.name for site in sp.sites(program)] == ["a.weight", "b.weight"]
    folded = sp.fold(sp.rewrite(program, LoRA(r=2)))
    sp.write_to(folded, compiled)
    model.a.register_forward_hook(lambda module, inputs, output: output * 2)
    torch.testing.assert_close(sp.capture(model, x).run(), model(x))
    with_adapters = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["a"], r=2))
    program = sp.capture(with_adapters, x)
    torch.testing.assert_close(program.run(), with_adapters.eval()(x))
    assert "base_model.model.a.base_layer.weight" in {site.name for site in sp.sites(program)}


def test_arguments_that_the_graph_has_not():
    model, inputs = models.mlp()
    module = sp.capture(model, inputs).module
    assert list(inspect.signature(module.forward).parameters) == ["x", "labels"]
    with pytest.raises(sp.CaptureError, match="without the argument 'output_hidden_states'; it takes x, labels"):
        module(**inputs, output_hidden_states=True)
    assert module(**inputs, output_hidden_states=None)[1].shape == (3, 3)


@pytest.fixture(scope="module")
def on_meta():
    model, inputs = models.mlp()
    with torch.device("meta"):
        empty = type(model)()
    program = sp.capture(empty, {name: value.to("meta") for name, value in inputs.items()})
    return empty, program, sp.rewrite(program, LoRA(r=2)), inputs


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": torch.randn(6), "labels": torch.tensor(index % 3)}


def test_a_model_on_the_meta_device_is_listed_and_costed(on_meta):
    _, program, adapted, _ = on_meta
    assert len(sp.sites(program)) == 3
    assert adapted.counts() == (2 * (16 + 20), 70 + 110 + 33)
    assert adapted.run()[1].shape == (3, 3)


def test_a_model_on_the_meta_device_is_not_trained_folded_or_written(on_meta, tmp_path):
    from subgraph_peft import export
    from subgraph_peft.store.merged_folder import save_merged
    from subgraph_peft.training.evaluate import evaluate
    from subgraph_peft.training.train import train

    empty, program, adapted, inputs = on_meta
    real, _ = models.mlp()
    loaded = sp.rewrite(sp.capture(real, inputs), LoRA(r=2))
    sp.save(loaded, tmp_path / "adapter")
    refused = {
        "train": lambda: train(adapted, Examples(), output=tmp_path / "run"),
        "evaluate": lambda: evaluate(adapted, Examples()),
        "fold": lambda: sp.fold(adapted),
        "save": lambda: sp.save(adapted, tmp_path / "saved"),
        "load adapters for": lambda: restore(adapted, tmp_path / "adapter"),
        "write": lambda: sp.write_to(program, real),
        "export": lambda: export.to_onnx(program, tmp_path / "model.onnx"),
    }
    for purpose, call in refused.items():
        with pytest.raises(sp.SubgraphPeftError, match=f"on the meta device has no weights to {purpose}; capture the"):
            call()
    with pytest.raises(sp.FoldError, match="no weights to save"):
        save_merged(program, None, None, tmp_path / "merged")
    with pytest.raises(sp.FoldError, match="first.weight is on the meta device in the model"):
        sp.write_to(sp.fold(loaded), empty)
    with pytest.raises(sp.TrainError, match="no weights to train"):
        adapted.module.train()(**adapted.example)
    with pytest.raises(sp.CaptureError, match="meta device and has no weights: capture the loaded model"):
        adapted.module.eval()(**inputs)
    assert adapted.module.eval()(**adapted.example)[1].is_meta
    assert not (tmp_path / "saved").exists() and not (tmp_path / "model.onnx").exists()


def test_nothing_is_said_of_a_capture_that_succeeds(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sp.capture(Net(), torch.randn(3, 4))
    printed = capfd.readouterr()
    assert printed.err == printed.out == ""
