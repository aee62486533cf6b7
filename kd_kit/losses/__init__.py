"""Losses as pure functions, one value per position, float32 inside whatever comes in.

Nothing here averages, masks or weighs: that is :mod:`kd_kit.reduce` and :mod:`kd_kit.terms`.
"""

from kd_kit.losses.divergence import forward_kl, jensen_shannon, reverse_kl, skew_kl
from kd_kit.losses.lm import cross_entropy
from kd_kit.losses.support import student_cells, tempered, top_k_cells

__all__ = [
    "cross_entropy",
    "forward_kl",
    "jensen_shannon",
    "reverse_kl",
    "skew_kl",
    "student_cells",
    "tempered",
    "top_k_cells",
]
