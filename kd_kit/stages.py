"""Who counts how much, when: shares of the loss terms and the learning rate, as pure functions of progress.

Everything counts in optimizer steps. Nothing here has state, so a resumed run and an evaluation see the same values
as the run that was not interrupted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

Line = Sequence[tuple[float, float]]
"""(progress, factor) points, joined by straight lines; progress runs from 0 to 1."""


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
    """

    name: str
    lines: Mapping[str, Line] = field(default_factory=dict)

    def __post_init__(self):
        for term, line in self.lines.items():
            progress = [p for p, _ in line]
            if not line or progress != sorted(progress) or progress[0] < 0 or progress[-1] > 1:
                raise ValueError(
                    f"Schedule: expected points with progress rising from 0 to 1 for {term!r}, got {list(line)}"
                )
            if any(f < 0 for _, f in line):
                raise ValueError(f"Schedule: expected factors of at least 0 for {term!r}, got {list(line)}")

    def shares(self, weights: Mapping[str, float], progress: float) -> dict[str, float]:
        """Share of every term at ``progress`` in [0, 1]; they sum to 1.

        Raises:
            ValueError: every term is off at that point.
        """
        raw = {n: w * _value(self.lines.get(n, ((0.0, 1.0),)), progress) for n, w in weights.items()}
        total = sum(raw.values())
        if total <= 0:
            raise ValueError(
                f"Schedule {self.name!r}: expected at least one term with weight at progress {progress:.0%}, got none; "
                "give one of them a factor above 0 there"
            )
        return {n: v / total for n, v in raw.items()}

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise if a line names no term, or an enabled term has less than half of its full factor at 50% progress.

        Raises:
            ValueError: as above. A curriculum that is still waiting at half time never teaches.
        """
        for term, line in self.lines.items():
            if term not in weights:
                raise ValueError(
                    f"Schedule {self.name!r}: expected one of the terms {', '.join(weights)}, got a line for {term!r}"
                )
            full = max(f for _, f in line)
            if _value(line, 0.5) < 0.5 * full or full == 0:
                raise ValueError(
                    f"Schedule {self.name!r}: expected at least half of the full factor {full:g} of {term!r} at 50% "
                    f"progress, got {_value(line, 0.5):g}; let it rise earlier"
                )
            if term == "lm" and min(f for _, f in line) == 0:
                raise ValueError(
                    f"Schedule {self.name!r}: expected the LM term to count at every step, got a factor of 0 in "
                    f"{list(line)}; give it a small one"
                )
        # between two points lines are straight, so a moment without any term would be at a point
        for progress in {0.0, 1.0}.union(p for line in self.lines.values() for p, _ in line):
            self.shares(weights, progress)


def constant() -> Schedule:
    """Every term at its full weight from the first step to the last."""
    return Schedule("constant")


def piecewise(**lines: Line) -> Schedule:
    """Your own lines, as in ``piecewise(kd=[(0, 0.2), (0.3, 1)])``: 20% of its weight at the start, all at 30%."""
    return Schedule("piecewise", lines)


@dataclass(frozen=True)
class LearningRate:
    """Warm-up, stable, decay: a factor on the peak rate, in optimizer steps.

    Attributes:
        warmup: share of the run that rises linearly from the first step's small value (never 0) to 1.
        decay: share at the end that falls to ``floor`` of the peak; 0 keeps the rate up to the last step.
        floor: factor at the last step.

    Source: Hu et al. 2024, "MiniCPM", section 4, https://arxiv.org/abs/2404.06395; the decay as 1 - sqrt from
        Hägele et al. 2024, section 3, https://arxiv.org/abs/2405.18392
    """

    warmup: float = 0.02
    decay: float = 0.2
    floor: float = 0.0

    def __post_init__(self):
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1 and 0 <= self.floor <= 1):
            raise ValueError(
                f"LearningRate: expected warmup and decay of at least 0 that sum to at most 1 and 0 <= floor <= 1, "
                f"got {self}"
            )

    def factor(self, step: int, total: int) -> float:
        """Factor of optimizer step ``step`` (the first is 0) of ``total``."""
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return (step + 1) / rising
        falling = round(self.decay * total)
        left = total - step
        if left > falling:
            return 1.0
        done = 1 - left / (falling + 1)  # the last step is small but not 0: it still learns
        return self.floor + (1 - self.floor) * (1 - math.sqrt(done))
