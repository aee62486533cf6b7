"""Routing losses against plain loops, and their two ends: balanced and collapsed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kd_kit.losses import router_z, routing_kl, switch_balance


def routed(seed: int, n: int = 12, experts: int = 6, k: int = 2):
    logits = torch.randn(n, experts, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    return logits, logits.detach().topk(k, dim=-1).indices


# ---- routing_kl


@given(seed=st.integers(0, 300), experts=st.integers(2, 9))
def test_is_the_naive_sum_value_and_gradient(seed, experts):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, experts, generator=generator).requires_grad_()
    teacher = torch.randn(4, experts, generator=generator).mul(2).softmax(-1)
    weights = torch.arange(1.0, 5.0)
    theirs = []
    for n in range(4):
        q = logits[n].double().exp() / logits[n].double().exp().sum()
        theirs.append(sum(p * (p / q[x]).log() for x, p in enumerate(teacher[n].double())) / math.log(experts))
    theirs = torch.stack(theirs)
    ours = routing_kl(logits, teacher)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(ours.double(), theirs, atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(gradient, expected, atol=2e-6, rtol=1e-4)


def test_a_student_that_knows_nothing_costs_at_most_one():
    certain = torch.eye(8)
    torch.testing.assert_close(routing_kl(torch.zeros(8, 8), certain), torch.ones(8))
    assert routing_kl(torch.zeros(8), torch.full((8,), 1 / 8)).abs().item() < 1e-6


def test_experts_left_out_have_no_share():
    logits = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    teacher = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]]).expand(3, 5)
    ours = routing_kl(logits, teacher)
    log_q = logits.log_softmax(-1)
    torch.testing.assert_close(ours, (math.log(0.5) - log_q[:, [1, 3]].mean(-1)) / math.log(5))
    (gradient,) = torch.autograd.grad(ours.sum(), logits)
    torch.testing.assert_close(gradient, (logits.softmax(-1) - teacher) / math.log(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_of_half_precision_leaves_a_distribution(dtype):
    logits = torch.randn(20, 60, generator=torch.Generator().manual_seed(0))
    teacher = logits.softmax(-1).to(dtype)
    exact = teacher.double() / teacher.double().sum(-1, keepdim=True)
    expected = (exact * (exact.log() - logits.double().log_softmax(-1))).sum(-1) / math.log(60)
    torch.testing.assert_close(routing_kl(logits, teacher).double(), expected, atol=1e-6, rtol=1e-4)
    assert (routing_kl(logits, teacher) > -1e-6).all()


def test_one_expert_is_refused():
    with pytest.raises(
        ValueError, match=r"routing_kl: .*at least two experts, got student \(3, 1\) and teacher \(3, 1\)"
    ):
        routing_kl(torch.zeros(3, 1), torch.ones(3, 1))


# ---- switch_balance


@given(seed=st.integers(0, 300), experts=st.integers(1, 8), k=st.integers(1, 4))
def test_is_the_naive_product_value_and_gradient(seed, experts, k):
    k = min(k, experts)
    logits, chosen = routed(seed, experts=experts, k=k)
    probs = logits.softmax(-1)
    ours = switch_balance(probs, chosen)
    theirs = torch.zeros((), dtype=torch.float64)
    for e in range(experts):
        f = sum(e in row for row in chosen.tolist()) / len(chosen)
        mean = sum(p[e].double() for p in probs) / len(probs)
        theirs = theirs + experts * f * mean / k
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad(ours, probs, retain_graph=True)
    (expected,) = torch.autograd.grad(theirs, probs)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (8, 8), (1, 1), (60, 4)])
def test_one_when_balanced_and_x_over_k_when_collapsed(experts, k):
    balanced = torch.stack([torch.arange(i, i + k) % experts for i in range(experts)])
    uniform = torch.full((experts, experts), 1 / experts)
    assert switch_balance(uniform, balanced).item() == pytest.approx(1.0, abs=1e-6)
    collapsed = torch.zeros(5, experts)
    collapsed[:, :k] = 1 / k
    assert switch_balance(collapsed, torch.arange(k).expand(5, k)).item() == pytest.approx(experts / k, rel=1e-6)
    # whichever tokens chose, a router that is uniform in the mean reads 1
    assert switch_balance(uniform, torch.arange(k).expand(experts, k)).item() == pytest.approx(1.0, abs=1e-6)


def test_its_gradient_takes_from_the_busy():
    logits, _ = routed(0, n=6, experts=3, k=1)
    chosen = torch.tensor([[0], [0], [0], [0], [1], [2]])
    (gradient,) = torch.autograd.grad(switch_balance(logits.softmax(-1), chosen), logits)
    assert (gradient[:, 0] > 0).all()
    assert gradient[:, 0].sum() > gradient[:, 1].sum()


def test_the_order_of_tokens_and_of_choices_does_not_matter():
    logits, chosen = routed(1)
    probs = logits.softmax(-1)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(switch_balance(probs[order], chosen[order].flip(-1)), switch_balance(probs, chosen))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_balance_of_half_is_float32(dtype):
    logits, chosen = routed(2, n=3000)
    probs = logits.detach().softmax(-1).to(dtype)
    value = switch_balance(probs, chosen)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, switch_balance(probs.float(), chosen))


@pytest.mark.parametrize(
    ("probs", "chosen"),
    [((4, 3), (5, 1)), ((4, 3), (4, 4)), ((4, 3), (4, 0)), ((0, 3), (0, 1)), ((2, 4, 3), (8, 1)), ((4, 3), (4, 1, 1))],
)
def test_shapes_that_do_not_fit_are_refused(probs, chosen):
    with pytest.raises(ValueError, match=r"switch_balance: .*got probs \(.*\) and chosen \(.*\); flatten"):
        switch_balance(torch.ones(probs), torch.zeros(chosen, dtype=torch.long))


# ---- router_z


def test_is_the_square_of_the_log_sum_exp():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weights = torch.arange(6.0).view(2, 3)
    theirs = logits.double().exp().sum(-1).log() ** 2
    ours = router_z(logits)
    torch.testing.assert_close(ours.double(), theirs, atol=1e-6, rtol=1e-5)
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(gradient, expected)


def test_values_worked_out_by_hand():
    torch.testing.assert_close(router_z(torch.zeros(1, 8)), torch.tensor([math.log(8) ** 2]))
    torch.testing.assert_close(router_z(torch.full((1, 4), -math.log(4))), torch.zeros(1), atol=1e-10, rtol=0)
    torch.testing.assert_close(router_z(torch.tensor([[3.0]])), torch.tensor([9.0]))


@pytest.mark.parametrize("size", [1e2, 1e4, -1e4])
def test_large_logits_stay_finite(size):
    logits = torch.full((2, 4), size).requires_grad_()
    value = router_z(logits)
    torch.testing.assert_close(value, torch.full((2,), (size + math.log(4)) ** 2))
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_z_of_half_is_float32(dtype):
    logits = torch.full((2, 4), 1000.0, dtype=dtype)  # its square is no float16
    assert router_z(logits).dtype == torch.float32
    assert torch.equal(router_z(logits), router_z(logits.float()))
