"""AdamW for a student and the parts of its terms: groups with rates of their own, clipped apart."""

from __future__ import annotations

import torch
from torch import Tensor

from kd_kit.module import DistillModule

RATES = {"parts": 5.0, "projectors": 5.0, "routers": 5.0}
"""Rate of a parameter group relative to the student's: what is thrown away at the end may move faster."""


def build_optimizer(module: DistillModule, *, learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Matrices of the student with weight decay, its vectors without, the parts of the terms at their own rate."""
    student = [p for p in module.student.parameters() if p.requires_grad]
    groups = [
        {"name": "student", "params": [p for p in student if p.ndim >= 2], "weight_decay": weight_decay},
        {"name": "student", "params": [p for p in student if p.ndim < 2], "weight_decay": 0.0},
    ]
    for name in RATES:
        parts = [part for part in module.parts.values() if _group_of(part) == name]
        own = [p for part in parts for p in part.parameters()]
        groups.append({"name": name, "params": own, "weight_decay": 0.0})
    for group in groups:
        group["rate_factor"] = RATES.get(group["name"], 1.0)
        group["lr"] = learning_rate * group["rate_factor"]
    return torch.optim.AdamW([g for g in groups if g["params"]], betas=(0.9, 0.95), eps=1e-8)


def clip_gradients(module: DistillModule, most: float) -> Tensor:
    """Clip the gradients, the student's and the parts' each on their own: neither shrinks the other's step.

    Returns:
        scalar, the norm of the student's gradient before that; where only the parts' is not finite, theirs.
    """
    norm = torch.nn.utils.clip_grad_norm_(module.student.parameters(), most)
    if len(module.parts):
        parts = torch.nn.utils.clip_grad_norm_(module.parts.parameters(), most)
        norm = torch.where(torch.isfinite(parts), norm, parts)
    return norm


def _group_of(part) -> str:
    """Which parameter group a trained part of a term is in; its own word where that is one of ours."""
    group = getattr(part, "group", "parts")
    return group if group in RATES else "parts"
