"""Paired bootstrap over documents: how much better one way of training is than another, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
HELPS, NOTHING, HURTS = "helps", "nothing to see", "hurts"


@dataclass(frozen=True)
class Difference:
    """Bits per byte of one minus those of another, negative where the first is better.

    Attributes:
        low, high: the 95% interval.
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """In words, from the interval alone."""
        if self.high < 0:
            return HELPS
        return HURTS if self.low > 0 else NOTHING

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def bits_per_byte(nats: Sequence[Sequence[float]], size: Sequence[int]) -> float:
    """Over all documents, the mean of the seeds.

    Args:
        nats: for each seed, each document's negative log-likelihood. size: each document's bytes.
    """
    return float(_mean(nats).sum() / np.asarray(size, dtype=float).sum() / math.log(2))


def paired_difference(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    size: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Bits per byte of ``ours`` minus ``theirs``, with an interval from drawing documents with replacement.

    A document's nats are the mean of the seeds; both sides are drawn together, so that what makes a document hard for
    both cancels. The interval is about other documents. It does not know what other seeds would give: see their spread.

    Args:
        ours, theirs: for each seed, each document's negative log-likelihood in nats. size: each document's bytes.

    Raises:
        ValueError: sides of different documents, or a document without bytes.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4; percentile
        interval: Efron and Tibshirani 1993, chapter 13
    """
    one, other, size = _mean(ours), _mean(theirs), np.asarray(size, dtype=float)
    if not one.shape == other.shape == size.shape or not len(size):
        raise ValueError(
            f"paired_difference: expected the same documents on both sides, got {one.shape}, {other.shape} and "
            f"{size.shape} sizes"
        )
    if not (size > 0).all():
        raise ValueError("paired_difference: expected documents with bytes, got an empty one; leave it out")
    gap = (one - other) / math.log(2)
    drawn = np.random.default_rng(seed).integers(len(size), size=(draws, len(size)))
    low, high = np.percentile(gap[drawn].sum(1) / size[drawn].sum(1), [2.5, 97.5])
    return Difference(float(gap.sum() / size.sum()), float(low), float(high))


def _mean(nats: Sequence[Sequence[float]]) -> np.ndarray:
    if not len(nats):
        raise ValueError("paired_difference: expected at least one seed, got none")
    return np.asarray(nats, dtype=float).mean(0)
