"""The least that a step can cost on this machine: one pass of the teacher's body, one step of the student on the text.

Everything above is what the terms, the cells and the loading of data add. Measured at the start of a session, so that
a slow run is seen as slow.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kd_kit.cached_teacher import CachedTeacher
from kd_kit.head import alone_with
from kd_kit.modes import modes_kept
from kd_kit.module import DistillModule
from kd_kit.packed_body import run_body
from kd_kit.teacher import LiveTeacher
from kd_kit.tensor_tree import capture_rng, restore_rng
from kd_kit.terms import lm_term
from kd_kit.types import DistillBatch

PASSES = 3
"""Timed passes; one before them warms up."""

LEAST_STEPS = 50 * (PASSES + 1)
"""A run with fewer steps before it goes unmeasured: the passes shall take no more than 2% of its time."""

_SLOW = 5.0  # seconds of the first pass from which it has to do
_STRETCH = 2**24  # numbers that the optimizer's step is timed on


def floor_of(teacher: LiveTeacher | None) -> str:
    """What the floor is made of, in words."""
    return ("the teacher's body, " if _is_asked(teacher) else "") + "the student on the text"


def _is_asked(teacher: LiveTeacher | None) -> bool:
    return teacher is not None and not isinstance(teacher, CachedTeacher)


def teacher_pass(teacher: LiveTeacher | None, batch: DistillBatch) -> None:
    """The teacher's body over the text of a batch, where a step needs that: not of one that is read from a cache."""
    if not _is_asked(teacher):
        return
    with torch.inference_mode(), torch.autocast(teacher.device.type, enabled=False):
        ids, packed = batch.teacher_ids.to(teacher.device), batch.teacher_packed.to(teacher.device)
        with alone_with(teacher.model):
            run_body(teacher.model, ids, packed)


def text_loss(plain: DistillModule, batch: DistillBatch, accelerator, count: int) -> Tensor:
    """What a step on the text alone differentiates.

    Args:
        plain: the student with an LM term alone. count: predicted tokens of the whole step.
    """
    with accelerator.autocast():
        return plain(batch, None, [1 / max(count, 1)])[0]


def measure_floor(
    student,
    teacher: LiveTeacher | None,
    pieces: Sequence[DistillBatch],
    *,
    accelerator,
    clock: Callable[[], float] = time.monotonic,
) -> float:
    """Seconds of a step of these micro-batches at the least; nothing of the student, or of its run, changes.

    The first micro-batch is timed for all of them. No weight moves: gradients are dropped, and the optimizer's part
    is timed on numbers of its own.

    Args:
        teacher: None where no term asks one.
        pieces: of one optimizer step, on the host.
    """
    device = accelerator.device
    plain = DistillModule(student, [lm_term(1.0)])
    trained = [p for p in student.parameters() if p.requires_grad]
    buffers = {name: b.clone() for name, b in student.named_buffers()}
    rng = capture_rng()

    def now() -> float:
        for each in {device, device if teacher is None else teacher.device}:
            if each.type == "cuda":
                torch.cuda.synchronize(each)
        return clock()

    def once() -> float:
        started = now()
        batch = pieces[0].to(device, non_blocking=True)
        teacher_pass(teacher, batch)
        text_loss(plain, batch, accelerator, len(batch.rows)).backward()
        for p in trained:
            p.grad = None
        return now() - started

    try:
        with modes_kept(student):
            student.train()
            first = once()
            passes = [first] if first > _SLOW else [once() for _ in range(PASSES)]
        optimizer = _optimizer_seconds(sum(p.numel() for p in trained), device, now)
    finally:
        for p in trained:
            p.grad = None
        with torch.no_grad():
            for name, b in student.named_buffers():
                if not torch.equal(b, buffers[name]):  # such as running statistics
                    b.copy_(buffers[name])
        restore_rng(*rng)
    return min(passes) * len(pieces) + optimizer  # the least: whatever else uses the machine only adds


def _optimizer_seconds(count: int, device: torch.device, now: Callable[[], float]) -> float:
    """Of a step of AdamW on so many numbers: that of a stretch of them, which any card has room for."""
    stretch = torch.nn.Parameter(torch.zeros(min(count, _STRETCH), device=device))
    stretch.grad = torch.zeros_like(stretch)
    optimizer = torch.optim.AdamW([stretch])
    taken = []
    for _ in range(3):  # the first one makes its state
        started = now()
        optimizer.step()
        taken.append(now() - started)
    return min(taken) * max(count / _STRETCH, 1.0)
