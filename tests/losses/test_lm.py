"""Cross-entropy against torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from kd_kit.losses import cross_entropy


def example(dtype=torch.float32, shape=(3, 4), vocab=11):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(*shape, vocab, generator=generator).mul(3).to(dtype)
    return logits.requires_grad_(), torch.randint(0, vocab, shape, generator=generator)


def test_is_torchs_own_value_and_gradient():
    logits, targets = example()
    ours = cross_entropy(logits, targets)
    weights = torch.rand(ours.shape, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad((ours * weights).sum(), logits)
    theirs = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(3, 4)
    (expected,) = torch.autograd.grad((theirs * weights).sum(), logits)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)


def test_a_known_log_z_changes_nothing():
    logits, targets = example()
    (plain,) = torch.autograd.grad(cross_entropy(logits, targets).sum(), logits)
    known = cross_entropy(logits, targets, logits.logsumexp(-1))
    (gradient,) = torch.autograd.grad(known.sum(), logits)
    torch.testing.assert_close(known, cross_entropy(logits, targets))
    torch.testing.assert_close(gradient, plain)


def test_a_uniform_guess_costs_ln_v():
    assert cross_entropy(torch.zeros(1, 2048), torch.tensor([5])).item() == pytest.approx(math.log(2048))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_in_is_computed_in_float32(dtype):
    logits, targets = example(dtype)
    ours = cross_entropy(logits, targets)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, cross_entropy(logits.float(), targets))


def test_the_error_names_both_shapes():
    with pytest.raises(ValueError, match=r"cross_entropy: .*\(3, 4\), got targets \(3, 5\)"):
        cross_entropy(torch.zeros(3, 4, 7), torch.zeros(3, 5, dtype=torch.long))
