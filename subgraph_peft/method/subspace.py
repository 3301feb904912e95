"""The largest singular triplets of a stack of matrices, by randomised subspace iteration with a residual test."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

import torch

OVERSAMPLING = 8  # columns of the subspace beyond the rank
TOLERANCE = 0.15  # of σ₁: the largest residual that `niter` iterations may leave
MOST_ITERATIONS = 16  # that the residual test goes to
SOUND = 0.1  # ‖Qᵀ Q − I‖ after one pass of CholeskyQR, up to which the second reaches rounding
SMALL = 512  # rows of matrices that LAPACK decomposes, one a thread, faster than a GPU does one after the other

Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
QR = Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


class Iterate(NamedTuple):
    """U [n, out, r], σ [n, r], Vh [n, r, in]; P [n, in, l], from which to go on; on the host, residuals [n] over σ₁"""

    U: torch.Tensor
    sigma: torch.Tensor
    Vh: torch.Tensor
    P: torch.Tensor
    residual: torch.Tensor

    def replaced(self, rows: torch.Tensor, by: "Iterate") -> "Iterate":
        pairs = zip(self, by, strict=True)
        return Iterate(*(old.index_copy(0, rows.to(old.device), new) for old, new in pairs))


@torch.library.custom_op("subgraph_peft::subspace", mutates_args=())
def subspace(W: torch.Tensor, r: int, niter: int) -> Triplets:
    """U [n, out, r], σ [n, r], Vh [n, r, in] of W [n, out, in], float32 or float64; r + 8 < min(out, in)

    P ← orth(Wᵀ orth(W P)), `niter` + 1 times from a random P [in, r + 8] that is the same for every matrix; then the
    singular value decomposition of R [r + 8, r + 8], where Wᵀ Q = P R. On CUDA, products with W run in tf32 in the
    first two thirds of the iterations, whose rounding the others take out; everything else in W's dtype or wider.

    The residual test: ‖W v − σ u‖ = sin θ ‖(I − Q Qᵀ) W w‖, with θ the angle between v and the subspace one iteration
    before, and w the direction of v outside it. The norm is taken as the smallest singular value found, and costs no
    product with W. Where the largest of these exceeds 0.15 σ₁, the matrix iterates as often again, up to 16 times.

    A stack waits for the device once if every matrix passes. What a matrix gets depends on its stack by rounding only.
    Source: Halko et al. 2011, "Finding structure with randomness", Algorithm 4.4.
    """
    generator = torch.Generator(W.device).manual_seed(0)
    P = torch.randn(1, W.shape[-1], r + OVERSAMPLING, generator=generator, device=W.device, dtype=W.dtype)
    P, _ = cholesky_pass(P, gram(P))
    found = iterate(W, P.expand(len(W), -1, -1), r, niter + 1, tf32=(2 * niter + 1) // 3)
    while niter < MOST_ITERATIONS and (slow := found.residual > TOLERANCE).any():
        rows = slow.nonzero()[:, 0].to(W.device)
        more = min(max(niter, 1), MOST_ITERATIONS - niter)
        found = found.replaced(rows, iterate(W[rows], found.P[rows], r, more))
        niter += more
    return found.U, found.sigma, found.Vh


@subspace.register_fake
def _(W: torch.Tensor, r: int, niter: int) -> Triplets:
    n, rows, columns = W.shape
    return W.new_empty(n, rows, r), W.new_empty(n, r), W.new_empty(n, r, columns)


@subspace.register_vmap
def _(info: object, dims: tuple[int, None, None], W: torch.Tensor, r: int, niter: int) -> tuple[Triplets, tuple]:
    """A batch of stacks is one stack."""
    batch = W.movedim(dims[0], 0)
    found = subspace(batch.flatten(0, 1), r, niter)
    return tuple(part.unflatten(0, batch.shape[:2]) for part in found), (0, 0, 0)


def iterate(W: torch.Tensor, P: torch.Tensor, r: int, steps: int, tf32: int = 0, qr: QR | None = None) -> Iterate:
    """`steps` iterations from an orthonormal P, the first `tf32` of them in that precision. By CholeskyQR2; matrices
    for which that is not accurate start again by Householder QR."""
    orth, begin = qr or cholesky_qr2, P
    host = "cpu" if P.shape[-1] <= SMALL else W.device
    with precision("ieee"):
        for step in range(steps):
            last, final, mode = P, step == steps - 1, "tf32" if step < tf32 else "ieee"
            with precision(mode):
                Y = W @ P
            Q, _, left = orth(Y, final)
            with precision(mode):
                Z = W.mT @ Q
            P, R, right = orth(Z, final)
        R, overlap, sound = (part.to(host) for part in (R.mT, last.mT @ P, torch.maximum(left, right) <= SOUND))
        U, sigma, Vh = small_svd(R.where(sound[:, None, None], 0))
        inside = torch.linalg.vector_norm(overlap @ Vh[:, :r].mT, dim=1).amin(1)
        residual = (1 - inside.square()).clamp_min(0).sqrt() * sigma[:, -1] / sigma[:, 0]
        U, sigma, Vh = U.to(W.device), sigma.to(W.device), Vh.to(W.device)
        found = Iterate(Q @ U[..., :r], sigma[:, :r].clone(), Vh[:, :r] @ P.mT, P, residual.nan_to_num(0).cpu())
    if qr is None and not sound.all():
        rows = (~sound).nonzero()[:, 0].to(W.device)
        return found.replaced(rows, iterate(W[rows], begin[rows], r, steps, tf32, householder_qr))
    return found


def cholesky_qr2(Y: torch.Tensor, final: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Y = Q R for Y [n, m, l] by products of matrices, and how far Q [n, m, l] is from orthonormal after one pass,
    ‖Qᵀ Q − I‖ [n]. A second pass, where it is `final`, makes Q orthonormal to rounding; a basis to go on from is good
    without, and counts as exact.

    R [n, l, l] is the Cholesky factor of the Gram matrix in float64: with float32 factors that serves condition numbers
    up to about 1e6. Sources: Fukaya et al. 2014, "CholeskyQR2"; Yamazaki et al. 2015 (a wider Gram matrix).
    """
    Q, R = cholesky_pass(Y, gram(Y))
    if not final:
        return Q, R, Y.new_zeros(len(Y), dtype=torch.float64)
    G = gram(Q)
    error = torch.linalg.matrix_norm(G - torch.eye(G.shape[-1], dtype=G.dtype, device=G.device))
    Q, second = cholesky_pass(Q, G)
    return Q, (second @ R).to(Y.dtype), error


def gram(Y: torch.Tensor) -> torch.Tensor:
    wide = Y.double()
    return wide.mT @ wide


def cholesky_pass(Y: torch.Tensor, G: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Q = Y R⁻¹ and R in float64, where G = Yᵀ Y = Rᵀ R; NaN where G is not positive definite."""
    L, failed = torch.linalg.cholesky_ex(G)
    L = L.masked_fill(failed[:, None, None] != 0, torch.nan)
    identity = torch.eye(G.shape[-1], dtype=G.dtype, device=G.device).expand_as(G)
    inverse = torch.linalg.solve_triangular(L, identity, upper=False)
    return Y @ inverse.mT.to(Y.dtype), L.mT


def householder_qr(Y: torch.Tensor, final: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    Q, R = torch.linalg.qr(Y)
    return Q, R, Y.new_zeros(len(Y), dtype=torch.float64)


def small_svd(R: torch.Tensor) -> Triplets:
    """U, σ, Vh of every R [n, l, l]; on the CPU as many at a time as there are threads."""
    threads = torch.get_num_threads()
    if R.device.type != "cpu" or threads == 1 or len(R) == 1:
        return torch.linalg.svd(R)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            found = list(pool.map(torch.linalg.svd, R))
    finally:
        torch.set_num_threads(threads)
    U, sigma, Vh = map(torch.stack, zip(*found, strict=True))
    return U, sigma, Vh


@contextmanager
def precision(mode: str) -> Iterator[None]:
    """Products of float32 matrices on CUDA in "ieee" or "tf32"."""
    former = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = mode
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = former
