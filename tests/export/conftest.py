"""Programs captured and exported once for the whole folder."""

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.export.onnx import exporter
from subgraph_peft.export.onnx.inference import Inference
from subgraph_peft.export.onnx.translate import translate
from subgraph_peft.export.onnx.walk import graph_values
from tests.models import captured


def shake(adapted: sp.Program, size: float = 0.1) -> sp.Program:
    """Random values in every trained tensor."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in adapted.parameters(trainable=True):
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    return adapted


@dataclass(frozen=True)
class Exported:
    path: Path
    report: export.ExportReport

    @property
    def proto(self) -> onnx.ModelProto:
        return onnx.load(self.path)


@pytest.fixture(autouse=True, scope="session")
def translated_once() -> Iterator[None]:
    """A graph that was translated in the same opset, with the same values and inputs, is not translated again: files
    differ in what is done afterwards."""
    made: dict[str, ir.Model] = {}

    def reused(program: sp.Program, cut: Inference, given: Mapping[str, torch.Tensor], opset: int | None) -> ir.Model:
        key = content(cut, given, opset)
        if key not in made:
            made[key] = translate(program, cut, given, opset)
        model = made[key].clone()
        for value in graph_values(model.graph):
            value.type = copy.copy(value.type)  # which clones share
        return model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "translate", reused)
        yield


def content(cut: Inference, given: Mapping[str, torch.Tensor], opset: int | None) -> str:
    """Hash of all that a translation depends on."""
    nodes = [
        (node.format_node(), str(node.meta.get("custom")), str(node.meta.get("val")))
        for node in cut.module._subgraph.nodes
    ]
    shapes = {name: (value.shape, value.dtype) for name, value in {**given, **cut.samples}.items()}
    found = hashlib.sha256(repr((nodes, cut.inputs, cut.outputs, cut.axes, shapes, opset)).encode())
    for name, value in cut.module.state_dict(keep_vars=True).items():
        found.update(repr((name, value.shape, value.stride(), value.dtype, type(value))).encode())
        found.update(value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The captured base of a model by name, as ONNX."""

    @cache
    def export_base(name: str) -> Exported:
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        return Exported(path, export.to_onnx(captured(name), path))

    return export_base
