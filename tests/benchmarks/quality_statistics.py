"""Paired bootstrap over documents and seeds: how much better one way of training is than another, and how sure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
SEEN = 0.005
"""Bits per byte below which a difference, however sure, is nothing to choose by."""
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
        """In words: sure where the interval is clear of 0, worth a word where the mean is at least ``SEEN``."""
        if abs(self.mean) < SEEN:
            return NOTHING
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
    return float(np.asarray(nats, dtype=float).mean(0).sum() / np.asarray(size).sum() / math.log(2))


def paired_difference(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    size: Sequence[int],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Difference:
    """Bits per byte of ``ours`` minus ``theirs``, with an interval from drawing documents and seeds with replacement.

    Both sides are drawn together, document by document and seed by seed, so that what is hard for both cancels: one
    seed gives both the same start and the same order of the text. Documents alone would give an interval that says
    nothing about another start, and calls a difference sure that the next seed turns around.

    Args:
        ours, theirs: for each seed, each document's negative log-likelihood in nats. size: each document's bytes.

    Raises:
        ValueError: sides of different documents or seeds, or a document without bytes.

    Source: Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation", section 4; two crossed
        factors: Owen 2007, "The pigeonhole bootstrap"; percentile interval: Efron and Tibshirani 1993, chapter 13
    """
    one, other, size = (np.asarray(x, dtype=float) for x in (ours, theirs, size))
    if one.ndim != 2 or one.shape != other.shape or not one.size or one.shape[1:] != size.shape:
        raise ValueError(
            "paired_difference: expected the same seeds and documents on both sides, got (seeds, documents) "
            f"{one.shape} and {other.shape}, and {size.shape} sizes"
        )
    if not (size > 0).all():
        raise ValueError("paired_difference: expected documents with bytes, got an empty one; leave it out")
    gap = (one - other) / math.log(2)
    random = np.random.default_rng(seed)
    seeds, documents = (random.multinomial(n, [1 / n] * n, size=draws) for n in gap.shape)  # how often each is drawn
    drawn = np.einsum("ns,sd,nd->n", seeds, gap, documents) / len(gap) / (documents @ size)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Difference(float(gap.sum() / len(gap) / size.sum()), float(low), float(high))
