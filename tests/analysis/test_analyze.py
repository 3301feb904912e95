"""Looking inside: known cases by construction, the papers' formulas written again in numpy, files that open."""

import importlib
import json
import math

import matplotlib.image
import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from typer.testing import CliRunner

import subgraph_peft as sp
from subgraph_peft.cli import app
from subgraph_peft.passes import IA3, SSB, BitFit, DoRA, LoRA, ParallelAdapter, PiSSA
from tests import models

OUT, IN = 12, 9
EXACT = dict(rel=1e-9, abs=1e-12)


class Layers(nn.Module):
    """Two layers, taller and wider than square; the second is stored [in, out]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(IN, OUT), "down": Conv1D(IN, OUT)}) for _ in "ab")
        self.head = nn.Linear(IN, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(x)


UP, DOWN = "layers.0.up.weight", "layers.1.down.weight"


def capture(seed: int = 0) -> sp.Program:
    torch.manual_seed(seed)
    model = Layers().double()
    for layer in model.layers:
        nn.init.normal_(layer["down"].weight)
    return sp.capture(model, torch.randn(3, IN, dtype=torch.float64))


@pytest.fixture(scope="module")
def base() -> sp.Program:
    return capture()


def adapt(base: sp.Program, method: sp.Method, where="layers.*", seed: int = 1, **options) -> sp.Program:
    """With random values in every trained tensor."""
    program = sp.rewrite(base, method, where=where, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in program.parameters(trainable=True):
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return program


def with_delta(base: sp.Program, left: torch.Tensor, sigma: list[float], right: torch.Tensor) -> sp.Program:
    """ΔW = left diag(σ) rightᵀ at UP: left [out, r], right [in, r]."""
    r = len(sigma)
    program = sp.rewrite(base, LoRA(r=r, alpha=float(r)), where=UP)
    with torch.no_grad():
        program.module.get_parameter(f"{UP}_lora.B").copy_(left * torch.tensor(sigma, dtype=torch.float64))
        program.module.get_parameter(f"{UP}_lora.A").copy_(right.T)
    return program


def frame(size: int, columns: int, seed: int) -> torch.Tensor:
    """Random orthonormal columns."""
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, columns, generator=generator, dtype=torch.float64)).Q


def weight(program: sp.Program, name: str) -> np.ndarray:
    W = dict(program.tensors())[name].detach().numpy()
    return W.T if ".down." in name else W


@pytest.fixture(scope="module")
def directions(base) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U, σ, V of the base at UP."""
    U, sigma, Vh = torch.linalg.svd(torch.tensor(weight(base, UP)), full_matrices=False)
    return U, sigma, Vh.T


# numbers


def test_an_update_along_the_base_is_inside_it_and_amplifies_by_the_ratio_of_sigmas(base, directions):
    U, sigma, V = directions
    site = sp.analyze(with_delta(base, U[:, :2], [0.5, 0.2], V[:, :2])).site(UP)
    found = site.overlap
    assert (found.r, found.k) == (2, 2) and site.update.rank == 2
    assert (found.inside, found.left, found.right) == pytest.approx((1, 1, 1), **EXACT)
    assert found.outside == pytest.approx(0, **EXACT)
    moved, there = math.hypot(0.5, 0.2), math.hypot(*sigma[:2])
    assert found.amplification == pytest.approx(moved / there, **EXACT)
    assert found.projected_update == pytest.approx(found.projected_base, **EXACT)
    assert site.update.values[:2] == pytest.approx((0.5, 0.2), **EXACT)
    assert site.update.stable_rank == pytest.approx((0.25 + 0.04) / 0.25, **EXACT)
    assert site.update.energy(1) == pytest.approx(0.25 / 0.29, **EXACT)
    assert (site.update.directions(0.86), site.update.directions(0.87)) == (1, 2)
    assert site.relative == pytest.approx(moved / torch.linalg.norm(sigma).item(), **EXACT)


def test_an_update_across_the_base_is_outside_it(base, directions):
    U, sigma, V = directions
    crossed = sp.analyze(with_delta(base, U[:, 4:6], [0.5, 0.2], V[:, 6:8]), k=4).site(UP).overlap
    assert (crossed.inside, crossed.left, crossed.right) == pytest.approx((0, 0, 0), **EXACT)
    assert crossed.outside == pytest.approx(1, **EXACT)
    assert crossed.projected_update == pytest.approx(0, **EXACT) and crossed.amplification > 1e9
    weak = sp.analyze(with_delta(base, U[:, 4:6], [0.5, 0.2], V[:, 4:6]), k=4).site(UP).overlap
    assert weak.inside == pytest.approx(0, **EXACT)
    assert weak.amplification == pytest.approx(math.hypot(0.5, 0.2) / math.hypot(*sigma[4:6]), **EXACT)


def test_an_update_that_reads_new_directions_and_writes_old_ones_is_half_inside(base, directions):
    U, _, V = directions
    found = sp.analyze(with_delta(base, U[:, :1], [0.3], V[:, 7:8]), k=3).site(UP).overlap
    assert (found.left, found.right, found.inside) == pytest.approx((1, 0, 0), **EXACT)
    assert found.outside == pytest.approx(0, **EXACT)


def reference(W: np.ndarray, delta: np.ndarray, k: int | None) -> dict[str, float]:
    """The formulas as the paper writes them, one matrix product at a time."""
    U, s, Vt = np.linalg.svd(delta)
    U0, s0, V0t = np.linalg.svd(W)
    r = np.linalg.matrix_rank(delta) if k is None else min(k, np.linalg.matrix_rank(delta))
    k = r if k is None else min(k, *W.shape)
    P, Q = U0[:, :k] @ U0[:, :k].T, V0t[:k].T @ V0t[:k]
    inside = np.linalg.norm(P @ delta @ Q) ** 2
    outside = np.linalg.norm((np.eye(len(P)) - P) @ delta @ (np.eye(len(Q)) - Q)) ** 2
    total = np.linalg.norm(delta) ** 2
    projected = np.linalg.norm(U[:, :r].T @ W @ Vt[:r].T)
    return {
        "r": r, "k": k, "inside": inside / total, "outside": outside / total,
        "left": np.linalg.norm(P @ delta) ** 2 / total, "right": np.linalg.norm(delta @ Q) ** 2 / total,
        "projected_update": projected, "projected_base": np.linalg.norm(U0[:, :r].T @ W @ V0t[:r].T),
        "amplification": np.linalg.norm(delta) / projected, "chance": k * k / W.size,
    }  # fmt: skip


METHODS = {
    "lora": LoRA(r=3, alpha=2.0), "pissa": PiSSA(r=2), "ssb": SSB(), "ia3": IA3(), "dora": DoRA(of=LoRA(r=2)),
}  # fmt: skip


@pytest.mark.parametrize("k", [None, 4, 50])
@pytest.mark.parametrize("name", METHODS)
def test_every_number_is_the_papers(base, name, k):
    program = adapt(base, METHODS[name])
    folded = sp.fold(program)
    analysis = sp.analyze(program, k=k)
    assert [site.name for site in analysis.sites] == [
        f"layers.{i}.{part}.weight" for i in "01" for part in ("up", "down")
    ]
    for site in analysis.sites:
        W, phi = weight(base, site.name), weight(folded, site.name)
        assert site.shape == W.shape
        for spectrum, M in ((site.base, W), (site.update, phi - W)):
            sigma = np.linalg.svd(M, compute_uv=False)
            assert spectrum.exact and spectrum.values == pytest.approx(sigma, **EXACT)
            assert spectrum.norm == pytest.approx(np.linalg.norm(M), **EXACT)
            assert spectrum.stable_rank == pytest.approx((sigma**2).sum() / sigma[0] ** 2, **EXACT)
            assert spectrum.rank == np.linalg.matrix_rank(M, tol=1e-12)
        for key, expected in reference(W, phi - W, k).items():
            assert getattr(site.overlap, key) == pytest.approx(expected, rel=1e-8, abs=1e-12), key


def test_the_ranks_are_those_of_the_methods(base):
    ranks = {name: {s.update.rank for s in sp.analyze(adapt(base, m)).sites} for name, m in METHODS.items()}
    assert ranks == {"lora": {3}, "pissa": {4}, "ssb": {IN}, "ia3": {IN}, "dora": {IN}}


def test_random_directions_see_what_a_random_subspace_sees(base):
    """E ‖UᵀWV‖² = r² ‖W‖² / (out · in): the mean over many sites of one size comes near."""
    from subgraph_peft.analysis.analyze import random_directions

    W = torch.tensor(weight(base, UP))
    for r in (1, 3):
        norms = [(U.T @ W @ V).square().sum() for U, V in (random_directions(str(i), W, r) for i in range(2000))]
        assert torch.stack(norms).mean().item() == pytest.approx((r * r * W.square().mean()).item(), rel=0.1)
    site = sp.analyze(adapt(base, LoRA(r=2))).site(UP)
    U, V = random_directions(UP, W, 2)
    assert site.overlap.projected_random == pytest.approx(torch.linalg.norm(U.T @ W @ V).item(), **EXACT)
    assert torch.allclose(V.T @ V, torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_small_update_keeps_its_rank_in_a_narrow_model(dtype):
    """W + ΔW in the model's own dtype would drown ΔW in rounding."""
    torch.manual_seed(0)
    program = sp.rewrite(sp.capture(nn.Linear(IN, OUT).to(dtype), torch.randn(3, IN, dtype=dtype)), LoRA(r=2), "weight")
    with torch.no_grad():
        program.module.get_parameter("weight_lora.B").normal_(std=1e-5)
    site = sp.analyze(program).sites[0]
    assert site.update.rank == 2 and site.overlap.r == 2 and site.relative < 1e-3


def test_what_did_not_move_says_so(base):
    for method in (LoRA(r=2), PiSSA(r=2), SSB(), DoRA()):
        analysis = sp.analyze(sp.rewrite(base, method, where="layers.*"))
        assert not any(site.moved or site.update.rank or site.similarity for site in analysis.sites)
        assert "Not moved: layers.0.up, layers.0.down" in str(analysis)


def test_large_matrices_are_approximated_and_it_says_so(base, monkeypatch):
    program = adapt(base, LoRA(r=2))
    exact = sp.analyze(program)
    module = importlib.import_module("subgraph_peft.analysis.analyze")
    monkeypatch.setattr(module, "EXACT_UP_TO", 5)
    monkeypatch.setattr(module, "TRIPLETS", 4)
    rough = sp.analyze(program)
    for one, two in zip(rough.sites, exact.sites, strict=True):
        assert not one.base.exact and len(one.base.values) == 4 and one.base.norm == two.base.norm
        assert one.update.rank == 2 and one.update.values[:2] == pytest.approx(two.update.values[:2], **EXACT)
        assert one.overlap.amplification == pytest.approx(two.overlap.amplification, **EXACT)
        assert one.base.directions(0.999) is None and one.base.energy(4) < 0.999
        assert one.base.values == pytest.approx(two.base.values[:4], rel=1e-3)
    text = " ".join(str(rough).split())
    assert "4 sites are large: of their singular values only the 4 largest were computed" in text
    assert "100.0% of that of ΔW" in text and "of the energy of W at least" in text
    assert "sites are large" not in str(exact)


def test_the_approximation_is_close_where_singular_values_fall_slowly(monkeypatch):
    module = importlib.import_module("subgraph_peft.analysis.analyze")
    monkeypatch.setattr(module, "EXACT_UP_TO", 5)
    monkeypatch.setattr(module, "TRIPLETS", 6)
    sigma = 1 / torch.arange(1, 71, dtype=torch.float64).sqrt()
    W = frame(80, 70, 0) @ torch.diag(sigma) @ frame(70, 70, 1).T
    U, found, Vh = module.decompose(W)
    assert found.tolist() == pytest.approx(sigma[:6].tolist(), rel=0.01) and U.shape == (80, 6) and Vh.shape == (6, 70)


# similarity of two updates


def phi(one: sp.Program, two: sp.Program, **options) -> tuple[torch.Tensor, torch.Tensor]:
    found = sp.analyze(one, two, **options).site(UP).similarity
    return found.right, found.left


def close(found: torch.Tensor, expected: torch.Tensor | float) -> bool:
    return torch.allclose(found, torch.as_tensor(expected, dtype=torch.float64).expand_as(found), atol=1e-9)


def test_similarity_is_the_papers_formula(base):
    one, two = adapt(base, LoRA(r=2)), adapt(base, LoRA(r=4), seed=2)
    deltas = [weight(sp.fold(program), UP) - weight(base, UP) for program in (one, two)]
    (U1, _, V1t), (U2, _, V2t) = map(np.linalg.svd, deltas)
    for found, first, second in zip(phi(one, two), (V1t.T, U1), (V2t.T, U2), strict=True):
        assert found.shape == (2, 4)
        for i in range(1, 3):
            for j in range(1, 5):
                expected = np.linalg.norm(first[:, :i].T @ second[:, :j]) ** 2 / min(i, j)
                assert found[i - 1, j - 1] == pytest.approx(expected, **EXACT)
                assert 0 <= found[i - 1, j - 1] <= 1


def test_equal_nested_and_orthogonal_subspaces(base):
    left, right = frame(OUT, 6, 0), frame(IN, 6, 1)
    small = with_delta(base, left[:, :2], [3.0, 2.0], right[:, :2])
    large = with_delta(base, left[:, :5], [9.0, 8.0, 7.0, 6.0, 5.0], right[:, :5])
    for found in phi(small, small):
        assert close(found, [[1, 1], [1, 1]])
    for found in phi(small, large):
        assert close(found, 1.0)
    last = with_delta(base, left[:, 4:6], [3.0, 2.0], right[:, 4:6])
    for found in phi(small, last):
        assert close(found, 0.0)
    # the first direction of `last` is the fifth of `large`, its second is none of them
    for found in phi(last, large):
        assert close(found[0], [0, 0, 0, 0, 1]) and close(found[1], [0, 0, 0, 0, 0.5])


def test_left_and_right_are_not_mixed_up(base):
    left, right = frame(OUT, 4, 0), frame(IN, 4, 1)
    one = with_delta(base, left[:, :2], [2.0, 1.0], right[:, :2])
    two = with_delta(base, left[:, 2:4], [2.0, 1.0], right[:, :2])
    found = sp.analyze(one, two).site(UP).similarity
    assert found.whole == pytest.approx((1, 0), **EXACT)
    assert found.chance == pytest.approx((2 / IN, 2 / OUT))


def test_roles_are_symmetric_and_factors_may_be_rotated(base):
    one, two = adapt(base, LoRA(r=2)), adapt(base, LoRA(r=3), seed=2)
    for forth, back in zip(phi(one, two), phi(two, one), strict=True):
        assert close(forth, back.T)
    rotated = adapt(base, LoRA(r=3), seed=2)
    R = frame(3, 3, 5) + 0.1
    with torch.no_grad():
        for _, tensor, path in rotated.adapters[0].all_paths():
            parameter = rotated.module.get_parameter(path)
            parameter.copy_(parameter @ R if tensor == "B" else torch.linalg.solve(R, parameter))
    for plain, turned in zip(phi(one, two), phi(one, rotated), strict=True):
        assert close(plain, turned)


def test_right_directions_of_a_low_rank_update_are_the_row_space_of_A(base):
    program = adapt(base, LoRA(r=3))
    A = program.module.get_parameter(f"{UP}_lora.A").detach()
    B = program.module.get_parameter(f"{UP}_lora.B").detach()
    rows, columns = torch.linalg.svd(A, full_matrices=False).Vh.T, torch.linalg.svd(B, full_matrices=False).U
    same_rows = with_delta(base, frame(OUT, 3, 7), [1.0, 1.0, 1.0], rows)
    same_columns = with_delta(base, columns, [1.0, 1.0, 1.0], frame(IN, 3, 8))
    assert phi(program, same_rows)[0][-1, -1] == pytest.approx(1, **EXACT)
    assert phi(program, same_rows)[1][-1, -1] < 0.9
    assert phi(program, same_columns)[1][-1, -1] == pytest.approx(1, **EXACT)
    assert phi(program, same_columns)[0][-1, -1] < 0.9


def test_methods_of_any_kind_compare_and_k_limits_both(base):
    right, left = phi(adapt(base, LoRA(r=3)), adapt(base, SSB()))
    assert right.shape == left.shape == (3, IN) and close(right[:, -1], 1.0)
    assert phi(adapt(base, LoRA(r=3)), adapt(base, SSB()), k=2)[0].shape == (2, 2)


# which sites


def test_what_has_no_singular_directions_is_left_out_with_its_reason(base):
    program = adapt(adapt(adapt(base, IA3()), BitFit(), where="layers.*"), ParallelAdapter(r=2), trainable="head")
    analysis = sp.analyze(program, where="*.up")
    assert [site.name for site in analysis.sites] == ["layers.0.up.weight", "layers.1.up.weight"]
    reasons = dict(analysis.left_out)
    assert reasons["head.weight"] == "trained in full, not by an adapter"
    assert reasons["layers.0.up.bias"] == "a vector has no singular directions"
    assert reasons[UP] == "parallel_adapter acts on activations: there is no ΔW"
    assert "layers.0.up.bias (a vector has no singular directions)" in " ".join(str(analysis).split())


def test_adapters_over_adapters_are_one_update(base):
    both = adapt(adapt(base, LoRA(r=2)), SSB(), seed=2)
    site = sp.analyze(both).site("layers.1.down")
    expected = weight(sp.fold(both), DOWN) - weight(base, DOWN)
    assert site.update.norm == pytest.approx(np.linalg.norm(expected), **EXACT)
    assert "ssb over lora" in str(sp.analyze(both))


def test_sites_of_one_program_only_are_named(base):
    one, two = adapt(base, LoRA(r=2), where="*.up"), adapt(base, LoRA(r=2), where=["layers.0.*"])
    analysis = sp.analyze(one, two)
    assert [site.similarity is not None for site in analysis.sites] == [True, False]
    assert dict(analysis.left_out) == {
        "layers.1.up.weight": "not in the other program: no similarity",
        "layers.0.down.weight": "only in the other program",
    }


def test_an_embedding_and_a_head_that_are_adapted_are_seen():
    model, inputs = models.llama()
    program = sp.rewrite(sp.capture(model, inputs), LoRA(r=2), where=["*.embed_tokens", "lm_head"])
    assert {site.name for site in sp.analyze(program).sites} == {"model.embed_tokens.weight", "lm_head.weight"}


def refusal(message, *arguments, error=sp.AnalysisError, **options):
    with pytest.raises(error, match=message):
        sp.analyze(*arguments, **options)


def test_refusals_say_why(base):
    program = adapt(base, LoRA(r=2))
    refusal("has no update to look at: it has no adapters", base)
    refusal("has no update to look at: it has no adapters", sp.fold(program))
    refusal("bitfit changes no matrix", adapt(base, BitFit(), where="*"))
    refusal("takes a program with adapters, not Linear", nn.Linear(2, 2))
    refusal("k = 0 directions", program, k=0)
    refusal("matches none of 4 sites", program, where="*.side", error=sp.SelectorError)
    refusal(
        "no selected weight in common", adapt(base, LoRA(r=2), where="*.up"), adapt(base, LoRA(r=2), where="*.down")
    )
    with pytest.raises(sp.AnalysisError, match="no site 'layers.0.upp'. Nearest: layers.0.up.weight"):
        sp.analyze(program).site("layers.0.upp")


def test_another_models_adapter_is_refused(base):
    class Wider(Layers):
        def __init__(self):
            super().__init__()
            for layer in self.layers:
                layer["up"], layer["down"] = nn.Linear(IN, OUT + 1), Conv1D(IN, OUT + 1)

    other = sp.capture(Wider().double(), torch.randn(3, IN, dtype=torch.float64))
    refusal(r"is \[12, 9\] in one program and \[13, 9\]", adapt(base, LoRA(r=2)), adapt(other, LoRA(r=2)))


def test_a_diverged_update_is_refused(base):
    program = adapt(base, LoRA(r=2))
    with torch.no_grad():
        program.module.get_parameter(f"{UP}_lora.B")[0, 0] = float("nan")
    refusal(f"update of {UP} holds values that are not finite", program)


def test_a_program_without_weights_is_refused():
    with torch.device("meta"):
        model, x = nn.Linear(IN, OUT), torch.randn(2, IN)
    program = sp.rewrite(sp.capture(model, x, verify=False), LoRA(r=2), where="weight")
    refusal("meta device has no weights", program)


# files


def test_save_leaves_files_that_open(base, tmp_path):
    one, two = adapt(base, LoRA(r=2)), adapt(base, LoRA(r=4), seed=2)
    analysis = sp.analyze(one, two)
    page = sp.write_analysis(analysis, tmp_path / "new" / "folder", site="layers.1.down")
    folder = page.parent
    pictures = {"spectra.png", "shares.png", "similarity.png", "agreement.png"}
    assert {path.name for path in folder.iterdir()} == pictures | {"analysis.json", "analysis.md"}
    for name in pictures:
        assert matplotlib.image.imread(folder / name).std() > 0, name
    document = json.loads((folder / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert [site["name"] for site in document["sites"]] == [site.name for site in analysis.sites]
    stored, site = document["sites"][0], analysis.sites[0]
    assert stored["overlap"]["amplification"] == site.overlap.amplification
    assert stored["update"]["values"] == list(site.update.values) and stored["update"]["rank"] == 2
    assert stored["similarity"]["right"] == site.similarity.right.tolist()
    text = page.read_text()
    for part in ("| layers.0.up | 12×9 |", "Moved most: layers.", "by chance", "(similarity.png)", "at layers.1.down"):
        assert part in text, part
    assert text.count("![") == 4 and "Similarity with lora" in str(analysis)


def test_save_without_another_update_and_without_any(base, tmp_path):
    alone = sp.analyze(adapt(base, LoRA(r=2)))
    sp.write_analysis(alone, tmp_path / "alone")
    assert {p.name for p in (tmp_path / "alone").glob("*.png")} == {"spectra.png", "shares.png"}
    with pytest.raises(sp.AnalysisError, match="has no similarity to draw"):
        sp.write_analysis(alone, tmp_path, site="layers.0.up")
    sp.write_analysis(sp.analyze(sp.rewrite(base, LoRA(r=2), where="layers.*")), tmp_path / "still")
    document = json.loads((tmp_path / "still/analysis.json").read_text(), parse_constant=pytest.fail)
    assert document["sites"][0]["overlap"] is None and document["sites"][0]["relative"] == 0
    with pytest.raises(sp.AnalysisError, match="cannot be written"):
        sp.write_analysis(alone, "/proc/nowhere")


def test_kinds_of_modules_have_the_shortest_labels_that_differ():
    from subgraph_peft.analysis.pictures import kinds_of, layer_of

    sites = [type("S", (), {"name": n}) for n in ("a.0.x.weight", "a.1.x.weight", "a.0.y.weight", "head.weight")]
    assert {label: len(members) for label, members in kinds_of(sites).items()} == {"x": 2, "y": 1, "head": 1}
    clash = [type("S", (), {"name": n}) for n in ("a.0.x.weight", "b.0.x.weight")]
    assert list(kinds_of(clash)) == ["a.*.x", "b.*.x"]
    assert layer_of("a.10.b.2.x.weight") == (10, 2) and layer_of("head.weight") == ()


# command line

PIPELINE = """model:
  factory: tests.analysis.test_analyze:tiny
data:
  train: tests.analysis.test_analyze:rows
passes:
  - capture
  - lora: {r: 2, where: "*.{query,value}", trainable: classifier}
  - train: {max_steps: 4, batch_size: 8, lr: 0.01}
output: OUTPUT
"""


def tiny():
    return models.bert()[0]


def rows():
    ids = torch.randint(1, models.VOCABULARY, (16, 7), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row[0] % 3} for row in ids]


def call(*arguments, code=0):
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exit_code == code, result.output + str(result.exception)
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A pipeline file whose results folder has a trained adapter of rank 2."""
    folder = tmp_path_factory.mktemp("runs")
    path = folder / "pipeline.yaml"
    path.write_text(PIPELINE.replace("OUTPUT", str(folder / "out")))
    call("train", path)
    return path


def test_command_line_on_a_pipeline_and_on_two_runs(trained, tmp_path):
    run = trained.parent / "out"
    output = call("analyze", trained)
    assert "bert.encoder.layer.1.attention.self.value" in output and "Moved most" in output
    assert "classifier.weight (trained in full, not by an adapter)" in output
    assert f"Tables and pictures: {run}/analysis" in output
    assert {"analysis.json", "analysis.md", "spectra.png", "shares.png"} == {
        p.name for p in (run / "analysis").iterdir()
    }

    call("train", trained, "--set", "lora.r=4", "--set", "seed=3", "--output", tmp_path / "other")
    where = ["--where", "*.query", "--where", "*.layer.0.*"]
    output = call("analyze", run, "--other", tmp_path / "other", "--output", tmp_path / "seen", *where, "-k", 3)
    assert "Similarity with lora" in output
    document = json.loads((tmp_path / "seen/analysis.json").read_text())
    names = [site["name"].removeprefix("bert.encoder.layer.") for site in document["sites"]]
    assert names == [f"{i}.attention.self.{p}.weight" for i, p in ((0, "query"), (0, "value"), (1, "query"))]
    assert np.shape(document["sites"][0]["similarity"]["right"]) == (2, 3)
    assert (tmp_path / "seen/similarity.png").exists()


def test_command_line_refuses_with_a_reason(trained, tmp_path):
    assert "holds no adapter" in call("analyze", trained, "--adapter", tmp_path, code=1)
    assert "matches none of 4 sites" in call("analyze", trained, "--where", "*.qurey", code=1)
    call("analyze", code=2)
