"""Looking inside a trained adapter: what an update ΔW = φ(W) − W is, set against W and against another update."""

import zlib
from collections.abc import Iterator, Sequence

import torch
from tqdm import tqdm

from ..base.errors import AnalysisError
from ..method.adapter import Target, targets
from ..method.svd import svd
from ..program.program import Program
from ..program.selectors import Where, select
from .results import Analysis, Overlap, Similarity, SiteAnalysis, Spectrum

EXACT_UP_TO = 2048  # min(out, in) of the largest matrix that is decomposed exactly
TRIPLETS = 256  # singular triplets of a larger one
DIRECTIONS = 64  # the most directions that a site is looked at in unless `k` says otherwise: the paper's largest rank

Factors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@torch.no_grad()
def analyze(program: Program, other: Program | None = None, *, k: int | None = None, where: Where = "*") -> Analysis:
    """Spectra of W and ΔW = φ(W) − W, the overlap of the two, and φ(i, j) with another update, at every weight.

    other: a program with other adapters on the same weights (another seed, rank or method). Two runs that start from
           the same random factors agree in part before they train: give them different seeds
    k:     directions to look at; by default the numerical rank of each update (the r of a low-rank method), at most 64.
           Overlap.r and Overlap.k say how many a site had
    where: see `select`; every adapted weight by default, heads and embeddings too

    ΔW is evaluated in float64 and decomposed in float32, or in the weight's dtype where wider, on the program's device;
    exactly for min(out, in) ≤ 2048, else for the 256 largest singular values (Spectrum.exact says which).
    Biases and methods that act on activations have no ΔW: Analysis.left_out lists them.
    Raises AnalysisError, SelectorError.
    """
    if k is not None and k < 1:
        raise AnalysisError(f"k = {k} directions cannot be looked at; give 1 or more, or leave it out.")
    mine = weight_targets(program)
    theirs = {} if other is None else weight_targets(other)
    known = [target.site for target in (theirs | mine).values()]
    chosen = [site.name for site in select(known, where, kinds=sorted({site.kind for site in known})).sites]
    reasons = dict(left_out(program))
    if other is not None:
        check_comparable([name for name in chosen if name in mine and name in theirs], mine, theirs)
        reasons |= {name: "not in the other program: no similarity" for name in chosen if name not in theirs}
        reasons |= {name: "only in the other program" for name in chosen if name not in mine}
    held = dict(program.tensors())
    compared = {} if other is None else dict(other.tensors())
    entries = tuple(
        analyze_site(mine[name], held, k, theirs.get(name), compared)
        for name in tqdm(chosen, desc="analyze", unit="site", leave=False, disable=None)
        if name in mine
    )
    names = tuple(adapter.name for adapter in program.adapters)
    others = () if other is None else tuple(adapter.name for adapter in other.adapters)
    return Analysis(program.source, names, entries, others, tuple(reasons.items()))


def weight_targets(program: Program) -> dict[str, Target]:
    """The rewritten weights by name, or an error where there is none or none to see."""
    if not isinstance(program, Program):
        raise AnalysisError(f"analyze takes a program with adapters, not {type(program).__name__}.")
    program.need_values("look at", AnalysisError)
    every = [target for target in targets(program.adapters) if target.part == "weight"]
    found = {target.name: target for target in every if not target.site.stack}
    if every and not found:
        raise AnalysisError(
            f"{every[0].name} holds {every[0].site.stack} matrices (experts): analyze looks at one a site."
        )
    if not found:
        what = ", ".join(adapter.name for adapter in program.adapters)
        what = f"{what} changes no matrix" if what else "it has no adapters; once folded, W and φ(W) are not kept apart"
        raise AnalysisError(f"{program.source} has no update to look at: {what}. Analyze a program after `rewrite`.")
    return found


def left_out(program: Program) -> Iterator[tuple[str, str]]:
    for name, _ in program.parameters(trainable=True):
        if name in dict(program.captured.module.named_parameters()):
            yield name, "trained in full, not by an adapter"
    for target in targets(program.adapters):
        if target.part == "bias":
            yield target.name, "a vector has no singular directions"
        if target.part == "weight" and target.site.stack:
            yield target.name, f"holds {target.site.stack} matrices (experts)"
    for adapter in program.adapters:
        if not (adapter.method.defines("weight") or adapter.method.defines("bias")):
            yield from ((site.name, f"{adapter.name} acts on activations: there is no ΔW") for site in adapter.sites)


def check_comparable(common: Sequence[str], mine: dict[str, Target], theirs: dict[str, Target]) -> None:
    if not common:
        raise AnalysisError(
            f"The programs have no selected weight in common: one rewrites {next(iter(mine))} …, the other "
            f"{next(iter(theirs))} …. Compare adapters of the same sites."
        )
    for name in common:
        if mine[name].site.shape != theirs[name].site.shape:
            raise AnalysisError(
                f"{name} is {list(mine[name].site.shape)} in one program and {list(theirs[name].site.shape)} in the "
                "other: compare adapters of the same model."
            )


def analyze_site(
    target: Target,
    tensors: dict[str, torch.Tensor],
    k: int | None,
    twin: Target | None,
    twin_tensors: dict[str, torch.Tensor],
) -> SiteAnalysis:
    W, delta = update(target, tensors)
    base_factors, update_factors = decompose(W), decompose(delta)
    base = spectrum(W, base_factors)
    change = spectrum(delta, update_factors, floor=base.norm)
    shape = (W.shape[0], W.shape[1])
    if not change.rank:
        return SiteAnalysis(target.name, shape, base, change, None)
    r = min(change.rank, k or DIRECTIONS)
    overlap = overlap_of(target.name, W, delta, base_factors, update_factors, r, min(k or r, base.rank))
    similarity = None
    if twin is not None:
        W, delta = update(twin, twin_tensors)
        factors = tuple(factor.to(base_factors[0].device) for factor in decompose(delta))
        theirs = spectrum(delta, factors, floor=norm_of(W))
        if theirs.rank:
            similarity = similarity_of(update_factors, factors, r, min(theirs.rank, k or DIRECTIONS))
    return SiteAnalysis(target.name, shape, base, change, overlap, similarity)


def update(target: Target, tensors: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """W and ΔW [out, in]: their difference is taken in float64, so that ΔW keeps its own precision."""
    wide = torch.promote_types(tensors[target.name].dtype, torch.float32)
    W = target.read(tensors, torch.float64)
    delta = target.evaluate(tensors, torch.float64) - W
    if not torch.isfinite(delta).all():
        raise AnalysisError(
            f"The update of {target.name} holds values that are not finite: the training diverged. Go back to an "
            "earlier checkpoint."
        )
    return W.to(wide), delta.to(wide)


def decompose(M: torch.Tensor) -> Factors:
    """U [out, n], σ [n], Vh [n, in]: n = min(out, in), or TRIPLETS of a larger matrix, approximately."""
    return svd(M) if min(M.shape) <= EXACT_UP_TO else svd(M, TRIPLETS, niter=4)


def spectrum(M: torch.Tensor, factors: Factors, floor: float = 0.0) -> Spectrum:
    """floor: rank 0 where ‖M‖_F is not above this norm's rounding."""
    sigma, eps = factors[1], torch.finfo(M.dtype).eps
    norm = norm_of(M)
    rank = int((sigma > max(M.shape) * eps * sigma[0]).sum()) if norm > eps * floor else 0
    return Spectrum(tuple(sigma.tolist()), norm, rank, min(M.shape) <= EXACT_UP_TO)


def norm_of(M: torch.Tensor) -> float:
    """‖M‖_F, summed in float64."""
    return torch.linalg.vector_norm(M, dtype=torch.float64).item()


def overlap_of(
    name: str, W: torch.Tensor, delta: torch.Tensor, base: Factors, update: Factors, r: int, k: int
) -> Overlap:
    U, V = base[0][:, :k], base[2][:k].T
    total = norm_of(delta)

    def share(part: torch.Tensor) -> float:
        return (norm_of(part) / total) ** 2

    def projected(U: torch.Tensor, V: torch.Tensor) -> float:
        return norm_of(U.T @ W @ V)

    return Overlap(
        r=r,
        k=k,
        norm=total,
        projected_update=projected(update[0][:, :r], update[2][:r].T),
        projected_base=projected(base[0][:, :r], base[2][:r].T),
        projected_random=projected(*random_directions(name, W, r)),
        inside=share(U.T @ delta @ V),
        left=share(U.T @ delta),
        right=share(delta @ V),
        chance=k**2 / W.numel(),
    )


def random_directions(name: str, W: torch.Tensor, r: int) -> Sequence[torch.Tensor]:
    """Singular directions of a matrix of normal numbers, drawn as what they are: independent random frames."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return [torch.linalg.qr(torch.randn(size, r, generator=generator).to(W)).Q for size in W.shape]


def similarity_of(one: Factors, two: Factors, i: int, j: int) -> Similarity:
    def phi(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        """φ of the leading columns: sums over the leading blocks of squared cosines."""
        sums = (first.double().T @ second.double()).square().cumsum(0).cumsum(1).cpu()
        sizes = torch.minimum(torch.arange(1, i + 1)[:, None], torch.arange(1, j + 1))
        return (sums / sizes).clamp(0, 1)

    right = phi(one[2][:i].T, two[2][:j].T)
    left = phi(one[0][:, :i], two[0][:, :j])
    return Similarity(right, left, (one[0].shape[0], one[2].shape[1]))
