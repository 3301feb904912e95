"""What is borrowed is there, and where it is gone a VersionError says so before anything else happens. A new version of
a library is tried here."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import subgraph_peft as sp
from subgraph_peft.base import borrowed, patches
from subgraph_peft.base.borrowed import ENTRIES, pytree
from subgraph_peft.base.errors import VersionError
from subgraph_peft.frontend.foreign_graphs import load
from subgraph_peft.graph.legal import operator_of
from subgraph_peft.graph.nodes import aten, every_node

ROOT = Path(sp.__file__).parent.parent


class Branching(nn.Module):
    """Another result for long inputs, under no_grad and under vmap."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = torch.vmap(torch.sum)(x)
        return x * scale[:, None] if x.shape[0] > 4 else x


@pytest.fixture(scope="module")
def exported() -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(Branching(), (torch.ones(6, 3),), dynamic_shapes=dynamic)


@pytest.mark.parametrize("path", ENTRIES)
def test_everything_borrowed_is_there(path: str):
    if "cuda" in path and not torch.cuda.is_available():
        pytest.skip("a build of torch without CUDA has none of it")
    borrowed.get(path)


@pytest.mark.parametrize("path", ENTRIES)
def test_what_is_gone_is_named_with_its_versions(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ENTRIES, f"{path}_gone", ENTRIES[path])
    library, seen = ENTRIES[path].seen.split()
    with pytest.raises(VersionError) as caught:
        borrowed.get(f"{path}_gone")
    text = str(caught.value)
    assert all(part in text for part in (f"{path.replace(':', '.')}_gone", library, seen, ENTRIES[path].use))


def test_attributes_of_objects_are_there(exported: torch.export.ExportedProgram):
    assert any("size()[0]" in code for code in borrowed.guard_code(exported))
    assert any(borrowed.is_of_vmap(node.target) for node in every_node(exported.graph_module))
    size = exported.graph.find_nodes(op="placeholder")[0].meta["val"].shape[0]
    assert borrowed.size_hint(size, 2) == 6 and len(borrowed.size_formula(size).free_symbols) == 1
    assert borrowed.fake_mode_of(exported.graph.find_nodes(op="placeholder")[0].meta["val"]) is not None
    assert borrowed.schema_of(aten.add_.Tensor).is_mutable and not borrowed.schema_of(aten.add.Tensor).is_mutable
    module = exported.module()
    assert borrowed.input_structure(module).num_children == 2
    (guards,) = [node.target for node in module.graph.nodes if node.op == "call_module"]
    assert guards.startswith(borrowed.GUARDS_MODULE)


def test_texts_by_which_things_are_found():
    from torch._dynamo import eval_frame
    from torch.onnx._internal.exporter import _core

    assert borrowed.ORIGINAL_NAMES in Path(eval_frame.__file__).read_text()
    assert borrowed.FX_NODE in Path(_core.__file__).read_text()
    text = pytree.treespec_dumps(pytree.tree_structure({"a": 1}))
    leaf = '{"type": null, "context": null, "children_spec": []}'
    assert text == f'[1, {{"type": "builtins.dict", "context": "[\\"a\\"]", "children_spec": [{leaf}]}}]'

    def marked() -> None:
        pass

    assert vars(torch.compiler.assume_constant_result(marked)) == {"_dynamo_marked_constant": True}


def test_a_write_to_a_tensor_is_counted():
    tensor = torch.zeros(2)
    before = borrowed.version_of(tensor)
    tensor.add_(1)
    assert borrowed.version_of(tensor) == before + 1


def test_a_compiled_module_is_seen_through():
    model = nn.Linear(3, 2)
    assert borrowed.uncompiled(torch.compile(model, backend="eager")) is model
    assert borrowed.uncompiled(model) is model


def test_onnxruntime_says_which_file_a_session_is_of(tmp_path: Path):
    import onnxruntime

    model, file = nn.Linear(3, 2).eval(), tmp_path / "model.onnx"
    torch.onnx.export(model, (torch.ones(1, 3),), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert borrowed.model_path(session) == str(file)


# planted absences


def test_a_graph_is_not_taken_without_its_guards(
    exported: torch.export.ExportedProgram, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delattr(exported, "_guards_code")
    with pytest.raises(VersionError, match="_guards_code.*another branch"):
        sp.capture(exported)


@pytest.mark.parametrize("name", borrowed.HOOKS)
def test_a_trainer_without_a_hook_is_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    from transformers import Trainer

    monkeypatch.delattr(Trainer, name)
    with pytest.raises(VersionError, match=f"Trainer.{name} is not there.*{borrowed.HOOKS[name]}"):
        borrowed.trainer_class()


def test_a_trainer_that_no_longer_calls_a_hook_is_refused(monkeypatch: pytest.MonkeyPatch):
    from transformers import Trainer

    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", lambda self, *args, **kwargs: None)
    with pytest.raises(VersionError, match="Trainer._save_checkpoint is not called .*checkpoints hold the base"):
        borrowed.trainer_class()


def test_every_override_of_the_trainer_is_a_hook():
    from subgraph_peft.training.trainer import ProgramTrainer, Trainer

    overrides = {name for name in vars(ProgramTrainer) if hasattr(Trainer, name) and not name.startswith("__")}
    assert overrides == set(borrowed.HOOKS)


def test_an_operator_without_a_known_kernel_is_refused_in_files(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch._C, "_dispatch_has_kernel")
    with pytest.raises(VersionError, match="_dispatch_has_kernel"):
        operator_of("node", "torch.ops.aten.add.Tensor")


def test_no_file_is_read_where_torch_would_unpickle_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)), file)
    assert isinstance(load(file), torch.export.ExportedProgram)
    monkeypatch.setattr(borrowed, "WEIGHTS_ONLY", "TORCH_OF_TOMORROW")
    monkeypatch.setattr(patches, "WEIGHTS_ONLY", "TORCH_OF_TOMORROW")
    with pytest.raises(VersionError, match="TORCH_OF_TOMORROW.*run anything"):
        load(file)


def test_arguments_of_a_traced_graph_keep_their_order_or_it_is_said(exported: torch.export.ExportedProgram):
    module = exported.module()
    del module._in_spec
    with pytest.raises(VersionError, match="_in_spec.*in their order"):
        borrowed.input_structure(module)


def test_a_trainer_that_would_spread_a_model_over_gpus_is_refused():
    class Arguments:
        n_gpu = 8  # whatever `_n_gpu` is

    with pytest.raises(VersionError, match="_n_gpu.*wrapped for several devices"):
        borrowed.one_gpu(Arguments())


def test_a_wrapper_of_compile_that_hides_its_module_is_refused(monkeypatch: pytest.MonkeyPatch):
    compiled = torch.compile(nn.Linear(2, 2), backend="eager")
    monkeypatch.delitem(compiled._modules, "_orig_mod")
    with pytest.raises(VersionError, match="OptimizedModule._orig_mod"):
        borrowed.uncompiled(compiled)


def capture_small() -> None:
    sp.capture(nn.Linear(2, 2), torch.ones(1, 2))


def test_a_capture_needs_what_it_changes(monkeypatch: pytest.MonkeyPatch):
    for owner, name in (
        (torch.utils.checkpoint, "CheckpointFunction"),
        (torch.autograd.graph.saved_tensors_hooks, "__enter__"),
        (torch.autograd.Function, "apply"),  # which is inherited then
    ):
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            with pytest.raises(VersionError, match=name):
                capture_small()
    capture_small()


def test_a_capture_needs_to_see_calls_of_checkpoints(monkeypatch: pytest.MonkeyPatch):
    """Where torch goes another way than through what is changed, all names being there."""
    monkeypatch.setattr(torch.utils.checkpoint._checkpoint_hook, "__module__", "torch.elsewhere")
    with pytest.raises(VersionError, match="a call of torch.utils.checkpoint is not seen"):
        capture_small()


def test_layers_stay_checkpointed_or_it_is_said(monkeypatch: pytest.MonkeyPatch):
    from transformers import modeling_layers

    monkeypatch.delattr(modeling_layers, "GradientCheckpointingLayer")
    with pytest.raises(VersionError, match="GradientCheckpointingLayer.*layers stay checkpointed"):
        capture_small()


def test_a_rule_that_fuses_masks_away_is_refused(monkeypatch: pytest.MonkeyPatch):
    import onnx_ir as ir

    from subgraph_peft.export.onnx import fuse

    def fusing(model: ir.Model) -> None:
        model.graph.append(ir.node("GroupQueryAttention", [], domain="com.microsoft"))

    monkeypatch.setattr(fuse, "get", lambda path: fusing)
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    with pytest.raises(VersionError, match="gqa_rules.*GroupQueryAttention"):
        fuse.fuse(model)


# nothing else names what is private

OURS = {"self", "cls"}
MEANT = {
    "super()._apply": "nn.Module's way to follow .to()",
    "super(GraphModel, self)._apply": "nn.Module's way to follow .to()",
    "super()._get_grad_norm": "the base of a hook of Trainer",
}
TUPLES = {"_replace", "_asdict", "_fields", "_make"}


def private(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, text) of what names a private part of something else than `self`, `cls` or this package."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and hidden(node.attr):
            owner = ast.unparse(node.value)
            if owner in OURS or owner.startswith("self.") or owner in ("aten", "torch.ops.aten"):  # operators by name
                continue
            if ast.unparse(node) not in MEANT and node.attr not in TUPLES and not node.attr.startswith("_subgraph"):
                yield node.lineno, ast.unparse(node)
        elif (
            isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] != "subgraph_peft"
        ):
            parts = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            if any(map(hidden, parts)):
                yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Import) and any(hidden(p) for alias in node.names for p in alias.name.split(".")):
            yield node.lineno, ast.unparse(node)
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "hasattr",
            "setattr",
            "delattr",
        ):
            name = node.args[1]
            if isinstance(name, ast.Constant) and hidden(name.value) and not name.value.startswith("_subgraph"):
                yield node.lineno, ast.unparse(node)


def hidden(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__") and name != "_"


@pytest.mark.parametrize("folder", ["subgraph_peft", "passes", "export"])
def test_only_one_file_names_what_is_private(folder: str):
    files = [path for path in (ROOT / folder).rglob("*.py") if path.name != "borrowed.py"]
    found = {
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in files
        for line, text in private(ast.parse(path.read_text()))
    }
    assert len(files) > 3 and not found, "\n".join(sorted(found))


@pytest.mark.parametrize(
    "planted",
    [
        "import torch._dynamo",
        "from torch._ops import OpOverload",
        "from torch.utils import _pytree",
        "torch._C._dispatch_has_kernel(x)",
        "getattr(program, '_guards_code', ())",
        "node.target._schema",
    ],
)
def test_a_planted_use_of_what_is_private_is_seen(planted: str):
    assert list(private(ast.parse(planted)))
