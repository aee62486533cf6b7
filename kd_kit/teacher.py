"""A live teacher: token windows in, its knowledge in the student's vocabulary out."""

from __future__ import annotations

import torch

from kd_kit.head import body_of, head_of
from kd_kit.losses import top_k_cells
from kd_kit.reduce import chunks
from kd_kit.types import DistillBatch, TeacherSignal
from kd_kit.vocab import Bridge


class LiveTeacher:
    """Runs the frozen teacher over a batch and hands its next-token distributions over in student terms.

    Only the positions that it can teach pass the teacher's head, once each. Its padded rows are cut off before the
    softmax: no probability goes to tokens that do not exist.

    Args:
        model: a frozen causal language model, see :func:`kd_kit.build_teacher`.
        bridge: teacher vocabulary to student vocabulary, at aligned positions and inside teacher tokens.
        top_k: K, kept cells per position.

    Raises:
        ValueError: K below 1 or above the student's vocabulary.
    """

    def __init__(self, model, bridge: Bridge, *, top_k: int):
        if not 1 <= top_k <= bridge.student_size:
            raise ValueError(
                f"LiveTeacher: expected 1 <= top_k <= {bridge.student_size} (the student's vocabulary), got {top_k}"
            )
        self.model = model
        self.bridge = bridge
        self.top_k = top_k

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def signal(self, batch: DistillBatch) -> TeacherSignal:
        """The teacher's distribution at every position of ``batch`` that it can teach, on the batch's device."""
        target = batch.student_ids.device
        ids, log_probs, tail = [], [], []
        with torch.inference_mode():
            batch = batch.to(self.device)
            hidden = body_of(self.model)(input_ids=batch.teacher_ids, use_cache=False).last_hidden_state
            width = batch.student_ids.shape[1]
            window = batch.taught_rows // width
            positions = batch.teacher_index.flatten()[batch.taught_rows]
            rows = hidden.flatten(0, 1)[window * batch.teacher_ids.shape[1] + positions]
            head = head_of(self.model).cut(self.bridge.teacher_size)
            for chunk in chunks(len(rows), head.chunk_rows()):
                probs = torch.softmax(head.logits(rows[chunk]), dim=-1)
                kept = top_k_cells(self.bridge.project_at(probs, batch.prefix[chunk]), self.top_k)
                for whole, part in zip((ids, log_probs, tail), kept, strict=True):
                    whole.append(part)
            if not ids:
                empty = rows.new_zeros(0, self.top_k, dtype=torch.float32)
                ids, log_probs, tail = [empty.long()], [empty], [empty.new_zeros(0)]
            signal = TeacherSignal(torch.cat(ids), torch.cat(log_probs), torch.cat(tail))
        # tensors made in inference mode may not enter a graph; a copy made outside may
        return TeacherSignal(*(t.to(target).clone() for t in (signal.ids, signal.log_probs, signal.tail)))
