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

    def forward(
        self, batch: DistillBatch, signal: TeacherSignal | None, scales: Sequence[float]
    ) -> tuple[Tensor, Tensor]:
        """The loss to differentiate, and every term's sum over this batch.

        Args:
            scales: of every term, its weight over its count in the whole optimizer step. A term scaled by 0 is
                measured and not differentiated.

        Shapes:
            returns: scalar, the scaled sums added up; and sums [terms] float32 without gradient

        Raises:
            ValueError: the signal of another batch.
        """
        if signal is not None and len(signal.tail) != len(batch.taught_rows):
            raise ValueError(
                f"DistillModule: expected a signal of {len(batch.taught_rows)} rows, one per taught position of the "
                f"batch, got {len(signal.tail)}; pass the signal that the teacher made for this batch"
            )
        hidden = body_of(self.student)(input_ids=batch.student_ids, use_cache=False).last_hidden_state
        output = StudentOutput(hidden, head_of(self.student))
        values = self._row_values(output, signal, batch)
        for term in self.terms:
            if term.value is not None:
                values[term.name] = term.value(output, signal, batch)
        sums = [values[term.name].sum.float() for term in self.terms]
        used = [value * scale for value, scale in zip(sums, scales, strict=True) if scale != 0]
        total = torch.stack(used).sum() if used else hidden.float().sum() * 0.0
        return total, torch.stack(sums).detach()

    def _row_values(
        self, output: StudentOutput, signal: TeacherSignal | None, batch: DistillBatch
    ) -> dict[str, LossValue]:
        """All losses of one value per token, from one pass over the student's head."""
        losses = {t.name: t.rows for t in self.terms if t.rows is not None}
        if not losses:
            return {}
        hidden = output.hidden.flatten(0, 1)[batch.rows]
        targets = batch.targets.flatten()[batch.rows]
        masks = {over: getattr(batch, over).flatten()[batch.rows] for over in ("aligned", "taught")}
        taught = masks["taught"]
        cells = {}
        if signal is not None:
            # the signal has a row per taught position, the head a row per target: spread one over the other
            place = torch.cumsum(taught, 0) - 1
            place = place.clamp(min=0, max=max(len(signal.tail) - 1, 0))
            if len(signal.tail):
                ids = signal.ids[place]
                known = torch.cat([signal.log_probs, signal.tail.unsqueeze(-1)], dim=-1)[place]
            else:
                k = signal.ids.shape[1]
                ids = torch.arange(k, device=hidden.device).expand(len(hidden), k)
                known = hidden.new_full((len(hidden), k + 1), -torch.inf, dtype=torch.float32)
                known[:, -1] = 0.0
            cells = {"cell_ids": ids, "teacher_cells": known, "has_teacher": taught}
        values = head_losses(hidden, output.head, losses, targets=targets, **cells)
        out = {}
        for term in self.terms:
            if term.rows is not None:
                out[term.name] = masked_sum(values[term.name], masks.get(term.over))
        return out
