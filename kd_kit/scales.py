"""Does a loss scale with what it should not? Every term on the same text in other shapes of batch.

A loss of one value per token says the same of a text whether it comes in long windows or in short ones, in large
batches or in small ones, with much padding or with none. One that does not changes its weight in the total whenever
somebody changes the window or the batch size, and nobody sees why.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn import functional

from kd_kit.data import WindowSet
from kd_kit.table import Table, short
from kd_kit.terms import LossTerm
from kd_kit.types import IGNORE, DistillBatch

KEEPS = (0.5**0.5, 2**0.5)
"""Ratio of a value at half the length, or half the batch, to the whole, within which it does not scale with it: what
scales has 0.5 or 2, what does not has 1, and halfway between lies the square root. Relations within a window become a
little larger in shorter ones: up to 1.28 was seen of the attention and relation terms."""

PADS = (0.98, 1.02)
"""The same for padding, which may change nothing but the order of sums."""

WARMS = (0.4, 2.5)
"""The same for the norm of a gradient at twice the temperature."""

FLATTENED = 4.0
"""Temperature from which on it is doubled: distributions are flat enough there for the norm of a divergence's gradient
to fall to a quarter where nothing multiplies it by T^2. From 1 to 2 it fell to 0.34 only."""

_NOTHING = 1e-7  # a value below has no ratio worth the name


@dataclass(frozen=True)
class Scale:
    """One term in other shapes. Ratios are None where they could not be taken.

    Attributes:
        value: on the whole batch; None where the term has nothing to look at.
        length, batch, padding: value at half the length, in half the batch and with longer padding, over that.
        gradient: norm of the gradient at twice the temperature, over that at the temperature.
        batchwise: the value depends on which windows share a batch, and the term says so.
    """

    name: str
    value: float | None
    length: float | None = None
    batch: float | None = None
    padding: float | None = None
    gradient: float | None = None
    batchwise: bool = False

    @property
    def faults(self) -> list[str]:
        """What is wrong and what to do, in words."""
        numbers = (self.value, self.length, self.batch, self.padding, self.gradient)
        if any(x is not None and not math.isfinite(x) for x in numbers):
            return ["not finite: look for a logarithm or a quotient of 0 (unused cells hold -inf)"]
        found = []
        if self.padding is not None and not PADS[0] <= self.padding <= PADS[1]:
            found.append("changes with padding: count batch.rows only")
        if not self.batchwise and self.length is not None and not KEEPS[0] <= self.length <= KEEPS[1]:
            found.append("scales with length: normalise by tokens")
        if not self.batchwise and self.batch is not None and not KEEPS[0] <= self.batch <= KEEPS[1]:
            found.append("scales with the batch: normalise by tokens")
        if self.gradient is not None and not WARMS[0] <= self.gradient <= WARMS[1]:
            rises = self.gradient > 1
            found.append(
                "its gradient rises with T: multiply by T*T and no more"
                if rises
                else "its gradient falls with T^2: multiply by T*T"
            )
        return found

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "nothing to look at in this batch"
        if self.faults:
            return "; ".join(self.faults)
        return "ok; compares the spans of a batch, so it depends on the batch, as it says" if self.batchwise else "ok"


@dataclass(frozen=True)
class ScaleReport:
    """What :meth:`kd_kit.probe.Probe.scales` found. ``ok`` says whether no term scales with what it should not.

    Attributes:
        rows: one :class:`Scale` for every term. notes: what could not be looked at, and why.
    """

    rows: tuple[Scale, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        return not self.blamed

    @property
    def blamed(self) -> dict[str, list[str]]:
        """{term: what is wrong with it}, of those where something is."""
        return {row.name: row.faults for row in self.rows if row.faults}

    @property
    def table(self) -> Table:
        """Ratios to the value of the whole batch; what they must lie within stands below."""
        rows = tuple(
            (
                row.name,
                short(row.value),
                *("-" if x is None else f"{x:.2f}" for x in (row.length, row.batch, row.padding, row.gradient)),
                row.verdict,
            )
            for row in self.rows
        )
        within = (
            f"ratios; a term that does not scale keeps {KEEPS[0]:.2f} to {KEEPS[1]:.2f} at half length and in half a "
            f"batch,\n{PADS[0]:g} to {PADS[1]:g} with longer padding, and its gradient's norm {WARMS[0]:g} to "
            f"{WARMS[1]:g} when its temperature is doubled"
        )
        said = f"-> {len(self.blamed)} of {len(rows)} terms scale with what they should not"
        columns = ("term", "value", "half length", "half batch", "padding", "gradient, 2 T", "verdict")
        note = "\n".join([within, *self.notes, said if self.blamed else f"-> none of {len(rows)} terms scales"])
        return Table("", columns, rows, note, ("term", "verdict"))

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


Measure = Callable[[DistillBatch], Mapping[str, tuple[float | None, int]]]
"""A batch on the host to {term: (mean, positions)}."""


def measure_scales(
    terms: Sequence[LossTerm], windows: WindowSet, indices: Sequence[int], measure: Measure
) -> tuple[list[Scale], list[str]]:
    """Every term on the same windows whole, cut into halves, half of them at a time, and padded longer.

    Args:
        indices: the windows. measure: what the terms say about a batch.
    """
    batch = windows.collate(list(indices))
    whole = measure(batch)
    notes = []
    cut = halves(windows, indices)
    if cut is None:
        notes.append("half length: no window can be cut at a byte where both tokenizers have a boundary")
        length, padding = {}, {}
    else:
        both = [half.collate(range(len(half))) for half in cut]
        parts = [measure(half) for half in both]
        length = _joined(parts)
        longer = batch.student_ids.shape[1], batch.teacher_ids.shape[1]  # what the models are known to hold
        pads = windows.pair.student_vocab.pad_id, windows.pair.teacher_vocab.pad_id
        wider = measure(padded(both[0], *longer, pads=pads))
        padding = {name: _ratio(wider[name][0], value) for name, (value, _) in parts[0].items()}
    if len(indices) < 2:
        notes.append("half batch: expected at least two windows; raise windows= of build_probe")
        small = {}
    else:
        middle = len(indices) // 2
        small = _joined([measure(windows.collate(list(some))) for some in (indices[:middle], indices[middle:])])
    found = [
        Scale(
            term.name,
            whole[term.name][0],
            _ratio(length.get(term.name), whole[term.name][0]),
            _ratio(small.get(term.name), whole[term.name][0]),
            padding.get(term.name),
            batchwise=term.batchwise,
        )
        for term in terms
    ]
    return found, notes


def _joined(parts: Sequence[Mapping[str, tuple[float | None, int]]]) -> dict[str, float | None]:
    """Means over several batches as a mean over all their positions; None where one of them has none."""
    found = {}
    for name in parts[0]:
        values, counts = zip(*(part[name] for part in parts), strict=True)
        whole = sum(counts)
        known = whole and None not in values
        found[name] = sum(v * c for v, c in zip(values, counts, strict=True)) / whole if known else None
    return found


def _ratio(value: float | None, whole: float | None) -> float | None:
    if value is None or whole is None or not abs(whole) >= _NOTHING or math.isinf(whole):
        return None
    return value / whole


def halves(windows: WindowSet, indices: Sequence[int]) -> tuple[WindowSet, WindowSet] | None:
    """The first and the second halves of windows, cut where both tokenizers have a boundary; None if none can be."""
    rows = []
    for index in indices:
        number, first, scored, last = windows.table[index]
        document = windows.documents[number]
        common = np.intersect1d(document.student_ends, document.teacher_ends)
        common = common[(common > max(first, scored)) & (common < last)]
        if len(common):
            middle = common[np.abs(common - (first + last) / 2).argmin()]
            rows.append(((number, first, scored, middle), (number, middle, middle, last)))
    if not rows:
        return None
    found = []
    for table in zip(*rows, strict=True):
        half = copy.copy(windows)
        half.table = np.array(table)
        found.append(half)
    return found[0], found[1]


def padded(batch: DistillBatch, student: int, teacher: int, *, pads: tuple[int, int]) -> DistillBatch:
    """The same batch with so many positions on either side, the new ones padding.

    Args:
        pads: ids that fill the student's and the teacher's rows.
    """
    t, s = batch.student_ids.shape[1], batch.teacher_ids.shape[1]

    def wide(tensor: torch.Tensor, to: int, value) -> torch.Tensor:
        return functional.pad(tensor, (0, to - tensor.shape[1]), value=value)

    def moved(rows: torch.Tensor, before: int, now: int) -> torch.Tensor:
        return rows // before * now + rows % before

    flat = ("rows", "aligned_rows", "taught_rows", "same_rows")
    ends = torch.stack([moved(batch.span_rows[:, 0], t, student), moved(batch.span_rows[:, 1], s, teacher)], dim=-1)
    return replace(
        batch.unpacked(),
        student_ids=wide(batch.student_ids, student, pads[0]),
        teacher_ids=wide(batch.teacher_ids, teacher, pads[1]),
        targets=wide(batch.targets, student, IGNORE),
        teacher_targets=wide(batch.teacher_targets, teacher, IGNORE),
        **{name: wide(getattr(batch, name), student, 0) for name in ("target_bytes", "teacher_index")},
        **{name: wide(getattr(batch, name), student, False) for name in ("aligned", "taught", "same")},
        **{name: moved(getattr(batch, name), t, student) for name in flat},
        span_rows=ends,
    )
