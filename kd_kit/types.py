"""The words of the kit: one legend of axes, and the few frozen objects that cross a module's border.

Axes, used in every docstring and shape comment:

    B  windows in a batch            V  student vocabulary (rows of its head)
    T  student positions             U  teacher vocabulary (entries of its tokenizer)
    S  teacher positions             K  kept cells of a teacher distribution
    C  spans between two common byte boundaries
    D  student width                 E  teacher width
    N  student positions of a batch that predict a token ("rows"), M those of them that the teacher can teach,
       A those of them that are aligned
    P  scored spans of a batch       X  experts of a mixture

A *position* is named after what it predicts: position ``i`` has read tokens ``0..i``, stands at the byte
where token ``i`` ends, and predicts token ``i + 1``. Targets are shifted once, where the batch is built.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor

IGNORE = -100
"""Target of a position that predicts nothing (padding, the end of a window, mere context)."""


@dataclass(frozen=True)
class Alignment:
    """Two tokenizations of one text, matched by the byte at which each position stands.

    Attributes:
        teacher_index: [T] int64, the teacher's last position at or before the byte of the student's position;
            -1 where the teacher has none yet.
        aligned: [T] bool, both stand at the same byte, so both predict what follows it.
        student_boundaries: [C + 1] int64, student positions that stand at a common boundary, in order.
        teacher_boundaries: [C + 1] int64, the teacher positions at the same bytes.

    Span ``c`` is predicted by student positions ``student_boundaries[c] .. student_boundaries[c + 1] - 1`` and by
    the teacher positions likewise. Bytes after the last common boundary belong to no span.
    """

    teacher_index: np.ndarray
    aligned: np.ndarray
    student_boundaries: np.ndarray
    teacher_boundaries: np.ndarray

    @property
    def spans(self) -> int:
        return max(len(self.student_boundaries) - 1, 0)


class OnDevice:
    """Moves every tensor of a frozen dataclass at once, also those in mappings and in objects of this kind."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False):
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        return self.mapped(lambda tensor: tensor.pin_memory())

    def mapped(self, function: Callable[[Tensor], Tensor]):
        """The same object with ``function`` applied to every tensor in it."""

        def apply(value):
            if isinstance(value, Tensor):
                return function(value)
            if isinstance(value, OnDevice):
                return value.mapped(function)
            if isinstance(value, Mapping):
                return {name: apply(v) for name, v in value.items()}
            return value

        return type(self)(**{f.name: apply(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class DistillBatch(OnDevice):
    """Windows of text in both tokenizations, padded on the right.

    Attributes:
        student_ids: [B, T] int64.
        targets: [B, T] int64, the token each position predicts, ``IGNORE`` where it predicts none.
        target_bytes: [B, T] int64, UTF-8 bytes of that token, 0 where none.
        teacher_ids: [B, S] int64.
        teacher_targets: [B, S] int64, as ``targets``, over the same bytes.
        teacher_index: [B, T] int64, teacher position at or before each student position (0 where none).
        aligned: [B, T] bool, a target is there and the teacher stands at the same byte. Positions where the two
            tokenizers cut a run of white space differently are left out, of ``taught`` too.
        rows: [N] int64, flat indices (b * T + t) of the positions with a target, made on the host so that no
            step waits for the device to count them.
        aligned_rows: [A] int64, those of them that are aligned.
        taught: [B, T] bool, a target is there and the teacher can be heard: aligned, or inside a teacher token.
        taught_rows: [M] int64, the flat indices of these.
        prefix: [M, 3] int64, for each of these the bytes read since the teacher's boundary (0 where aligned) and the
            range of teacher tokens that begin with them, see :meth:`kd_kit.inside.InsideBridge.span`.
        same: [B, T] bool, aligned, and both sides' next tokens are the same bytes.
        same_rows: the flat indices of these.
        whitespace: [B] int64, positions left out because of a run of white space.
        span_student: [B, C + 1] int64, ``Alignment.student_boundaries``, padded with its last entry.
        span_teacher: [B, C + 1] int64.
        span_mask: [B, C] bool, spans that are there and whose bytes are scored.
        span_rows: [P, 2] int64, for each of these, window by window, the flat student and teacher position of its
            last token: both models have then read the same bytes.
        document: [B] int64, the document that each window was cut from.
        sample: [B] int64, the index of each window in its data set.
        student_packed, teacher_packed: [R, L] int64, rows in which several windows stand side by side: at every place
            the flat index (b * T + t, b * S + t) of a token, -1 where there is none. [0, 0] where that would save
            little, see :func:`kd_kit.packing.side_by_side`.
    """

    student_ids: Tensor
    targets: Tensor
    target_bytes: Tensor
    teacher_ids: Tensor
    teacher_targets: Tensor
    teacher_index: Tensor
    aligned: Tensor
    rows: Tensor
    aligned_rows: Tensor
    taught: Tensor
    taught_rows: Tensor
    prefix: Tensor
    same: Tensor
    same_rows: Tensor
    whitespace: Tensor
    span_student: Tensor
    span_teacher: Tensor
    span_mask: Tensor
    span_rows: Tensor
    document: Tensor
    sample: Tensor
    student_packed: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))
    teacher_packed: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.long))

    def unpacked(self) -> DistillBatch:
        """The same batch for models to run padded, each window a row."""
        none = self.student_packed.new_zeros(0, 0)
        return replace(self, student_packed=none, teacher_packed=none)

    def spans_of(self) -> tuple[Tensor, Tensor]:
        """[P] int64 each: the window of every row of ``span_rows``, and its number among that window's spans."""
        window, span = self.span_mask.nonzero(as_tuple=True)
        return window, span

    def __repr__(self) -> str:
        b, t = self.student_ids.shape
        return (
            f"DistillBatch({b} windows, student {t} positions, teacher {self.teacher_ids.shape[1]}, "
            f"{len(self.rows)} predicted tokens, {len(self.aligned_rows)} aligned)"
        )


@dataclass(frozen=True)
class Cells(OnDevice):
    """Next-token distributions of the teacher over few cells. ``exp(log_probs).sum(-1) + exp(tail) == 1``.

    Attributes:
        ids: [n, K] int64, student tokens that keep a cell of their own; None where cells are ranks and not tokens.
        log_probs: [n, K] float32, log of the teacher's probability of that cell in nats; -inf marks an unused cell.
        tail: [n] float32, log of all the mass that has no cell: below the top K, or without a home in the student's
            vocabulary.
    """

    ids: Tensor | None
    log_probs: Tensor
    tail: Tensor


@dataclass(frozen=True)
class TeacherSignal(OnDevice):
    """What the teacher knows about a batch, in the student's vocabulary and at the student's positions.

    A loss never learns whether it was computed just now or read from a cache, nor which tokenizer the teacher had.
    Only what the terms of a run need is there.

    Attributes:
        cells: {key of a reading: :class:`Cells`}, one row per position that the reading is about, see
            :mod:`kd_kit.readings`.
        row_states: [A, E] float32, the teacher's final hidden state at every aligned row; None if not needed.
        span_log_probs: [B, C] float32, log-probability in nats of each span's bytes as the teacher cuts them, 0 where
            there is no scored span; None if not needed.
        states: {teacher layer: [P, E] float32}, its hidden state at the end of every scored span.
        routing: {teacher layer: [P, X] float32}, its distribution over experts there.
        attention: {teacher layer: {"q" | "k" | "v": [B, S, width]}}, its attention projections.
    """

    cells: Mapping[str, Cells] = field(default_factory=dict)
    row_states: Tensor | None = None
    span_log_probs: Tensor | None = None
    states: Mapping[int, Tensor] = field(default_factory=dict)
    routing: Mapping[int, Tensor] = field(default_factory=dict)
    attention: Mapping[int, Mapping[str, Tensor]] = field(default_factory=dict)


@dataclass(frozen=True)
class LossValue:
    """A loss before it is averaged: sums over many micro-batches add up, averages do not.

    Attributes:
        sum: scalar float32 with gradient.
        count: scalar float32 without gradient, how many positions the sum runs over.
        extras: what else was measured, as sums over the same positions, by name; recorded, never differentiated.
    """

    sum: Tensor
    count: Tensor
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        """Sum over count; 0 where nothing was counted."""
        return self.sum / self.count.clamp(min=1)
