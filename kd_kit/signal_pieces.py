"""A teacher's signal cut into windows, and put together again for other batches of the same windows.

What a signal holds is about rows of a batch: taught, aligned or same positions, or ends of spans. Their order is window
by window, so a batch's rows are those of its windows, one after the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kd_kit.readings import Needs
from kd_kit.types import Cells, DistillBatch, TeacherSignal

IDS, LOG_PROBS, TAIL = "ids", "log_probs", "tail"


def kinds_of_rows(needs: Needs) -> dict[str, str]:
    """{name of a piece: "taught", "aligned", "same" or "spans"}, of everything that a signal for ``needs`` has.

    A reading's pieces are named after its key. Attention is about all positions of both, and cannot be cut.
    """
    found = {}
    for reading in needs.readings:
        found |= {f"{reading.key}/{part}": reading.over for part in (IDS, LOG_PROBS, TAIL)}
    if needs.row_states:
        found["row_states"] = "aligned"
    if needs.span_log_probs:
        found["span_log_probs"] = "spans"
    found |= {f"states/{layer}": "spans" for layer in sorted(needs.teacher_states)}
    found |= {f"routing/{layer}": "spans" for layer in sorted(needs.routing)}
    return found


def counts_of(batch: DistillBatch) -> dict[str, Tensor]:
    """{kind of rows: [B] int64, how many each window has}."""
    masks = {"taught": batch.taught, "aligned": batch.aligned, "same": batch.same, "spans": batch.span_mask}
    return {kind: mask.sum(dim=1) for kind, mask in masks.items()}


def cut(signal: TeacherSignal, batch: DistillBatch, needs: Needs) -> dict[str, list[Tensor]]:
    """{name of a piece: its rows in every window of the batch}."""
    whole: dict[str, Tensor] = {}
    for reading in needs.readings:
        cells = signal.cells[reading.key]
        parts = {IDS: cells.ids, LOG_PROBS: cells.log_probs, TAIL: cells.tail}
        whole |= {f"{reading.key}/{part}": tensor for part, tensor in parts.items() if tensor is not None}
    if needs.row_states:
        whole["row_states"] = signal.row_states
    if needs.span_log_probs:
        whole["span_log_probs"] = signal.span_log_probs[batch.span_mask]
    whole |= {f"states/{layer}": signal.states[layer] for layer in sorted(needs.teacher_states)}
    whole |= {f"routing/{layer}": signal.routing[layer] for layer in sorted(needs.routing)}
    kinds, counts = kinds_of_rows(needs), {kind: each.tolist() for kind, each in counts_of(batch).items()}
    return {name: list(tensor.split(counts[kinds[name]])) for name, tensor in whole.items()}


def join(fetch: Callable[[str], Tensor | None], batch: DistillBatch, needs: Needs) -> TeacherSignal:
    """The signal for a batch, from the rows of its windows, in the types that they are stored in; see :func:`widened`.

    Args:
        fetch: gives the rows of a piece in all windows of the batch, in order; None where a reading has no ids.
    """
    cells = {r.key: Cells(*(fetch(f"{r.key}/{part}") for part in (IDS, LOG_PROBS, TAIL))) for r in needs.readings}
    spans = None
    if needs.span_log_probs:
        rows = fetch("span_log_probs")
        spans = rows.new_zeros(batch.span_mask.shape)
        spans[batch.span_mask] = rows
    return TeacherSignal(
        cells=cells,
        row_states=fetch("row_states") if needs.row_states else None,
        span_log_probs=spans,
        states={layer: fetch(f"states/{layer}") for layer in sorted(needs.teacher_states)},
        routing={layer: fetch(f"routing/{layer}") for layer in sorted(needs.routing)},
    )


def widened(signal: TeacherSignal) -> TeacherSignal:
    """In the types that terms compute in: int64 and float32. Where it is already, the same tensors."""

    def wide(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int16:
            return tensor.long() & 0xFFFF  # the bits of an unsigned number, see Cache.stored
        return tensor.float() if tensor.is_floating_point() else tensor.long()

    return signal.mapped(wide)
