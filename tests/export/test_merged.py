"""A folded program costs what its base costs; adapters that stay are nodes that say who made them."""

import json
from collections import Counter

import pytest
import torch

import subgraph_peft as sp
from subgraph_peft import export
from subgraph_peft.passes import DoRA, LoRA, ParallelAdapter, PiSSA
from tests.export.conftest import Exported, shake
from tests.models import captured

SITES = {
    "bert": "*.attention.self.{query,value}", "gpt2": "*.attn.c_attn", "tied_llama": "*.{q_proj,down_proj}",
    "conv": ["stem", "point"], "mlp": ["first", "shared"],
}  # fmt: skip
METHODS = {"bert": LoRA(r=2), "gpt2": DoRA(of=LoRA(r=2)), "tied_llama": PiSSA(r=2), "conv": LoRA(r=2), "mlp": LoRA(r=2)}


def made_by(node) -> dict[str, str]:
    return {k: v for k, v in facts(node).items() if k != "namespace"}


def facts(proto) -> dict[str, str]:
    return {p.key.removeprefix("subgraph_peft."): p.value for p in proto.metadata_props}


def wiring(graph) -> list[tuple]:
    return [(node.name, node.op_type, node.input, node.output) for node in graph.node]


@pytest.mark.parametrize("name", SITES)
def test_the_merged_file_is_node_for_node_the_base(exported, tmp_path, name):
    adapted = shake(sp.rewrite(captured(name), METHODS[name], where=SITES[name]))
    report = export.to_onnx(sp.fold(adapted), tmp_path / "model.onnx")
    base, merged = exported(name).proto.graph, Exported(tmp_path / "model.onnx", report).proto.graph
    assert report.nodes == exported(name).report.nodes
    assert wiring(merged) == wiring(base)
    assert [t.name for t in merged.initializer] == [t.name for t in base.initializer]
    changed = {t.name for t, b in zip(merged.initializer, base.initializer, strict=True) if t.raw_data != b.raw_data}
    assert changed == {site.name for site in adapted.adapters[0].sites}
    assert report.merged and not report.remaining
    assert not any(made_by(node) for node in merged.node)


@pytest.fixture(scope="module")
def parallel(tmp_path_factory):
    program = shake(sp.rewrite(captured("bert"), ParallelAdapter(r=2, scale=0.5, biases=False), where="*.self.query"))
    path = tmp_path_factory.mktemp("parallel") / "model.onnx"
    return program, Exported(path, export.to_onnx(program, path))


def test_an_adapter_that_does_not_fold_stays_as_nodes_that_say_so(exported, parallel):
    program, done = parallel
    assert done.report.remaining == ("parallel_adapter",) and done.report.merged
    own = [node for node in done.proto.graph.node if made_by(node)]
    assert len(own) == done.report.nodes - exported("bert").report.nodes
    assert {made_by(node)["adapter"] for node in own} == {"parallel_adapter"}
    sites = [site.name for site in program.adapters[0].sites]
    assert Counter(made_by(node)["site"] for node in own) == dict.fromkeys(sites, len(own) // 2)
    assert {made_by(node)["term"] for node in own} == {"D", "relu", "U", "mul", "add"}
    readable = [n.name for n in own if n.name.startswith("bert_encoder_layer_0") and n.op_type != "Transpose"]
    prefix = "bert_encoder_layer_0_attention_self_query_parallel_adapter_"
    assert readable == [prefix + term for term in ("D", "relu", "U", "mul", "add")]
    weights = {t.name for t in done.proto.graph.initializer if "parallel_adapter." in t.name}
    assert weights == {path for _, _, path in program.adapters[0].all_paths()}


def test_the_file_says_where_it_comes_from(parallel):
    told = facts(parallel[1].proto)
    assert told["source"] == "BertForSequenceClassification"
    assert json.loads(told["history"]) == ["capture", "parallel_adapter"]
    (adapter,) = json.loads(told["adapters"])
    assert adapter["method"]["parallel_adapter"]["scale"] == 0.5
    assert adapter["sites"] == [site.name for site in parallel[0].adapters[0].sites]
    versions = json.loads(told["versions"])
    assert versions["subgraph_peft"] == sp.__version__ and versions["torch"] == torch.__version__
    assert told["identity"] == parallel[1].report.identity and told["dtype"] == "float32"
    assert "fold" not in told


def test_a_folded_file_says_what_the_fold_kept(tmp_path):
    folded = sp.fold(shake(sp.rewrite(captured("mlp"), LoRA(r=2), where="first")))
    report = export.to_onnx(folded, tmp_path / "model.onnx")
    told = facts(Exported(tmp_path / "model.onnx", report).proto)
    assert json.loads(told["history"]) == ["capture", "lora", "fold"]
    assert json.loads(told["fold"]) == {
        "dtype": "torch.float32", "retained": {"first.weight": folded.folded.retained},
        "adapters": {"lora": {"lora": {"r": 2, "alpha": 16.0, "dropout": 0.0}}},
    }  # fmt: skip


def test_unfolded_adapters_are_exported_and_reported(tmp_path):
    adapted = shake(sp.rewrite(captured("mlp"), LoRA(r=2, dropout=0.5), where="first", trainable="head"))
    report = export.to_onnx(adapted, tmp_path / "model.onnx")
    assert report.unmerged == ("lora",) and not report.merged
    assert dict(report.rows())["not merged"] == "lora"
    graph = Exported(tmp_path / "model.onnx", report).proto.graph
    own = [made_by(node) for node in graph.node]
    assert [made["term"] for made in own if made.get("adapter") == "lora"] == ["A", "scale", "B", "sum"]
    assert not [node for node in graph.node if node.op_type == "Dropout"]
