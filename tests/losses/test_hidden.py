"""Directions of hidden states against torch's own cosine and plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from kd_kit.losses import cosine_distance, gram_distance
from kd_kit.losses.hidden import unit


def vectors(seed: int, *shape: int):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def window(seed: int, b: int = 3, n: int = 6, d: int = 5, e: int = 7):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(b, n, d, generator=generator).requires_grad_()
    return student, torch.randn(b, n, e, generator=generator), torch.rand(b, n, generator=generator) < 0.7


def naive_gram(student, teacher, mask):
    out = []
    for b in range(len(mask)):
        items = [i for i in range(mask.shape[1]) if mask[b, i]]
        total = torch.zeros((), dtype=torch.float64)
        for i in items:
            for j in items:
                if i != j:
                    of_s = functional.cosine_similarity(student[b, i].double(), student[b, j].double(), dim=0)
                    of_t = functional.cosine_similarity(teacher[b, i].double(), teacher[b, j].double(), dim=0)
                    total = total + (of_s - of_t) ** 2
        out.append(total / max(len(items) * (len(items) - 1), 1))
    return torch.stack(out)


# ---- cosine_distance


@given(st.integers(0, 500))
def test_is_torchs_own_cosine_value_and_gradient(seed):
    student, teacher = vectors(seed, 2, 3, 8), vectors(seed + 1, 2, 3, 8).detach()
    weights = torch.arange(6.0).view(2, 3)
    ours = cosine_distance(student, teacher)
    theirs = 1 - functional.cosine_similarity(student.double(), teacher.double(), dim=-1)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), student)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_same_right_angle_and_opposite():
    student = torch.tensor([[3.0, 0.0], [0.0, 5.0], [-2.0, 0.0], [1.0, 1.0]])
    teacher = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    torch.testing.assert_close(cosine_distance(student, teacher), torch.tensor([0.0, 1.0, 2.0, 1 - 0.5**0.5]))


@pytest.mark.parametrize("scale", [1e-6, 1e4, 1e18, 1e30])
def test_length_does_not_matter(scale):
    student, teacher = vectors(0, 4, 8), vectors(1, 4, 8)
    (gradient,) = torch.autograd.grad(cosine_distance(student, teacher).sum(), student)
    larger = (student.detach() * scale).requires_grad_()
    value = cosine_distance(larger, teacher * scale)
    torch.testing.assert_close(value, cosine_distance(student, teacher), atol=1e-6, rtol=1e-5)
    (of_larger,) = torch.autograd.grad(value.sum(), larger)
    torch.testing.assert_close(of_larger * scale, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-20])
def test_a_vector_without_direction_is_at_right_angles_to_everything(size):
    student = torch.full((2, 8), size).requires_grad_()
    teacher = torch.stack([vectors(1, 8).detach(), torch.zeros(8)])
    value = cosine_distance(student, teacher)
    torch.testing.assert_close(value, torch.ones(2))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    assert gradient.abs().max() <= 1
    assert gradient[0].abs().max() > 0, "it can still learn one"


def test_unit_vectors_have_length_one():
    torch.testing.assert_close(unit(vectors(0, 5, 9) * 1e4).norm(dim=-1), torch.ones(5))
    assert unit(torch.zeros(2, 3)).eq(0).all()
    assert unit(torch.zeros(2, 3, dtype=torch.float16)).dtype == torch.float32


# ---- gram_distance


@given(st.integers(0, 300))
def test_is_the_naive_double_loop_value_and_gradient(seed):
    student, teacher, mask = window(seed)
    weights = torch.arange(1.0, 4.0)
    ours, theirs = gram_distance(student, teacher, mask), naive_gram(student, teacher, mask)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-4)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), student)
    if theirs.requires_grad:
        (expected,) = torch.autograd.grad((theirs * weights).sum(), student)
        torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_opposite_relations_cost_four():
    student = torch.tensor([[[1.0, 0.0], [2.0, 0.0]]])
    teacher = torch.tensor([[[1.0, 0.0, 0.0], [-3.0, 0.0, 0.0]]])
    assert gram_distance(student, teacher, torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(4.0)


def test_a_rotation_and_a_scale_change_nothing():
    student, _, mask = window(1)
    rotation = torch.linalg.qr(vectors(2, 5, 5).detach()).Q
    turned = student.detach() @ rotation * torch.rand(3, 6, 1).add(0.5)
    assert gram_distance(student, turned, mask).abs().max() < 1e-6


def test_masked_is_sliced():
    student, teacher, mask = window(2)
    ours = gram_distance(student, teacher, mask)
    for b in range(3):
        kept = mask[b].nonzero().squeeze(-1)
        alone = gram_distance(
            student[b : b + 1, kept], teacher[b : b + 1, kept], torch.ones(1, len(kept), dtype=torch.bool)
        )
        torch.testing.assert_close(alone, ours[b : b + 1])


@pytest.mark.parametrize("rubbish", [torch.nan, torch.inf, 1e30])
def test_what_is_masked_out_may_be_anything(rubbish):
    student, teacher, mask = window(3)
    expected = gram_distance(student, teacher, mask)
    (theirs,) = torch.autograd.grad(expected.sum(), student)
    broken = torch.where(mask.unsqueeze(-1), student.detach(), rubbish).requires_grad_()
    ours = gram_distance(broken, torch.where(mask.unsqueeze(-1), teacher, rubbish), mask)
    (gradient,) = torch.autograd.grad(ours.sum(), broken)
    torch.testing.assert_close(ours, expected)
    torch.testing.assert_close(gradient, theirs)


def test_the_order_of_items_does_not_matter():
    student, teacher, mask = window(4)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        gram_distance(student[:, order], teacher[:, order], mask[:, order]), gram_distance(student, teacher, mask)
    )


@pytest.mark.parametrize("items", [0, 1])
def test_fewer_than_two_items_have_no_relation(items):
    student, teacher, mask = window(5)
    mask[1] = torch.arange(6) < items
    value = gram_distance(student, teacher, mask)
    assert value[1] == 0
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert gradient.isfinite().all()
    assert gradient[1].eq(0).all()
    assert gradient[0].abs().sum() > 0


def test_vectors_of_zeros_stay_finite():
    student, teacher, _ = window(6)
    student = student.detach().clone()
    student[0] = 0
    student.requires_grad_()
    value = gram_distance(student, teacher, torch.ones(3, 6, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(value.sum(), student)
    assert value.isfinite().all()
    assert gradient.isfinite().all()


def test_a_mask_of_other_items_is_refused():
    student, teacher, mask = window(7)
    with pytest.raises(
        ValueError, match=r"gram_distance: .*student \(3, 6, 5\), teacher \(3, 6, 7\) and mask \(3, 5\)"
    ):
        gram_distance(student, teacher, mask[:, :5])
    with pytest.raises(ValueError, match=r"gram_distance: .*student \(6, 5\)"):
        gram_distance(student[0], teacher[0], mask[0])
    with pytest.raises(ValueError, match=r"gram_distance: .*student \(3, 6, 1, 5\)"):
        gram_distance(student.unsqueeze(2), teacher, mask)
    with pytest.raises(ValueError, match=r"gram_distance: .*teacher \(3, 6, 1, 7\)"):
        gram_distance(student, teacher.unsqueeze(2), mask)
