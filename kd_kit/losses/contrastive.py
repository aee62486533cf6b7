"""Contrast: which of many teacher vectors belongs to this student vector?"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kd_kit.losses.hidden import unit


def info_nce(student: Tensor, teacher: Tensor, groups: Tensor, *, temperature: float = 0.1) -> tuple[Tensor, Tensor]:
    """How hard it is to tell the own teacher vector from those of other documents; 1.0 at random, one per anchor.

    The candidates of anchor i are teacher vector i and those of all other groups: neighbours in one document may well
    mean the same and are no negatives. Cross-entropy over cosine / temperature, divided by the log of the number of
    candidates. It cannot reach 0: with n candidates all at right angles to the right one, and that one met exactly,
    it is log(1 + (n - 1) e^(-1 / temperature)) / log(n).

    Shapes:
        student: [n, E], already projected to the teacher's width
        teacher: [n, E], receives no gradient
        groups: [n] int64, the document of each
        returns: values [n] float32, 0 where there is no negative; has_negatives [n] bool, the anchors that count

    Raises:
        ValueError: the shapes do not fit, or ``temperature`` is not positive.

    Source: van den Oord et al. 2018, equation 4, https://arxiv.org/abs/1807.03748; between teacher and student: Tian
        et al. 2019, "Contrastive representation distillation", section 3.1, https://arxiv.org/abs/1910.10699
    """
    if student.dim() != 2 or student.shape != teacher.shape or groups.shape != student.shape[:1]:
        raise ValueError(
            f"info_nce: expected vectors [n, E] of one shape and groups [n], got student {tuple(student.shape)} and "
            f"teacher {tuple(teacher.shape)} and groups {tuple(groups.shape)}; project the student to the teacher's "
            "width first"
        )
    if not temperature > 0:
        raise ValueError(f"info_nce: expected a temperature above 0, got {temperature}")
    anchors, candidates = unit(student), unit(teacher.detach())
    with torch.autocast(student.device.type, enabled=False):
        scores = anchors @ candidates.mT / temperature
    own = torch.eye(len(groups), dtype=torch.bool, device=groups.device)
    among = (groups.unsqueeze(1) != groups) | own
    count = among.sum(-1)
    has_negatives = count > 1
    values = torch.where(among, scores, -math.inf).logsumexp(-1) - scores.diagonal()
    return torch.where(has_negatives, values / count.clamp(min=2).float().log(), 0.0), has_negatives
