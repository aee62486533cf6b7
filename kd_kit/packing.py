"""Short texts side by side in rows of bounded length, so that little of a batch is padding.

Which text stands in which row is a pure function of the lengths: best fit, the longest first.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

LEAST_SAVED = 0.1
"""Share of the places of a padded batch that packing must save to be used: rows with several windows need an attention
mask, and with one the fastest attention is not available."""

_WIDTHS = (1, 2, 4)
"""Rows are as wide as the longest window, or so many times: wider ones fill better where windows are about as long as
each other."""

_EVEN = 4096
"""Places of a row whose attention costs about as much as all else in a layer: 6 times the width of a model of 700."""


def best_fit(sizes: Sequence[int] | np.ndarray, room: int) -> np.ndarray:
    """[n] int64, a row for every item so that no row holds more than ``room``; the longest first, each into the fullest
    row that has room for it.

    Needs at most 11/9 of the fewest rows possible, and one.

    Raises:
        ValueError: an item longer than ``room``, or one without length.

    Source: Johnson 1973, Near-optimal bin packing algorithms
    """
    sizes = np.asarray(sizes, dtype=np.int64)
    if len(sizes) and not 1 <= sizes.min() <= sizes.max() <= room:
        raise ValueError(f"best_fit: expected sizes between 1 and {room}, got {sizes.min()} to {sizes.max()}")
    order = np.argsort(-sizes, kind="stable")
    rows = np.empty(len(sizes), dtype=np.int64)
    opened: dict[int, list[int]] = {}  # rows by the room that is left in them
    there, count = 0, 0  # bit i: some row has i places left
    for item, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        fitting = there >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = opened[left].pop()
            if not opened[left]:
                there ^= 1 << left
        else:
            row, left, count = count, room, count + 1
        rows[item] = row
        left -= size
        if left:
            opened.setdefault(left, []).append(row)
            there |= 1 << left
    return rows


def side_by_side(lengths: np.ndarray) -> np.ndarray:
    """Where the tokens of the windows of a batch stand when several windows share a row.

    Shapes:
        lengths: [B] int64, tokens of every window
        returns: [R, L] int64, at every place of the rows the flat index (b * T + t) of a token of the batch that is
            padded to its longest window T, -1 where nothing stands; [0, 0] where that would save less than
            ``LEAST_SAVED`` of the places
    """
    width = int(lengths.max())
    most = (1 - LEAST_SAVED) * len(lengths) * width
    none = np.zeros((0, 0), dtype=np.int64)
    if lengths.sum() > most:
        return none
    best = None
    for times in _WIDTHS:
        rows = best_fit(lengths, times * width)
        used = np.bincount(rows, lengths).astype(np.int64)
        cost = len(used) * used.max() * (1 + used.max() / _EVEN)
        if best is None or cost < best[0]:
            best = cost, rows, used
    _, rows, used = best
    if len(used) * used.max() > most:
        return none
    order = np.argsort(rows, kind="stable")
    starts = np.empty(len(rows), dtype=np.int64)  # of every window, in its row
    before = np.cumsum(lengths[order]) - lengths[order]
    starts[order] = before - (np.cumsum(used) - used)[rows[order]]
    window = np.repeat(np.arange(len(lengths)), lengths)
    token = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    out = np.full((len(used), int(used.max())), -1, dtype=np.int64)
    out[rows[window], starts[window] + token] = window * width + token
    return out
