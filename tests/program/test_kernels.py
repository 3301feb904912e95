"""The kernel of every attention: outputs and gradients of the model, masks and repeated keys where they have to be."""

import copy
from functools import cache

import pytest
import torch
import transformers
from torch import fx, nn

import subgraph_peft as sp
from subgraph_peft.base.compare import difference
from subgraph_peft.export import to_onnx
from subgraph_peft.export.onnx import runtime
from subgraph_peft.graph.nodes import show
from subgraph_peft.graph.sequence.attention import attentions, bound
from subgraph_peft.graph.sequence.padding import check_right
from subgraph_peft.passes import LoRA
from subgraph_peft.passes.reconstruction.prefix_tuning import PrefixTuning
from subgraph_peft.passes.reconstruction.prompt_tuning import PromptTuning
from subgraph_peft.program.internals import Home, internals
from subgraph_peft.program.kernels import accelerate, choose_kernel
from subgraph_peft.program.runners import specialise
from tests.models import VOCABULARY, made
from tests.sequences import BART, DECODER

BATCH, LENGTH, WINDOW = 3, 7, 4
GEMMA = {**DECODER, "head_dim": 8, "sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
WHISPER = {
    "vocab_size": VOCABULARY, "d_model": 24, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8,
    "max_source_positions": 10, "max_target_positions": 32, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2,
    "decoder_start_token_id": 2,
}  # fmt: skip
GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 32, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_inner": 40,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
T5 = {
    "vocab_size": VOCABULARY, "d_model": 24, "d_kv": 6, "d_ff": 40, "num_layers": 1, "num_heads": 4,
    "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip
BERT = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
# name -> (model, config, options, has a decoder, kernels without an attention mask)
MODELS: dict[str, tuple[str, str, dict, bool, list[str]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, False, ["is_causal grouped"] * 2),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2, False, ["is_causal"] * 2),
    "mistral": ("MistralForCausalLM", "MistralConfig", {**DECODER, "sliding_window": WINDOW}, False, ["mask"] * 2),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", GEMMA, False, ["mask", "is_causal grouped"]),
    "bert": ("BertForMaskedLM", "BertConfig", BERT, False, ["no mask"] * 2),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, True, ["no mask", "is_causal", "no mask"]),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, True, ["mask", "mask", "no mask"]),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, None, ["no mask", "is_causal", "no mask"]),
}  # fmt: skip
SLOW = ("gemma3", "bart", "t5")


def ids(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def inputs(name: str, batch: int = BATCH, length: int = LENGTH, dtype: torch.dtype = torch.float64) -> dict:
    decoder = MODELS[name][3]
    if decoder is None:
        features = torch.randn(batch, 8, 20, generator=torch.Generator().manual_seed(0), dtype=dtype)
        return {"input_features": features, "labels": ids(batch, length)}
    return {"input_ids": ids(batch, length), "labels": ids(batch, length - 2 if decoder else length)}


@cache
def model(name: str) -> nn.Module:
    kind, config, options, *_ = MODELS[name]
    return made(lambda: getattr(transformers, kind)(getattr(transformers, config)(**options)), dict)[0].double()


@cache
def captured(name: str, masked: bool = False) -> sp.Program:
    given = inputs(name)
    return sp.capture(model(name), padded(given, [7, 5, 6]) if masked else given, verify=False)


def padded(given: dict, lengths: list[int], left: bool = False) -> dict:
    """The inputs with rows of so many tokens."""
    steps = torch.arange(given["input_ids"].shape[1]).expand(len(lengths), -1)
    real = steps < torch.tensor(lengths)[:, None]
    mask = (real.flip(1) if left else real).long()
    labels = given["labels"].masked_fill(mask == 0, -100)
    return {"input_ids": given["input_ids"], "labels": labels, "attention_mask": mask}


def running(program: sp.Program) -> fx.Graph:
    """The graph that a program runs in train mode."""
    graph = specialise(program.module, True)
    accelerate(graph, program.home, internals(program.module).padding)
    return graph


def gradients(module: nn.Module, given: dict) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """loss, logits, and the gradient of every parameter that has one"""
    parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
    result = module.train()(**given)
    found = torch.autograd.grad(result.loss, list(parameters.values()), allow_unused=True)
    module.eval()
    grads = {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}
    return result.loss.detach(), result.logits.detach(), grads


@pytest.mark.filterwarnings("ignore:.*input_features")
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * (n in SLOW)) for n in MODELS])
def test_outputs_and_gradients_are_the_models(name):
    program, net = captured(name), model(name)
    expected = MODELS[name][4]
    found = [call.kernel + " grouped" * call.grouped for call in sp.kernels(program)]
    assert found == expected, str(sp.kernels(program))
    for batch, length in [(BATCH, LENGTH), (2, 11)]:
        program.module.requires_grad_(True)
        loss, logits, grads = gradients(program.module, inputs(name, batch, length))
        program.module.requires_grad_(False)
        true_loss, true_logits, true_grads = gradients(net, inputs(name, batch, length))
        assert abs(loss - true_loss) < 1e-10
        assert difference(true_logits, logits) < 1e-6  # some compute angles in float32
        assert max(difference(true_grads[n], grads[n]) for n in true_grads) < 1e-6
    given = [bound(node)["attn_mask"] is not None for node in attentions(running(program)).values()]
    assert given == [kernel == "mask" for kernel in expected]


def test_float32():
    net = copy.deepcopy(model("llama")).float()
    program = sp.capture(net, inputs("llama"))
    given = inputs("llama", 2, 12)
    program.module.requires_grad_(True)
    (loss, logits, grads), (true_loss, true_logits, true_grads) = (
        gradients(program.module, given),
        gradients(net, given),
    )
    assert abs(loss - true_loss) < 1e-5
    assert difference(true_logits, logits) < 1e-4
    assert max(difference(true_grads[n], grads[n]) for n in grads) < 1e-4


def test_the_graph_that_runs_holds_no_mask_and_no_repeated_keys():
    program = captured("llama")
    before, after = show(program.graph), show(running(program))
    assert " = __and__(" in before
    assert before.count(" = reshape(") - after.count(" = reshape(") == 4
    for gone in (" = __and__(", " = le(", " = cumsum(", "expand_2"):
        assert gone not in after
    assert after.count("None, 0.0, True, scale=") == after.count("enable_gqa=True") == 2


def test_keys_stay_repeated_where_no_fast_kernel_takes_groups():
    program = captured("llama")
    graph = copy.deepcopy(program.graph)
    calls = list(choose_kernel(graph, Home(torch.device("cuda"), torch.float64), None))
    assert {(c.kernel, c.grouped) for c in calls} == {("is_causal", False)}
    assert "16 bits, not torch.float64" in calls[0].why


@cache
def promised() -> sp.Program:
    return sp.promise(captured("llama", masked=True), "right")


def test_under_the_promise_tokens_stay_the_same():
    plain, program = captured("llama", masked=True), promised()
    assert program.module.get_parameter("lm_head.weight") is plain.module.get_parameter("lm_head.weight")
    assert [c.kernel for c in sp.kernels(plain)] == ["mask"] * 2
    assert [c.kernel for c in sp.kernels(program)] == ["is_causal"] * 2
    assert show(program.graph) == show(plain.graph)
    assert show(running(program)).count("attention_mask") == 2  # the input and its check
    for lengths in ([7, 5, 6], [12, 1, 9, 12]):
        given = padded(inputs("llama", len(lengths), max(lengths)), lengths)
        program.module.requires_grad_(True)
        loss, logits, grads = gradients(program.module, given)
        program.module.requires_grad_(False)
        true_loss, true_logits, true_grads = gradients(model("llama"), given)
        real = given["attention_mask"].bool()
        assert abs(loss - true_loss) < 1e-10
        assert difference(true_logits[real], logits[real]) < 1e-6
        assert difference(true_logits, logits) > 1e-3  # padding sees what it did not
        assert max(difference(true_grads[n], grads[n]) for n in grads) < 1e-6


BROKEN = {
    "left": [[0, 0, 1, 1, 1, 1, 1]], "inner": [[1, 1, 0, 1, 1, 1, 0]], "values": [[2, 2, 2, 1, 1, 1, 0]],
}  # fmt: skip


@pytest.mark.parametrize("row", BROKEN)
def test_a_broken_promise_is_an_error(row):
    given = {"input_ids": ids(2, LENGTH), "attention_mask": torch.tensor([[1] * LENGTH, *BROKEN[row]])}
    with pytest.raises(sp.CaptureError, match="attention_mask is not padded.*promise.program, padding=None"):
        promised().run(given)
    if row != "values":
        found = sp.promise(promised(), None).run(given).logits
        with torch.no_grad():
            true = model("llama")(**given).logits
        real = given["attention_mask"].bool()
        assert difference(true[real], found[real]) < 1e-6


def test_a_broken_promise_is_noticed_before_anything_is_computed():
    first = next(node for node in running(promised()).nodes if node.op == "call_function")
    assert first.target is check_right


def test_the_promise_stays_with_the_program(tmp_path):
    program = sp.rewrite(promised(), LoRA(r=2), where="*.q_proj")
    sp.write(program, tmp_path / "program.safetensors")
    carried = {
        "rewritten": program,
        "folded": sp.fold(program),
        "copied": copy.deepcopy(program),
        "read": sp.read(tmp_path / "program.safetensors"),
        "base": program.captured,
    }
    for how, other in carried.items():
        assert [c.kernel for c in sp.kernels(other)] == ["is_causal"] * 2, how
        with pytest.raises(sp.CaptureError, match="padded on the right"):
            other.run({"input_ids": ids(1, 4), "attention_mask": torch.tensor([[0, 1, 1, 1]])})


def test_what_cannot_be_promised():
    with pytest.raises(sp.CaptureError, match="LlamaForCausalLM has no attention_mask .* .input_ids, labels"):
        sp.promise(captured("llama"), "right")
    with pytest.raises(sp.CaptureError, match="padding is \"right\" or None, not 'left'"):
        sp.promise(captured("llama", masked=True), "left")


def test_compiled_without_a_break():
    program = promised()
    compiled = torch.compile(program.module, fullgraph=True, backend="aot_eager")
    given = padded(inputs("llama"), [7, 5, 6])
    assert torch.allclose(compiled(**given).logits, program.run(given).logits)
    with pytest.raises(RuntimeError, match="attention_mask is not padded on the right"):
        compiled(**padded(inputs("llama"), [7, 5, 6], left=True))


@pytest.mark.parametrize("method", [PromptTuning(n=3), PrefixTuning(n=3)])
@pytest.mark.parametrize("masked", [False, True])
def test_virtual_positions(method, masked):
    """Prompts are before the tokens, so that the mask stays causal; a prefix is seen by all of them."""
    plain = captured("llama", masked)
    program = sp.rewrite(sp.promise(plain, "right") if masked else plain, method)
    exact = sp.rewrite(plain, method)
    given = padded(inputs("llama", 2, 9), [9, 4]) if masked else inputs("llama", 2, 9)
    real = given["attention_mask"].bool() if masked else slice(None)
    kernel = "is_causal" if isinstance(method, PromptTuning) else "mask"
    assert {c.kernel for c in sp.kernels(program)} == {kernel}
    graphs = {"captured": specialise(exact.module, False), "running": running(program)}
    assert (" = le(" in show(graphs["running"])) == (kernel == "mask")
    expected = run(exact, graphs["captured"], given)
    assert difference(expected[real], program.run(given).logits[real]) < 1e-9


def run(program: sp.Program, graph: fx.Graph, given: dict) -> torch.Tensor:
    """The logits of a graph as it was captured."""
    with torch.no_grad():
        leaves = fx.Interpreter(program.module, graph=graph).run(*program.signature.flatten(given))
    return program.signature.unflatten(leaves).logits


def test_export_does_without_promises_and_kernels(tmp_path):
    report = to_onnx(promised(), tmp_path / "model.onnx")
    assert set(report.inputs) == {"input_ids", "attention_mask"}
    assert len(report.shapes) == 2
    left = padded(inputs("llama"), [7, 5, 6], left=True)
    given = {name: left[name] for name in report.inputs}
    found = runtime.run(runtime.session(tmp_path / "model.onnx"), given)["logits"]
    with torch.no_grad():
        true = model("llama")(**given).logits
    real = given["attention_mask"].bool()
    assert difference(true[real], found[real]) < 1e-6
