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
        # rows of one depth together, so that one table serves a chunk; the host knows where they are
        depths = batch.prefix[:, 0].cpu()
        order = torch.argsort(depths, stable=True)
        counts = torch.bincount(depths).tolist() if len(depths) else []
        parts = []
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            batch = batch.to(self.device)
            hidden = body_of(self.model)(input_ids=batch.teacher_ids, use_cache=False).last_hidden_state
            order = order.to(self.device)
            places = batch.taught_rows[order]
            window = places // batch.student_ids.shape[1]
            positions = batch.teacher_index.flatten()[places]
            rows = hidden.flatten(0, 1)[window * batch.teacher_ids.shape[1] + positions]
            _, first, last = batch.prefix[order].unbind(-1)
            head = head_of(self.model).cut(self.bridge.teacher_size)
            start = 0
            for depth, count in enumerate(counts):
                for chunk in chunks(count, head.chunk_rows()):
                    some = slice(start + chunk.start, start + chunk.stop)
                    probs = torch.softmax(head.logits(rows[some]), dim=-1)
                    parts.append(top_k_cells(self.bridge.project_at(probs, depth, first[some], last[some]), self.top_k))
                start += count
            if parts:
                back = torch.argsort(order)
                found = [torch.cat(columns)[back] for columns in zip(*parts, strict=True)]
            else:
                empty = rows.new_zeros(0, self.top_k, dtype=torch.float32)
                found = [empty.long(), empty, empty.new_zeros(0)]
        # tensors made in inference mode may not enter a graph; a copy made outside may
        return TeacherSignal(*(t.to(target).clone() for t in found))
