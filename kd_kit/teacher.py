"""A live teacher: token windows in, its knowledge at the student's positions out."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from kd_kit.head import Head, head_of
from kd_kit.packed_body import Back, run_body
from kd_kit.readings import BridgeReading, Needs
from kd_kit.routing import RoutingTap, more_experts
from kd_kit.taps import Taps
from kd_kit.teacher_rows import read_rows
from kd_kit.types import DistillBatch, TeacherSignal
from kd_kit.vocab import Bridge


class LiveTeacher:
    """Runs the frozen teacher over a batch and hands over what the terms of a run need of it.

    Only the positions that are asked about pass the teacher's head, once each. Its padded rows are cut off before the
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
        self._some: Head | None = None

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

    def check_terms(self, terms, where: str) -> None:
        """Raise where terms want what it cannot say. A live one can say everything.

        Raises:
            ValueError: names the term, and what is missing; begins with ``where``.
        """

    def read_ahead(self, batch: DistillBatch) -> None:
        """A batch is on its way. For a teacher that reads; a live one waits until it is asked."""

    def signal(self, batch: DistillBatch, here: DistillBatch | None = None) -> TeacherSignal:
        """What the teacher knows about ``batch``, on the batch's device, without gradient.

        Args:
            here: the same batch on the host, as it was fetched, where it still is there: then nothing waits for the
                device, and a teacher that reads knows it again.
        """
        target, here = batch.student_ids.device, batch.to("cpu") if here is None else here
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
            cells, span_log_probs = {}, None
            if needs.readings or needs.span_log_probs:
                cells, span_log_probs = read_rows(
                    self._head(), passes, batch, here, needs.readings, spans=needs.span_log_probs
                )
            signal = TeacherSignal(
                cells=cells,
                row_states=self._aligned(batch, hidden) if needs.row_states else None,
                span_log_probs=span_log_probs,
                states={n: back(taps.states[n]).flatten(0, 1)[ends].float() for n in sorted(needs.teacher_states)},
                routing={n: back(router.probabilities[n]).flatten(0, 1)[ends] for n in sorted(needs.routing)},
                attention={
                    n: {kind: back(t) for kind, t in taps.attention[n].items()} for n in sorted(needs.teacher_attention)
                },
            )
        # tensors made in inference mode may not enter a graph; a copy made outside may
        return signal.mapped(lambda tensor: tensor.to(target).clone())

    def _head(self) -> Head:
        """The head's rows that the readings look at: without padding, and only those of some tokens if that is all."""
        whole = head_of(self.model).cut(self.bridge.teacher_size)
        readings = self.needs.readings
        rows = readings[0].rows if readings else None
        # of several passes the mean is taken over all tokens: what is given some of them must not depend on the others
        if rows is None or self.needs.span_log_probs or self.more_experts is not None:
            return whole
        if not all(r.rows is not None and torch.equal(r.rows, rows) for r in readings):
            return whole
        if self._some is None or self._some.weight.device != whole.weight.device:
            self._some = whole.of(rows.to(whole.weight.device))
        return self._some

    def _body(self, batch: DistillBatch) -> tuple[Tensor, Back]:
        return run_body(self.model, batch.teacher_ids, batch.teacher_packed)

    def _aligned(self, batch: DistillBatch, hidden: Tensor) -> Tensor:
        window = batch.aligned_rows // batch.student_ids.shape[1]
        place = window * batch.teacher_ids.shape[1] + batch.teacher_index.flatten()[batch.aligned_rows]
        return hidden.flatten(0, 1)[place].float()


def default_reading(bridge: Bridge, *, over: str = "taught") -> BridgeReading:
    """What a teacher is asked for when nobody says otherwise: the 64 largest cells over the bridge."""
    return BridgeReading("bridge", bridge, min(64, bridge.student_size), over=over)
