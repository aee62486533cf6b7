"""Loss terms: what is taught, with what weight, over which positions, and in which range it must lie.

A term is a plain object with a function in it. Write your own by building a :class:`LossTerm`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from kd_kit.head import Head, RowLoss, Rows
from kd_kit.pair import TokenizerPair
from kd_kit.ranges import RANGES
from kd_kit.readings import Needs
from kd_kit.types import DistillBatch, LossValue, TeacherSignal


@dataclass(frozen=True)
class StudentOutput:
    """What the student computed for a batch.

    Attributes:
        hidden: [B, T, D] final hidden states, after the last norm.
        head: the map from there to logits; apply it to few rows at a time.
        states: {layer: [B, T, D]}, hidden states of the layers that a term needs.
        attention: {layer: {"q" | "k" | "v": [B, T, width]}}, likewise.
        point: [B, T, D], the state at which the gradients of all terms meet; None where they are not compared.
    """

    hidden: Tensor
    head: Head
    states: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)
    point: Tensor | None = None


@dataclass(frozen=True)
class Setup:
    """The two models and the two tokenizers of a run: what a term has to know before it can be computed."""

    student: nn.Module
    teacher: nn.Module
    pair: TokenizerPair


ValueLoss = Callable[[StudentOutput, TeacherSignal | None, DistillBatch], LossValue]
Gather = Callable[[Tensor, TeacherSignal | None, DistillBatch], LossValue]

ROWS: dict[str, Callable[[DistillBatch], int]] = {
    "targets": lambda batch: len(batch.rows),
    "taught": lambda batch: len(batch.taught_rows),
    "aligned": lambda batch: len(batch.aligned_rows),
    "same": lambda batch: len(batch.same_rows),
    "spans": lambda batch: len(batch.span_rows),
}
"""How many positions a term runs over, by the name of the positions."""


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One kind of knowledge.

    Attributes:
        name: in records, plots and schedules.
        weight: share of the total relative to the other terms' weights.
        unit: of the reported value.
        healthy: (low, high), where the value lies in a run that learns.
        impossible_below, impossible_above: a value beyond is a bug, not bad luck. None for no bound.
        floor: its value where the student says and holds what the teacher does; None where that is not one number.
        source: where the range comes from.
        rows: a loss of one value per predicted token, served by the shared pass over the student's head. Either this
        value: or a function of the whole batch. If one of the two is an ``nn.Module``, its parameters are trained with
            the student and left out of the export.
        whole: with ``rows``, whether it looks at whole rows of logits (:class:`kd_kit.head.LogitRows`). Without that it
            has what :class:`kd_kit.head.Rows` has, and the pass over the head is faster.
        gather: with ``rows``, what makes the term's sum of the rows' values, [N]; the sum over ``over`` if left out.
        over: the positions that the sum runs over: "targets", "taught", "aligned", "same" or "spans", or a function of
            the batch to their number. They are counted from the batch alone, so that the count of a whole optimizer
            step is known before its first backward pass.
        needs: what it asks of teacher and student.
        build: for a term that depends on the models: the fields above that only they decide, given a :class:`Setup`.
        settings: what else shapes the term, as plain values, for the run's record.
        batchwise: the value depends on which windows share a batch.
        empty: why a batch may have no position for it, and what to do about that.
    """

    name: str
    weight: float
    unit: str
    healthy: tuple[float, float]
    impossible_below: float | None = None
    impossible_above: float | None = None
    floor: float | None = None
    source: str = ""
    rows: RowLoss | None = None
    value: ValueLoss | nn.Module | None = None
    whole: bool = True
    gather: Gather | None = None
    over: str | Callable[[DistillBatch], int] = "targets"
    needs: Needs = field(default_factory=Needs)
    build: Callable[[Setup], Mapping[str, object]] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    batchwise: bool = False
    empty: str = "no such position in the text; see kd_kit.audit"

    def __post_init__(self):
        given = [x for x in ("rows", "value", "build") if getattr(self, x) is not None]
        if len(given) != 1:
            raise ValueError(
                f"LossTerm {self.name!r}: expected one of rows=, value= and build=, got {' and '.join(given) or 'none'}"
            )
        if not isinstance(self.weight, (int, float)) or not 0 <= self.weight < float("inf"):
            raise ValueError(f"LossTerm {self.name!r}: expected a weight of at least 0, got {self.weight!r}")
        if not callable(self.over) and self.over not in ROWS:
            raise ValueError(
                f"LossTerm {self.name!r}: expected over= one of {', '.join(map(repr, ROWS))} or a function of the "
                f"batch, got {self.over!r}"
            )
        if self.rows is not None and self.gather is None and (callable(self.over) or self.over == "spans"):
            raise ValueError(
                f"LossTerm {self.name!r}: expected gather= beside rows= for an over= that names no rows, got "
                f"{self.over!r}; say how the rows' values make its sum"
            )

    def bound(self, setup: Setup) -> LossTerm:
        """The term for these two models, with parts of its own where it has any.

        Raises:
            ValueError: the models cannot serve it.
        """
        if self.build is None:
            return self
        return dataclasses.replace(self, build=None, **self.build(setup))

    @property
    def taught(self) -> bool:
        """Whether it needs a teacher."""
        return self.build is not None or self.needs.teacher

    @property
    def part(self) -> nn.Module | None:
        """What is trained beside the student, if anything."""
        return next((x for x in (self.rows, self.value) if isinstance(x, nn.Module)), None)

    def count(self, batch: DistillBatch) -> int:
        """Positions of ``batch`` that this term is averaged over; no device is asked where the batch is on the host."""
        return self.over(batch) if callable(self.over) else ROWS[self.over](batch)

    @property
    def meta(self) -> dict:
        """Unit and ranges, as the history keeps them."""
        return {
            "unit": self.unit,
            "healthy": list(self.healthy),
            "impossible_below": self.impossible_below,
            "impossible_above": self.impossible_above,
        }

    def __repr__(self) -> str:
        low, high = self.healthy
        return f"{self.name}: weight {self.weight:g}, healthy {low:g} to {high:g} {self.unit}"


def name_of(function) -> str:
    """A function's name, with the arguments that a ``functools.partial`` binds."""
    if isinstance(function, functools.partial):
        bound = ", ".join([*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())])
        return f"{name_of(function.func)}({bound})"
    return getattr(function, "__name__", type(function).__name__)


def nll_rows(rows: Rows) -> Tensor:
    """Negative log-likelihood of each row's target, [n] nats."""
    return rows.nll


def lm_term(weight: float = 0.3) -> LossTerm:
    """Cross-entropy with the text itself, in nats per student token.

    It is always computed and shown. On the embedded pair 0.3 beside a KD term of 0.7 did best of 0.05, 0.3 and 0.5.
    """
    return LossTerm(
        name="lm",
        weight=weight,
        **RANGES["lm"],
        rows=nll_rows,
        whole=False,
    )
