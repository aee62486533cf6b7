"""What the checks before a run read, and the words that they answer in."""

from __future__ import annotations

from collections.abc import Iterable

from kd_kit.trainer import Trainer
from kd_kit.trial import Trial

OK, LOOK, FAIL = "ok", "look", "FAIL"

Found = tuple[str, str, str] | None
"""What was measured, the verdict, and the cure; None where a check has nothing to say about this run."""

_POINTS = 2000  # steps of the plan that are looked at, evenly spaced, beside its corners
NOT_FINITE = "a gradient is not finite; the lines about dtypes and sizes say which term it comes from"


class Facts:
    """What the checks read."""

    def __init__(self, trainer: Trainer, trial: Trial, free: int):
        self.trainer = trainer
        self.trial = trial
        self.free = free  # bytes of the disk, before the trial

    @property
    def taught(self) -> bool:
        return any(term.taught and term.weight > 0 for term in self.trainer.terms)

    @property
    def steps(self) -> list[int]:
        """Steps of the plan: every one of a short run, else some, with all corners."""
        total = self.trainer.total_steps
        if total <= _POINTS:
            return list(range(total))
        rates = self.trainer.lr_schedule
        corners = {0, total // 2, total - 1, rates.warmup_steps(self.trainer.planned_steps) - 1}
        corners |= {round(p * total) for line in self.trainer.schedule.lines.values() for p, _ in line}
        corners |= {round(i * (total - 1) / _POINTS) for i in range(_POINTS)}
        near = {corner + i for corner in corners for i in (-1, 0, 1)}
        return sorted(step for step in near if 0 <= step < total)


def pulls(facts: Facts) -> dict[str, float] | None:
    """{term: share of the gradient at the trial's step}; of terms that come in later, with the share of half time."""
    facts.trial.need("steps")
    one, record = facts.trainer, facts.trial.records[0]
    norms = {name: term["grad_norm"] for name, term in record["terms"].items() if "grad_norm" in term}
    if not norms:  # one term alone is not compared
        return None
    now, half = one.shares_at(one.step), one.shares_at((one.total_steps + 1) // 2)
    pulled = {n: now[n] * norms[n] for n in norms if now[n] > 0}
    shares = {n: value / (sum(pulled.values()) or 1.0) for n, value in pulled.items()}
    later = {n: half[n] * norms[n] for n in norms}
    for name in norms:
        if name not in shares and half[name] > 0:
            shares[name] = later[name] / (sum(later.values()) or 1.0)
    return {name: shares[name] for name in norms if name in shares}


def sentence(error: Exception) -> str:
    """What went wrong, at most 300 characters; with its kind unless it is written for people to read."""
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, ValueError) and text else f"{type(error).__name__}: {text}"


def few(names: Iterable[str]) -> str:
    """The first three, and how many more; a parameter of the student as the student calls it."""
    names = [name.removeprefix("student.") for name in names]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def percent(share: float) -> str:
    """Two digits, however small."""
    return f"{share:.0%}" if share >= 0.0995 or share == 0 else f"{share:.1%}" if share >= 0.001 else f"{share:.1e}"


def gigabytes(size: int) -> str:
    """Bytes in GiB or MiB."""
    if size >= 2**30:
        return f"{size / 2**30:.1f} GiB"
    return f"{size / 2**20:.0f} MiB" if size >= 10 * 2**20 else f"{size / 2**20:.1f} MiB"


def seconds(time: float) -> str:
    """How long a step takes."""
    return f"{time:.1f} s" if time >= 10 else f"{time:.2f} s" if time >= 0.1 else f"{1e3 * time:.0f} ms"
