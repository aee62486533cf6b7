"""One optimizer step: all micro-batches forward and backward, each term divided by its count in all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kd_kit.head import alone_with
from kd_kit.module import DistillModule
from kd_kit.optimizer import clip_gradients
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import ROWS
from kd_kit.types import DistillBatch


@dataclass(frozen=True)
class StepResult:
    """What a step measured. Tensors stay on the device; see :meth:`kd_kit.step_log.StepLog.add`.

    Attributes:
        counts: positions of every term. predicted, aligned, taught: positions of the batches.
        sums: of every term. total: the loss that was differentiated.
        norm, loss_scale, skipped: of the second half; skipped says that the step was not taken, since its gradient was
            not finite.
    """

    counts: list[int]
    sums: Tensor
    total: Tensor
    extras: dict[str, Tensor]
    tail: Tensor | None
    tail_rows: int
    gradients: Tensor | None
    gradient_counts: list[int]
    predicted: int
    aligned: int
    taught: int
    norm: Tensor | None = None
    loss_scale: Tensor | None = None
    skipped: bool = False


def take_gradients(
    accelerator,
    prepared,
    optimizer,
    batches: Sequence[DistillBatch],
    *,
    module: DistillModule,
    teacher: LiveTeacher | None,
    shares: Mapping[str, float],
    measure: bool,
    counts: Sequence[int] | None = None,
) -> StepResult:
    """The first half of a step: forward and backward. Changes nothing but gradients, so it can be done again.

    Args:
        accelerator: of accelerate. prepared, optimizer: what it made of ``module`` and of the optimizer.
        shares: of the total, of every term.
        measure: compare the terms' gradients on the first micro-batch.
        counts: of every term in the whole step, where ``batches`` are a part of it; those of ``batches`` if left out.
    """
    terms, device = module.terms, accelerator.device
    each = [[term.count(b) for b in batches] for term in terms]  # on the host, where they are made
    counts = [sum(of_term) for of_term in each] if counts is None else list(counts)
    scales = [shares[t.name] / c if c else 0.0 for t, c in zip(terms, counts, strict=True)]
    on_host, batches = batches, [b.to(device, non_blocking=True) for b in batches]
    optimizer.zero_grad(set_to_none=True)  # what a step that was broken off may have left
    reading = next(iter(module.needs.readings), None)  # whose tail is recorded
    asked = teacher is not None and module.needs.teacher
    sums, whole = torch.zeros(len(terms), device=device), torch.zeros((), device=device)
    tail = torch.zeros((), device=device)
    extras: dict[str, Tensor] = {}
    gradients: Tensor | None = None
    for number, (batch, here) in enumerate(zip(batches, on_host, strict=True)):
        signal = teacher.signal(batch, here) if asked else None
        # checkpointed layers run again in the backward pass: in the mode, and with the hooks, of this thread alone
        with alone_with(module.student):
            total, part, measured = prepared(batch, signal, scales, measure and number == 0)
            accelerator.backward(total)
        sums += part
        whole += total.detach().float()
        gradients = measured.pop("gradients", gradients)
        for name, value in measured.items():
            extras[name] = extras[name] + value if name in extras else value
        if reading is not None:
            tail += signal.cells[reading.key].tail.exp().sum()
    return StepResult(
        counts=counts,
        sums=sums,
        total=whole,
        extras=extras,
        tail=tail if reading else None,
        tail_rows=sum(ROWS[reading.over](b) for b in batches) if reading else 0,
        gradients=gradients,
        gradient_counts=[of_term[0] for of_term in each],
        predicted=sum(len(b.rows) for b in batches),
        aligned=sum(len(b.aligned_rows) for b in batches),
        taught=sum(len(b.taught_rows) for b in batches),
    )


def apply_gradients(
    accelerator, optimizer, measured: StepResult, *, module: DistillModule, rate: float, max_grad_norm: float
) -> StepResult:
    """The second half: clip, and take the step if the gradient is finite. Not to be done again once it has begun.

    Args:
        rate: of the student; the groups' factors come on top.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]
    accelerator.unscale_gradients()
    norm = clip_gradients(module, max_grad_norm)
    # a loss that is not finite may have a finite gradient; what it says is wrong all the same
    skipped = accelerator.scaler is None and not bool(torch.isfinite(torch.stack([norm, measured.total])).all())
    if not skipped:  # a scaler sees to this itself
        optimizer.step()
        skipped = bool(optimizer.step_was_skipped)
    optimizer.zero_grad(set_to_none=True)
    scale = None if accelerator.scaler is None else accelerator.scaler._scale
    return replace(measured, norm=norm, loss_scale=scale, skipped=skipped)
