"""Singular value decompositions for methods that start from a weight's own factors."""

import torch


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
