"""Loss terms: what is taught, with what weight, over which positions, and in which range it must lie.

A term is a plain object with a function in it. Write your own by building a :class:`LossTerm`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kd_kit.head import Head, LogitRows, RowLoss
from kd_kit.losses import cross_entropy, forward_kl, tempered
from kd_kit.types import DistillBatch, LossValue, TeacherSignal


@dataclass(frozen=True)
class StudentOutput:
    """What the student computed for a batch.

    Attributes:
        hidden: [B, T, D] final hidden states, after the last norm.
        head: the map from there to logits; apply it to few rows at a time.
    """

    hidden: Tensor
    head: Head


ValueLoss = Callable[[StudentOutput, TeacherSignal | None, DistillBatch], LossValue]


@dataclass(frozen=True, kw_only=True)
class LossTerm:
    """One kind of knowledge.

    Attributes:
        name: in records, plots and schedules.
        weight: share of the total relative to the other terms' weights.
        unit: of the reported value.
        healthy: (low, high), where the value lies in a run that learns.
        impossible_below, impossible_above: a value beyond is a bug, not bad luck. None for no bound.
        source: where the range comes from.
        rows: a loss of one value per predicted token, served by the shared pass over the student's head. Either this
        value: or a function of the whole batch. If it is an ``nn.Module``, its parameters are trained with the student.
        over: "targets", "taught" or "aligned": the positions that the sum runs over. They are counted from the batch
            alone, so that the count of a whole optimizer step is known before its first backward pass.
        top_k: kept cells of the teacher's distribution that the term needs; 0 if it needs no teacher.
        settings: what else shapes the term, as plain values, for the run's record.
    """

    name: str
    weight: float
    unit: str
    healthy: tuple[float, float]
    impossible_below: float | None = None
    impossible_above: float | None = None
    source: str = ""
    rows: RowLoss | None = None
    value: ValueLoss | nn.Module | None = None
    over: str = "targets"
    top_k: int = 0
    settings: Mapping[str, object] = field(default_factory=dict)

    def __post_init__(self):
        if (self.rows is None) == (self.value is None):
            raise ValueError(f"LossTerm {self.name!r}: expected either rows= or value=, got both or none")
        if not (self.weight >= 0 and self.weight < float("inf")):
            raise ValueError(f"LossTerm {self.name!r}: expected a weight of at least 0, got {self.weight}")
        if self.over not in ("targets", "taught", "aligned"):
            raise ValueError(
                f"LossTerm {self.name!r}: expected over='targets', 'taught' or 'aligned', got {self.over!r}"
            )

    def count(self, batch: DistillBatch) -> int:
        """Positions of ``batch`` that this term is averaged over; no device is asked."""
        rows = {"targets": batch.rows, "taught": batch.taught_rows, "aligned": batch.aligned_rows}
        return len(rows[self.over])

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


def _name_of(function) -> str:
    """A function's name, with the arguments that a ``functools.partial`` binds."""
    if isinstance(function, functools.partial):
        bound = ", ".join([*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())])
        return f"{_name_of(function.func)}({bound})"
    return getattr(function, "__name__", type(function).__name__)


def _lm_rows(rows: LogitRows) -> Tensor:
    return cross_entropy(rows.logits, rows.targets, rows.log_z)


def lm_term(weight: float = 0.3) -> LossTerm:
    """Cross-entropy with the text itself, in nats per student token.

    It is always computed and shown. On the embedded pair 0.3 beside a KD term of 0.7 did best of 0.05, 0.3 and 0.5.
    """
    return LossTerm(
        name="lm",
        weight=weight,
        unit="nats/token",
        healthy=(1.0, 6.0),
        impossible_below=0.0,
        impossible_above=13.5,
        source="2-6 for pretrained students; ln V (7.6 for 2,048 tokens, 12.5 for 262,144) at a uniform guess",
        rows=_lm_rows,
    )


def kd_term(
    weight: float = 0.7,
    *,
    top_k: int = 64,
    divergence: Callable[[Tensor, Tensor], Tensor] = forward_kl,
    temperature: float = 1.0,
    inside: bool = True,
) -> LossTerm:
    """Divergence from the teacher's next-token distribution, over its top K cells and the tail.

    The teacher's distribution crosses to the student's vocabulary by the byte-prefix bridge: as it is where both
    tokenizers stand at the same byte, and as what is left of the teacher's next token where the student stands inside
    it.

    Args:
        weight: share of the total relative to the other terms.
        top_k: K, cells that are kept apart; all other mass goes to one tail cell.
        divergence: a function of :mod:`kd_kit.losses`: ``forward_kl``, ``reverse_kl``, ``jensen_shannon``, ``skew_kl``.
        temperature: T. The gradient is that of T^2 times the divergence at T; the reported value is always the one
            at T = 1, in nats, so that runs at different temperatures can be compared.
        inside: teach inside teacher tokens too; otherwise only where both stand at the same byte.

    Raises:
        ValueError: ``top_k`` below 1 or ``temperature`` not positive.

    Source: Hinton, Vinyals, Dean 2015, section 2; the bridge: :func:`kd_kit.vocab.build_bridge` and
        :class:`kd_kit.inside.InsideBridge`
    """
    if top_k < 1:
        raise ValueError(f"kd_term: expected top_k of at least 1, got {top_k}")
    if not temperature > 0:
        raise ValueError(f"kd_term: expected a temperature above 0, got {temperature}")

    def kd_rows(rows: LogitRows) -> Tensor:
        # rows without a teacher carry a dummy distribution; it is replaced before anything can go wrong with it
        there = rows.has_teacher.unsqueeze(-1)
        teacher = torch.where(there, rows.teacher, rows.student.detach())
        value = divergence(rows.student, teacher)
        if temperature != 1.0:
            soft = temperature**2 * divergence(tempered(rows.student, temperature), tempered(teacher, temperature))
            value = value.detach() + soft - soft.detach()
        return torch.where(rows.has_teacher, value, torch.zeros_like(value))

    return LossTerm(
        name="kd",
        weight=weight,
        unit="nats/token",
        healthy=(0.05, 3.0),
        impossible_below=0.0,
        impossible_above=10.0,
        source="0.5-3 at the start for pretrained students, up to 8 for untrained ones; 0.1-3 later",
        rows=kd_rows,
        over="taught" if inside else "aligned",
        top_k=top_k,
        settings={
            "top_k": top_k,
            "divergence": _name_of(divergence),
            "temperature": temperature,
            "inside": inside,
        },
    )
