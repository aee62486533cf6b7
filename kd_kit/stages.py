"""Who counts how much, when: shares of the loss terms as pure functions of progress.

Everything counts in optimizer steps, the first of which is 0. Nothing here has state, so a resumed run and an
evaluation see the same values as the run that was not interrupted.
"""

from __future__ import annotations

import itertools
import math
import numbers
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

Line = Sequence[tuple[float, float]]
"""(progress, factor) points, joined by straight lines; progress runs from 0 to 1."""

HIDDEN_TERMS = ("feature", "layerwise", "relation", "attention", "contrastive", "router")
"""The kit's terms about a model's inside: what a preset phases in where no term is named."""

Change = tuple[int, str]
"""(optimizer step, sentence): from this step on something is different."""


def checked_number(where: str, name: str, value, low: float, high: float, more: str = "") -> float:
    """``value`` as a float in [low, high]."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise ValueError(f"{where}: expected {name} to be a number such as {high / 2:g}, got {value!r}{more}")
    if not low <= value <= high:
        raise ValueError(f"{where}: expected {name} between {low:g} and {high:g}, got {float(value):g}{more}")
    return float(value)


def _points(term, line) -> Line:
    """A line as a tuple of pairs of floats; one line, however it was written, has one repr."""
    shape = "write a line such as [(0, 0.2), (0.3, 1)], of progress and factor"
    if not isinstance(term, str):
        raise ValueError(f"Schedule: expected lines by the names of terms, got {term!r}; use term.name")
    try:
        points = [tuple(point) for point in line]
    except TypeError:
        points = [()]
    if any(len(p) != 2 or not all(isinstance(x, numbers.Real) and not isinstance(x, bool) for x in p) for p in points):
        raise ValueError(f"Schedule: expected pairs of numbers for {term!r}, got {line!r}; {shape}")
    progress = [p for p, _ in points]
    in_range = all(0 <= p <= 1 for p in progress)  # False for NaN
    if not points or not in_range or progress != sorted(progress):
        raise ValueError(
            f"Schedule: expected points with progress rising from 0 to 1 for {term!r}, got {line!r}; {shape}"
        )
    if not all(0 <= f < math.inf for _, f in points):
        raise ValueError(f"Schedule: expected finite factors of at least 0 for {term!r}, got {line!r}")
    return tuple((float(p), float(f)) for p, f in points)


def _value(line: Line, progress: float) -> float:
    """The factor that a piecewise line has at ``progress``; flat outside its points."""
    before = line[0]
    for point in line:
        if point[0] >= progress:
            (x0, y0), (x1, y1) = before, point
            # the quotient first: it is at most 1, so that no rounding goes below 0
            return y1 if x1 == x0 else y0 + (y1 - y0) * ((progress - x0) / (x1 - x0))
        before = point
    return before[1]


@dataclass(frozen=True)
class Schedule:
    """How the terms' shares of the total change during a run.

    A term's share is its weight times its factor, divided by the sum of these over all terms: shares sum to 1 at
    every step. Terms that no line names keep factor 1.

    Attributes:
        name: for plots and records.
        lines: {term: points}.
        optional: lines of terms that the run lacks are left out; otherwise such a line is refused. It changes no share,
            and is not in the repr, which stands for the shares in a run's record.

    Raises:
        ValueError: a line is no line.
    """

    name: str
    lines: Mapping[str, Line] = field(default_factory=dict)
    optional: bool = field(default=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.lines, Mapping):
            raise ValueError(f"Schedule: expected lines as {{term: points}}, got {self.lines!r}")
        lines = {term: _points(term, line) for term, line in self.lines.items()}
        # a copy that nobody changes from outside, in an order that does not depend on how it was written
        object.__setattr__(self, "lines", dict(sorted(lines.items())))

    def shares(self, weights: Mapping[str, float], progress: float) -> dict[str, float]:
        """Share of every term at ``progress`` in [0, 1]; they sum to 1.

        Raises:
            ValueError: every term is off at that point, or an argument is out of range.
        """
        where = f"Schedule {self.name!r}"
        checked_number(where, "progress", progress, 0, 1, "; it is the step divided by all steps")
        for term, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{where}: expected weights of at least 0, got {weight} for {term!r}")
        raw = {n: w * _value(self.lines.get(n, ((0.0, 1.0),)), progress) for n, w in weights.items()}
        total = sum(raw.values())
        if total <= 0:
            raise ValueError(
                f"{where}: expected at least one term with weight at progress {progress:.0%}, got none; "
                "give one of them a factor above 0 there"
            )
        return {n: v / total for n, v in raw.items()}

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise if this schedule cannot serve a run with these terms.

        Half of the full *factor* at 50% progress implies half of the full *share* there: with weights w, factors f and
        their maxima F, the share w_i f_i / sum(w_j f_j) has at least half of the numerator of the full share
        w_i F_i / sum(w_j F_j), and a denominator that is not larger.

        Raises:
            ValueError: a line names no term, a term has less than half of its full factor at 50% progress or is off
                for ever, the LM term is off at some moment, or every term is. A curriculum that is still waiting at
                half time never teaches.
        """
        where = f"Schedule {self.name!r}"
        missing = [term for term in self.lines if term not in weights]
        if missing and not self.optional:
            raise ValueError(f"{where}: expected one of the terms {', '.join(weights)}, got a line for {missing[0]!r}")
        if self.optional and not any(weights.get(term, 0) > 0 for term in self.lines):
            raise ValueError(
                f"{where}: expected at least one of the terms {', '.join(self.lines)} with a weight above 0, got "
                f"{', '.join(weights)}; add one such as kd.feature_term(), or name the terms that shall come in later"
            )
        for term, line in self.lines.items():
            full = max(f for _, f in line)
            if term in weights and (_value(line, 0.5) < 0.5 * full or full == 0):
                raise ValueError(
                    f"{where}: expected at least half of the full factor {full:g} of {term!r} at 50% "
                    f"progress, got {_value(line, 0.5):g}; let it rise earlier"
                )
            if term == "lm" and min(f for _, f in line) == 0:
                raise ValueError(
                    f"{where}: expected the LM term to count at every step, got a factor of 0 in "
                    f"{list(line)}; give it a small one"
                )
        # between two points lines are straight, so a moment without any term would be at a point
        for progress in {0.0, 1.0}.union(p for line in self.lines.values() for p, _ in line):
            self.shares(weights, progress)

    def changes(self, weights: Mapping[str, float], total_steps: int) -> list[Change]:
        """What begins or ends at which optimizer step, in order; several terms at one step in one sentence.

        As in ``(250, "feature and relation come in")``: at step 250, the first being 0, their lines begin to rise.
        What holds from step 0 on is no change, nor is what a run of so few steps never reaches.
        """
        check_total("Schedule.changes", total_steps)
        found: dict[int, dict[str, list[str]]] = {}  # {step: {term: phrases}}
        for term, weight in weights.items():
            if weight > 0 and term in self.lines:
                for step, phrase in _turns(self.lines[term], total_steps):
                    _say_also(found.setdefault(step, {}).setdefault(term, []), phrase)
        said = []
        for step in sorted(found):
            phrases = dict.fromkeys(phrase for own in found[step].values() for phrase in own)
            parts = (_sentence([t for t, own in found[step].items() if phrase in own], phrase) for phrase in phrases)
            said.append((step, "; ".join(parts)))
        return said


_IN, _FULL, _OFF = "come{s} in", "{have} {their} full weight", "{are} off"
_IN_FULL = "come{s} in with {their} full weight"


def _turns(line: Line, total: int) -> list[tuple[int, str]]:
    """(step, phrase) for every point where a line begins or ceases to rise or fall, within the run."""
    full = max(f for _, f in line)
    ends = [(0.0, line[0][1]), *line, (1.0, line[-1][1])]
    pieces = [(a, b) for a, b in itertools.pairwise(ends) if a != b]
    # stretches that rise, fall or stay, as one, with those of other slopes but the same direction
    stretches = [(way, list(group)) for way, group in itertools.groupby(pieces, lambda p: _sign(p[1][1] - p[0][1]))]
    found = []
    before, jumped = 0, False  # direction of the stretch before, and whether it ended in a jump
    for way, group in stretches:
        (start, here), goal = group[0][0], group[-1][1][1]
        after = jumped or group[0][1][0] == start  # at a jump's own progress the factor is still the old one
        level = f"{100 * goal / full:.3g}% of {{their}} full weight" if 0 < goal < full else "{their} full weight"
        if way > 0:
            phrase = _IN if here == 0 else f"rise{{s}} to {level}"
        elif way < 0:
            phrase = "fade{s} out" if goal == 0 else f"fall{{s}} to {level}"
        elif here == 0:
            phrase = _OFF
        else:
            phrase = _FULL if before > 0 and here == full else f"{{have}} {level}"
        found.append((_step_at(start, total, after=after), phrase))
        before, jumped = way, group[-1][0][0] == group[-1][1][0]
    return [(step, phrase) for step, phrase in found if 0 < step < total]


def _say_also(phrases: list[str], phrase: str) -> None:
    """Add what else a term does at the same step: at a jump, or where a run has few steps."""
    last = phrases[-1] if phrases else ""
    if last == _IN and phrase == _FULL:
        phrases[-1] = _IN_FULL
    elif last.startswith("fade") and phrase == _OFF:
        phrases[-1] = _OFF
    elif not (phrase.startswith("{have} ") and last.endswith(f" to {phrase.removeprefix('{have} ')}")):
        phrases.append(phrase)


def _sign(x: float) -> int:
    return (x > 0) - (x < 0)


def _step_at(progress: float, total: int, *, after: bool = False) -> int:
    """The first step at ``progress`` or beyond it; with ``after``, beyond it."""
    guess = max(0, math.floor(progress * total) - 1)
    # 1 - 0.1 and the like are not exact: what misses a step by a hair is meant to be there
    return next(s for s in itertools.count(guess) if (s / total > progress if after else s / total >= progress - 1e-9))


def _sentence(names: Sequence[str], phrase: str) -> str:
    many = len(names) > 1
    words = {"s": "", "have": "have", "are": "are", "their": "their"} if many else {
        "s": "s", "have": "has", "are": "is", "their": "its"
    }  # fmt: skip
    who = f"{', '.join(names[:-1])} and {names[-1]}" if many else names[0]
    return f"{who} {phrase.format(**words)}"


def check_total(where: str, total) -> None:
    if not isinstance(total, numbers.Integral) or isinstance(total, bool) or total < 1:
        raise ValueError(f"{where}: expected a whole number of at least 1 as the steps of the run, got {total!r}")


# --- presets -------------------------------------------------------------------------------------------------------


def constant() -> Schedule:
    """Every term at its full weight from the first step to the last."""
    return Schedule("constant")


def piecewise(**lines: Line) -> Schedule:
    """Your own lines, as in ``piecewise(kd=[(0, 0.2), (0.3, 1)])``: 20% of its weight at the start, all at 30%."""
    return Schedule("piecewise", lines)


def curriculum(*terms: str, start: float = 0.0, full: float = 0.4, fade: float = 0.0) -> Schedule:
    """The named terms rise slowly from the first step on; the others count in full all the time.

    Args:
        terms: their names; the terms about the models' inside that the run has, if left out.
        start: factor at the first step, 0 to 1.
        full: progress at which they have their full weight, at most 0.5.
        fade: share of the run at its end, at most 0.5, over which they fall to 0. As long as the decay of the learning
            rate, it leaves the last refinement to the text and the teacher's predictions.

    Raises:
        ValueError: an argument is out of range, or the LM term would be off at some moment.
    """
    where = "curriculum"
    start = checked_number(where, "start", start, 0, 1)
    full = checked_number(where, "full", full, 0, 0.5, _HALF)
    if full == 0:
        raise ValueError(f"{where}: expected full above 0, got 0; for full weight from the first step use constant()")
    names = _names(where, terms)
    return _phased(where, {name: [(0, start), (full, 1)] for name in names or HIDDEN_TERMS}, fade, optional=not names)


def two_stage(*terms: str, at: float = 0.25, ramp: float = 0.05, fade: float = 0.0) -> Schedule:
    """First without the named terms, then with them: the teacher's predictions, then also its inside.

    Args:
        terms: their names; the terms about the models' inside that the run has, if left out.
        at: progress at which they come in. ramp: progress that they then take to their full weight; 0 for at once.
        fade: as in :func:`curriculum`.

    Raises:
        ValueError: an argument is out of range, or the LM term is named.
    """
    where = "two_stage"
    at, ramp = checked_number(where, "at", at, 0, 0.5, _HALF), checked_number(where, "ramp", ramp, 0, 0.5)
    if at == 0 or at == 0.5 or at + ramp > 0.5 + 1e-9:
        raise ValueError(
            f"{where}: expected at between 0 and 0.5, and at + ramp of at most 0.5, got at={at:g}, ramp={ramp:g}{_HALF}"
        )
    names = _names(where, terms)
    line = [(at, 0), (min(at + ramp, 0.5), 1)]
    return _phased(where, dict.fromkeys(names or HIDDEN_TERMS, line), fade, optional=not names)


def progressive(*groups: str | Sequence[str], until: float = 0.5, fade: float = 0.0) -> Schedule:
    """One group of terms after the other comes in, each over ``until / len(groups)`` of the run.

    Args:
        groups: a term's name, or several. From lower to upper layers, if left out: ``layerwise``, then the other terms
            about the models' inside that the run has; a group that it lacks keeps its turn. For finer steps give
            several layerwise terms of other names and layers, and their names here.
        until: progress at which the last group has its full weight, at most 0.5.
        fade: as in :func:`curriculum`.

    Raises:
        ValueError: an argument is out of range, a group is empty, or the LM term is named.
    """
    where = "progressive"
    until = checked_number(where, "until", until, 0, 0.5, _HALF)
    if until == 0:
        raise ValueError(f"{where}: expected until above 0, got 0; for full weight from the first step use constant()")
    chosen = groups or (("layerwise",), tuple(t for t in HIDDEN_TERMS if t != "layerwise"))
    listed = [
        (group,) if isinstance(group, str) or not isinstance(group, Iterable) else tuple(group) for group in chosen
    ]
    if not all(listed):
        raise ValueError(f"{where}: expected a term or several in every group, got {chosen!r}; leave the empty one out")
    _names(where, [name for group in listed for name in group])
    lines = {}
    for i, group in enumerate(listed):
        ends = [min(until * k / len(listed), until) for k in (i, i + 1)]
        lines |= {name: [(ends[0], 0), (ends[1], 1)] for name in group}
    return _phased(where, lines, fade, optional=not groups)


_HALF = "; every term must have half of its weight when half of the run is over"


def _names(where: str, terms: Sequence[str]) -> tuple[str, ...]:
    for term in terms:
        if not isinstance(term, str):
            raise ValueError(f"{where}: expected the names of terms such as 'feature', got {term!r}; use term.name")
    twice = next((term for i, term in enumerate(terms) if term in terms[:i]), None)
    if twice is not None:
        raise ValueError(f"{where}: expected every term once, got {twice!r} twice; leave one out")
    return tuple(terms)


def _phased(where: str, lines: Mapping[str, Line], fade: float, *, optional: bool) -> Schedule:
    """The lines, with the fall at the end."""
    fade = checked_number(where, "fade", fade, 0, 0.5)
    if fade:
        lines = {term: [*line, (1 - fade, 1), (1, 0)] for term, line in lines.items()}
    if any(f == 0 for _, f in lines.get("lm", ())):
        raise ValueError(
            f"{where}: expected the LM term to count at every step, got a factor of 0 for 'lm'; leave it out, "
            "or phase it from a factor above 0 and without a fade: curriculum('lm', start=0.3)"
        )
    return Schedule(where, lines, optional)
