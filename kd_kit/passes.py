"""The passes of both models over one batch, made once and kept: a question about the same text costs no pass again.

Nothing here changes a model: evaluation mode while it lasts, the former mode of every module afterwards, and gradients
are asked for and never accumulated.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from kd_kit.gradients import gradient_at
from kd_kit.modes import modes_kept
from kd_kit.module import DistillModule
from kd_kit.packed_body import Back
from kd_kit.readings import Needs
from kd_kit.taps import layers_of
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm, StudentOutput
from kd_kit.types import DistillBatch, TeacherSignal


@contextlib.contextmanager
def as_in_evaluation(trainer) -> Iterator[None]:
    """Everything of a trainer in evaluation mode, computing in its precision; each module's mode comes back, and the
    random state of torch with it.
    """
    device = trainer.session.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), modes_kept(trainer.module):
        trainer.module.eval()
        with trainer.accelerator.autocast():
            yield


class KeptTeacher(LiveTeacher):
    """A teacher that reads one batch once, and answers what it is asked later from what it said then.

    Args:
        teacher: of the run.
    """

    def __init__(self, teacher: LiveTeacher, batch: DistillBatch):
        super().__init__(teacher.model, teacher.bridge, Needs(), more_experts=teacher.more_experts)
        self.batch = batch
        self._said = TeacherSignal()
        self._hidden: list[tuple[Tensor, Back]] = []  # of the pass, and of the one with more experts
        self._called, self._anew = 0, False

    def ask(self, needs: Needs, more: Needs | None = None) -> TeacherSignal:
        """At least what is needed; a body runs only for the first question, and for layers not asked for before.

        Cells that are no longer needed are given up: those of a whole vocabulary are large.

        Args:
            more: layers to keep as well where a pass has to be made anyway.
        """
        said = self._said
        layers = _lacking(needs, said)
        if layers.teacher or (not self._hidden and needs.teacher):
            wanted = needs | (more or Needs())
            self._read(replace(_lacking(wanted, said), routing_scores=wanted.routing_scores), anew=True)
        cells = {r.key: said.cells[r.key] for r in needs.readings if r.key in said.cells}
        self._said = replace(self._said, cells=cells)
        self._read(
            Needs(
                tuple(r for r in needs.readings if r.key not in cells),
                needs.row_states and said.row_states is None,
                needs.span_log_probs and said.span_log_probs is None,
            ),
            anew=False,
        )
        return self._said

    def _read(self, needs: Needs, *, anew: bool) -> None:
        if not (anew or needs.teacher):
            return
        self.needs, self._called, self._anew = needs, 0, anew
        found, said = self.signal(self.batch), self._said
        # a mapping has what it had and what is new; of the others, whichever is there
        both = {f.name: (getattr(said, f.name), getattr(found, f.name)) for f in fields(TeacherSignal)}
        self._said = TeacherSignal(
            **{
                name: {**one, **other} if isinstance(one, dict) else other if one is None else one
                for name, (one, other) in both.items()
            }
        )

    def _body(self, batch: DistillBatch) -> tuple[Tensor, Back]:
        place, self._called = self._called, self._called + 1
        if self._anew or place >= len(self._hidden):
            self._hidden[place : place + 1] = [super()._body(batch)]
        return self._hidden[place]


def _lacking(needs: Needs, said: TeacherSignal) -> Needs:
    """The layers that have not been read yet."""
    return Needs(
        teacher_states=needs.teacher_states - said.states.keys(),
        teacher_attention=needs.teacher_attention - said.attention.keys(),
        routing=needs.routing - said.routing.keys(),
        routing_scores=needs.routing_scores,
    )


@dataclass(frozen=True)
class Seen:
    """One term on one batch.

    Attributes:
        value: the mean over its positions; None where it has none.
        count: of these. gradient: [B * T * D] float32, of the sum, at the meeting point; None where it was not asked.
    """

    value: float | None
    count: int
    gradient: Tensor | None


class Passes:
    """Both models' passes over one batch, with the student's graph.

    Args:
        trainer: at rest, and as it is now.
        batch: on the host.
        more: layers to keep beyond those that terms need, for questions that may come.
        graph: keep the student's graph; without it there are values and no gradients.
    """

    def __init__(self, trainer, batch: DistillBatch, more: Needs | None = None, *, graph: bool = True):
        self.trainer = trainer
        self._graph = graph
        self.on_host = batch  # where counting positions waits for no device
        # windows in rows of their own: gradients may meet at any state, and all of them have one shape
        self.batch = batch.unpacked().to(trainer.session.device)
        self.teacher = None if trainer.teacher is None else KeptTeacher(trainer.teacher, self.batch)
        self._more = more or Needs()
        self._kept = Needs()
        self._output: StudentOutput | None = None

    def term(self, term: LossTerm, needs: Needs, meeting: int | None = None) -> Seen:
        """Value and, with a graph, gradient of one bound term.

        Args:
            needs: of all terms, so that what one asks for stays for the others.
            meeting: the layer at which gradients meet, see :func:`kd_kit.gradients.meeting_layer`.
        """
        count = term.count(self.on_host)
        with torch.set_grad_enabled(self._graph):
            module = DistillModule(self.trainer.student, [term])
            output = self._of_student(needs)
            signal = self.teacher.ask(needs, self._more) if self.teacher is not None and needs.teacher else None
            value = module.values(output, signal, self.batch)[term.name]
            found = None
            if self._graph:
                point = output.hidden if meeting is None else output.states[meeting] if meeting else output.point
                found = gradient_at(value, point).flatten().detach()
        mean = float(value.sum.detach().float()) / count if count else None
        return Seen(mean, count, found)

    def _of_student(self, needs: Needs) -> StudentOutput:
        """The student's output with every state that may be asked for, and the embeddings as its ``point``."""
        has = self._kept
        if (
            self._output is None
            or not needs.student_states <= has.student_states
            or not needs.student_attention <= has.student_attention
        ):
            self._kept = kept = _widened(self.trainer.student, needs | self._more | has)
            module = DistillModule(self.trainer.student, [])
            module.needs, module.meeting_layer = kept, 0 if kept.student_states else None
            self._output = module.output(self.batch, meet=True)
        return self._output


def _widened(student: nn.Module, needs: Needs) -> Needs:
    """With all states of the student, which its graph holds anyway, where any layer is looked at."""
    if not (needs.student_states or needs.student_attention):
        return needs
    return needs | Needs(student_states=frozenset(range(1, len(layers_of(student)) + 1)))


class SpanStates:
    """What both models hold at the span ends of a few batches: enough to settle a part with, in no time.

    Args:
        needs: the layers.
    """

    def __init__(self, trainer, batches: Iterable[DistillBatch], needs: Needs):
        self.needs = needs
        self._kept: list[tuple[StudentOutput, TeacherSignal, DistillBatch]] = []
        module = DistillModule(trainer.student, [])
        module.needs = Needs(student_states=needs.student_states)
        asked = Needs(teacher_states=needs.teacher_states, routing=needs.routing, routing_scores=needs.routing_scores)
        for batch in batches:
            batch = batch.to(trainer.session.device)
            with torch.no_grad():
                output, signal = module.output(batch), trainer.teacher.asked(asked).signal(batch)
            ends = batch.span_rows[:, 0]
            states = {layer: s.flatten(0, 1)[ends].unsqueeze(0) for layer, s in output.states.items()}
            rows = torch.arange(len(ends), device=ends.device)
            few = replace(batch, span_rows=torch.stack([rows, rows], dim=-1))
            self._kept.append((StudentOutput(output.hidden[:0], output.head, states), signal, few))

    def covers(self, needs: Needs) -> bool:
        mine = self.needs
        return (
            needs.student_states <= mine.student_states
            and needs.teacher_states <= mine.teacher_states
            and needs.routing <= mine.routing
        )

    def settle(self, part: nn.Module) -> None:
        """Settle a part of the kit on what was read."""
        part.forget()
        with torch.no_grad():
            for output, signal, batch in self._kept:
                part.observe(output, signal, batch)
        part.settle()
