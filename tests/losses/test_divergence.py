"""Each divergence against a naive loop and against values whose origin is written down."""

from __future__ import annotations

import math

import pytest
import torch

from kd_kit.losses import forward_kl, jensen_shannon, reverse_kl, skew_kl, student_cells


def log(*probs: float):
    return torch.tensor([probs]).log()


# p = (3/4, 1/4), q = (1/2, 1/2), worked out by hand
P, Q = (0.75, 0.25), (0.5, 0.5)
FORWARD = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
REVERSE = 0.5 * math.log(2 / 3) + 0.5 * math.log(2)


def test_values_worked_out_by_hand():
    assert forward_kl(log(*Q), log(*P)).item() == pytest.approx(FORWARD, abs=1e-6)
    assert reverse_kl(log(*Q), log(*P)).item() == pytest.approx(REVERSE, abs=1e-6)
    m = (0.625, 0.375)
    js = sum(0.5 * a * math.log(a / c) + 0.5 * b * math.log(b / c) for a, b, c in zip(P, Q, m, strict=True))
    assert jensen_shannon(log(*Q), log(*P)).item() == pytest.approx(js, abs=1e-6)
    mixed = (0.1 * 0.75 + 0.9 * 0.5, 0.1 * 0.25 + 0.9 * 0.5)
    skewed = sum(a * math.log(a / c) for a, c in zip(P, mixed, strict=True))
    assert skew_kl(log(*Q), log(*P), alpha=0.1).item() == pytest.approx(skewed, abs=1e-6)


def test_forward_is_torchs_own():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 8, generator=generator).log_softmax(-1) for _ in range(2))
    theirs = torch.nn.functional.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
    torch.testing.assert_close(forward_kl(student, teacher), theirs)


def test_forward_and_reverse_are_each_other_swapped():
    torch.testing.assert_close(reverse_kl(log(*Q), log(*P)), forward_kl(log(*P), log(*Q)))
    torch.testing.assert_close(jensen_shannon(log(*Q), log(*P)), jensen_shannon(log(*P), log(*Q)))


def test_forward_covers_and_reverse_seeks():
    two_modes = log(0.495, 0.495, 0.01)
    one_mode, spread = log(0.98, 0.01, 0.01), log(1 / 3, 1 / 3, 1 / 3)
    assert forward_kl(spread, two_modes) < forward_kl(one_mode, two_modes)
    assert reverse_kl(one_mode, two_modes) < reverse_kl(one_mode, log(0.01, 0.01, 0.98))


def test_the_bounds_are_reached_by_disjoint_distributions():
    left, right = torch.tensor([[0.0, -200.0]]), torch.tensor([[-200.0, 0.0]])
    assert jensen_shannon(left, right).item() == pytest.approx(math.log(2), abs=1e-6)
    for alpha in (0.01, 0.1, 0.5, 0.9):
        assert skew_kl(left, right, alpha=alpha).item() == pytest.approx(-math.log(alpha), abs=1e-5)


def test_a_small_skew_is_the_forward_kl():
    assert skew_kl(log(*Q), log(*P), alpha=1e-6).item() == pytest.approx(FORWARD, abs=1e-5)


@pytest.mark.parametrize("alpha", [0.0, 1.0, -0.1, 1.5, math.nan])
def test_an_alpha_outside_is_refused(alpha):
    with pytest.raises(ValueError, match=r"skew_kl: expected 0 < alpha < 1"):
        skew_kl(log(*Q), log(*P), alpha=alpha)


def test_reverse_kl_bears_a_cell_that_the_teacher_gives_nothing():
    student = log(0.5, 0.25, 0.25).requires_grad_()
    teacher = torch.tensor([[0.5, 0.5, 0.0]]).log()
    value = reverse_kl(student, teacher)
    assert value.item() == pytest.approx(0.25 * math.log(0.5) + 0.25 * (math.log(0.25) + 40), abs=1e-4)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon, skew_kl])
def test_the_tail_is_charged(divergence):
    """Kept cells in the teacher's proportions, but a tail ten times too light."""
    teacher = log(0.3, 0.2, 0.5)
    logits = torch.tensor([[0.57, 0.38, 0.05 / 3, 0.05 / 3, 0.05 / 3]]).log().requires_grad_()
    student, _ = student_cells(logits, torch.tensor([[0, 1]]))
    value = divergence(student, teacher)
    assert value.item() > 0.1
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert (gradient[0, 2:] < 0).all(), "the tokens of the tail are to rise"
    assert (gradient[0, :2] > 0).all()


def test_the_gradient_of_the_forward_kl_is_known():
    """q - p on the cells, q * (1 - p_tail / q_tail) off them."""
    logits = torch.randn(3, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.tensor([[0.5, 0.2, 0.3]]).log().expand(3, 3)
    ids = torch.tensor([[0, 3], [5, 1], [2, 4]])
    student, _ = student_cells(logits, ids)
    (gradient,) = torch.autograd.grad(forward_kl(student, teacher).sum(), logits)
    for n in range(3):
        q = logits[n].detach().softmax(-1)
        expected = q * (1 - 0.3 / (1 - q[ids[n]].sum()))
        expected[ids[n]] = q[ids[n]] - torch.tensor([0.5, 0.2])
        torch.testing.assert_close(gradient[n], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon, skew_kl])
def test_a_teacher_that_is_not_finite_is_seen(divergence):
    """NaN compares false with everything: a mask written the other way round would make it a loss of 0."""
    student = torch.log_softmax(torch.randn(2, 5), dim=-1)
    assert divergence(student, torch.full_like(student, torch.nan)).isnan().all()
