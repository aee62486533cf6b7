"""The words of the kit: one legend of axes, and the few frozen objects that cross a module's border.

Axes, used in every docstring and shape comment:

    B  windows in a batch            V  student vocabulary (rows of its head)
    T  student positions             U  teacher vocabulary (entries of its tokenizer)
    S  teacher positions             K  kept cells of a teacher distribution
    C  spans between two common byte boundaries
    D  student width                 E  teacher width
    N  student positions of a batch that predict a token ("rows"), M those of them that the teacher can teach

A *position* is named after what it predicts: position ``i`` has read tokens ``0..i``, stands at the byte
where token ``i`` ends, and predicts token ``i + 1``. Targets are shifted once, where the batch is built.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

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


class _OnDevice:
    """Moves every tensor field of a frozen dataclass at once."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False):
        def move(value):
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})

    def pin_memory(self):
        def pin(value):
            return value.pin_memory() if isinstance(value, Tensor) else value

        return type(self)(**{f.name: pin(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class DistillBatch(_OnDevice):
    """Windows of text in both tokenizations, padded on the right.

    Attributes:
        student_ids: [B, T] int64.
        targets: [B, T] int64, the token each position predicts, ``IGNORE`` where it predicts none.
        target_bytes: [B, T] int64, UTF-8 bytes of that token, 0 where none.
        teacher_ids: [B, S] int64.
        teacher_targets: [B, S] int64, as ``targets``, over the same bytes.
        teacher_index: [B, T] int64, teacher position at or before each student position (0 where none).
        aligned: [B, T] bool, a target is there and the teacher stands at the same byte.
        rows: [N] int64, flat indices (b * T + t) of the positions with a target, made on the host so that no
            step waits for the device to count them.
        aligned_rows: [A] int64, those of them that are aligned.
        taught: [B, T] bool, a target is there and the teacher can be heard: aligned, or inside a teacher token.
        taught_rows: [M] int64, the flat indices of these.
        prefix: [M, 3] int64, for each of these the bytes read since the teacher's boundary (0 where aligned) and the
            range of teacher tokens that begin with them, see :meth:`kd_kit.inside.InsideBridge.span`.
        span_student: [B, C + 1] int64, ``Alignment.student_boundaries``, padded with its last entry.
        span_teacher: [B, C + 1] int64.
        span_mask: [B, C] bool.
        sample: [B] int64, the index of each window in its data set.
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
    span_student: Tensor
    span_teacher: Tensor
    span_mask: Tensor
    sample: Tensor

    def __repr__(self) -> str:
        b, t = self.student_ids.shape
        return (
            f"DistillBatch({b} windows, student {t} positions, teacher {self.teacher_ids.shape[1]}, "
            f"{len(self.rows)} predicted tokens, {len(self.aligned_rows)} aligned)"
        )


@dataclass(frozen=True)
class TeacherSignal(_OnDevice):
    """What the teacher knows about a batch, in the student's vocabulary and at the student's positions.

    A loss never learns whether it was computed just now or read from a cache, nor which tokenizer the teacher had.

    Attributes:
        ids: [M, K] int64, student tokens that keep a cell of their own, one row per entry of ``taught_rows``.
        log_probs: [M, K] float32, log of the teacher's probability of that cell in nats; -inf marks an unused cell.
        tail: [M] float32, log of all the mass that has no cell: below the top K, or without a home in the
            student's vocabulary. ``exp(log_probs).sum(-1) + exp(tail) == 1``.
    """

    ids: Tensor
    log_probs: Tensor
    tail: Tensor


@dataclass(frozen=True)
class LossValue:
    """A loss before it is averaged: sums over many micro-batches add up, averages do not.

    Attributes:
        sum: scalar float32 with gradient.
        count: scalar float32 without gradient, how many positions the sum runs over.
    """

    sum: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        """Sum over count; 0 where nothing was counted."""
        return self.sum / self.count.clamp(min=1)
