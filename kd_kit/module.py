"""Everything that has parameters, in one module with one forward pass.

What accelerate prepares is this module, so precision and data-parallel training are right without code of our own:
the student, every trainable part of a term, and the head's loss all run inside its ``forward``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kd_kit.head import body_of, head_losses, head_of
from kd_kit.reduce import masked_sum
from kd_kit.terms import LossTerm, StudentOutput
from kd_kit.types import DistillBatch, LossValue, TeacherSignal


class DistillModule(nn.Module):
    """The student and the trainable parts of the terms; a batch in, one sum per term out.

    Args:
        student: a causal language model of transformers.
        terms: in the order of the sums.
    """

    def __init__(self, student: nn.Module, terms: Sequence[LossTerm]):
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        self.parts = nn.ModuleDict({t.name: t.value for t in terms if isinstance(t.value, nn.Module)})

    def forward(self, batch: DistillBatch, signal: TeacherSignal | None, scales: Tensor) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and every term's sum over this batch.

        Shapes:
            scales: [terms] float32, weight over the count of the whole optimizer step
            returns: scalar ``(sums * scales).sum()``, and sums [terms] float32 without gradient
        """
        hidden = body_of(self.student)(input_ids=batch.student_ids, use_cache=False).last_hidden_state
        output = StudentOutput(hidden, head_of(self.student))
        values = self._row_values(output, signal, batch)
        for term in self.terms:
            if term.value is not None:
                values[term.name] = term.value(output, signal, batch)
        sums = torch.stack([values[term.name].sum.float() for term in self.terms])
        # a term that is scaled by 0 (no such position, weight 0) is left out: 0 times infinity is no number
        used = scales != 0
        total = torch.where(used, sums * torch.where(used, scales, torch.zeros_like(scales)), 0.0).sum()
        return total, sums.detach()

    def _row_values(
        self, output: StudentOutput, signal: TeacherSignal | None, batch: DistillBatch
    ) -> dict[str, LossValue]:
        """All losses of one value per token, from one pass over the student's head."""
        losses = {t.name: t.rows for t in self.terms if t.rows is not None}
        if not losses:
            return {}
        hidden = output.hidden.flatten(0, 1)[batch.rows]
        targets = batch.targets.flatten()[batch.rows]
        aligned = batch.aligned.flatten()[batch.rows]
        cells = {}
        if signal is not None:
            # the signal has a row per aligned position, the head a row per target: spread one over the other
            place = torch.cumsum(aligned, 0) - 1
            place = place.clamp(min=0, max=max(len(signal.tail) - 1, 0))
            if len(signal.tail):
                ids = signal.ids[place]
                known = torch.cat([signal.log_probs, signal.tail.unsqueeze(-1)], dim=-1)[place]
            else:
                k = signal.ids.shape[1]
                ids = torch.arange(k, device=hidden.device).expand(len(hidden), k)
                known = hidden.new_full((len(hidden), k + 1), -torch.inf, dtype=torch.float32)
                known[:, -1] = 0.0
            cells = {"cell_ids": ids, "teacher_cells": known, "has_teacher": aligned}
        values = head_losses(hidden, output.head, losses, targets=targets, **cells)
        out = {}
        for term in self.terms:
            if term.rows is not None:
                mask = aligned if term.over == "aligned" else None
                out[term.name] = masked_sum(values[term.name], mask)
        return out
