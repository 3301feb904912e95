"""Half precision, fused operators and quantised weights: what is in the file, and that it still is the model."""

import json
import logging
from collections import Counter

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_ir.passes.common import ShapeInferencePass
from onnxruntime import InferenceSession, SessionOptions
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.export.onnx import files, fuse, precision, quantize, weights
from tests import models
from tests.models import captured
from tests.training.test_train import collate, examples


def operators(path) -> Counter:
    return Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def initializers(path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


# half precision


@pytest.mark.parametrize("name", ["bert", "tied_llama", "conv"])
def test_half_precision_halves_the_file_and_keeps_the_answers(tmp_path, exported, name):
    report = export.to_onnx(captured(name), tmp_path / "model.onnx", dtype="float16")
    assert report.dtype == "float16" and max(drift.relative for drift in report.drift.values()) < 3e-3
    opened = export.session(tmp_path / "model.onnx")
    assert {value.type for value in opened.get_outputs()} == {"tensor(float16)"}
    stored = initializers(tmp_path / "model.onnx")
    for path, weight in captured(name).module.named_parameters():
        half = weight.detach().half().numpy()
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored[path]), half, strict=True)


def test_angles_stay_exact_where_half_precision_knows_no_position(tmp_path):
    """Positions beyond 2048 are no float16: a rotary embedding computed in it would turn by wrong angles."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61, hidden_size=24, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2,
        use_cache=False, max_position_embeddings=8192, rope_parameters={"rope_type": "default", "rope_theta": 50.0},
        initializer_range=0.3,
    )  # fmt: skip
    places = torch.arange(5001, 5001 + 6).expand(2, -1)
    inputs = {"input_ids": torch.randint(61, (2, 6)), "position_ids": places}
    program = sp.capture(LlamaForCausalLM(config).eval(), inputs)
    export.to_onnx(program, tmp_path / "model.onnx", dtype="float16")
    model = ir.load(tmp_path / "model.onnx")
    (cos,) = (node for node in model.graph if node.op_type == "Cos")
    assert cos.inputs[0].producer().op_type in ("Concat", "Transpose") and cos.outputs[0].uses()
    assert all(node.outputs[0].dtype is not ir.DataType.FLOAT16 for node in precision_cone(model, cos))


def precision_cone(model: ir.Model, node: ir.Node) -> list[ir.Node]:
    ShapeInferencePass()(model)
    return [made for made in precision.cone(node) if made.outputs[0].dtype is not None]


class Means(nn.Module):
    """Means of squares overflow in half precision from 256 on."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 300
        return self.scale(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def test_means_of_squares_do_not_overflow(tmp_path):
    torch.manual_seed(0)
    program = sp.capture(Means(), {"x": torch.randn(3, 6)})
    report = export.to_onnx(program, tmp_path / "model.onnx", dtype=torch.float16)
    assert report.drift["output"].relative < 2e-3
    assert operators(tmp_path / "model.onnx")["Cast"] >= 2


class Spread(nn.Module):
    """x / its deviation, whose squares overflow in half precision."""

    def __init__(self, form: str):
        super().__init__()
        self.form, self.scale = form, nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 600
        d = x - x.mean(-1, keepdim=True)
        squares = {"var": lambda: x.var(-1, keepdim=True), "d d": lambda: (d * d).mean(-1, keepdim=True)}
        return self.scale(d / torch.sqrt(squares[self.form]() + 1e-5))


@pytest.mark.parametrize("form", ["var", "d d"])
def test_deviations_do_not_overflow(tmp_path, form):
    torch.manual_seed(0)
    program = sp.capture(Spread(form), {"x": torch.randn(3, 6)})
    report = export.to_onnx(program, tmp_path / "model.onnx", dtype=torch.float16)
    assert report.drift["output"].relative < 2e-3


class Guarded(nn.Module):
    """What a small number keeps finite."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"unit": x / (x.abs().amax(-1, keepdim=True) + 1e-8), "log": torch.log(torch.relu(x) + 1e-10)}


def test_numbers_that_half_precision_does_not_have_keep_their_effect(tmp_path):
    program = sp.capture(Guarded(), {"x": torch.randn(3, 6)})
    export.to_onnx(program, tmp_path / "model.onnx", dtype="float16")
    x = torch.zeros(2, 6)
    found = export.BoundSession(tmp_path / "model.onnx")({"x": x})
    assert torch.equal(found["unit"].float().cpu(), x)
    assert torch.allclose(found["log"].float().cpu(), x - 23.03, atol=0.1)


class Snake(nn.Module):
    """x + sin² x between layers: angles that come from weights."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
            x = x + torch.sin(x) * torch.sin(x)
        return x


def test_layers_before_a_sine_are_in_half_precision(tmp_path):
    torch.manual_seed(0)
    export.to_onnx(sp.capture(Snake(), {"x": torch.randn(3, 32)}), tmp_path / "model.onnx", dtype="float16")
    stored = initializers(tmp_path / "model.onnx")
    assert all(stored[f"layers.{i}.weight"].data_type == onnx.TensorProto.FLOAT16 for i in range(3))


class Buckets(nn.Module):
    """Distances in logarithmic buckets, as T5 has them."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, 4)

    def forward(self, distance: torch.Tensor) -> torch.Tensor:
        far = 8 + (torch.log(distance.float() / 8) / 2.7725887 * 8).to(torch.long)
        return self.table(torch.where(distance < 8, distance, far.clamp(max=15)))


def test_what_is_rounded_to_integers_is_computed_in_whole(tmp_path):
    program = sp.capture(Buckets(), {"distance": torch.arange(1, 7)[None].repeat(2, 1)})
    export.to_onnx(program, tmp_path / "model.onnx", dtype="float16")
    model = ir.load(tmp_path / "model.onnx")
    ShapeInferencePass()(model)
    (log,) = (node for node in model.graph if node.op_type == "Log")
    near = [log, log.inputs[0].producer(), *(use.node for use in log.outputs[0].uses())]
    assert [node.outputs[0].dtype for node in near] == [ir.DataType.FLOAT] * 3


def test_a_mask_of_the_lowest_numbers_is_clamped():
    held = weights.TorchTensor(torch.full((2, 2), torch.finfo(torch.float32).min))
    for dtype, lowest in ((ir.DataType.FLOAT16, -65504.0), (ir.DataType.BFLOAT16, torch.finfo(torch.bfloat16).min)):
        assert weights.values(weights.converted(held, dtype, "mask")).unique().item() == lowest


def test_a_weight_beyond_the_range_is_an_error_and_leaves_no_file(tmp_path):
    model, inputs = models.MODELS["mlp"]()
    with torch.no_grad():
        model.first.weight[0, 0] = 1e5
    with pytest.raises(sp.ExportError, match=r"first\.weight holds 1e\+05, beyond the largest float16 \(65504\)"):
        export.to_onnx(sp.capture(model, inputs), tmp_path / "model.onnx", dtype="float16")
    assert not list(tmp_path.iterdir())


def test_a_file_is_not_written_wider_than_the_program(tmp_path):
    model, inputs = models.MODELS["mlp"]()
    narrow = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    program = sp.capture(model.bfloat16(), narrow)
    with pytest.raises(sp.ExportError, match=r"torch\.bfloat16; a file in torch\.float16 is written from a float"):
        export.to_onnx(program, tmp_path / "model.onnx", dtype="float16")
    with pytest.raises(sp.ExportError, match="in float32, float16 or bfloat16, not int8"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx", dtype="int8")


def test_bfloat16_has_its_own_bits(tmp_path):
    """The CPU provider has no kernels for it, and says so; the graph is right."""
    if torch.cuda.is_available():
        report = export.to_onnx(captured("bert"), tmp_path / "model.onnx", dtype="bfloat16")
        assert report.dtype == "bfloat16"
        return
    with pytest.raises(sp.ExportError, match=r"no \w+ kernel for bfloat16"):
        export.to_onnx(captured("bert"), tmp_path / "model.onnx", dtype="bfloat16")
    assert not list(tmp_path.iterdir())


# fused


@pytest.mark.parametrize(
    ("name", "fused"),
    [
        ("bert", {"Attention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2}),
        ("gpt2", {"MultiHeadAttention": 2, "SkipLayerNormalization": 4}),
        ("wide_tied_llama", {"MultiHeadAttention": 2, "SkipSimplifiedLayerNormalization": 4}),
    ],
)
def test_what_is_fused(tmp_path, exported, name, fused):
    report = export.to_onnx(captured(name), tmp_path / "model.onnx", optimize=True)
    assert report.fused.items() >= fused.items() and report.nodes < 0.65 * exported(name).report.nodes
    assert report.before.keys() == report.drift.keys()
    assert max(drift.relative for drift in report.drift.values()) < 1e-5
    export.verify(tmp_path / "model.onnx", captured(name))


class Rotary(nn.Module):
    """Queries turned by their positions, the same for all sequences of a batch."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(24, 24)
        self.register_buffer("inv_freq", 1.0 / 50.0 ** (torch.arange(0, 12, 2) / 12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q = self.query(x).view(x.shape[0], x.shape[1], 2, 12).transpose(1, 2)
        return self.turned(q, *self.angles(x.shape[1]))

    def angles(self, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        places = torch.arange(length)[None, None].float()
        angles = (self.inv_freq[None, :, None].expand(1, -1, 1) @ places).transpose(1, 2)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)

    @staticmethod
    def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return x * cos + torch.cat((-x[..., 6:], x[..., :6]), dim=-1) * sin


class Grouped(Rotary):
    """Attention whose queries share keys by twos, under a mask that hides padding."""

    def __init__(self):
        super().__init__()
        self.key, self.value, self.out = nn.Linear(24, 12), nn.Linear(24, 12), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        cos, sin = self.angles(length)
        keys, values = (layer(x).view(batch, length, 1, 12).transpose(1, 2) for layer in (self.key, self.value))
        q, k = (
            self.turned(self.query(x).view(batch, length, 2, 12).transpose(1, 2), cos, sin),
            self.turned(keys, cos, sin),
        )
        k, v = (t[:, :, None].expand(-1, -1, 2, -1, -1).reshape(batch, 2, length, 12) for t in (k, values))
        places = torch.arange(length)
        seen = (places[None, :] <= places[:, None]) & attention_mask[:, None, None, :].bool()
        scores = q @ k.transpose(2, 3) * 12**-0.5 + torch.where(seen, 0.0, torch.finfo(torch.float32).min)
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, 24))


def test_grouped_attention_keeps_its_mask(tmp_path):
    """The rule of onnxscript for GroupQueryAttention takes it for full length whatever the mask says."""
    torch.manual_seed(0)
    module, x, mask = Grouped(), torch.randn(3, 5, 24), torch.ones(3, 5, dtype=torch.long)
    program = sp.capture(module, {"x": x, "attention_mask": mask})
    report = export.to_onnx(program, tmp_path / "model.onnx", optimize=True)
    assert report.fused["RotaryEmbedding"] == 2 and "GroupQueryAttention" not in report.fused
    mask[0, 3:], mask[1, :2] = 0, 0
    export.verify(tmp_path / "model.onnx", program, {"x": x, "attention_mask": mask})


def test_rotary_embeddings_of_positions_that_a_batch_shares(tmp_path):
    torch.manual_seed(0)
    program = sp.capture(Rotary(), {"x": torch.randn(3, 5, 24)})
    report = export.to_onnx(program, tmp_path / "model.onnx", optimize=True)
    assert report.fused == {"RotaryEmbedding": 1} and report.drift["output"].relative < 1e-5


def test_a_half_precision_model_is_fused_like_a_whole_one(tmp_path):
    report = export.to_onnx(captured("wide_tied_llama"), tmp_path / "model.onnx", optimize=True, dtype="float16")
    assert report.fused.items() >= {"MultiHeadAttention": 2, "SkipSimplifiedLayerNormalization": 4}.items()


def test_weights_are_stored_as_products_read_them_and_tied_ones_once(tmp_path):
    export.to_onnx(captured("wide_tied_llama"), tmp_path / "model.onnx", optimize=True)
    stored = initializers(tmp_path / "model.onnx")
    own = dict(captured("wide_tied_llama").module.named_parameters())
    down = "model.layers.0.mlp.down_proj.weight"
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored[f"{down}.T"]), own[down].detach().numpy().T)
    assert down not in stored
    tables = [name for name, tensor in stored.items() if sorted(tensor.dims) == [24, models.VOCABULARY]]
    assert tables == ["model.embed_tokens.weight"]


def test_packed_weights_have_the_names_of_their_parts(tmp_path):
    torch.manual_seed(0)
    config = BertConfig(vocab_size=61, hidden_size=96, intermediate_size=40, num_hidden_layers=1, num_attention_heads=2)
    ids = torch.randint(61, (2, 5))
    program = sp.capture(BertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert export.to_onnx(program, tmp_path / "model.onnx", optimize=True).fused["Attention"] == 1
    stored = initializers(tmp_path / "model.onnx")
    packed = stored["encoder.layer.0.attention.self.{query,key,value}.weight.T"]
    own = dict(program.module.named_parameters())
    parts = [own[f"encoder.layer.0.attention.self.{part}.weight"].T for part in ("query", "key", "value")]
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(packed), torch.cat(parts, 1).detach().numpy())


def test_common_names():
    assert fuse.common(["a.q.weight", "a.key.weight"]) == "a.{q,key}.weight"
    assert fuse.common(["a", "b"]) == "{a,b}"


def test_weights_are_computed_when_they_are_written():
    """No copy is held: what changes in between is what the file gets."""
    tensor = torch.arange(6.0).reshape(2, 3)
    held = weights.TorchTensor(tensor)
    views = (weights.transposed(held, [1, 0]), weights.joined([held, held], 0),
             weights.converted(held, ir.DataType.FLOAT16, "w"))  # fmt: skip
    tensor += 1
    np.testing.assert_array_equal(views[0].numpy(), tensor.numpy().T)
    np.testing.assert_array_equal(views[1].numpy(), torch.cat([tensor, tensor]).numpy())
    np.testing.assert_array_equal(views[2].numpy(), tensor.half().numpy())
    twice = weights.transposed(views[2], [1, 0])
    assert twice.dtype is ir.DataType.FLOAT16 and list(twice.shape) == [3, 2]
    np.testing.assert_array_equal(twice.numpy(), tensor.half().numpy().T)


def test_onnxruntime_fuses_nothing_of_the_plain_file_that_the_fused_one_lacks(tmp_path, exported):
    """Its own optimiser at the highest level finds less in the plain file."""
    export.to_onnx(captured("bert"), tmp_path / "model.onnx", optimize=True)
    counts = []
    for path in (exported("bert").path, tmp_path / "model.onnx"):
        options = SessionOptions()
        options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "loaded.onnx"), 4
        InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        counts.append(sum(operators(tmp_path / "loaded.onnx").values()))
    assert counts[1] < 0.6 * counts[0]


# quantised


@pytest.mark.parametrize(("name", "products"), [("bert", 14), ("gpt2", 8), ("mlp", 2)])
@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights(tmp_path, name, products, bits):
    """All linear layers, but for GPT-2's head, which is the embedding's table."""
    report = export.to_onnx(captured(name), tmp_path / "model.onnx", quantize=bits)
    assert operators(tmp_path / "model.onnx")[quantize.PRODUCT] == products
    drift, before = (max(d.relative for d in found.values()) for found in (report.drift, report.before))
    assert before < 1e-5 < drift < (0.05 if bits == 8 else 0.5) and report.quantize == bits
    assert export.verify(tmp_path / "model.onnx", captured(name)).bound == report.bound


def test_quantised_and_fused(tmp_path):
    report = export.to_onnx(captured("bert"), tmp_path / "model.onnx", quantize=8, optimize=True)
    expected = {quantize.PRODUCT: 14, "MultiHeadAttention": 2, "SkipLayerNormalization": 4, "BiasGelu": 2}
    assert report.fused == expected


def test_what_cannot_be_quantised(tmp_path):
    with pytest.raises(sp.ExportError, match="to 4 or 8 bits, not 3"):
        export.to_onnx(captured("mlp"), tmp_path / "model.onnx", quantize=3)
    convolutions = nn.Sequential(nn.Conv1d(3, 5, 2))
    program = sp.capture(convolutions, {"input": torch.randn(2, 3, 6)})
    with pytest.raises(sp.ExportError, match="has no product by a weight that onnxruntime quantises"):
        export.to_onnx(program, tmp_path / "model.onnx", quantize=8)
    assert not list(tmp_path.iterdir())


def test_quantising_leaves_logging_alone(tmp_path):
    before = logging.getLogger().level, list(logging.getLogger().handlers)
    export.to_onnx(captured("mlp"), tmp_path / "model.onnx", quantize=8)
    assert (logging.getLogger().level, list(logging.getLogger().handlers)) == before


def test_data_of_the_form_before_is_not_kept(tmp_path, monkeypatch):
    """A model that is too large for one file, and is not once it is quantised."""
    whole = sum(tensor.nbytes for tensor in captured("bert").module.parameters())
    monkeypatch.setattr(files, "PROTOBUF_LIMIT", files.ROOM_FOR_THE_GRAPH + int(0.8 * whole))
    report = export.to_onnx(captured("bert"), tmp_path / "model.onnx", quantize=4)
    assert report.files == ("model.onnx",) and [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


class Clashing(nn.Module):
    """Parameters with the names of the only input and output."""

    def __init__(self):
        super().__init__()
        self.x, self.output = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(4, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.x) @ self.output


def test_parameters_with_the_names_of_input_and_output(tmp_path):
    torch.manual_seed(0)
    program = sp.capture(Clashing(), {"x": torch.randn(2, 4)})
    report = export.to_onnx(program, tmp_path / "model.onnx")
    assert report.inputs.keys() == {"x"} and report.outputs.keys() == {"output"}
    assert {"x.tensor", "output.tensor"} <= initializers(tmp_path / "model.onnx").keys()


class ReturnsItsWeight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": x @ self.w.T, "wt": self.w.t()}


@pytest.mark.parametrize("options", [{"optimize": True}, {"quantize": 8}], ids=str)
def test_a_transposed_weight_that_is_an_output(tmp_path, options):
    program = sp.capture(ReturnsItsWeight(), {"x": torch.randn(3, 6)})
    if "quantize" in options:
        with pytest.raises(sp.ExportError, match="no product by a weight that onnxruntime quantises"):
            export.to_onnx(program, tmp_path / "model.onnx", **options)
    else:
        export.to_onnx(program, tmp_path / "model.onnx", **options)


# what goes with the file


def test_the_file_says_what_was_done(tmp_path):
    report = export.to_onnx(captured("mlp"), tmp_path / "model.onnx", dtype="float16", quantize=8, optimize=True)
    told = {prop.key.partition(".")[2]: prop.value for prop in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert (told["dtype"], told["quantize"], told["optimize"]) == ("float16", "8", "true")
    assert told["identity"] == report.identity and {"torch", "onnxruntime"} <= json.loads(told["versions"]).keys()
    other, inputs = models.MODELS["mlp"]()
    with torch.no_grad():
        other.first.weight += 1
    plain = export.to_onnx(captured("mlp"), tmp_path / "plain.onnx")
    changed = export.to_onnx(sp.capture(other, inputs), tmp_path / "changed.onnx")
    assert plain.identity == report.identity != changed.identity


def test_configs_beside_the_file_come_and_fail_with_it(tmp_path):
    model, program = models.bert()[0], captured("bert")
    export.to_onnx(program, tmp_path / "model.onnx", beside=[model.config])
    assert json.loads((tmp_path / "config.json").read_text())["hidden_size"] == 24
    before = (tmp_path / "config.json").read_bytes()
    model.config.update({"note": "new"})

    class Full:
        def save_pretrained(self, folder):
            raise OSError(28, "No space left on device")

    with pytest.raises(sp.ExportError, match="No space left on device"):
        export.to_onnx(program, tmp_path / "model.onnx", beside=[model.config, Full()])
    assert (tmp_path / "config.json").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", "model.onnx"]


def test_scores_of_a_file_are_those_of_the_program(tmp_path):
    program = captured("bert")
    export.to_onnx(program, tmp_path / "model.onnx")
    data = examples(20)
    found = export.evaluate(tmp_path / "model.onnx", data, collate=collate, batch_size=8)
    expected = sp.evaluate(program, data, collate=collate, batch_size=8)
    assert found.keys() == expected.keys() and found == pytest.approx(expected, abs=1e-5)


def test_perplexity_of_a_file(tmp_path):
    program, inputs = captured("gpt2"), models.gpt2()[1]
    export.to_onnx(program, tmp_path / "model.onnx")
    data = [{name: tensor[row] for name, tensor in inputs.items()} for row in range(3)]

    def stack(items: list) -> dict:
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    found = export.evaluate(tmp_path / "model.onnx", data, metrics="perplexity", collate=stack)
    expected = sp.evaluate(program, data, metrics="perplexity", collate=stack)
    assert found == pytest.approx(expected, rel=1e-5)
