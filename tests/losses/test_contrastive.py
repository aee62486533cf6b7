"""InfoNCE against torch's cross-entropy, one anchor at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from kd_kit.losses import info_nce


def example(seed: int = 0, n: int = 8, width: int = 6, documents: int = 3):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(n, width, generator=generator).requires_grad_()
    groups = torch.randint(0, documents, (n,), generator=generator)
    return student, torch.randn(n, width, generator=generator), groups


def naive(student, teacher, groups, temperature):
    values, has = [], []
    for i in range(len(groups)):
        candidates = [i] + [j for j in range(len(groups)) if groups[j] != groups[i]]
        has.append(len(candidates) > 1)
        if not has[-1]:
            values.append(torch.zeros((), dtype=torch.float64))
            continue
        cosines = torch.stack(
            [functional.cosine_similarity(student[i].double(), teacher[j].double(), dim=0) for j in candidates]
        )
        # the own one is the first of the candidates
        entropy = functional.cross_entropy((cosines / temperature).unsqueeze(0), torch.tensor([0]))
        values.append(entropy / math.log(len(candidates)))
    return torch.stack(values), torch.tensor(has)


@given(seed=st.integers(0, 300), documents=st.integers(1, 8), temperature=st.sampled_from([0.05, 0.1, 1.0]))
def test_is_the_naive_cross_entropy_value_and_gradient(seed, documents, temperature):
    student, teacher, groups = example(seed, documents=documents)
    ours, has = info_nce(student, teacher, groups, temperature=temperature)
    theirs, there = naive(student, teacher, groups, temperature)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-5, rtol=1e-4)
    assert torch.equal(has, there)
    weights = torch.arange(1.0, 9.0)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    if theirs.requires_grad:
        (expected,) = torch.autograd.grad((theirs * weights).sum(), student)
        torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-3)
    else:
        assert gradient.eq(0).all()


def test_random_vectors_cost_about_one():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(256, 512, generator=generator) for _ in range(2))
    values, has = info_nce(student, teacher, torch.arange(256) // 8)
    assert has.all()
    assert values.mean().item() == pytest.approx(1.0, abs=0.05)


def test_the_floor_is_the_one_that_is_stated():
    n = 6
    values, _ = info_nce(torch.eye(n) * 3, torch.eye(n), torch.arange(n))
    floor = math.log(1 + (n - 1) * math.exp(-10)) / math.log(n)
    torch.testing.assert_close(values, torch.full((n,), floor))


def test_teachers_of_the_own_document_are_no_candidates():
    student, teacher, _ = example()
    groups = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    before, _ = info_nce(student, teacher, groups)
    teacher[1] = student[0].detach()  # what anchor 0 would love to take for its own
    after, _ = info_nce(student, teacher, groups)
    assert after[0] == before[0]
    assert (after[4:] != before[4:]).all()


def test_anchors_without_negatives_are_told_and_cost_nothing():
    student, teacher, _ = example()
    values, has = info_nce(student, teacher, torch.full((8,), 5))
    assert not has.any()
    assert values.eq(0).all()
    (gradient,) = torch.autograd.grad(values.sum(), student)
    assert gradient.eq(0).all()


def test_one_negative_is_enough():
    student, teacher, _ = example(3, n=3)
    values, has = info_nce(student, teacher, torch.tensor([0, 0, 1]))
    assert has.all()
    torch.testing.assert_close(
        values.double(), naive(student, teacher, torch.tensor([0, 0, 1]), 0.1)[0], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("n", [0, 1])
def test_no_anchor_and_one(n):
    values, has = info_nce(torch.randn(n, 4), torch.randn(n, 4), torch.zeros(n, dtype=torch.long))
    assert values.shape == has.shape == (n,)
    assert not has.any()
    assert has.dtype == torch.bool
    assert values.dtype == torch.float32


def test_the_order_of_anchors_and_the_names_of_documents_do_not_matter():
    student, teacher, groups = example(1)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    values, has = info_nce(student, teacher, groups)
    other, has_other = info_nce(student[order], teacher[order], 100 - groups[order])
    torch.testing.assert_close(other, values[order])
    assert torch.equal(has_other, has[order])


def test_the_right_pairs_cost_less_than_the_wrong_ones():
    _, teacher, _ = example(2)
    groups = torch.arange(8)
    right, _ = info_nce(teacher, teacher, groups)
    wrong, _ = info_nce(teacher.roll(1, 0), teacher, groups)
    assert (right < 0.7).all()
    assert right.mean() < wrong.mean() - 1


@pytest.mark.parametrize("temperature", [0.0, -0.1, math.nan])
def test_a_temperature_must_be_positive(temperature):
    with pytest.raises(ValueError, match="info_nce: expected a temperature above 0"):
        info_nce(torch.zeros(2, 3), torch.zeros(2, 3), torch.arange(2), temperature=temperature)


def test_groups_of_other_anchors_are_refused():
    with pytest.raises(ValueError, match=r"info_nce: .*student \(4, 3\) and teacher \(4, 3\) and groups \(5,\)"):
        info_nce(torch.zeros(4, 3), torch.zeros(4, 3), torch.arange(5))
    with pytest.raises(ValueError, match=r"info_nce: .*student \(2, 4, 3\)"):
        info_nce(torch.zeros(2, 4, 3), torch.zeros(2, 4, 3), torch.arange(2))
