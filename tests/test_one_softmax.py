"""A few log-probabilities of each row, and their gradient, beside plain autograd on all logits in float64."""

from __future__ import annotations

import pytest
import torch

from kd_kit import one_softmax
from kd_kit.one_softmax import Read, log_probs

N, D, V = 23, 8, 40


def cells(k=6, *, seed=1, used=True):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(V, generator=generator)[:k] for _ in range(N)])
    return Read(ids, torch.rand(N, k, generator=generator) < 0.8 if used else None)


def shared(seed=2):
    """Cells among half of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    among = torch.arange(V) % 2 == 0
    ids = torch.stack([2 * torch.randperm(V // 2, generator=generator)[:5] for _ in range(N)])
    return Read(ids, torch.rand(N, 5, generator=generator) < 0.8, among=among)


def drawn():
    return Read(torch.randint(0, V, (N, 60), generator=torch.Generator().manual_seed(3)), tail=False)


READS = {
    "nothing": [],
    "cells": [cells()],
    "all cells used": [cells(used=False)],
    "every token a cell": [cells(V, used=False)],
    "drawn": [drawn()],
    "shared": [shared()],
    "two of cells": [cells(), cells(3, seed=5)],
    "all kinds": [drawn(), shared(), cells(), cells(4, seed=6, used=False)],
}


def inputs(spread=1.0, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = spread * torch.randn(N, D, generator=generator)
    weight, bias = torch.randn(V, D, generator=generator), torch.randn(V, generator=generator)
    targets = torch.randint(0, V, (N,), generator=generator)
    return [t.to(dtype).requires_grad_() for t in (hidden, weight, bias)], targets


def plainly(hidden, weight, bias, targets, reads, scale, softcap):
    """The same from all logits at once, row by row."""
    logits = (hidden @ weight.T + bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    target = torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    outs = []
    for read in reads:
        rows = []
        for n in range(N):
            among = torch.ones(V, dtype=torch.bool) if read.among is None else read.among
            log_p = torch.log_softmax(logits[n].masked_fill(~among, -torch.inf), -1)
            if not read.tail:
                rows.append(log_p[read.ids[n]])
                continue
            used = torch.ones_like(read.ids[n], dtype=torch.bool) if read.used is None else read.used[n]
            outside = among.clone()
            outside[read.ids[n][used]] = False
            tail = log_p[outside].logsumexp(-1) if outside.any() else log_p.new_tensor(-torch.inf)
            rows.append(torch.cat([log_p[read.ids[n]].masked_fill(~used, -torch.inf), tail.unsqueeze(0)]))
        outs.append(torch.stack(rows))
    return target, outs


def one_number(target, outs):
    """Every entry with a weight of its own; what is unused, or empty, has none."""
    generator = torch.Generator().manual_seed(9)
    total = (target * torch.randn(target.shape, generator=generator)).sum()
    for out in outs:
        weights = torch.randn(out.shape, generator=generator)
        total = total + torch.where(out > -30, out * weights, 0.0).sum()
    return total


@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.3, None), (4.0, 3.0)])
@pytest.mark.parametrize("chunk", [1, 7, 22, 23, 100])
@pytest.mark.parametrize("kind", READS)
def test_values_and_gradients_are_those_of_autograd(kind, chunk, scale, softcap):
    leaves, targets = inputs()
    reads = READS[kind]
    target, outs = log_probs(*leaves, targets, reads, chunk=chunk, scale=scale, softcap=softcap)
    exact, _ = inputs(dtype=torch.float64)
    expected, theirs = plainly(*exact, targets, reads, scale, softcap)
    assert (target.dtype, target.shape) == (torch.float32, (N,))
    torch.testing.assert_close(target.double(), expected, atol=1e-5, rtol=1e-5)
    for out, other in zip(outs, theirs, strict=True):
        if other[:, -1].isinf().all():  # no token is left for the tail: it is as good as empty
            assert (out[:, -1] < -15).all()
            out, other = out[:, :-1], other[:, :-1]
        torch.testing.assert_close(out.double(), other, atol=1e-5, rtol=1e-5)
    if kind == "every token a cell":  # whatever arrives at an empty tail, which is a constant, goes nowhere
        theirs = [torch.where(o.isinf(), -16.0, o) for o in theirs]
    ours = torch.autograd.grad(one_number(target, outs), leaves)
    naive = torch.autograd.grad(one_number(expected, theirs), exact)
    for gradient, other in zip(ours, naive, strict=True):
        assert (gradient.double() - other).norm() / other.norm() < 1e-5


@pytest.mark.parametrize("kind", ["cells", "shared", "all kinds"])
def test_a_sure_student_has_finite_values_and_the_right_gradient(kind):
    """The tail of a student that is sure of itself is e to the minus thousands, and has a gradient all the same."""
    leaves, targets = inputs(spread=3000.0)
    target, outs = log_probs(*leaves, targets, READS[kind], chunk=5)
    assert target.min() < -1000
    exact, _ = inputs(spread=3000.0, dtype=torch.float64)
    expected, theirs = plainly(*exact, targets, READS[kind], 1.0, None)

    def of_tails(target, outs):
        return sum(out[:, -1].sum() for out, read in zip(outs, READS[kind], strict=True) if read.tail) + target.sum()

    ours = torch.autograd.grad(of_tails(target, outs), leaves[:1])
    naive = torch.autograd.grad(of_tails(expected, theirs), exact[:1])
    for gradient, other in zip(ours, naive, strict=True):
        assert gradient.isfinite().all()
        assert (gradient.double() - other).norm() / other.norm() < 1e-3


def test_what_is_not_used_has_no_gradient():
    leaves, targets = inputs()
    read = cells()
    _, (out,) = log_probs(*leaves, targets, [read], chunk=9)
    assert (out[:, :-1].isneginf() == ~read.used).all()
    (gradient,) = torch.autograd.grad(out, leaves[0], torch.where(out.isneginf(), torch.nan, 0.0))
    assert (gradient == 0).all()


@pytest.mark.parametrize("power", [0, 4, 8, 12, 16])
def test_a_loss_scale_only_multiplies(power):
    leaves, targets = inputs()
    reads = READS["all kinds"]
    found = one_number(*log_probs(*leaves, targets, reads, chunk=7)) / 4096
    exact = torch.autograd.grad(found, leaves, retain_graph=True)
    scaled = torch.autograd.grad(found * 2**power, leaves)
    for ours, theirs in zip(scaled, exact, strict=True):
        assert (ours / 2**power - theirs).norm() / theirs.norm() < 1e-6


@pytest.mark.parametrize("power", [0, 8, 16])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_under_autocast_the_gradient_is_that_of_plain_autograd(half, power):
    """Both multiply in half precision; what lies between the two products is float32 in ours."""
    leaves, targets = inputs()
    reads = [cells()]
    with torch.autocast("cpu", dtype=half):
        target, outs = log_probs(*leaves, targets, reads, chunk=7)
    assert target.dtype == outs[0].dtype == torch.float32
    scale = 2**power / 4096
    ours = torch.autograd.grad(one_number(target, outs) * scale, leaves)
    exact, _ = inputs()
    expected, theirs = plainly(*exact, targets, reads, 1.0, None)
    naive = torch.autograd.grad(one_number(expected, theirs), exact)
    for gradient, other in zip(ours, naive, strict=True):
        assert gradient.dtype == torch.float32
        assert (gradient / scale - other).norm() / other.norm() < (0.03 if half == torch.bfloat16 else 0.005)


def counted_products(monkeypatch):
    rows = []

    def linear(hidden, weight, bias):
        rows.append(len(hidden))
        return hidden @ weight.T + bias

    monkeypatch.setattr(one_softmax.nn.functional, "linear", linear)
    return rows


def test_the_last_chunk_is_not_made_again(monkeypatch):
    rows = counted_products(monkeypatch)
    leaves, targets = inputs()
    target, _ = log_probs(*leaves, targets, [cells()], chunk=10)
    assert rows == [3, 10, 10]
    first = torch.autograd.grad(target.sum(), leaves, retain_graph=True)
    assert rows == [3, 10, 10, 10, 3]
    second = torch.autograd.grad(target.sum(), leaves)
    assert rows[5:] == [10, 10, 3], "its memory was used up by the first backward pass"
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_without_gradient_nothing_is_kept():
    leaves, targets = inputs()
    with torch.no_grad():
        target, (out,) = log_probs(*leaves, targets, [cells()], chunk=10)
    assert target.grad_fn is None
    kept, (again,) = log_probs(*leaves, targets, [cells()], chunk=10)
    assert torch.equal(kept.detach(), target)
    assert torch.equal(again.detach(), out)
    assert kept.grad_fn is not None


def test_a_frozen_head_gets_no_gradient():
    (hidden, weight, bias), targets = inputs()
    target, _ = log_probs(hidden, weight.detach(), bias.detach(), targets, [cells()], chunk=10)
    (ours,) = torch.autograd.grad(target.sum(), hidden)
    both, _ = log_probs(hidden, weight, bias, targets, [cells()], chunk=10)
    assert torch.equal(ours, torch.autograd.grad(both.sum(), hidden)[0])


def test_blocks_within_a_chunk_change_nothing(monkeypatch):
    leaves, targets = inputs()
    whole = log_probs(*leaves, targets, READS["all kinds"], chunk=23)
    monkeypatch.setattr(one_softmax, "_CACHE", 4 * V * 3)
    parts = log_probs(*leaves, targets, READS["all kinds"], chunk=23)
    assert torch.equal(whole[0], parts[0])
    ours, theirs = (torch.autograd.grad(one_number(*found), leaves) for found in (whole, parts))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_broken_logit_is_seen():
    """No infinity and no NaN is turned into a number."""
    (hidden, weight, bias), targets = inputs()
    spoilt = bias.detach().clone()
    spoilt[5] = torch.inf
    target, (out,) = log_probs(hidden, weight, spoilt, targets, [cells()], chunk=10)
    assert not target.isfinite().any()
    assert out.isnan().any(-1).all()


def test_nan_outside_the_cells_is_seen():
    """One row of the head is broken, and no cell and no target stands on it."""
    (hidden, weight, bias), targets = inputs()
    read = Read(torch.zeros(N, 1, dtype=torch.long))
    spoilt = bias.detach().clone()
    spoilt[5] = torch.nan
    target, (out,) = log_probs(hidden, weight, spoilt, torch.ones_like(targets), [read], chunk=10)
    assert target.isnan().all()
    assert out.isnan().all()


def test_the_bias_may_be_missing():
    (hidden, weight, bias), targets = inputs()
    none, _ = log_probs(hidden, weight, None, targets, [], chunk=10)
    zero, _ = log_probs(hidden, weight, torch.zeros_like(bias), targets, [], chunk=10)
    torch.testing.assert_close(none, zero)
    gradients = torch.autograd.grad(none.sum(), (hidden, weight))
    assert all(g.isfinite().all() for g in gradients)
