"""Divergences between two distributions given as log-probabilities over the same cells.

A cell is a token, or the tail that holds all mass without a cell of its own. All of these are 0 where both sides
agree and never negative, and by the data-processing inequality a divergence over cells is at most the one over
single tokens. ``-inf`` on both sides marks an unused cell.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# exp(-40) is far below what float32 can tell from 0 beside 1. A teacher that gives a cell exactly 0 would otherwise
# make the reverse KL infinite.
_FLOOR = -40.0


def _both(where: str, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{where}: expected log-probabilities over the same cells, got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)}; map the teacher to the student's cells first (losses.student_cells)"
        )
    return student.float(), teacher.detach().float()


def _expected(log_weights: Tensor, log_ratio: Tensor) -> Tensor:
    """Sum of exp(log_weights) * log_ratio over the cells that have weight."""
    used = log_weights != -math.inf  # NaN counts as used: a broken side must be seen, not dropped
    weight = torch.where(used, log_weights, torch.zeros_like(log_weights)).exp()
    return torch.where(used, weight * torch.where(used, log_ratio, torch.zeros_like(log_ratio)), 0.0).sum(-1)


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) at every position, in nats.

    Mode-covering: the student is charged wherever the teacher has mass. Its minimiser is the teacher, which is what
    bits per byte ask for.

    Shapes:
        student: [..., cells] log-probabilities
        teacher: [..., cells] log-probabilities, receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the shapes differ.

    Source: Hinton, Vinyals, Dean 2015, section 2, https://arxiv.org/abs/1503.02531
    """
    log_q, log_p = _both("forward_kl", student, teacher)
    return _expected(log_p, log_p - log_q)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(student || teacher) at every position, in nats.

    Mode-seeking: the student is charged where it has mass and the teacher has none.

    Shapes and errors as :func:`forward_kl`.

    Source: Gu et al. 2023, "MiniLLM", section 2.1, https://arxiv.org/abs/2306.08543
    """
    log_q, log_p = _both("reverse_kl", student, teacher)
    floored = torch.where(log_q > -math.inf, log_p.clamp(min=_FLOOR), log_p)
    return _expected(log_q, log_q - floored)


def jensen_shannon(student: Tensor, teacher: Tensor) -> Tensor:
    """Jensen-Shannon divergence at every position, in nats, at most ln 2.

    Shapes and errors as :func:`forward_kl`.

    Source: Lin 1991, "Divergence measures based on the Shannon entropy", equation 4.1 with equal weights
    """
    log_q, log_p = _both("jensen_shannon", student, teacher)
    log_m = _log_mix(log_p, log_q, 0.5)
    return 0.5 * (_expected(log_p, log_p - log_m) + _expected(log_q, log_q - log_m))


def skew_kl(student: Tensor, teacher: Tensor, *, alpha: float = 0.1) -> Tensor:
    """KL(teacher || alpha * teacher + (1 - alpha) * student) at every position, in nats, at most -ln(alpha).

    With alpha = 0.1 no position can cost more than 2.303 nats, however wrong the student is.

    Shapes and errors as :func:`forward_kl`; also ValueError for an ``alpha`` outside (0, 1).

    Source: Ko et al. 2024, "DistiLLM", equation 3, https://arxiv.org/abs/2402.03898
    """
    if not 0 < alpha < 1:
        raise ValueError(f"skew_kl: expected 0 < alpha < 1, got {alpha}; 0 is forward_kl itself")
    log_q, log_p = _both("skew_kl", student, teacher)
    return _expected(log_p, log_p - _log_mix(log_p, log_q, alpha))


def sampled_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """Estimate of KL(teacher || student) from tokens drawn from the teacher, in nats.

    Unbiased, so a single position can come out negative. Draws that fell into the tail count as 0: the student has no
    token to compare them with.

    Shapes:
        student: [..., K] log-probabilities of the drawn tokens
        teacher: [..., K] likewise, -inf where a draw has no token; receives no gradient
        returns: [...], float32

    Raises:
        ValueError: the shapes differ.

    Source: Anshumann et al. 2025, section 4, https://arxiv.org/abs/2503.16870
    """
    log_q, log_p = _both("sampled_kl", student, teacher)
    there = log_p != -math.inf
    ratio = torch.where(there, log_p, torch.zeros_like(log_p)) - torch.where(there, log_q, torch.zeros_like(log_q))
    return ratio.sum(-1) / max(log_p.shape[-1], 1)


def _log_mix(log_p: Tensor, log_q: Tensor, alpha: float) -> Tensor:
    """log(alpha * p + (1 - alpha) * q), with finite gradients where a cell is unused on either side."""
    floor = torch.finfo(torch.float32).min / 4
    return torch.logaddexp(log_p.clamp(min=floor) + math.log(alpha), log_q.clamp(min=floor) + math.log1p(-alpha))
