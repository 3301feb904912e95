"""Whether two models computed the same."""

from collections.abc import Sequence
from typing import Any

import torch

# largest difference, relative to the largest value, of one computation done twice
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 3e-2, torch.bfloat16: 3e-2}


def difference(expected: Any, actual: Any) -> float:
    """Largest difference relative to the largest finite expected value; 0 for what is no floating-point tensor.

    Infinities, and values that are no number, are equal to themselves.
    """
    if not isinstance(expected, torch.Tensor) or not expected.is_floating_point() or not expected.numel():
        return 0.0
    wide = torch.promote_types(expected.dtype, torch.float32)
    expected, actual = expected.to(wide), actual.to(wide)
    same = (expected == actual) | (expected.isnan() & actual.isnan())
    largest = torch.where(expected.isfinite(), expected, 0).abs().max().clamp_min(1e-12)
    return (torch.where(same, 0, expected - actual).abs().max() / largest).item()


def equal(expected: Sequence[Any], actual: Sequence[Any]) -> bool:
    """Whether flat outputs have the same shapes, integers, and floating-point values up to rounding."""

    def agree(e: Any, a: Any) -> bool:
        if not isinstance(e, torch.Tensor):
            return True
        if not isinstance(a, torch.Tensor) or a.shape != e.shape:
            return False
        return difference(e, a) <= ROUNDING[e.dtype] if e.is_floating_point() else torch.equal(e, a)

    return len(expected) == len(actual) and all(map(agree, expected, actual))
