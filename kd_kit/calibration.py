"""Whether a model is as sure as it is right: its first choice's probability against how often that choice is the text.

Measured in the model's own tokens, in the pass that measures its likelihood.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kit.data import WindowSet
from kd_kit.head import LogitRows
from kd_kit.likelihood import Score, evaluating, over_targets, row_nll

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """Positions by the probability of their first choice, in :data:`BINS` bins of equal width.

    Attributes:
        positions: how many in each bin. confidence: their mean probability. right: the share of them whose first
            choice was the text's next token. Both are 0 in a bin that is empty.
    """

    positions: tuple[int, ...]
    confidence: tuple[float, ...]
    right: tuple[float, ...]

    @property
    def ece(self) -> float:
        """Expected calibration error, between 0 and 1: the mean over positions of their bin's |confidence - right|.

        NaN without positions.

        Source: Guo et al. 2017, "On calibration of modern neural networks", section 2, equation 3,
        https://arxiv.org/abs/1706.04599
        """
        total = sum(self.positions)
        gaps = (n * abs(c - r) for n, c, r in zip(self.positions, self.confidence, self.right, strict=True))
        return sum(gaps) / total if total else float("nan")

    @property
    def points(self) -> list[list[float]]:
        """[confidence, right, positions] of every bin that has any, as a reliability diagram draws them."""
        bins = zip(self.confidence, self.right, self.positions, strict=True)
        return [list(one) for one in bins if one[2]]


def in_bins(confidence: Tensor, right: Tensor) -> Tensor:
    """Sums of a calibration over some positions: how many, their confidence, how many were right.

    Bin m of M holds the probabilities in ((m - 1) / M, m / M].

    Shapes:
        confidence: [n] in (0, 1]
        right: [n], 1 or 0
        returns: [3, BINS] float64
    """
    bins = (confidence.double() * BINS).ceil().long().sub(1).clamp(0, BINS - 1)
    sums = torch.zeros(3, BINS, dtype=torch.float64, device=confidence.device)
    values = torch.stack([torch.ones_like(confidence), confidence, right]).double()
    return sums.index_add_(1, bins, values)


def _confidence(rows: LogitRows) -> Tensor:
    return (rows.logits.amax(-1) - rows.log_z).exp()


def _right(rows: LogitRows) -> Tensor:
    return (rows.logits.argmax(-1) == rows.targets).float()


def score_and_calibration(
    model, windows: WindowSet, *, side: str = "student", batch_size: int = 8, limit: int | None = None
) -> tuple[Score, Calibration]:
    """Likelihood of a set of windows and the calibration of its first choices, in one pass.

    Args:
        side, batch_size, limit: as of :func:`kd_kit.score`.
    """
    sums, nats = torch.zeros(3, BINS, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    size = tokens = 0
    losses = {"nll": row_nll, "confidence": _confidence, "right": _right}
    with evaluating(model):
        for batch, values in over_targets(
            model, windows, losses, side=side, batch_size=batch_size, limit=limit, whole=True
        ):
            size += int(batch.target_bytes.sum())
            tokens += len(values["nll"])
            nats += values["nll"].double().sum().cpu()
            sums += in_bins(values["confidence"], values["right"]).cpu()
    count, *means = (sums / torch.where(torch.arange(3).unsqueeze(1) > 0, sums[0].clamp(min=1), 1)).tolist()
    return Score(float(nats), size, tokens), Calibration(tuple(map(int, count)), *map(tuple, means))
