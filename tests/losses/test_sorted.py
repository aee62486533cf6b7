"""The sorted distance against Python's own sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_kit.losses import sorted_distance, sorted_distance_cells


def naive(student, teacher, k=None):
    """Row by row: sort, fill up with zeros, fold what lies beyond k into one cell, add up the differences."""
    out = []
    for s, t in zip(student.double(), teacher.detach().double(), strict=True):
        sides = []
        for row in (s, t):
            probs = [row[i].exp() for i in sorted(range(len(row)), key=row.tolist().__getitem__, reverse=True)]
            probs += [torch.zeros((), dtype=torch.float64)] * (max(len(s), len(t)) - len(probs))
            if k is not None:
                probs = [*probs[:k], sum(probs[k:], torch.zeros((), dtype=torch.float64))]
            sides.append(probs)
        width = max(map(len, sides))
        sides = [side + [torch.zeros((), dtype=torch.float64)] * (width - len(side)) for side in sides]
        out.append(sum((x - y).abs() for x, y in zip(*sides, strict=True)))
    return torch.stack(out)


def both_sides(seed: int, a: int = 9, b: int = 13, rows: int = 3):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, a, generator=generator).mul(2).requires_grad_()
    return logits, torch.randn(rows, b, generator=generator).mul(2).log_softmax(-1)


@given(
    seed=st.integers(0, 1000), a=st.integers(1, 12), b=st.integers(1, 12), k=st.sampled_from([None, 1, 2, 5, 11, 40])
)
def test_is_the_naive_sum_value_and_gradient(seed, a, b, k):
    logits, teacher = both_sides(seed, a, b)
    student = logits.log_softmax(-1)
    weights = torch.arange(1.0, 4.0)
    ours, theirs = sorted_distance(student, teacher, k=k), naive(student, teacher, k)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4)


@given(seed=st.integers(0, 1000), a=st.integers(1, 12), b=st.integers(2, 12), k=st.integers(1, 11))
def test_a_teacher_cut_before_is_a_teacher_cut_here(seed, a, b, k):
    k = min(k, b - 1)
    logits, teacher = both_sides(seed, a, b)
    student = logits.log_softmax(-1)
    top = teacher.sort(-1, descending=True).values
    cells = torch.cat([top[:, :k], top[:, k:].logsumexp(-1, keepdim=True)], dim=-1)
    ours, theirs = sorted_distance_cells(student, cells), sorted_distance(student, teacher, k=k)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)


def test_values_worked_out_by_hand():
    student, teacher = torch.tensor([[0.1, 0.6, 0.3]]).log(), torch.tensor([[0.5, 0.5]]).log()
    assert sorted_distance(student, teacher).item() == pytest.approx(0.1 + 0.2 + 0.1)
    assert sorted_distance(student, teacher, k=1).item() == pytest.approx(0.1 + 0.1)
    # the tail holds what the teacher has beyond its two cells
    assert sorted_distance_cells(student, torch.tensor([[0.5, 0.3, 0.2]]).log()).item() == pytest.approx(0.1 + 0.1)


def test_which_token_is_which_does_not_matter():
    logits, teacher = both_sides(0)
    student = logits.log_softmax(-1)
    other = sorted_distance(student[:, torch.randperm(9)], teacher[:, torch.randperm(13)], k=4)
    torch.testing.assert_close(other, sorted_distance(student, teacher, k=4))
    top = teacher.sort(-1, descending=True).values
    cells = torch.cat([top[:, :4], top[:, 4:].logsumexp(-1, keepdim=True)], dim=-1)
    torch.testing.assert_close(
        sorted_distance_cells(student, cells[:, [2, 0, 3, 1, 4]]), sorted_distance_cells(student, cells)
    )


@given(seed=st.integers(0, 1000), k=st.integers(1, 13))
def test_fewer_cells_never_cost_more(seed, k):
    logits, teacher = both_sides(seed)
    student = logits.log_softmax(-1)
    assert (sorted_distance(student, teacher, k=k) <= sorted_distance(student, teacher) + 1e-6).all()


def test_the_largest_distance_is_two_nearly():
    one, spread = torch.full((1, 1000), -1e4), torch.zeros(1, 1000)
    one[0, 7] = 0
    assert sorted_distance(one, spread.log_softmax(-1)).item() == pytest.approx(2 * 0.999, abs=1e-4)


def test_a_cell_without_mass_and_a_vocabulary_smaller_than_the_cells():
    student = torch.tensor([[0.75, 0.25]]).log().requires_grad_()
    teacher = torch.tensor([[0.5, 0.0, 0.25, 0.125, 0.125]]).log()
    ours = sorted_distance_cells(student, teacher)
    assert ours.item() == pytest.approx(0.25 + 0 + 0.125 + 0 + 0.125)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    assert gradient.isfinite().all()


def test_padding_with_impossible_tokens_changes_nothing():
    logits, teacher = both_sides(1)
    student = logits.log_softmax(-1)
    padded = torch.nn.functional.pad(student, (2, 3), value=-math.inf)
    ours, theirs = sorted_distance(padded, teacher, k=5), sorted_distance(student, teacher, k=5)
    torch.testing.assert_close(ours, theirs)
    (gradient,) = torch.autograd.grad(ours.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs.sum(), logits)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("k", [0, -2])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"sorted_distance: expected k of at least 1, got {k}"):
        sorted_distance(torch.zeros(1, 3), torch.zeros(1, 3), k=k)


def test_a_tail_alone_is_refused():
    with pytest.raises(ValueError, match=r"sorted_distance_cells: .*student \(1, 3\) and teacher \(1, 1\)"):
        sorted_distance_cells(torch.zeros(1, 3), torch.zeros(1, 1))
