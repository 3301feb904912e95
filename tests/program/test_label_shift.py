"""Which label a loss compares with which logits: read from the graph, whatever the model's class is called."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn

import subgraph_peft as sp
from subgraph_peft.export import evaluate as evaluate_file
from subgraph_peft.export import to_onnx
from subgraph_peft.passes import LoRA
from subgraph_peft.pipeline.data import Examples
from subgraph_peft.program.label_shift import label_shift, scored
from tests.models import VOCABULARY, bert, gpt2

LENGTH = 6


def xlnet() -> nn.Module:
    """Named as a causal model, and compares each token's logits with its own label."""
    sizes = {"d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 16, "dropout": 0.0}
    return hf.XLNetLMHeadModel(hf.XLNetConfig(vocab_size=VOCABULARY, **sizes))


def cpmant() -> nn.Module:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "dim_head": 8, "dim_ff": 16, "num_hidden_layers": 1}
    types = {"prompt_length": 2, "prompt_types": 2, "segment_types": 2}
    return hf.CpmAntForCausalLM(hf.CpmAntConfig(vocab_size=VOCABULARY, **sizes, **types))


def llava() -> nn.Module:
    """Named as an encoder-decoder is, and has a decoder alone, whose labels are shifted."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = hf.LlamaConfig(vocab_size=VOCABULARY, **sizes)
    vision = hf.CLIPVisionConfig(**sizes, image_size=8, patch_size=4, projection_dim=16)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=VOCABULARY - 1)
    return hf.LlavaForConditionalGeneration(config)


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    return hf.T5ForConditionalGeneration(
        hf.T5Config(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0, pad_token_id=0)
    )


def tokens() -> nn.Module:
    config = bert()[0].config
    return hf.BertForTokenClassification(config)


MODELS = {
    "gpt2": (lambda: gpt2()[0], 1), "xlnet": (xlnet, 0), "llava": (llava, 1), "t5": (t5, 0), "bert": (tokens, 0),
}  # fmt: skip


def examples(count: int, vocabulary: int) -> Examples:
    """Labels of which each example's loss counts another number."""
    generator = torch.Generator().manual_seed(0)
    items = []
    for i in range(count):
        ids = torch.randint(1, VOCABULARY - 2, (LENGTH,), generator=generator)
        labels = ids % vocabulary
        labels[:i] = -100
        items.append({"input_ids": ids, "labels": labels})
    return Examples(items)


def captured(name: str) -> tuple[nn.Module, sp.Program, Examples]:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    data = examples(4, 3 if name == "bert" else VOCABULARY - 2)
    batch = {key: torch.stack([data[0][key], data[1][key]]) for key in data[0]}
    return model, sp.capture(model, batch, verify=False), data


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_accuracy_are_the_eager_model_s(name: str) -> None:
    model, program, data = captured(name)
    shift = MODELS[name][1]
    assert label_shift(program) == shift
    total = right = count = 0.0
    for item in data:
        ids, labels = item["input_ids"][None], item["labels"][None]
        with torch.no_grad():
            output = model(input_ids=ids, labels=labels)
        compared, logits = labels[:, shift:], output.logits[:, : LENGTH - shift]
        number = (compared != -100).sum().item()
        direct = F.cross_entropy(logits.flatten(0, 1), compared.flatten(), reduction="sum").item()
        assert output.loss.item() * number == pytest.approx(direct, rel=1e-5)  # what the model itself counts
        total, count = total + direct, count + number
        right += (logits.argmax(-1) == compared)[compared != -100].sum().item()
    found = sp.evaluate(program, data, batch_size=2, metrics=["perplexity", "accuracy"])
    assert found["loss"] == pytest.approx(total / count, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(total / count), rel=1e-4)
    assert found["accuracy"] == pytest.approx(right / count)


def test_a_causal_model_whose_labels_stay_in_place() -> None:
    ids = torch.randint(1, VOCABULARY, (2, LENGTH))
    assert label_shift(sp.capture(cpmant().eval(), {"input_ids": ids, "labels": ids}, verify=False)) == 0


def test_accumulated_steps_weigh_batches_by_the_labels_that_are_compared(tmp_path) -> None:
    """Four examples of 6, 5, 4 and 3 labels in one step: the loss of the step is the mean over all of them."""
    _, program, data = captured("xlnet")
    adapted = sp.rewrite(program, LoRA(r=2), where="*.ff.layer_1")
    start = sp.evaluate(adapted, data)["loss"]
    result = sp.train(
        adapted, data, output=tmp_path, options=sp.TrainOptions(
            max_steps=1, batch_size=1, gradient_accumulation=4, logging_every=1, save_every=None, device="cpu"
        ),
    )  # fmt: skip
    assert result.losses[0][1] == pytest.approx(start, rel=1e-5)


def test_an_exported_file_says_how_its_labels_are_compared(tmp_path) -> None:
    _, program, data = captured("xlnet")
    to_onnx(program, tmp_path / "model.onnx")
    found, expected = evaluate_file(tmp_path / "model.onnx", data, batch_size=2), sp.evaluate(program, data)
    assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-4)


class Scorer(nn.Module):
    """Logits of tokens, and a loss that `loss` makes of them."""

    def __init__(self, loss):
        super().__init__()
        self.table, self.head, self.loss = nn.Embedding(VOCABULARY, 4), nn.Linear(4, VOCABULARY), loss

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor):
        logits = self.head(self.table(input_ids))
        return {"loss": self.loss(logits, labels), "logits": logits}


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


LOSSES = {
    "its own": (cross_entropy, 0),
    "next": (lambda x, y: cross_entropy(x[:, :-1], y[:, 1:]), 1),
    "rolled": (lambda x, y: cross_entropy(x, F.pad(y.roll(-1, 1)[:, :-1], (0, 1), value=-100)), 1),
    "the next but one": (lambda x, y: cross_entropy(x[:, :-2], y[:, 2:]), 2),
    "classes in front": (lambda x, y: F.cross_entropy(x.transpose(1, 2)[..., :-1], y[:, 1:]), 1),
    "log likelihood": (lambda x, y: F.nll_loss(x.log_softmax(-1)[:, :-1].flatten(0, 1), y[:, 1:].flatten()), 1),
    "two heads": (lambda x, y: cross_entropy(x[:, :-2], y[:, 2:]) + cross_entropy(x[:, :-1], y[:, 1:]), 1),
    "padding masked": (lambda x, y: cross_entropy(x[:, :-1], y.masked_fill(y == 0, -100)[:, 1:]), 1),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_shift_is_read_from_any_spelling(name: str) -> None:
    loss, shift = LOSSES[name]
    ids = torch.randint(1, VOCABULARY, (2, LENGTH))
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.TrainWarning)
        assert label_shift(sp.capture(Scorer(loss), {"input_ids": ids, "labels": ids})) == shift


@pytest.mark.parametrize(
    "loss",
    [
        lambda x, y: -x.log_softmax(-1).gather(-1, y[..., None]).mean(),
        lambda x, y: cross_entropy(x, y.flip(1)),
        lambda x, y: F.cross_entropy(x.flatten(0, 1), F.one_hot(y.flatten(), VOCABULARY).float()),
        lambda x, y: cross_entropy(x, torch.arange(VOCABULARY)[y]),
    ],
    ids=["gathered", "reversed", "one-hot", "looked up"],
)
def test_a_loss_that_does_not_say_it_is_taken_as_unshifted_with_a_warning(loss) -> None:
    ids = torch.randint(1, VOCABULARY, (2, LENGTH))
    program = sp.capture(Scorer(loss), {"input_ids": ids, "labels": ids})
    with pytest.warns(sp.TrainWarning, match="no cross entropy of its labels"):
        assert label_shift(program) == 0


def test_what_a_loss_is_a_mean_over() -> None:
    labels = torch.tensor([[1, -100, 2], [3, 4, -100]])
    assert scored(labels, 0).tolist() == [1, 2, 3, 4] and scored(labels, 1).tolist() == [2, 4]
    assert scored(torch.tensor([1, -100]), None).tolist() == [1] and scored(torch.ones(2, 2), None).numel() == 4
    with pytest.raises(sp.TrainError, match="capture the model with `labels`"):
        scored(labels, None)
