import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import subgraph_peft as sp
from subgraph_peft.base.schema import Schema
from subgraph_peft.passes import DoRA, LoRA, PiSSA
from subgraph_peft.store import adapter_file
from subgraph_peft.store.adapter_file import read_config, restore
from tests import models
from tests.base.test_schema import spoiled


@pytest.fixture
def adapted():
    return sp.rewrite(models.captured("bert"), LoRA(r=2), where="*.query", trainable="classifier")


@pytest.fixture
def folder(adapted, tmp_path):
    sp.save(adapted, tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    path = folder / "adapter.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_tensors_are_named_beside_their_weights(folder):
    names = set(load_file(folder / "adapter.safetensors"))
    assert "bert.encoder.layer.0.attention.self.query.weight_lora.A" in names
    assert {"classifier.weight", "classifier.bias"} < names and len(names) == 2 * 2 + 2
    assert json.loads((folder / "adapter.json").read_text())["adapters"][0]["method"] == {
        "lora": {"r": 2, "alpha": 16.0, "dropout": 0.0}
    }


def test_nested_methods_and_frozen_tensors_come_back(tmp_path):
    base = models.captured("bert")
    adapted = sp.rewrite(base, DoRA(of=PiSSA(r=2, niter=2)), where="*.query", name="mine")
    sp.save(adapted, tmp_path)
    loaded = sp.load(base, tmp_path)
    assert loaded.adapters[0].method == DoRA(of=PiSSA(r=2, niter=2)) and loaded.adapters[0].name == "mine"
    assert torch.equal(loaded.run().logits, adapted.run().logits)
    assert {n for n, _ in loaded.parameters(trainable=True)} == {n for n, _ in adapted.parameters(trainable=True)}


def test_loading_does_not_run_the_decomposition_again(tmp_path, monkeypatch):
    base = models.captured("bert")
    sp.save(sp.rewrite(base, PiSSA(r=2), where="*.query"), tmp_path)
    monkeypatch.setattr(PiSSA, "prepare", lambda *_: pytest.fail("an SVD at load"))
    sp.load(base, tmp_path)


def test_a_damaged_foreign_or_incomplete_folder_says_so(adapted, folder, tmp_path):
    with pytest.raises(sp.CheckpointError, match="holds no adapter"):
        sp.load(adapted, tmp_path / "nowhere")
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft/adapter_config.json").write_text("{}")
    with pytest.raises(sp.CheckpointError, match="huggingface/peft adapter"):
        sp.load(adapted, tmp_path / "peft")
    path = folder / "adapter.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(sp.CheckpointError, match="is damaged"):
        sp.load(adapted, folder)
    path.unlink()
    with pytest.raises(sp.CheckpointError, match="adapter.safetensors is missing"):
        sp.load(adapted, folder)
    (folder / "adapter.json").write_text("{ not json")
    with pytest.raises(sp.CheckpointError, match="adapter.json is damaged"):
        sp.load(adapted, folder)


def test_every_field_that_is_missing_or_of_another_type_is_named(adapted, folder):
    good = json.loads((folder / "adapter.json").read_text())
    nested = [(f"adapters.0.{field}", {**good, "adapters": [e]}) for field, e in spoiled(good["adapters"][0])]
    nested += [(f"base.{field}", {**good, "base": values}) for field, values in spoiled(good["base"])]
    for field, values in (*spoiled(good), *nested):
        (folder / "adapter.json").write_text(json.dumps(values))
        with pytest.raises(sp.CheckpointError, match=rf"adapter.json (has |is damaged.*'){field}"):
            read_config(folder)


def test_errors_of_our_own_code_are_no_damage(folder, monkeypatch):
    monkeypatch.setattr(Schema, "model_validate_json", lambda *_: None.planted)
    with pytest.raises(AttributeError, match="planted"):
        read_config(folder)


def test_strict_loading_lists_every_key_that_does_not_fit_and_changes_nothing(adapted, folder):
    path = folder / "adapter.safetensors"
    tensors = load_file(path)
    first = next(name for name in tensors if name.endswith(".A"))
    wrong = {**tensors, "stray": torch.zeros(1), first: torch.zeros(3, 3)}
    del wrong["classifier.bias"]
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(wrong, path, metadata)
    before = {n: p.clone() for n, p in adapted.module.named_parameters()}
    for load in (lambda: restore(adapted, folder), lambda: sp.load(adapted, folder)):
        with pytest.raises(sp.CheckpointError) as caught:
            load()
        for part in ("missing classifier.bias", "unexpected stray", f"{first} is [3, 3], expected [2, 24]"):
            assert part in str(caught.value)
    assert all(torch.equal(p, before[n]) for n, p in adapted.module.named_parameters())


def test_another_base_another_method_another_format_are_refused(adapted, folder):
    model, inputs = models.bert()
    with torch.no_grad():
        model.bert.encoder.layer[0].attention.self.query.weight.mul_(1.5)
    with pytest.raises(sp.CheckpointError, match="another base"):
        sp.load(sp.capture(model, inputs), folder)
    base = adapted.captured
    with pytest.raises(sp.CheckpointError, match="another method"):
        restore(sp.rewrite(base, LoRA(r=3), where="*.query", trainable="classifier"), folder)
    with pytest.raises(sp.CheckpointError, match="trains"):
        restore(sp.rewrite(base, LoRA(r=2), where="*.query"), folder)
    edit(
        folder,
        adapters=[
            {
                "name": "x",
                "method": {"lorra": {}},
                "sites": ["bert.encoder.layer.0.attention.self.query.weight"],
                "variants": {},
            }
        ],
    )
    with pytest.raises(sp.CheckpointError, match="Unknown method 'lorra'. Did you mean 'lora'"):
        sp.load(base, folder)
    edit(
        folder,
        adapters=[
            {
                "name": "x",
                "method": {"lora": {"r": 2}},
                "sites": ["bert.encoder.layer.7.attention.self.query.weight"],
                "variants": {},
            }
        ],
    )
    with pytest.raises(sp.CheckpointError, match="no site bert.encoder.layer.7"):
        sp.load(base, folder)
    edit(folder, format=99)
    with pytest.raises(sp.CheckpointError, match="format 99"):
        sp.load(base, folder)


def test_an_interrupted_save_leaves_the_former_files(adapted, folder, monkeypatch):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def interrupted(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(adapter_file, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sp.save(adapted, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_an_error(adapted, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sp.CheckpointError, match="cannot be written"):
        sp.save(adapted, tmp_path / "file" / "adapter")
    with pytest.raises(sp.CheckpointError, match="no adapters to save"):
        sp.save(adapted.captured, tmp_path / "x")


def test_batch_norm_statistics_that_training_wrote_travel_with_the_adapter(tmp_path):
    from tests.frontend.test_capture import Norm

    model = Norm()
    base = sp.capture(model, torch.randn(4, 3, 8, 8))
    adapted = sp.rewrite(base, LoRA(r=1), where="exact:conv")
    before = {n: b.clone() for n, b in model.named_buffers()}
    adapted.module.train()(torch.randn(6, 3, 8, 8))
    assert all(torch.equal(b, before[n]) for n, b in (*model.named_buffers(), *base.module.named_buffers()))
    sp.save(adapted, tmp_path)
    loaded, x = sp.load(base, tmp_path), {"x": torch.randn(2, 3, 8, 8)}
    assert torch.equal(loaded.run(x), adapted.run(x)) and not torch.equal(loaded.run(x), base.run(x))
    fresh = restore(sp.rewrite(base, LoRA(r=1), where="exact:conv"), tmp_path)
    assert torch.equal(fresh.run(x), adapted.run(x))
    folded = sp.fold(adapted)
    torch.testing.assert_close(folded.run(x), adapted.run(x))
    changed = sp.write_to(folded, model)
    assert "norm.running_mean" in changed
    torch.testing.assert_close(model.eval()(x["x"]), folded.run(x))


def test_an_adapter_with_its_own_head_loads_on_a_base_whose_head_is_drawn_anew(adapted, folder):
    model, inputs = models.bert()
    model.classifier.reset_parameters()
    loaded = sp.load(sp.capture(model, inputs), folder)
    assert torch.equal(loaded.run().logits, adapted.run().logits)


def test_files_of_two_saves_do_not_load_together(adapted, folder, tmp_path):
    other = sp.rewrite(adapted.captured, LoRA(r=2, alpha=999), where="*.query", trainable="classifier")
    sp.save(other, tmp_path / "other")
    (tmp_path / "other/adapter.safetensors").replace(folder / "adapter.safetensors")
    with pytest.raises(sp.CheckpointError, match="is not the one that adapter.safetensors was saved with"):
        sp.load(adapted, folder)
