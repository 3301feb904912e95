"""Singular value decompositions and rotations, for methods that start from a weight's own factors."""

import torch
from torch.overrides import handle_torch_function, has_torch_function_unary

from ..base.errors import MethodError
from ..graph.site import Site
from .subspace import OVERSAMPLING, subspace


def svd(
    W: torch.Tensor, r: int | None = None, niter: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """U [out, r], σ [r], Vh [r, in] of W ≈ U diag(σ) Vh, in float32 or wider; of every matrix of W [..., out, in].

    niter: None for the exact decomposition; else randomised subspace iteration with that many power iterations, and
           more where its residual test asks for them: see `subspace`. Exact also where r + 8 ≥ min(out, in)

    Under torch.func.vmap the batch is decomposed as one stack.
    """
    W = W.to(torch.promote_types(W.dtype, torch.float32))
    k = min(W.shape[-2:])
    r = k if r is None else r
    if niter is None or r + OVERSAMPLING >= k:
        U, sigma, Vh = torch.linalg.svd(W, full_matrices=False)
        return U[..., :r], sigma[..., :r], Vh[..., :r, :]
    stack = W.shape[:-2]
    U, sigma, Vh = subspace(W.reshape(-1, *W.shape[-2:]), r, niter)
    return tuple(part.reshape(*stack, *part.shape[1:]) for part in (U, sigma, Vh))


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
