"""Samples tell values apart, not the width in which they are held."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from subgraph_peft.base.hashes import digest, sampled

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@given(st.lists(st.integers(1, 6), max_size=3), st.integers(0, 2**31))
def test_a_wider_copy_is_the_same(shape, seed):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)
    assert len({sampled(value.to(dtype)) for dtype in (torch.bfloat16, torch.float32, torch.float64)}) == 1
    assert len({digest(value.to(dtype)) for dtype in FLOATS}) == len(FLOATS)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_value_makes_a_difference(dtype):
    value = torch.ones(3, 5).to(dtype)
    other = value.clone()
    other[2, 4] = 0
    assert sampled(value) != sampled(other) and digest(value) != digest(other)
    assert sampled(value) != sampled(value.T) and digest(value) == digest(value.clone())


def test_bases_that_differ_below_float32_are_two():
    value = torch.ones(4, dtype=torch.float64)
    assert sampled(value) != sampled(value + 1e-12)
