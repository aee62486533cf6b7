"""The learning rate over a run: warm-up, stable, decay, as a pure function of the optimizer step.

The decay may begin before its planned time, when the session's clock or somebody says so. The first step is 0.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass

from kd_kit.stages import Change, check_total, checked_number

_SHAPES = {
    "sqrt": lambda done: 1 - math.sqrt(done),
    "linear": lambda done: 1 - done,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
}


@dataclass(frozen=True)
class LearningRate:
    """Warm-up, stable, decay: a factor on the peak rate, in optimizer steps.

    Attributes:
        warmup: share of the run that rises linearly from the first step's small value (never 0) to 1.
        decay: share at the end that falls to ``floor`` of the peak; 0 keeps the rate up to the last step.
        floor: factor that the decay falls to; it would be reached one step after the last.
        shape: of the decay: "sqrt" (1 - sqrt), "linear" or "cosine".

    Raises:
        ValueError: a field is of the wrong kind or out of range.

    Source: Hu et al. 2024, "MiniCPM", section 4, https://arxiv.org/abs/2404.06395; the decay as 1 - sqrt from
        Hägele et al. 2024, section 3, https://arxiv.org/abs/2405.18392; linear: Bergsma et al. 2025, "Straight to
        Zero", https://arxiv.org/abs/2502.15938; cosine: Loshchilov and Hutter 2017, "SGDR", equation 5,
        https://arxiv.org/abs/1608.03983
    """

    warmup: float = 0.02
    decay: float = 0.2
    floor: float = 0.0
    shape: str = "sqrt"

    def __post_init__(self):
        for name in ("warmup", "decay", "floor"):
            value = getattr(self, name)
            if not isinstance(value, numbers.Real) or isinstance(value, bool):
                raise ValueError(f"LearningRate: expected {name} to be a number such as 0.1, got {value!r}")
        if not (self.warmup >= 0 and self.decay >= 0 and self.warmup + self.decay <= 1 and 0 <= self.floor <= 1):
            raise ValueError(
                f"LearningRate: expected warmup and decay of at least 0 that sum to at most 1 and 0 <= floor <= 1, "
                f"got {self}; they are shares of the run, not steps"
            )
        if not isinstance(self.shape, str) or self.shape not in _SHAPES:
            raise ValueError(
                f"LearningRate: expected shape to be one of {', '.join(map(repr, _SHAPES))}, got {self.shape!r}"
            )

    def warmup_steps(self, total: int) -> int:
        """Steps that rise; the last of them has the peak rate. At least 1."""
        check_total("LearningRate", total)
        return max(1, round(self.warmup * total))

    def decay_steps(self, total: int) -> int:
        """Steps that fall, also where the decay starts earlier than planned."""
        check_total("LearningRate", total)
        return round(self.decay * total)

    def decay_start(self, total: int, decay_from: int | None = None) -> int | None:
        """The first step that falls; None where none does."""
        falling = self.decay_steps(total)
        if decay_from is not None:
            self._check_decay_from(decay_from, total)
            return decay_from if falling else None
        start = max(self.warmup_steps(total), total - falling)
        return start if falling and start < total else None

    def factor(self, step: int, total: int, decay_from: int | None = None) -> float:
        """Factor of optimizer step ``step`` (the first is 0) of ``total``.

        Args:
            decay_from: the step at which the decay starts instead, because the time is over or somebody says so. The
                run then ends at ``decay_from + decay_steps(total)``, with the rate at which the planned decay ends.
                The decay begins at the rate that the plan has there: it never raises the rate.

        Returns:
            in (0, 1]; after the last step, the last step's.

        Raises:
            ValueError: a step that is none, or a ``decay_from`` where ``decay`` is 0.
        """
        check_total("LearningRate.factor", total)
        if not isinstance(step, numbers.Integral) or step < 0:
            raise ValueError(f"LearningRate.factor: expected a step of at least 0, got {step!r}")
        if decay_from is not None:
            self._check_decay_from(decay_from, total)
            if step >= decay_from:
                return self._early(step, total, decay_from)
        return self._planned(step, total)

    def _planned(self, step: int, total: int) -> float:
        rising = self.warmup_steps(total)
        if step < rising:
            return (step + 1) / rising
        falling = self.decay_steps(total)
        left = max(1, total - step)
        if left > falling:
            return 1.0
        done = 1 - left / (falling + 1)  # the last step is small but not 0: it still learns
        return self.floor + (1 - self.floor) * _SHAPES[self.shape](done)

    def _early(self, step: int, total: int, decay_from: int) -> float:
        """The decay of another start, stretched between the rate that was there and the end of the planned one."""
        falling = self.decay_steps(total)
        # the planned decay falls at its first step already: the same start falls from the same rate before
        planned = decay_from == total - falling
        before = self._planned(max(0, decay_from - 1), total)
        high = before if planned else min(before, self._planned(decay_from, total))
        shape = _SHAPES[self.shape]
        least = shape(falling / (falling + 1))
        low = min(high, self.floor + (1 - self.floor) * least)  # in a warm-up the rate may not be up to it yet
        done = min(step - decay_from + 1, falling) / (falling + 1)
        return low + (high - low) * (shape(done) - least) / (1 - least) if falling else high

    def _check_decay_from(self, decay_from, total: int) -> None:
        if self.decay == 0:
            raise ValueError(
                f"LearningRate: expected a decay above 0 for one that starts early, got {self} and "
                f"decay_from={decay_from!r}; build the run with LearningRate(decay=0.2)"
            )
        whole = isinstance(decay_from, numbers.Integral) and not isinstance(decay_from, bool)
        if not whole or not 0 <= decay_from < total:
            raise ValueError(
                f"LearningRate: expected decay_from to be a step from 0 to {total - 1}, got {decay_from!r}"
            )

    def changes(self, total: int, decay_from: int | None = None) -> list[Change]:
        """(step, sentence) for the end of the warm-up and the start of the decay, in order."""
        start = self.decay_start(total, decay_from)
        warm = self.warmup_steps(total)
        found: dict[int, list[str]] = {}
        end = total if start is None or decay_from is None else decay_from
        if 1 < warm <= end and warm < total:
            found[warm] = ["warm-up is over"]
        if start:
            found.setdefault(start, []).append("the learning rate decays from here on")
        return [(step, "; ".join(found[step])) for step in sorted(found)]


def cosine(warmup: float = 0.02, floor: float = 0.1) -> LearningRate:
    """Warm-up, then one cosine over all the rest of the run, down to ``floor`` of the peak.

    For runs whose length is certain: a decay that starts early has to begin from a rate that has fallen already.

    Source: Loshchilov and Hutter 2017, "SGDR", equation 5, https://arxiv.org/abs/1608.03983; the floor of a tenth
        from Hoffmann et al. 2022, appendix B, https://arxiv.org/abs/2203.15556
    """
    warmup = checked_number("cosine", "warmup", warmup, 0, 1, "; it is a share of the run")
    return LearningRate(warmup, 1 - warmup, checked_number("cosine", "floor", floor, 0, 1), "cosine")
