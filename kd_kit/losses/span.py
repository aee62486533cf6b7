"""How likely a span of bytes is under each model: the comparison that needs no common tokens at all.

A span lies between two boundaries that both tokenizers have. Its log-likelihood is the sum of its tokens'
log-probabilities, one token or five, so the two sides are numbers about the same bytes.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A log-likelihood nearer to 0 than this is taken for this: float32 cannot tell it from rounding, and its logarithm,
# which the divergence needs, would run away.
_NEAREST = 1e-6


def span_divergence(student: Tensor, teacher: Tensor, *, temperature: float | None = None) -> Tensor:
    """Binary divergence between "the span" and "anything else" under the two models, in nats, one per span.

    With a = log P_teacher(span) and b = log P_student(span) it is KL(Bernoulli(e^(a / T)) || Bernoulli(e^(b / T))):
    binary cross-entropy less its own floor, so that equal models give 0. Spans are unlikely, so at T = 1 nearly all
    of e^a lies at 0 and the gradient with it. ``temperature=None`` is T times that in the limit of a large T,
    (a - b) + a log(b / a) = |a| (r - 1 - log r) with r = b / a: nothing to choose, and the default.

    Never negative, no upper bound. A padded span with 0 on both sides gives 0. No ``temperature ** 2`` here.

    Shapes:
        student: [...] log-likelihoods in nats, at most 0
        teacher: [...] likewise, receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the shapes differ, or ``temperature`` is not positive and finite.

    Source: Minixhofer, Vulić, Ponti 2025, "Approximate likelihood matching", section 3 (the binarised f-divergence),
        https://arxiv.org/abs/2503.20083; the limit is worked out in this kit
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"span_divergence: expected one log-likelihood per span from each side, got student "
            f"{tuple(student.shape)} and teacher {tuple(teacher.shape)}; sum the tokens of the same spans on both sides"
        )
    if temperature is not None and not 0 < temperature < math.inf:
        raise ValueError(
            f"span_divergence: expected a finite temperature above 0, got {temperature}; None is the limit of a "
            "large one"
        )
    b = student.float().clamp(max=-_NEAREST)
    a = teacher.detach().float().clamp(max=-_NEAREST)
    if temperature is None:
        change = (b - a) / a  # r - 1, without the rounding of r itself where the two are close
        near = change.abs() < 0.5
        log_ratio = torch.where(near, torch.where(near, change, 0.0).log1p(), (b / a).log())
        return -a * (change - log_ratio)
    a, b = a / temperature, b / temperature
    return a.exp() * (a - b) - a.expm1() * (_log1mexp(a) - _log1mexp(b))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0 by the form that is exact there; the second one may not even see an x near 0."""
    near = x > -math.log(2)
    return torch.where(near, (-x.expm1()).log(), (-torch.where(near, -1.0, x).exp()).log1p())
