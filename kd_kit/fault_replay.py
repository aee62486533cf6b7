"""The batch of a fault once more, through the models as they are now: what is finite, and what is not any longer."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch

from kd_kit.fault_trace import broken_weights, look, untouched
from kd_kit.table import Table, short
from kd_kit.types import DistillBatch

MOST_WINDOWS = 64
"""Windows that are run on their own; those that caused the fault come first."""

_TEXT = 48  # characters of a window's beginning in the table


@dataclass(frozen=True)
class ReplayRow:
    """One micro-batch, or one of its windows on its own.

    Attributes:
        what: "micro-batch 0" or "window 17". guilty: a window that caused the fault.
        means: {term: mean over its positions}; None where it has none, or was not reached.
        forward: "finite", or the place where it is not. gradient: likewise; "-" where it was not reached.
        text: the beginning of a window.
    """

    what: str
    guilty: bool
    means: dict[str, float | None]
    forward: str
    gradient: str
    text: str = ""

    @property
    def finite(self) -> bool:
        return self.forward == self.gradient == "finite"


@dataclass(frozen=True, repr=False)
class Replay:
    """What the kept batches give now. Prints as a table.

    Attributes:
        rows: every micro-batch, then its windows. note: what the table leaves out, or why it is short.
    """

    rows: tuple[ReplayRow, ...]
    note: str = ""

    @property
    def finite(self) -> bool:
        """Whether everything is finite now."""
        return all(row.finite for row in self.rows)

    @property
    def table(self) -> Table:
        terms = list(dict.fromkeys(name for row in self.rows for name in row.means))
        bad = sum(not row.finite for row in self.rows)
        said = "all of it is finite now" if not bad else f"{bad} of {len(self.rows)} are not finite"
        return Table(
            f"The batch of the fault, through the models as they are now: {said}",
            ("", "what", *terms, "forward", "gradient", "text"),
            tuple(
                (
                    "→" if row.guilty else "",
                    row.what,
                    *(short(row.means.get(name)) for name in terms),
                    row.forward,
                    row.gradient,
                    row.text,
                )
                for row in self.rows
            ),
            ("→ caused the fault; " if any(row.guilty for row in self.rows) else "")
            + "every term is the mean over its positions"
            + (f"\n{self.note}" if self.note else ""),
            words=("", "what", "forward", "gradient", "text"),
        )

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()


def replay(trainer, batches: Sequence[DistillBatch], guilty: Collection[int] = ()) -> Replay:
    """Run batches, and each of their windows on its own, through the models of a trainer; nothing is trained.

    Args:
        guilty: indices of windows to mark, and to run first.

    Raises:
        ValueError: the trainer trains in the background, its parts have not settled yet, or its training text is not
            that of the batches.
    """
    if trainer.running:
        raise ValueError(
            "Fault.replay: expected a run at rest, got one that trains in the background; trainer.stop() and "
            "trainer.wait() first"
        )
    if not all(getattr(part, "ready", True) for part in trainer.module.parts.values()):
        raise ValueError(
            "Fault.replay: expected parts of terms that have settled, got a run without a step; trainer.resume() or "
            "trainer.settle() first"
        )
    windows = trainer.data.train
    numbers = list(dict.fromkeys(int(i) for batch in batches for i in batch.sample.tolist()))
    for batch in batches:
        _check_text(windows, batch)
    chosen = sorted(numbers, key=lambda i: i not in guilty)[:MOST_WINDOWS]
    rows = []
    with untouched(trainer):
        broken = broken_weights(trainer)
        for number, batch in enumerate(batches):
            rows.append(_row(trainer, batch, f"micro-batch {number}", False, ""))
        for index in chosen:
            text = " ".join(windows.text(index).split())
            text = text if len(text) <= _TEXT else text[: _TEXT - 1] + "…"
            rows.append(_row(trainer, windows.collate([index]), f"window {index}", index in guilty, text))
    notes = []
    if broken is not None:
        notes.append(f"the weights themselves are not finite: {broken.layer} ({broken.dtype}), {broken.numbers}")
    if len(chosen) < len(numbers):
        notes.append(f"{len(numbers) - len(chosen):,} more windows were not run on their own")
    return Replay(tuple(rows), "\n".join(notes))


def _row(trainer, batch: DistillBatch, what: str, guilty: bool, text: str) -> ReplayRow:
    counts = {t.name: t.count(batch) for t in trainer.module.terms}
    scales = {name: 1.0 / count if count else 0.0 for name, count in counts.items()}
    seen = look(trainer, batch.to(trainer.session.device), scales, every=True)
    means = {n: seen.sums[n] / c if c and n in seen.sums else None for n, c in counts.items()}
    forward, gradient = "finite", "finite"
    if seen.found is not None and seen.found.where != "gradient":
        forward, gradient = _said(seen.found), "-"
    elif seen.problems:
        gradient = "; ".join(f"{name}: {_said(place)}" for name, place in seen.problems.items())
    return ReplayRow(what, guilty, means, forward, gradient, text)


def _said(place) -> str:
    at = place.layer or (place.term if place.where == "term" else place.where)
    return f"{place.numbers} in {at}" if place.numbers else str(at)


def _check_text(windows, batch: DistillBatch) -> None:
    """A ValueError where the windows of these numbers are other text than that of the batch."""
    same = all(0 <= i < len(windows) for i in batch.sample.tolist())
    if same:
        now, kept = windows.collate(batch.sample.tolist()).student_ids, batch.student_ids.cpu()
        same = now.shape == kept.shape and torch.equal(now, kept)
    if not same:
        raise ValueError(
            "Fault.replay: expected a run on the text that the batch is from, got another; build the data as they were"
        )
