"""Nodes that torch.onnx or onnxscript cannot take."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import subgraph_peft as sp
from subgraph_peft.export import to_onnx


class Masked(nn.Module):
    """A float minus an integer mask."""

    def forward(self, x, mask):
        return x + (1.0 - mask)[..., None] * -5.0


class Parts(nn.Module):
    """Parts of a length that varies, the last one shorter, and of one that does not."""

    def forward(self, x, mask):
        first, second, third = torch.cat([x, x], 1)[:, 1:].chunk(3, 1)
        left, right = x.chunk(2, 2)
        halves = torch.cat([x, x], 1).split(x.shape[1], 1)
        return first.sum(1) + 2 * second.sum(1) + 3 * third.sum(1), left - right * mask[..., None], halves[1]


class Fixed(nn.Module):
    """The length of the logits is fixed, that of the labels is not."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, labels):
        logits = self.linear(x)
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


@pytest.mark.parametrize("model", [Masked(), Parts()], ids=["masked", "parts"])
def test_it_is_written_in_another_form(model, tmp_path):
    inputs = {"x": torch.randn(3, 8, 4), "mask": torch.randint(0, 2, (3, 8))}
    report = to_onnx(sp.capture(model, inputs), tmp_path / "model.onnx")
    assert report.shapes == ({"x": (3, 8, 4), "mask": (3, 8)}, {"x": (2, 7, 4), "mask": (2, 7)})


def test_inputs_that_the_file_does_not_take_need_not_fit_the_second_size(tmp_path):
    inputs = {"x": torch.randn(3, 8, 4), "labels": torch.randint(0, 3, (3, 8))}
    program = sp.capture(Fixed(), inputs, dynamic={"x": [0], "labels": [0]})
    report = to_onnx(program, tmp_path / "model.onnx")
    assert report.left_out == ("labels",) and report.shapes[1] == {"x": (2, 8, 4)}
