"""Programs captured and exported once for the whole folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch

import subgraph_peft as sp
from subgraph_peft import export
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


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Exported]:
    """The captured base of a model by name, as ONNX."""

    @cache
    def export_base(name: str) -> Exported:
        path = tmp_path_factory.mktemp(name) / "model.onnx"
        return Exported(path, export.to_onnx(captured(name), path))

    return export_base
