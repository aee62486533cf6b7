"""Is this run ready? A checklist in under a minute: every line measured, each that is not in order with its cure.

Figures come from the plan (shares, rates, stopping, printed lines) and from a few real steps on copies
(:mod:`kd_kit.trial`): the trainer is left exactly as it was.
"""

from __future__ import annotations

import html
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

from kd_kit import plan_checks, trial_checks
from kd_kit.facts import FAIL, LOOK, OK, Facts, Found, sentence
from kd_kit.table import Table
from kd_kit.trainer import Trainer
from kd_kit.trial import Trial

_WIDTH = 100  # characters of a line of the notes
_COLUMNS = ("", "checked", "measured", "wanted")


class Line(NamedTuple):
    """One thing that was checked: what, what was measured, what is wanted, ok / look / FAIL, and the cure in words."""

    check: str
    measured: str
    wanted: str
    verdict: str
    cure: str = ""


@dataclass(frozen=True)
class Preflight:
    """What :func:`run_preflight` found. ``ok`` says whether nothing failed; what is to be looked at may be meant so.

    Attributes:
        rows: one :class:`Line` per check.
        notes: about the whole. seconds: that it took.
    """

    rows: tuple[Line, ...]
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        return all(line.verdict != FAIL for line in self.rows)

    @property
    def table(self) -> Table:
        """A line per check, and below them what to do about those that are not in order."""
        rows = tuple((line.verdict, line.check, line.measured, line.wanted) for line in self.rows)
        text = "\n".join(textwrap.fill(note, _WIDTH, subsequent_indent=" " * 6) for note in self._below())
        return Table("", _COLUMNS, rows, text, _COLUMNS)

    def _below(self) -> list[str]:
        """The lines below the table."""
        cures: dict[tuple[str, str], list[str]] = {}  # one sentence about several lines is said once
        for line in sorted(self.rows, key=lambda line: (FAIL, LOOK, OK).index(line.verdict)):
            if line.cure:
                cures.setdefault((line.verdict, line.cure), []).append(line.check)
        notes = [f"{word}  {', '.join(checks)}: {cure}" for (word, cure), checks in cures.items()]
        found = {word: sum(line.verdict == word for line in self.rows) for word in (FAIL, LOOK)}
        said = f"{len(self.rows)} checks in {self.seconds:.0f} s: {found[FAIL]} failed, {found[LOOK]} to look at"
        return [*notes, *self.notes, f"-> {'ready' if self.ok else 'not ready'}; {said}"]

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        table = replace(self.table, note="")._repr_html_()
        below = "".join(
            f'<div style="max-width:56em;margin:0.4em 0;white-space:pre-wrap">{html.escape(note, quote=False)}</div>'
            for note in self._below()
        )
        return f"<div>{table}{below}</div>"


Check = Callable[[Facts], Found]

_CHECKS: tuple[tuple[str, str, Check], ...] = (
    ("dtypes agree, no autocast", "every value finite", trial_checks.dtypes),
    ("size of the terms", "0 to 10, in range", trial_checks.sizes),
    ("share at half time", "50% of the full share", plan_checks.half_time),
    ("printed lines", f"under {plan_checks.LINES}", plan_checks.printed),
    ("early stopping", f"patience {plan_checks.PATIENCE} or more", plan_checks.stopping),
    ("LM term always on", "above 0; gradient > 1%", plan_checks.language),
    ("top K cells", "K < V, tail under 10%", trial_checks.top_k),
    ("learning rate", "as planned, never 0", plan_checks.rate),
    ("positions", "50% taught", trial_checks.heard),
    ("padding", f"under {plan_checks.PADDING:.0%}", plan_checks.padding),
    ("held-out text", "teacher below student", trial_checks.better),
    ("gradient reaches", "all that is trained", trial_checks.reaches),
    ("gradient shares", "1% to 90% each", trial_checks.gradient_shares),
    ("save and resume", "the same next step", trial_checks.resumes),
    ("memory", "under 90%", trial_checks.fits),
    ("disk", "what will be kept", trial_checks.disk),
    ("time", "in this session", trial_checks.time_left),
    ("cost of a step", f"under {trial_checks.TIMES_FLOOR:g} x", trial_checks.cost),
)


def run_preflight(trainer: Trainer) -> Preflight:
    """Check a run before it begins, or before it goes on: its plan, and what a few real steps on copies of it show.

    - The plan: every term has half of its full share at half time, the LM term counts at every step, the rate is as
      drawn and never 0, early stopping waits long enough, the log stays readable.
    - The first batches: every term is finite and in its range, also without autocast beside a teacher in half
      precision; the teacher is heard often enough, its top K cells hold most of its mass, and it is better than the
      student on held-out text.
    - A few steps: the gradient reaches all that is trained, no term drowns the others, a checkpoint goes on to
      the same weights.
    - The machine: memory, disk, and the session's time. Sets ``trainer.floor_seconds``.

    The steps are made at the trainer's current step, with its data, accumulation and schedule. Weights, random states,
    history, optimizer and the run's folder are afterwards what they were. A loss function of your own that keeps state
    outside its own attributes is run on that state.

    Raises:
        ValueError: the trainer trains in the background, or is one of several processes.
    """
    trainer.processes.refuse_several("run_preflight")
    if trainer.running:
        raise ValueError(
            "run_preflight: expected a trainer at rest, got one that trains; let it end with trainer.wait(), or "
            "trainer.stop() it first"
        )
    started = time.monotonic()
    free = trial_checks.free_space(trainer)
    trial = Trial(trainer).run()
    if trial.floor_seconds is not None:
        trainer.floor_seconds = trial.floor_seconds
    lines = []
    for name, wanted, check in _CHECKS:
        try:
            found = check(Facts(trainer, trial, free))
        except Exception as error:  # one line that cannot be had leaves the others
            found = "not measured", FAIL, sentence(error)
        if found is not None:
            measured, word, cure = found
            lines.append(Line(name, measured, wanted, word, cure))
    notes = []
    behind = trainer._steps_done()
    if behind > trainer.step:
        notes.append(
            f"The run's folder holds a checkpoint of step {behind:,}, and this was measured at step {trainer.step:,}: "
            "call trainer.resume() first to measure where it goes on."
        )
    return Preflight(tuple(lines), tuple(notes), time.monotonic() - started)
