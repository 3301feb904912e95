import warnings
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import subgraph_peft as sp
from subgraph_peft.compiler import initial_values
from subgraph_peft.compiler.factor_cache import Cache, content_hash
from subgraph_peft.method import subspace
from subgraph_peft.method.svd import svd
from subgraph_peft.passes import DoRA, LoRADash, PiSSA, SpectralAdditive, SVDiff
from subgraph_peft.pipeline.passes import State
from subgraph_peft.pipeline.pipeline import Pipeline

DTYPES = [torch.float64, torch.float32]


def matrix(shape: tuple[int, int], sigma: torch.Tensor, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """A matrix with these singular values and random singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = len(sigma)
    U, V = (torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q for n in shape)
    return ((U * sigma.double()) @ V.T).to(dtype)


def off(U: torch.Tensor) -> float:
    return (U.mT @ U - torch.eye(U.shape[-1], dtype=U.dtype)).abs().max().item()


SPECTRA = {
    "power law": lambda k: torch.arange(1, k + 1.0) ** -1,
    "slow": lambda k: torch.arange(1, k + 1.0) ** -0.2,
    "flat": torch.ones,
    "pairs": lambda k: torch.arange(k, 0, -1.0).div(2, rounding_mode="floor"),
    "rank 3": lambda k: (torch.arange(k) < 3).double(),
    "ill-conditioned": lambda k: torch.logspace(0, -14, k, dtype=torch.float64),
    "zero": torch.zeros,
}


@settings(max_examples=30, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES), rows=st.integers(24, 50), columns=st.integers(24, 50), r=st.integers(1, 12),
    niter=st.integers(0, 5), spectrum=st.sampled_from([*SPECTRA]), scale=st.sampled_from([1e-12, 1.0, 1e9]),
    seed=st.integers(0, 9),
)  # fmt: skip
def test_factors_are_orthonormal_and_nearly_as_good_as_the_best(dtype, rows, columns, r, niter, spectrum, scale, seed):
    sigma = SPECTRA[spectrum](min(rows, columns)).double() * scale
    W = matrix((rows, columns), sigma, seed, dtype)
    U, found, Vh = svd(W, r, niter)
    eps = torch.finfo(dtype).eps * 100
    assert (U.shape, found.shape, Vh.shape) == ((rows, r), (r,), (r, columns)) and U.dtype == dtype
    assert off(U) <= eps and off(Vh.T) <= eps
    rounding = eps * float(sigma[0])
    assert (found.diff() <= rounding).all() and (found >= 0).all()
    assert (found.double() <= sigma[:r] + rounding).all()
    assert torch.allclose(U.T @ W, found[:, None] * Vh, rtol=0, atol=rounding)
    left = torch.linalg.matrix_norm(W.double() - ((U * found) @ Vh).double())
    assert left <= 1.3 * sigma[r:].norm() + rows * rounding


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(90, 50), (50, 90)])
def test_many_iterations_reach_the_exact_factors(dtype, shape):
    W = matrix(shape, 0.7 ** torch.arange(50.0), 0, dtype)
    exact, found = svd(W, 6), svd(W, 6, niter=8)
    for one, two in ((exact[0], found[0]), (exact[2].T, found[2].T)):
        assert (one.T @ two).abs().sub(torch.eye(6)).abs().max() <= 1e3 * torch.finfo(dtype).eps
    assert torch.allclose(exact[1], found[1])


def test_no_niter_and_ranks_near_full_are_exact():
    W = matrix((40, 30), torch.arange(1, 31.0) ** -0.1, 0, torch.float64)
    exact = torch.linalg.svd(W, full_matrices=False)
    for r, niter in ((5, None), (22, 0), (30, 1)):
        U, sigma, Vh = svd(W, r, niter)
        assert torch.equal(U, exact.U[:, :r]) and torch.equal(sigma, exact.S[:r]) and torch.equal(Vh, exact.Vh[:r])


@pytest.fixture
def steps(monkeypatch) -> list[tuple[int, int, str]]:
    """(matrices, iterations, QR) of every round that runs."""
    rounds, iterate = [], subspace.iterate

    def noted(W, P, r, steps, tf32=0, qr=None):
        rounds.append((len(W), steps, qr.__name__ if qr else "cholesky_qr2"))
        return iterate(W, P, r, steps, tf32, qr)

    monkeypatch.setattr(subspace, "iterate", noted)
    return rounds


def test_the_residual_test_raises_the_iterations_of_what_decays_slowly_and_of_nothing_else(steps, monkeypatch):
    fast, slow = (matrix((80, 70), torch.arange(1, 71.0) ** -p, 0, torch.float64) for p in (1.0, 0.1))
    fast_found = svd(fast, 8, niter=1)
    assert steps == [(1, 2, "cholesky_qr2")]
    steps.clear()
    found = svd(torch.stack([fast, slow]), 8, niter=1)
    assert steps[:2] == [(2, 2, "cholesky_qr2"), (1, 1, "cholesky_qr2")]
    assert sum(count for _, count, _ in steps) <= 17
    assert torch.allclose(found[0][0], fast_found[0])
    U, sigma, Vh = (part[1] for part in found)
    residual = torch.linalg.vector_norm(slow @ Vh.T - U * sigma, dim=0).max() / sigma[0]
    steps.clear()
    patience = subspace.TOLERANCE
    monkeypatch.setattr(subspace, "TOLERANCE", float("inf"))
    U, sigma, Vh = svd(slow, 8, niter=1)
    without = torch.linalg.vector_norm(slow @ Vh.T - U * sigma, dim=0).max() / sigma[0]
    assert steps == [(1, 2, "cholesky_qr2")] and residual <= 1.1 * patience < without


@pytest.mark.parametrize("sigma", [SPECTRA["zero"](40), SPECTRA["rank 3"](40)], ids=["zero", "rank 3"])
def test_where_cholesky_fails_householder_takes_over_for_that_matrix_alone(steps, sigma):
    bad = matrix((40, 60), sigma, 0, torch.float32)
    good = matrix((40, 60), SPECTRA["power law"](40), 1, torch.float32)
    U, _, Vh = svd(torch.stack([good, bad]), 6, niter=2)
    assert steps == [(2, 3, "cholesky_qr2"), (1, 3, "householder_qr")]
    assert off(U) <= 1e-5 and off(Vh.mT) <= 1e-5


@pytest.fixture
def two_threads() -> Iterator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(former)


def test_a_stack_and_vmap_give_what_single_matrices_give(two_threads):
    W = torch.stack([matrix((60, 45), SPECTRA[name](45), i, torch.float32) for i, name in enumerate(SPECTRA)])
    single = [svd(each, 5, niter=3) for each in W]
    for U, sigma, Vh in (svd(W, 5, niter=3), torch.func.vmap(lambda each: svd(each, 5, niter=3))(W)):
        for i, (u, s, vh) in enumerate(single):
            assert torch.allclose(s, sigma[i], rtol=0, atol=1e-5 * s[0])
            assert torch.allclose((u * s) @ vh, (U[i] * sigma[i]) @ Vh[i], rtol=0, atol=1e-4 * s[0])
    assert torch.get_num_threads() == 2
    nested = torch.func.vmap(lambda each: svd(each, 5, niter=3)[1])(W[:6].unflatten(0, (2, 3)))
    assert torch.allclose(nested.flatten(0, 1), torch.stack([s for _, s, _ in single[:6]]), atol=1e-5)


def test_the_precision_of_matrix_products_is_put_back():
    matmul = torch.backends.cuda.matmul
    former = matmul.fp32_precision
    with pytest.raises(ValueError), subspace.precision("tf32"):
        assert matmul.fp32_precision == "tf32"
        raise ValueError
    svd(torch.randn(40, 40), 3, niter=2)
    assert matmul.fp32_precision == former


# batches of sites


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.ModuleList(nn.Linear(20, 30) for _ in range(5))
        self.back = nn.ModuleList(nn.Linear(30, 20) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for wide, back in zip(self.wide, self.back, strict=True):
            x = x + back(wide(x).tanh())
        return x


def captured() -> sp.Program:
    torch.manual_seed(0)
    return sp.capture(Net().double(), torch.randn(2, 20, dtype=torch.float64))


@pytest.fixture(scope="module")
def program() -> sp.Program:
    return captured()


@pytest.fixture
def batching(monkeypatch) -> None:
    """Batches of three, as on CUDA."""
    monkeypatch.setitem(initial_values.BATCH_BYTES, "cpu", 3 * 20 * 30 * 8)


@pytest.fixture
def widths(monkeypatch) -> list[int]:
    """Matrices in every batch that goes through vmap."""
    seen, batched = [], initial_values.batched

    def noted(method, sites, W):
        values = batched(method, sites, W)
        seen.append(len(W) if values is not None else 0)
        return values

    monkeypatch.setattr(initial_values, "batched", noted)
    return seen


@pytest.mark.parametrize(
    "method",
    [PiSSA(r=3, niter=2), PiSSA(r=3), DoRA(of=PiSSA(r=2, alpha=4.0)), SVDiff(), SpectralAdditive(r=2), LoRADash(r=2)],
    ids=lambda method: method.name,
)
def test_batched_starting_values_are_those_of_single_sites(program, method, monkeypatch, widths):
    single = sp.rewrite(program, method)
    assert not widths
    monkeypatch.setitem(initial_values.BATCH_BYTES, "cpu", 3 * 20 * 30 * 8)
    together = sp.rewrite(program, method)
    assert widths == [3, 2, 3, 2]
    assert [n for n, _ in single.module.named_parameters()] == [n for n, _ in together.module.named_parameters()]
    for (name, one), (_, two) in zip(single.tensors(), together.tensors(), strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12), name
        assert two.untyped_storage().nbytes() == two.nbytes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("method", [PiSSA(r=8, niter=4), PiSSA(r=8)], ids=["fast", "exact"])
def test_cuda_agrees_with_the_cpu(method, widths):
    torch.manual_seed(0)
    model, x = Net().float(), torch.randn(2, 20)
    for layer in (*model.wide, *model.back):
        layer.weight.data = matrix(tuple(layer.weight.shape), 0.5 ** torch.arange(20), 0, torch.float32)
    host = sp.rewrite(sp.capture(model, x), method)
    device = sp.rewrite(sp.capture(model.cuda(), x.cuda()), method)
    assert widths == [5, 5]
    there = dict(device.tensors())
    for site in host.adapters[0].sites:
        paths = host.adapters[0].paths(site)
        one, two = (t[paths["B0"]].cpu() @ t[paths["A0"]].cpu() for t in (dict(host.tensors()), there))
        assert torch.allclose(one, two, rtol=0, atol=1e-5)


def test_a_fused_weight_is_batched_by_its_row_blocks(program, batching, widths):
    sp.rewrite(program, sp.passes.Blocks(of=PiSSA(r=2), only=("q", "v")), where="wide.*")
    assert widths == [3, 2]


class Named(sp.Method):
    """φ(W) = W + diag(v), v from the site's name"""

    name = "named"

    def tensors(self, site):
        return {"v": sp.trainable(site.out_features)}

    def prepare(self, site, W):
        return {"v": W[:, 0] * len(site.name) + int(site.name.split(".")[1])}

    def weight(self, W, v):
        return v[:, None] * W


class Branching(Named):
    """φ(W) = diag(v) W, v from a branch on values"""

    name = "branching"

    def prepare(self, site, W):
        return {"v": W[:, 0] if W[0, 0] > 0 else -W[:, 0]}


class Raising(Named):
    """φ(W) = diag(v) W, and an error at one site"""

    name = "raising"

    def prepare(self, site, W):
        if site.name == "wide.4.weight":
            raise sp.MethodError(f"no start at {site.name}")
        return {"v": W[:, 0]}


class Wrong(Named):
    """φ(W) = diag(v) W, with a slip of the pen"""

    name = "wrong"

    def prepare(self, site, W):
        return {"v": W[:, 0] @ torch.ones(len(W) + 1, dtype=W.dtype)}


class Hungry(Named):
    """φ(W) = diag(v) W, out of memory where more than `most` matrices come at once"""

    name = "hungry"
    most: int = 2

    def prepare(self, site, W):
        if torch._C._functorch.is_batchedtensor(W) and len(torch._C._functorch.get_unwrapped(W)) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if not self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"v": W[:, 0]}


@pytest.mark.parametrize(("method", "why"), [(Named(), "its name"), (Branching(), "control flow")],
                         ids=["name", "branch"])  # fmt: skip
def test_a_prepare_that_cannot_be_batched_runs_site_by_site_and_says_so(program, method, why, monkeypatch, widths):
    single = sp.rewrite(program, method)
    monkeypatch.setitem(initial_values.BATCH_BYTES, "cpu", 3 * 20 * 30 * 8)
    with pytest.warns(sp.MethodWarning, match=rf"{method.name}.*site by site.*{why}"):
        together = sp.rewrite(program, method)
    assert widths == [0, 0]
    for (name, one), (_, two) in zip(single.tensors(), together.tensors(), strict=True):
        assert torch.equal(one, two), name


def test_errors_of_a_batch_are_those_of_the_site(program, batching):
    with pytest.raises(sp.MethodError, match=r"no start at wide\.4\.weight"):
        sp.rewrite(program, Raising(), where="wide.*")
    with pytest.raises(sp.MethodError, match=r"pissa at wide\.0\.weight: r = 21 exceeds"):
        sp.rewrite(program, PiSSA(r=21), where="wide.*")


def test_a_slip_in_prepare_is_told_as_it_is_without_batches(program, batching, recwarn):
    with pytest.raises(RuntimeError, match="inconsistent tensor size, expected tensor .30. .* .31."):
        sp.rewrite(program, Wrong(), where="wide.*")
    assert not [w for w in recwarn if issubclass(w.category, sp.MethodWarning)]


def test_out_of_memory_halves_the_batch(program, monkeypatch, recwarn):
    single = sp.rewrite(program, Hungry(), where="wide.*")
    monkeypatch.setitem(initial_values.BATCH_BYTES, "cpu", 5 * 20 * 30 * 8)
    seen, batched = [], initial_values.batched

    def counted(method, sites, W):
        seen.append(len(W))
        return batched(method, sites, W)

    monkeypatch.setattr(initial_values, "batched", counted)
    together = sp.rewrite(program, Hungry(), where="wide.*")
    assert seen == [5, 2, 2]
    for (name, one), (_, two) in zip(single.tensors(), together.tensors(), strict=True):
        assert torch.equal(one, two), name
    assert not [w for w in recwarn if issubclass(w.category, sp.MethodWarning)]


def test_out_of_memory_at_one_site_names_it(program, batching):
    with pytest.raises(sp.MethodError, match=r"hungry at wide\.0\.weight: .* memory"):
        sp.rewrite(program, Hungry(most=0), where="wide.*")


@pytest.mark.parametrize("method", [PiSSA(r=2, niter=1), DoRA(of=PiSSA(r=2))], ids=["pissa", "dora"])
def test_a_zero_weight_is_named_in_a_batch_too(method, batching):
    model = Net()
    model.back[1].weight.data.zero_()
    program = sp.capture(model, torch.randn(2, 20))
    with pytest.raises(sp.MethodError, match=r"pissa at back\.1\.weight: W is zero"):
        sp.rewrite(program, method)


def test_a_value_that_is_not_finite_is_named(program):
    class Infinite(Named):
        """φ(W) = diag(v) W from infinity"""

        name = "infinite"

        def prepare(self, site, W):
            return {"v": W[:, 0] / (0 if "back.3" in site.name else 1)}

    with pytest.raises(sp.MethodError, match=r"infinite at back\.3\.weight: the starting value of 'v' is not finite"):
        sp.rewrite(program, Infinite())


# the cache


@pytest.fixture
def decompositions(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of what torch.linalg.svd is called on."""
    seen, exact = [], torch.linalg.svd

    def noted(W, *args, **options):
        seen.append(tuple(W.shape))
        return exact(W, *args, **options)

    monkeypatch.setattr(torch.linalg, "svd", noted)
    return seen


def same(one: sp.Program, two: sp.Program) -> bool:
    pairs = zip(one.tensors(), two.tensors(), strict=True)
    return all(n == m and torch.equal(a, b) for (n, a), (m, b) in pairs)


def test_a_rerun_finds_its_decompositions(program, tmp_path, decompositions):
    first = sp.rewrite(program, PiSSA(r=3), cache=tmp_path / "svd")
    assert len(decompositions) == len(list((tmp_path / "svd").iterdir())) == 10
    again = sp.rewrite(program, PiSSA(r=3), cache=tmp_path / "svd")
    assert len(decompositions) == 10 and same(first, again) and same(first, sp.rewrite(program, PiSSA(r=3)))
    assert len(decompositions) == 20
    sp.rewrite(program, PiSSA(r=2), where="wide.0", cache=tmp_path / "svd")
    assert len(decompositions) == 21


def test_a_changed_weight_misses(tmp_path, decompositions):
    program = captured()
    sp.rewrite(program, PiSSA(r=3), cache=tmp_path)
    weight = program.module.get_parameter("back.2.weight")
    weight.data[3, 4] = torch.nextafter(weight.data[3, 4], torch.tensor(9.0, dtype=torch.float64))
    decompositions.clear()
    found = sp.rewrite(program, PiSSA(r=3), cache=tmp_path)
    assert len(decompositions) == 1 and same(found, sp.rewrite(program, PiSSA(r=3)))


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_computed_again_with_a_warning(program, tmp_path, damage):
    first = sp.rewrite(program, PiSSA(r=3), cache=tmp_path)
    path = sorted(tmp_path.iterdir())[0]
    whole = path.read_bytes()
    flipped = whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:]
    path.write_bytes({"cut": whole[:-100], "flipped": flipped, "empty": b"", "foreign": b"x" * 99}[damage])
    with pytest.warns(sp.CacheWarning, match=f"{path.name} is damaged"):
        assert same(first, sp.rewrite(program, PiSSA(r=3), cache=tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error", sp.CacheWarning)
        assert same(first, sp.rewrite(program, PiSSA(r=3), cache=tmp_path))
    assert path.read_bytes() == whole


def test_a_pipeline_keeps_its_cache_in_its_folder(program, tmp_path, decompositions):
    pipeline = Pipeline.read("pissa{r=3,where=wide.*,cache=svd}")
    assert str(pipeline) == "pissa{r=3,where=wide.*,cache=svd}"
    for _ in range(2):
        list(pipeline.run(State(program=program, folder=tmp_path)))
    assert len(decompositions) == len(list((tmp_path / "svd").iterdir())) == 5


def test_a_cache_that_cannot_be_written_is_an_error(program, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(sp.MethodError, match="cannot be written"):
        sp.rewrite(program, PiSSA(r=3), cache=tmp_path / "file")


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 9), dtype=st.sampled_from(DTYPES), data=st.data())
def test_the_hash_sees_every_bit_and_every_place(rows, columns, dtype, data):
    W = torch.arange(rows * columns, dtype=dtype).reshape(rows, columns)
    index = data.draw(st.integers(0, W.numel() * W.itemsize * 8 - 1))
    changed = W.clone()
    changed.view(torch.uint8).view(-1)[index // 8] ^= 1 << index % 8
    pair = content_hash(W)
    assert pair == content_hash(W.clone()) and all(0 <= part < 2**64 for part in pair)
    assert all(one != two for one, two in zip(pair, content_hash(changed), strict=True))
    if W.numel() > 1:
        assert all(one != two for one, two in zip(pair, content_hash(W.flatten().roll(1)), strict=True))


def test_the_hash_of_a_weight_does_not_hang_on_slices(monkeypatch):
    W = torch.randn(30, 40)
    whole = content_hash(W)
    monkeypatch.setattr("subgraph_peft.compiler.factor_cache.SLICE", 7)
    assert content_hash(W) == whole != content_hash(W.T)


def test_a_key_names_the_method_and_the_site(tmp_path):
    W, cache = torch.randn(20, 30), Cache(tmp_path)
    sites = [sp.Site(name, "linear", (20, 30), torch.float32, ()) for name in ("a", "b")]
    made = [cache.key(method, site, W) for method in (PiSSA(r=2), PiSSA(r=3), DoRA(of=PiSSA(r=2))) for site in sites]
    assert len(set(made)) == 6 and cache.key(PiSSA(r=2), sites[0], W.clone()) == made[0]
