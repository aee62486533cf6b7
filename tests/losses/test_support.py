"""The cells of a distillation loss: top K and a tail, from either side."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_kit.losses import forward_kl, jensen_shannon, reverse_kl, skew_kl, student_cells, tempered, top_k_cells


def teacher_probs(seed: int = 0, rows: int = 4, size: int = 9, tail: float = 0.2):
    """[rows, size + 1], the last column the mass without a home."""
    generator = torch.Generator().manual_seed(seed)
    probs = torch.randn(rows, size, generator=generator).mul(2).softmax(-1) * (1 - tail)
    return torch.cat([probs, torch.full((rows, 1), tail)], dim=-1)


def naive_student(logits, ids, used=None):
    """log-probabilities of the cells and the tail, row by row in float64."""
    out = []
    for n in range(len(logits)):
        probs = logits[n].double().softmax(-1)
        row, rest = [], list(range(logits.shape[1]))
        for k, i in enumerate(ids[n].tolist()):
            if used is None or used[n, k]:
                row.append(probs[i].log())
                rest.remove(i)
            else:
                row.append(torch.tensor(-math.inf, dtype=torch.float64))
        out.append(torch.stack([*row, sum(probs[i] for i in rest).log()]))
    return torch.stack(out)


# ---- the teacher's side


def test_the_largest_cells_and_all_the_rest():
    probs = teacher_probs()
    ids, log_probs, tail = top_k_cells(probs, 3)
    for n in range(4):
        order = sorted(range(9), key=lambda v: -float(probs[n, v]))
        assert ids[n].tolist() == order[:3]
        torch.testing.assert_close(log_probs[n].exp(), probs[n, order[:3]])
        rest = sum(float(probs[n, v]) for v in order[3:]) + float(probs[n, -1])
        assert float(tail[n].exp()) == pytest.approx(rest, rel=1e-5)
    assert (ids.dtype, log_probs.dtype, tail.dtype) == (torch.int64, torch.float32, torch.float32)


@given(st.integers(0, 200), st.integers(1, 9), st.sampled_from([0.0, 0.01, 0.5, 0.999]))
def test_the_mass_of_cells_and_tail_is_one(seed, k, homeless):
    _, log_probs, tail = top_k_cells(teacher_probs(seed, tail=homeless), k)
    torch.testing.assert_close(log_probs.exp().sum(-1) + tail.exp(), torch.ones(4))
    assert tail.isfinite().all()


def test_a_cell_without_mass_is_unused():
    probs = torch.tensor([[0.75, 0.25, 0.0, 0.0, 0.0]])
    ids, log_probs, tail = top_k_cells(probs, 3)
    assert ids[0, :2].tolist() == [0, 1]
    assert log_probs[0, 2] == -math.inf
    assert -17 < tail[0] < -16


@pytest.mark.parametrize("k", [0, -1, 10])
def test_k_out_of_range(k):
    with pytest.raises(ValueError, match=rf"top_k_cells: expected 1 <= k <= 9 .*got {k}"):
        top_k_cells(teacher_probs(), k)


# ---- the student's side


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("k", [1, 3, 8])
def test_student_cells_are_the_naive_ones(k, masked):
    generator = torch.Generator().manual_seed(k)
    logits = torch.randn(5, 9, generator=generator).mul(3).requires_grad_()
    ids = torch.stack([torch.randperm(9, generator=generator)[:k] for _ in range(5)])
    used = torch.rand(5, k, generator=generator) < 0.6 if masked else None
    ours, log_z = student_cells(logits, ids, used)
    theirs = naive_student(logits, ids, used)
    torch.testing.assert_close(ours, theirs.float(), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(log_z, logits.logsumexp(-1))
    finite = theirs > -math.inf
    weights = torch.rand(ours.shape, generator=generator)
    (gradient,) = torch.autograd.grad((ours[finite] * weights[finite]).sum() + log_z.sum(), logits)
    (expected,) = torch.autograd.grad((theirs[finite] * weights[finite]).sum() + logits.logsumexp(-1).sum(), logits)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_a_tiny_tail_is_exact():
    # 1 - sum of the cells would give 0 here
    logits = torch.tensor([[0.0, -40.0, -41.0]])
    log_probs, _ = student_cells(logits, torch.tensor([[0]]))
    assert log_probs[0, 1].item() == pytest.approx(math.log(math.exp(-40) + math.exp(-41)), abs=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_with_every_token_a_cell_nothing_is_left_for_the_tail(masked):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, generator=generator).requires_grad_()
    ids = torch.arange(7).expand(3, 7)
    used = torch.ones(3, 7, dtype=torch.bool)
    used[2, 4] = not masked
    log_probs, log_z = student_cells(logits, ids, used if masked else None)
    torch.testing.assert_close(log_probs[:2, :-1], logits[:2].log_softmax(-1))
    torch.testing.assert_close(log_z, logits.logsumexp(-1))
    assert (log_probs[:2, -1].exp() < 1e-6).all()
    if masked:  # the one that is no cell is the tail
        torch.testing.assert_close(log_probs[2, -1], logits[2].log_softmax(-1)[4])


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon, skew_kl])
@pytest.mark.parametrize("homeless", [0.0, 0.1])
def test_k_equal_to_v_is_plain_distillation(divergence, homeless):
    generator = torch.Generator().manual_seed(1)
    student = torch.randn(4, 9, generator=generator).mul(2).requires_grad_()
    probs = teacher_probs(tail=homeless)
    ids, log_probs, tail = top_k_cells(probs, 9)
    teacher = torch.cat([log_probs, tail.unsqueeze(-1)], dim=-1)
    cells, _ = student_cells(student, ids)
    value = divergence(cells, teacher)
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert (value < 10).all()
    if homeless == 0.0:
        plain = divergence(student.log_softmax(-1), probs[:, :-1].log())
        (expected,) = torch.autograd.grad(plain.sum(), student)
        torch.testing.assert_close(value, plain, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)
        # and a student that is the teacher has nothing to learn
        perfect = probs[:, :-1].log().requires_grad_()
        value = divergence(student_cells(perfect, ids)[0], teacher)
        assert value.abs().max() < 1e-5
        (gradient,) = torch.autograd.grad(value.sum(), perfect)
        assert gradient.abs().max() < 1e-5


def test_ids_of_other_rows_are_refused():
    with pytest.raises(ValueError, match=r"student_cells: .*\(4, 9\), got ids \(3, 2\)"):
        student_cells(torch.zeros(4, 9), torch.zeros(3, 2, dtype=torch.long))


# ---- temperature


def test_temperature_one_is_the_identity():
    teacher = torch.log(teacher_probs())
    torch.testing.assert_close(tempered(teacher, 1.0), teacher)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 7.0])
def test_tempered_is_the_normalised_power(temperature):
    probs = teacher_probs()
    power = probs ** (1 / temperature)
    torch.testing.assert_close(tempered(probs.log(), temperature).exp(), power / power.sum(-1, keepdim=True))


def test_an_unused_cell_stays_unused_and_harmless():
    probs = torch.tensor([[0.5, 0.0, 0.3, 0.2]])
    log_probs = probs.log().requires_grad_()
    ours = tempered(log_probs, 2.0)
    assert ours[0, 1] == -math.inf
    torch.testing.assert_close(ours.exp().sum(), torch.tensor(1.0))
    (gradient,) = torch.autograd.grad(ours[0, [0, 2, 3]].sum(), log_probs)
    assert gradient.isfinite().all()
    assert forward_kl(ours, ours) == 0


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="tempered: expected a temperature above 0"):
        tempered(torch.zeros(1, 2), temperature)


def test_a_tail_that_is_not_a_number_stays_none():
    logits = torch.zeros(2, 6)
    logits[0, 4] = torch.nan
    log_probs, log_z = student_cells(logits, torch.tensor([[0, 1], [0, 1]]))
    assert log_probs[0].isnan().all()
    assert log_z[0].isnan()
    assert log_probs[1].isfinite().all()
