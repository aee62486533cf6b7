"""Masked sums: what is behind a mask does not exist, and micro-batches add up."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_kit.reduce import chunks, masked_sum


def values_and_mask(seed: int = 0, shape=(5, 7)):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    return values.requires_grad_(), torch.rand(shape, generator=generator) < 0.6


def test_masked_is_sliced():
    values, mask = values_and_mask()
    sliced = values.detach()[mask].requires_grad_()
    ours, theirs = masked_sum(values, mask), sliced.sum()
    torch.testing.assert_close(ours.sum, theirs)
    assert ours.count == mask.sum()
    ours.sum.backward()
    assert torch.equal(values.grad, mask.float())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nothing_gets_through_a_mask(bad):
    values, mask = values_and_mask()
    with torch.no_grad():
        values[~mask] = bad
    value = masked_sum(values, mask)
    torch.testing.assert_close(value.sum, values.detach()[mask].sum())
    (value.sum * 3).backward()
    assert torch.equal(values.grad, 3 * mask.float())


def test_without_a_mask_every_position_counts():
    values, mask = values_and_mask()
    ours, theirs = masked_sum(values), masked_sum(values, torch.ones_like(mask))
    assert torch.equal(ours.sum, theirs.sum)
    assert ours.count == theirs.count == 35


def test_micro_batches_add_up():
    values, mask = values_and_mask(shape=(8, 7))
    whole = masked_sum(values, mask)
    parts = [masked_sum(values[i : i + 2], mask[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(sum(p.sum for p in parts), whole.sum)
    assert sum(p.count for p in parts) == whole.count
    torch.testing.assert_close(sum(p.sum for p in parts) / sum(p.count for p in parts), whole.mean)


def test_sums_in_float32():
    # in float16 the sum would stand still at 2,048
    value = masked_sum(torch.ones(5000, dtype=torch.float16), torch.ones(5000, dtype=torch.bool))
    assert value.sum.dtype == value.count.dtype == torch.float32
    assert value.sum == value.count == 5000
    assert masked_sum(torch.ones(5000, dtype=torch.float16)).sum == 5000


def test_an_empty_mask_is_zero_with_gradient():
    values, mask = values_and_mask()
    value = masked_sum(values, torch.zeros_like(mask))
    assert value.sum == value.count == value.mean == 0
    value.sum.backward()
    assert not values.grad.any()


def test_the_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"masked_sum: .*\(5, 7\).*\(5, 6\)"):
        masked_sum(torch.zeros(5, 7), torch.zeros(5, 6, dtype=torch.bool))


@given(st.integers(0, 60), st.integers(1, 20))
def test_chunks_cover_the_range_once(length, size):
    parts = list(chunks(length, size))
    assert [i for part in parts for i in range(length)[part]] == list(range(length))
    assert all(0 < part.stop - part.start <= size for part in parts)


def test_chunks_of_no_size():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        list(chunks(3, 0))
