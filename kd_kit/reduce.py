"""Masked sums. A loss is computed per position; what is averaged over what is decided here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kd_kit.types import LossValue


def masked_sum(values: Tensor, mask: Tensor | None = None) -> LossValue:
    """Sum and count of ``values`` where ``mask`` holds, in float32.

    A masked-out NaN or infinity neither reaches the sum nor the gradient (``torch.where``, since 0 * NaN is NaN).

    Shapes:
        values: [...]
        mask: [...] bool, same shape; None counts every position

    Raises:
        ValueError: the shapes differ.
    """
    if mask is None:
        count = torch.tensor(float(values.numel()), device=values.device)
        return LossValue(values.float().sum(), count)
    if values.shape != mask.shape:
        raise ValueError(
            f"masked_sum: expected a mask of the values' shape {tuple(values.shape)}, got {tuple(mask.shape)}; "
            "build the mask from the same batch as the values"
        )
    kept = torch.where(mask, values.float(), values.new_zeros((), dtype=torch.float32))
    return LossValue(kept.sum(), mask.sum().float())


def chunks(length: int, size: int) -> Iterator[slice]:
    """Slices of at most ``size`` that cover ``range(length)``."""
    if size < 1:
        raise ValueError(f"chunks: expected a size of at least 1, got {size}")
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))
