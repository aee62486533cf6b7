"""A live teacher: token windows in, its knowledge at the student's positions out."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kd_kit.head import head_of
from kd_kit.packed_body import Back, run_body
from kd_kit.readings import BridgeReading, Needs, Where, empty_cells, joined
from kd_kit.reduce import chunks
from kd_kit.routing import RoutingTap, more_experts
from kd_kit.taps import Taps
from kd_kit.types import DistillBatch, TeacherSignal
from kd_kit.vocab import Bridge


class LiveTeacher:
    """Runs the frozen teacher over a batch and hands over what the terms of a run need of it.

    Only the positions that it can teach pass the teacher's head, once each. Its padded rows are cut off before the
    softmax: no probability goes to tokens that do not exist.

    Args:
        model: a frozen causal language model, see :func:`kd_kit.build_teacher`.
        bridge: teacher vocabulary to student vocabulary, at aligned positions and inside teacher tokens.
        needs: what is asked of it; the 64 largest cells over the bridge if left out.
        more_experts: experts per token of a second pass over the same text. What the teacher then says of the next
            token is the mean of both passes, in probability space; hidden states and routing are those of the first.

    Source: for ``more_experts``, knowledge augmentation, https://arxiv.org/abs/2502.12947
    """

    def __init__(self, model, bridge: Bridge, needs: Needs | None = None, *, more_experts: int | None = None):
        self.model = model
        self.bridge = bridge
        self.needs = Needs((default_reading(bridge),)) if needs is None else needs
        self.more_experts = more_experts

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def home(self) -> torch.device:
        """Where the model computes."""
        return self.device

    def awake(self) -> contextlib.AbstractContextManager:
        """For evaluation: the model is where it computes fast. A live one is there always."""
        return contextlib.nullcontext()

    def asked(self, needs: Needs) -> LiveTeacher:
        """The same teacher, asked for something else."""
        return LiveTeacher(self.model, self.bridge, needs, more_experts=self.more_experts)

    def signal(self, batch: DistillBatch) -> TeacherSignal:
        """What the teacher knows about ``batch``, on the batch's device, without gradient."""
        target = batch.student_ids.device
        needs = self.needs
        with torch.inference_mode(), torch.autocast(self.device.type, enabled=False):
            batch = batch.to(self.device)
            taps = Taps(self.model, states=sorted(needs.teacher_states), attention=sorted(needs.teacher_attention))
            router = contextlib.nullcontext()
            if needs.routing:
                router = RoutingTap(self.model, sorted(needs.routing), scores=needs.routing_scores)
            with taps, router:
                hidden, back = self._body(batch)
            hidden = back(hidden)
            passes = [hidden]
            if self.more_experts is not None and (needs.readings or needs.span_log_probs):
                with more_experts(self.model, self.more_experts):
                    again, back_again = self._body(batch)
                    passes.append(back_again(again))
            ends = batch.span_rows[:, 1]
            signal = TeacherSignal(
                cells=self._cells(batch, [h.flatten(0, 1) for h in passes]) if needs.readings else {},
                row_states=self._aligned(batch, hidden) if needs.row_states else None,
                span_log_probs=self._span_log_probs(batch, passes) if needs.span_log_probs else None,
                states={n: back(taps.states[n]).flatten(0, 1)[ends].float() for n in sorted(needs.teacher_states)},
                routing={n: back(router.probabilities[n]).flatten(0, 1)[ends] for n in sorted(needs.routing)},
                attention={
                    n: {kind: back(t) for kind, t in taps.attention[n].items()} for n in sorted(needs.teacher_attention)
                },
            )
        # tensors made in inference mode may not enter a graph; a copy made outside may
        return signal.mapped(lambda tensor: tensor.to(target).clone())

    def _body(self, batch: DistillBatch) -> tuple[Tensor, Back]:
        return run_body(self.model, batch.teacher_ids, batch.teacher_packed)

    def _aligned(self, batch: DistillBatch, hidden: Tensor) -> Tensor:
        window = batch.aligned_rows // batch.student_ids.shape[1]
        place = window * batch.teacher_ids.shape[1] + batch.teacher_index.flatten()[batch.aligned_rows]
        return hidden.flatten(0, 1)[place].float()

    def _probabilities(self, passes: list[Tensor], rows: Tensor) -> Tensor:
        """[n, U] float32, at flat teacher positions, the mean over the passes."""
        head = head_of(self.model).cut(self.bridge.teacher_size)
        probs = torch.softmax(head.logits(passes[0][rows]), dim=-1)
        for hidden in passes[1:]:
            probs += torch.softmax(head.logits(hidden[rows]), dim=-1)
        return probs / len(passes)

    def _cells(self, batch: DistillBatch, passes: list[Tensor]) -> dict:
        """Every reading of the teacher's distribution, each from one softmax per position."""
        # rows of one depth together, aligned ones first, so that one table serves a chunk; the host knows their number
        depths = batch.prefix[:, 0].cpu()
        order = torch.argsort(depths, stable=True).to(self.device)
        counts = torch.bincount(depths, minlength=1).tolist()
        places = batch.taught_rows[order]
        width = batch.student_ids.shape[1]
        window = places // width
        rows = window * batch.teacher_ids.shape[1] + batch.teacher_index.flatten()[places]
        # the window's number in its data set and the place within it, whatever the batch was padded to
        place = batch.sample[window] * 2**24 + places % width
        _, first, last = batch.prefix[order].unbind(-1)
        size = head_of(self.model).chunk_rows()
        parts = {r.key: [] for r in self.needs.readings}
        start = 0
        for depth, count in enumerate(counts):
            asked = [r for r in self.needs.readings if depth == 0 or r.over == "taught"]
            for chunk in chunks(count, size) if asked else ():
                some = slice(start + chunk.start, start + chunk.stop)
                probs = self._probabilities(passes, rows[some])
                for reading in asked:
                    parts[reading.key].append(reading.read(probs, Where(depth, first[some], last[some], place[some])))
            start += count
        found = {}
        for reading in self.needs.readings:
            if not parts[reading.key]:
                found[reading.key] = empty_cells(reading, self.device)
                continue
            read = order if reading.over == "taught" else order[: counts[0]]
            spot = torch.empty_like(order)
            spot[read] = torch.arange(len(read), device=self.device)
            back = spot[_rows_of(reading, batch)]
            found[reading.key] = joined(parts[reading.key]).mapped(lambda tensor, back=back: tensor[back])
        return found

    def _span_log_probs(self, batch: DistillBatch, passes: list[Tensor]) -> Tensor:
        """[B, C] float32, the sum over each scored span of the teacher's log-probabilities of its own tokens."""
        passes = [h.flatten(0, 1) for h in passes]
        b, c = batch.span_mask.shape
        s = batch.teacher_ids.shape[1]
        # teacher position i predicts token i + 1: it belongs to span c if span_teacher[c] <= i < span_teacher[c + 1]
        at = torch.arange(s, device=self.device).expand(b, s).contiguous()
        span = torch.searchsorted(batch.span_teacher.contiguous(), at, right=True) - 1
        inside = (span >= 0) & (span < c)
        inside &= batch.span_mask.gather(1, span.clamp(0, c - 1))
        rows = inside.flatten().nonzero().squeeze(-1)
        targets = batch.teacher_ids.roll(-1, dims=1).flatten()[rows]
        found = [
            self._probabilities(passes, rows[chunk]).gather(-1, targets[chunk].unsqueeze(-1)).squeeze(-1)
            for chunk in chunks(len(rows), head_of(self.model).chunk_rows())
        ]
        out = torch.zeros(b * c, device=self.device)
        if found:
            where = (torch.arange(b, device=self.device).unsqueeze(-1) * c + span).flatten()[rows]
            # a token that float32 gives no probability at all makes its span unlikely, not impossible
            out.index_add_(0, where, torch.cat(found).clamp(min=torch.finfo(torch.float32).tiny).log())
        return out.view(b, c)


def default_reading(bridge: Bridge, *, over: str = "taught") -> BridgeReading:
    """What a teacher is asked for when nobody says otherwise: the 64 largest cells over the bridge."""
    return BridgeReading("bridge", bridge, min(64, bridge.student_size), over=over)


def _rows_of(reading, batch: DistillBatch) -> Tensor:
    """[n] int64, the rows of a reading as places among the taught rows of the batch."""
    if reading.over == "taught":
        return torch.arange(len(batch.taught_rows), device=batch.taught_rows.device)
    rows = batch.same_rows if reading.over == "same" else batch.aligned_rows
    return torch.searchsorted(batch.taught_rows, rows)
