"""One suite that every loss passes, whatever its formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit import losses
from kd_kit.losses import (
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    skew_kl,
    student_cells,
    tempered,
    top_k_cells,
)

DIVERGENCES = [forward_kl, reverse_kl, jensen_shannon, skew_kl]
BOUNDS = {jensen_shannon: math.log(2), skew_kl: -math.log(0.1)}

every = pytest.mark.parametrize("divergence", DIVERGENCES)


def both_sides(seed: int, rows: int = 5, vocab: int = 12, k: int = 4, homeless: float = 0.1, spread: float = 2.0):
    """Student logits with gradient, and the teacher's ids and cells (tail last)."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocab, generator=generator).mul(spread).requires_grad_()
    probs = torch.randn(rows, vocab, generator=generator).mul(spread).softmax(-1) * (1 - homeless)
    ids, log_probs, tail = top_k_cells(torch.cat([probs, torch.full((rows, 1), homeless)], dim=-1), k)
    return logits, ids, torch.cat([log_probs, tail.unsqueeze(-1)], dim=-1)


def naive(divergence, student, teacher):
    """The textbook sum, one cell at a time in float64, with gradient to the student."""
    out = []
    for n in range(len(teacher)):
        total = torch.zeros((), dtype=torch.float64)
        for c in range(teacher.shape[1]):
            p, q = teacher[n, c].detach().double().exp(), student[n, c].double().exp()
            if divergence is forward_kl and p > 0:
                total = total + p * (p / q).log()
            if divergence is reverse_kl and q > 0:
                total = total + q * (q / p).log()
            if divergence is jensen_shannon:
                m = (p + q) / 2
                total = total + (p * (p / m).log() / 2 if p > 0 else 0) + (q * (q / m).log() / 2 if q > 0 else 0)
            if divergence is skew_kl and p > 0:
                total = total + p * (p / (0.1 * p + 0.9 * q)).log()
        out.append(total)
    return torch.stack(out)


def test_every_loss_is_in_a_suite():
    support = {"student_cells", "tempered", "top_k_cells"}
    assert set(losses.__all__) - support == {d.__name__ for d in DIVERGENCES} | {"cross_entropy"}
    assert sorted(losses.__all__) == losses.__all__


@every
@settings(max_examples=30)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11), homeless=st.sampled_from([0.0, 0.3]))
def test_is_the_naive_sum_value_and_gradient(divergence, seed, k, homeless):
    logits, ids, teacher = both_sides(seed, k=k, homeless=homeless, rows=2)
    cells, _ = student_cells(logits, ids)
    value = divergence(cells, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
    expected = naive(divergence, cells, teacher)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(value.double(), expected, atol=2e-6, rtol=1e-4)
    torch.testing.assert_close(gradient, theirs, atol=2e-6, rtol=1e-4)


@every
@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.1, 1.0, 5.0, 30.0]))
def test_zero_when_equal_and_positive_otherwise(divergence, seed, spread):
    logits, ids, teacher = both_sides(seed, spread=spread)
    cells, _ = student_cells(logits, ids)
    (gradient,) = torch.autograd.grad(divergence(cells, cells.detach()).sum(), logits)
    assert divergence(cells, cells).abs().max() < 1e-5
    assert gradient.abs().max() < 1e-5
    other = divergence(cells, teacher)
    assert (other > -1e-6).all()
    apart = (cells.exp() - teacher.exp()).abs().sum(-1) > 0.05
    assert (other[apart] > 1e-4).all()
    if divergence in BOUNDS:
        assert (other <= BOUNDS[divergence] + 1e-5).all()


def test_the_cross_entropy_of_a_certain_student_is_zero():
    logits = torch.full((1, 6), -100.0)
    logits[0, 2] = 0
    assert cross_entropy(logits, torch.tensor([2])) == 0
    assert cross_entropy(logits, torch.tensor([3])) == 100


@every
@pytest.mark.parametrize("size", [1e2, 1e4])
@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("k", [1, 4, 12])
def test_finite_at_extreme_logits(divergence, size, temperature, k):
    """Student and teacher as certain as can be, right and wrong; at K = V nothing is left for the tail."""
    signs = torch.tensor([[1.0] + [-1.0] * 11, [-1.0] * 11 + [1.0], [-1.0] * 6 + [1.0] * 6, [1.0] * 12])
    logits = (signs * size).requires_grad_()
    probs = torch.cat([(signs.flip(0) * size).softmax(-1), torch.zeros(4, 1)], dim=-1)
    ids, log_probs, tail = top_k_cells(probs, k)
    teacher = torch.cat([log_probs, tail.unsqueeze(-1)], dim=-1)
    cells, log_z = student_cells(logits, ids, log_probs > -math.inf)
    if temperature != 1.0:
        cells, teacher = tempered(cells, temperature), tempered(teacher, temperature)
    value = divergence(cells, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert value.isfinite().all()
    assert (value > -1e-6).all()
    assert (value <= 3 * size / temperature + 60).all()
    assert gradient.isfinite().all()
    assert log_z.isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_cross_entropy_is_finite_at_extreme_logits(size):
    logits = (torch.tensor([[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]]) * size).requires_grad_()
    value = cross_entropy(logits, torch.tensor([1, 0]))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    torch.testing.assert_close(value, torch.tensor([2 * size, 2 * size + math.log(2)]))
    assert gradient.isfinite().all()


@every
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_in_float32_out(divergence, dtype):
    logits, ids, teacher = both_sides(3)
    cells = student_cells(logits.detach(), ids)[0].to(dtype)
    value = divergence(cells, teacher.to(dtype))
    assert value.dtype == torch.float32
    assert torch.equal(value, divergence(cells.float(), teacher.to(dtype).float()))


@every
def test_the_teacher_receives_no_gradient(divergence):
    logits, ids, teacher = both_sides(4)
    teacher.requires_grad_()
    divergence(student_cells(logits, ids)[0], teacher).sum().backward()
    assert teacher.grad is None
    assert logits.grad.abs().sum() > 0


@every
def test_unused_cells_do_not_exist(divergence):
    """-inf on both sides equals leaving the cell out, in value and gradient."""
    logits, ids, teacher = both_sides(5, homeless=0.0)
    used = torch.ones_like(ids, dtype=torch.bool)
    used[:, 2] = False
    keep = [0, 1, 3, 4]
    shorter = teacher[:, keep].log_softmax(-1)
    teacher = torch.full_like(teacher, -math.inf)
    teacher[:, keep] = shorter
    value = divergence(student_cells(logits, ids, used)[0], teacher)
    expected = divergence(student_cells(logits, ids[:, [0, 1, 3]])[0], shorter)
    torch.testing.assert_close(value, expected)
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(gradient, theirs)


@every
@settings(max_examples=50)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 11))
def test_over_cells_at_most_the_one_over_tokens(divergence, seed, k):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(4, 12, generator=generator).mul(2).log_softmax(-1) for _ in range(2))
    ids = teacher.topk(k, dim=-1).indices
    bucketed = divergence(student_cells(student, ids)[0], student_cells(teacher, ids)[0])
    assert (bucketed <= divergence(student, teacher) + 1e-5).all()


@every
def test_every_leading_shape_is_kept(divergence):
    logits, ids, teacher = both_sides(6, rows=6)
    cells = student_cells(logits, ids)[0]
    flat = divergence(cells, teacher)
    assert torch.equal(divergence(cells.view(2, 3, 5), teacher.view(2, 3, 5)), flat.view(2, 3))
    assert divergence(cells[:0], teacher[:0]).shape == (0,)


@every
def test_relabelled_cells_change_nothing(divergence):
    logits, ids, teacher = both_sides(7)
    cells = student_cells(logits, ids)[0]
    order = torch.tensor([2, 0, 4, 1, 3])
    torch.testing.assert_close(divergence(cells[:, order], teacher[:, order]), divergence(cells, teacher))


@every
def test_the_error_names_both_shapes(divergence):
    with pytest.raises(ValueError, match=rf"{divergence.__name__}: .*student \(3, 4\) and teacher \(3, 5\)"):
        divergence(torch.zeros(3, 4), torch.zeros(3, 5))
