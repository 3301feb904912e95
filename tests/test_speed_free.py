"""What takes no time: weights are not copied, nothing is traced twice, no garbage collected on the way, no heavy module
imported with the package."""

import gc
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.method.equation import trace
from subgraph_peft.passes import LoRA
from tests import models


@pytest.fixture
def traces(monkeypatch):
    """The modules that torch.export traces."""
    found, export = [], torch.export.export

    def counted(module, *args, **kwargs):
        found.append(type(module).__name__)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", counted)
    return found


def addresses(module: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in module.named_parameters(remove_duplicate=False)}


@pytest.mark.parametrize("name", ["tied_llama", "albert", "conv"])
def test_every_parameter_stays_where_the_model_has_it(name):
    model, inputs = models.MODELS[name]()
    own = addresses(model)
    program = sp.capture(model, inputs)
    assert addresses(program.module) == own
    where = [site.name for site in sp.sites(program) if not site.ties and site.kind != "embedding"]
    adapted = sp.rewrite(program, LoRA(r=2), where)
    assert {name: at for name, at in addresses(adapted.module).items() if name in own} == own
    assert addresses(model) == own


def test_a_model_that_switches_with_its_graph_is_traced_once_and_every_shape_of_a_weight_once(traces):
    model, inputs = models.llama()
    program = sp.capture(model, inputs)
    assert traces == ["LlamaForCausalLM"]
    trace.cache_clear()
    traces.clear()
    shapes = {site.shape for site in sp.sites(program) if not site.reserved}
    first = sp.rewrite(program, LoRA(r=2))
    assert len(first.adapters[0].sites) == 14 and len(traces) == len(shapes) == 4
    sp.rewrite(program, LoRA(r=2))
    assert len(traces) == len(shapes)


class Watched(nn.Module):
    """A linear layer that tells `watch` of every call, before it fails where it is asked to."""

    def __init__(self, watch: Callable[[], None], fails: bool):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.watch, self.fails = watch, fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.watch()
        if self.fails and x.sum() > 0:
            return x
        return self.linear(x)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_the_collector_rests_during_a_trace_and_is_left_as_it_was(enabled, fails):
    seen = []
    model = Watched(lambda: seen.append((torch.compiler.is_exporting(), gc.isenabled())), fails)
    before = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        if fails:
            with pytest.raises(sp.CaptureError, match="Control flow depends on tensor values"):
                sp.capture(model, torch.randn(2, 4))
        else:
            sp.rewrite(sp.capture(model, torch.randn(2, 4)), LoRA(r=2), "linear")
        assert gc.isenabled() is enabled
    finally:
        gc.enable() if before else gc.disable()
    assert (True, False) in seen and (True, True) not in seen


def test_verbs_import_nothing_heavy():
    code = "import sys, torch; own = {*sys.modules}; import subgraph_peft as s; s.rewrite; print(*own ^ {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {
        "accelerate", "datasets", "matplotlib", "onnx", "onnxruntime", "onnxscript", "rich", "scipy", "sympy",
        "torch._dynamo", "torch.distributed.tensor", "torch.onnx", "transformers", "typer",
    }  # fmt: skip
    assert "subgraph_peft.compiler.rewrite" in done.stdout.split() and not heavy.intersection(done.stdout.split())
