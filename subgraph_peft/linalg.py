"""Singular value decompositions and rotations, for methods that start from a weight's own factors."""

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from .errors import MethodError
from .sites import Site


def svd(
    W: torch.Tensor, r: int | None = None, niter: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, r], σ [r], Vh [r, in] of W ≈ U diag(σ) Vh, in float32 or wider.

    niter: None for the exact decomposition; else randomised subspace iteration with that many power iterations and 8
           columns of oversampling (Halko et al. 2011, Algorithm 4.4)
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    k = min(W.shape)
    r = k if r is None else r
    if niter is None or r == k:
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[:, :r], sigma[:r], Vh[:r]
    generator = torch.Generator(W.device).manual_seed(0)
    Q = torch.randn(W.shape[1], min(r + 8, k), generator=generator, device=W.device, dtype=W.dtype)
    for _ in range(niter):
        Q = torch.linalg.qr(W @ Q).Q
        Q = torch.linalg.qr(W.T @ Q).Q
    Q = torch.linalg.qr(W @ Q).Q
    U, sigma, Vh = torch.linalg.svd(Q.T @ W, full_matrices=False)
    return (Q @ U)[:, :r], sigma[:r], Vh[:r]


def check_rank(method: str, site: Site, r: int) -> None:
    """MethodError where the matrix of a site has fewer than r singular values."""
    shape = [site.out_features, site.in_features]
    if r > min(shape):
        raise MethodError(f"{method} at {site.name}: r = {r} exceeds min(in, out) = {min(shape)} of {shape}.")


def cayley(X: torch.Tensor) -> torch.Tensor:
    """Q = (I + K)⁻¹ (I − K), K = (X − Xᵀ)/2: orthogonal for every X [r, r], and I where X = 0."""
    if has_torch_function_unary(X):
        return handle_torch_function(cayley, (X,), X)
    identity, K = torch.ones_like(X).tril().triu(), (X - X.mT) / 2
    return torch.linalg.solve(identity + K, identity - K)
