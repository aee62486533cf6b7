"""Which windows share a batch: a pure function of (seed, epoch, place within the epoch) and of their lengths.

Windows that are nearly all full are shuffled. Where many are short, shuffled batches would be mostly padding and a
batch would hold few tokens: the windows are then put into rows once, and a batch is so many rows; or, where that is not
wanted, windows of about one length share a batch.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from kd_kit.align import Ragged, starts_of
from kd_kit.packing import LEAST_SAVED, best_fit, side_by_side

Arrangement = Literal["shuffled", "rows", "lengths"]

BLOCK = 64
"""Batches whose windows are sorted by length together: enough for likes to meet, and few enough that two epochs differ
in who meets whom."""

_LOOKED_AT = 32  # batches that the share of padding is measured on


def shuffled_padding(lengths: np.ndarray, batch_size: int) -> float:
    """Expected share of the places of shuffled batches that are padding, both sides together.

    Args:
        lengths: [W, 2] tokens of every window on either side.
    """
    ranked = np.sort(lengths, axis=0)
    up_to = (np.arange(len(ranked) + 1) / len(ranked)) ** min(batch_size, len(ranked))
    longest = (ranked * np.diff(up_to)[:, None]).sum()  # expected of a batch, the sides added
    return 1 - float(lengths.mean(axis=0).sum() / longest)


class Batching:
    """The batches of a set of windows.

    Attributes:
        arrangement: "shuffled", "rows" or "lengths". units: rows of windows; of one window each, where there are none.
        padding: share of the places of shuffled batches that are padding, as expected of the lengths.
    """

    def __init__(self, lengths: np.ndarray, *, window: int, batch_size: int, pack: bool | None):
        self.batch_size = batch_size
        self.lengths = lengths
        self.padding = shuffled_padding(lengths, batch_size)
        padded = self.padding > LEAST_SAVED
        self.arrangement: Arrangement = "rows" if pack or (pack is None and padded) else "shuffled"
        if pack is False and padded:
            self.arrangement = "lengths"
        count = len(lengths)
        self.row_of = best_fit(lengths.max(axis=1), window) if self.arrangement == "rows" else np.arange(count)
        members = np.argsort(self.row_of, kind="stable")
        self.units = Ragged(members, starts_of(np.bincount(self.row_of)))
        self._order: tuple = (None, None)

    @property
    def per_epoch(self) -> int:
        """Whole batches in one pass; a set smaller than a batch is one batch."""
        return max((len(self.units.starts) - 1) // self.batch_size, 1)

    def indices(self, seed: int, position: int) -> np.ndarray:
        """The windows of batch number ``position``."""
        epoch, place = divmod(position, self.per_epoch)
        remembered = self._order  # for speed only; read once, as several threads may ask
        if remembered[0] != (seed, epoch):
            self._order = remembered = ((seed, epoch), self._epoch(seed, epoch))
        chosen = remembered[1][place * self.batch_size : (place + 1) * self.batch_size]
        if self.arrangement != "rows":
            return chosen
        starts = self.units.starts
        return np.concatenate([self.units.values[starts[row] : starts[row + 1]] for row in chosen])

    def _epoch(self, seed: int, epoch: int) -> np.ndarray:
        """All units in the order of an epoch."""
        draw = np.random.Generator(np.random.PCG64([seed, epoch]))
        order = draw.permutation(len(self.units.starts) - 1)
        if self.arrangement != "lengths" or len(order) < self.batch_size:
            return order
        size = self.lengths.max(axis=1)
        order = order[: self.per_epoch * self.batch_size]  # what is left over is left over by chance, as ever
        block = BLOCK * self.batch_size
        blocks = [order[start : start + block] for start in range(0, len(order), block)]
        alike = np.concatenate([some[np.argsort(size[some], kind="stable")] for some in blocks])
        return alike.reshape(-1, self.batch_size)[draw.permutation(self.per_epoch)].ravel()

    def split(self, windows: list[int], at_once: int) -> list[list[int]]:
        """The windows of a batch in their order, no more than ``at_once`` rows together."""
        rows = self.row_of[windows]
        number = np.cumsum(np.diff(rows, prepend=rows[:1]) != 0) if self.arrangement == "rows" else range(len(windows))
        out: dict[int, list[int]] = {}
        for window, row in zip(windows, number, strict=True):
            out.setdefault(int(row) // at_once, []).append(window)
        return list(out.values())

    def measured_padding(self, *, packed: bool = True) -> float:
        """Share of padding of these batches, measured on a few of them.

        Args:
            packed: as models run them that keep windows in one row apart; otherwise every window in a row of its own.
        """
        tokens = places = 0
        for position in np.unique(np.linspace(0, self.per_epoch - 1, _LOOKED_AT).astype(int)).tolist():
            for lengths in self.lengths[self.indices(0, position)].T:
                tokens += lengths.sum()
                places += (side_by_side(lengths).size if packed else 0) or len(lengths) * lengths.max()
        return 1 - float(tokens / places)
