"""The span divergence against plain arithmetic in float64, and at the ends of its range."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_kit.losses import span_divergence

TEMPERATURES = [None, 0.5, 1.0, 3.0, 100.0]


def naive(student, teacher, temperature):
    """One span at a time, in float64, as the formulas are written."""
    out = []
    for a, b in zip(teacher.detach().double(), student.double(), strict=True):
        if temperature is None:
            out.append((a - b) + a * (b / a).log())
        else:
            p, q = (a / temperature).exp(), (b / temperature).exp()
            out.append(p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
    return torch.stack(out)


@pytest.mark.parametrize("temperature", TEMPERATURES)
@given(
    spans=st.lists(st.tuples(st.floats(-30, -0.01), st.floats(-30, -0.01)), min_size=1, max_size=8),
)
def test_is_the_formula_value_and_gradient(temperature, spans):
    student = torch.tensor([b for _, b in spans]).requires_grad_()
    teacher = torch.tensor([a for a, _ in spans])
    weights = torch.arange(1.0, len(spans) + 1)
    ours, theirs = (f(student, teacher, temperature) for f in (call, naive))
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), student)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=2e-4)


def call(student, teacher, temperature):
    return span_divergence(student, teacher, temperature=temperature)


def test_values_worked_out_by_hand():
    # a = -1, b = -2: r = 2, so 2 - 1 - ln 2; a = -2, b = -1: 2 (1/2 - 1 + ln 2)
    ours = span_divergence(torch.tensor([-2.0, -1.0]), torch.tensor([-1.0, -2.0]))
    torch.testing.assert_close(ours, torch.tensor([1 - math.log(2), 2 * math.log(2) - 1]))
    # p = 1/2, q = 1/4 at temperature 1; the same numbers as powers of 3 at temperature 3
    kl = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    for t in (1.0, 3.0):
        a, b = torch.tensor([t * math.log(0.5)]), torch.tensor([t * math.log(0.25)])
        assert span_divergence(b, a, temperature=t).item() == pytest.approx(kl, abs=1e-6)


def test_a_large_temperature_comes_to_the_default():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (-torch.rand(50, generator=generator) * 10 - 0.1 for _ in range(2))
    limit = span_divergence(student, teacher)
    apart = [(t * span_divergence(student, teacher, temperature=t) - limit).abs().max() for t in (100.0, 1000.0, 1e4)]
    assert apart[0] < 0.5
    assert apart[1] < apart[0] / 5
    assert apart[2] < apart[1] / 2


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("value", [0.0, -1e-7, -1e-3, -1.0, -1e4])
def test_equal_models_cost_nothing_even_at_the_ends(temperature, value):
    student = torch.full((1,), value).requires_grad_()
    ours = call(student, student, temperature)
    assert ours.item() == 0
    (gradient,) = torch.autograd.grad(ours, student)
    assert gradient.abs().item() < 1e-6


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_certain_and_impossible_spans_stay_finite(temperature):
    ends = torch.tensor([0.0, -1e-9, -1e-6, -1e-3, -1.0, -100.0, -1e4])
    student = ends.repeat(len(ends)).requires_grad_()
    ours = call(student, ends.repeat_interleave(len(ends)), temperature)
    (gradient,) = torch.autograd.grad(ours.sum(), student)
    assert ours.isfinite().all()
    assert (ours > -1e-6).all()
    assert gradient.isfinite().all()


def test_a_certain_teacher_asks_for_the_students_surprise():
    ours = span_divergence(torch.tensor([-3.0]), torch.tensor([0.0]))
    assert ours.item() == pytest.approx(3.0, abs=1e-4)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_it_pulls_towards_the_teacher_from_both_sides(temperature):
    student = torch.tensor([-3.0, -1.0]).requires_grad_()
    (gradient,) = torch.autograd.grad(call(student, torch.tensor([-2.0, -2.0]), temperature).sum(), student)
    assert gradient[0] < 0 < gradient[1]


def test_the_small_difference_of_close_models_is_not_lost():
    teacher = torch.linspace(-20, -0.5, 40)
    student = teacher * (1 + 1e-3)
    exact = naive(student, teacher, None)  # near |a| * 1e-6 / 2
    torch.testing.assert_close(span_divergence(student, teacher).double(), exact, atol=0, rtol=2e-3)


def test_unlikely_spans_keep_their_few_nats():
    """At temperature 1 most spans are so unlikely that the divergence is 1e-8; even that is right, and positive."""
    student, teacher = torch.tensor([-17.0, -25.0, -18.0]), torch.tensor([-20.0, -20.0, -18.5])
    exact = naive(student, teacher, 1.0)
    torch.testing.assert_close(span_divergence(student, teacher, temperature=1.0).double(), exact, atol=0, rtol=1e-4)
    assert (exact > 0).all()


def test_log_probabilities_through_a_softmax_get_bounded_gradients():
    """The slope a / b runs away as the student becomes certain; what reaches its logits does not."""
    logits = torch.tensor([[0.0, -12.0], [0.0, -15.0], [0.0, -60.0]]).requires_grad_()
    ours = span_divergence(logits.log_softmax(-1)[:, 0], torch.full((3,), -5.0))
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    assert gradient.abs().max() < 6


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan, math.inf])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match=r"span_divergence: expected a finite temperature above 0, got"):
        span_divergence(torch.zeros(1), torch.zeros(1), temperature=temperature)
