"""Everything that has parameters, in one module with one forward pass.

What accelerate prepares is this module, so precision and data-parallel training are right without code of our own:
the student, every trainable part of a term, and the head's loss all run inside its ``forward``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from kd_kit.gradients import gradient_products, meeting_layer
from kd_kit.head import Given, head_losses, head_of
from kd_kit.modes import modes_kept
from kd_kit.packed_body import run_body
from kd_kit.readings import Needs, Reading
from kd_kit.reduce import masked_sum
from kd_kit.taps import Taps
from kd_kit.terms import LossTerm, StudentOutput
from kd_kit.types import Cells, DistillBatch, LossValue, TeacherSignal


class DistillModule(nn.Module):
    """The student and the trainable parts of the terms; a batch in, one sum per term out.

    Args:
        student: a causal language model of transformers.
        terms: in the order of the sums, each bound to the models (:meth:`kd_kit.terms.LossTerm.bound`).
    """

    def __init__(self, student: nn.Module, terms: Sequence[LossTerm]):
        super().__init__()
        self.student = student
        self.terms = tuple(terms)
        self.needs = all_needs(terms)
        self.meeting_layer = meeting_layer(self.needs)
        self.parts = nn.ModuleDict({t.name: t.part for t in terms if t.part is not None})

    def forward(
        self, batch: DistillBatch, signal: TeacherSignal | None, scales: Sequence[float], measure: bool = False
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """The loss to differentiate, and every term's sum over this batch.

        Args:
            scales: of every term, its weight over its count in the whole optimizer step. A term scaled by 0 is
                measured and not differentiated.
            measure: also compare the gradients of the terms, see :mod:`kd_kit.gradients`; costs about one pass
                through the student per term.

        Shapes:
            returns: scalar, the scaled sums added up; sums [terms] float32 without gradient; and what else the terms
                measured, {"term.name": sums}, with "gradients" [terms, terms] where they were compared

        Raises:
            ValueError: the signal of another batch, or one that lacks what a term needs.
        """
        output = self.output(batch, meet=measure)
        values = self.values(output, signal, batch)
        sums = [values[term.name].sum.float() for term in self.terms]
        used = [value * scale for value, scale in zip(sums, scales, strict=True) if scale != 0]
        total = torch.stack(used).sum() if used else output.hidden.float().sum() * 0.0
        extras = {
            f"{name}.{what}": v.detach().float() for name, value in values.items() for what, v in value.extras.items()
        }
        if measure:
            extras["gradients"] = gradient_products(values, [t.name for t in self.terms], output.point)
        return total, torch.stack(sums).detach(), extras

    def output(self, batch: DistillBatch, *, meet: bool = False) -> StudentOutput:
        """What the student computes for a batch, as far as the terms need it.

        Args:
            meet: keep the state at which the gradients of all terms meet, too.
        """
        needs, layer = self.needs, self.meeting_layer if meet else None
        wanted = needs.student_states | ({layer} if layer else set())
        taps = Taps(self.student, states=sorted(wanted), attention=sorted(needs.student_attention))
        embedded = _Kept(self.student.get_input_embeddings()) if layer == 0 else contextlib.nullcontext()
        with taps, embedded:
            hidden, back = run_body(self.student, batch.student_ids, batch.student_packed)
        return StudentOutput(
            back(hidden),
            head_of(self.student),
            {n: back(taps.states[n]) for n in sorted(needs.student_states)},
            {n: {kind: back(t) for kind, t in taps.attention[n].items()} for n in sorted(needs.student_attention)},
            # in the rows that the model ran: what the terms see is made from these, gradients come back to them
            None if not meet else hidden if layer is None else taps.states[layer] if layer else embedded.output,
        )

    def values(self, output: StudentOutput, signal: TeacherSignal | None, batch: DistillBatch) -> dict[str, LossValue]:
        """{term: its sum over the batch}, with gradient."""
        self._check(signal)
        values = self._row_values(output, signal, batch)
        for term in self.terms:
            if term.value is not None:
                values[term.name] = term.value(output, signal, batch)
        return values

    def _check(self, signal: TeacherSignal | None) -> None:
        """A ValueError where the signal lacks something that a term needs."""
        needs, given = self.needs, TeacherSignal() if signal is None else signal
        lacking = [f"hidden states of layer {n}" for n in sorted(needs.teacher_states - given.states.keys())]
        lacking += [f"attention of layer {n}" for n in sorted(needs.teacher_attention - given.attention.keys())]
        lacking += [f"routing of layer {n}" for n in sorted(needs.routing - given.routing.keys())]
        lacking += ["final states"] if needs.row_states and given.row_states is None else []
        lacking += ["span likelihoods"] if needs.span_log_probs and given.span_log_probs is None else []
        if lacking:
            raise ValueError(
                f"DistillModule: expected a signal with the teacher's {', '.join(lacking)}, got one without; ask the "
                "teacher for what the terms need"
            )

    def _row_values(
        self, output: StudentOutput, signal: TeacherSignal | None, batch: DistillBatch
    ) -> dict[str, LossValue]:
        """All losses of one value per token, from one pass over the student's head."""
        terms = [t for t in self.terms if t.rows is not None]
        if not terms:
            return {}
        rows = batch.rows
        values = head_losses(
            output.hidden.flatten(0, 1)[rows],
            output.head,
            {t.name: t.rows for t in terms},
            targets=batch.targets.flatten()[rows],
            given={} if signal is None else self._given(signal, batch, len(output.head.weight)),
            whole=any(t.whole for t in terms),
        )
        out = {}
        for term in terms:
            if term.gather is not None:
                out[term.name] = term.gather(values[term.name], signal, batch)
            else:
                mask = None if term.over == "targets" else getattr(batch, term.over).flatten()[rows]
                out[term.name] = masked_sum(values[term.name], mask)
        return out

    def _given(self, signal: TeacherSignal, batch: DistillBatch, size: int) -> dict[str, Given]:
        """What the teacher says, spread over the rows that have a target.

        Args:
            size: rows of the student's head.
        """
        out = {}
        for reading in self.needs.readings:
            if reading.key not in signal.cells:
                raise ValueError(
                    f"DistillModule: expected a signal with the reading {reading.key!r}, got one with "
                    f"{', '.join(map(repr, signal.cells)) or 'none'}; ask the teacher for what the terms need"
                )
            out[reading.key] = _spread(signal.cells[reading.key], reading, batch, size)
        if self.needs.row_states:
            there, place = _places("aligned", len(signal.row_states), batch)
            states = signal.row_states
            if not len(states):
                states = states.new_zeros(1, states.shape[-1])
            out["row_states"] = Given(there, states=states[place])
        return out


class _Kept:
    """Keeps what a module gives out while ``with`` lasts."""

    def __init__(self, module: nn.Module):
        self._module = module
        self.output: Tensor | None = None

    def __enter__(self) -> _Kept:
        self._handle = self._module.register_forward_hook(self._keep)
        return self

    def __exit__(self, *error) -> None:
        self._handle.remove()

    def _keep(self, module, args, output) -> None:
        self.output = output


def settle_parts(module: DistillModule, teacher, batches: Iterable[DistillBatch]) -> None:
    """Let the parts of the terms that have not seen any text yet look at ``batches``, and settle them.

    Args:
        teacher: asked for a signal of every batch, see :class:`kd_kit.teacher.LiveTeacher`.
    """
    waiting = [part for part in module.parts.values() if not getattr(part, "ready", True)]
    if not waiting:
        return
    for part in waiting:
        part.forget()
    with modes_kept(module), torch.no_grad():
        module.eval()
        for batch in batches:
            signal, output = teacher.signal(batch), module.output(batch)
            for part in waiting:
                part.observe(output, signal, batch)
    for part in waiting:
        part.settle()


def all_needs(terms: Sequence[LossTerm]) -> Needs:
    """What all terms together ask of teacher and student."""
    needs = Needs()
    for term in terms:
        needs = needs | term.needs
    return needs


def _places(over: str, known: int, batch: DistillBatch) -> tuple[Tensor, Tensor]:
    """Of every target row: whether it is one of the ``known`` rows, [N] bool, and which one, [N] int64 (else any)."""
    there = getattr(batch, over).flatten()[batch.rows]
    expected = len(getattr(batch, f"{over}_rows"))
    if known != expected:
        raise ValueError(
            f"DistillModule: expected a signal of {expected} rows, one per {over} position of the batch, got {known}; "
            "pass the signal that the teacher made for this batch"
        )
    return there, (torch.cumsum(there, 0) - 1).clamp(min=0, max=max(known - 1, 0))


def _spread(cells: Cells, reading: Reading, batch: DistillBatch, size: int) -> Given:
    """Cells of the rows of a reading, spread over all rows with a target."""
    there, place = _places(reading.over, len(cells.tail), batch)
    known = torch.cat([cells.log_probs, cells.tail.unsqueeze(-1)], dim=-1)
    ids = cells.ids
    if not len(known):  # no row at all: one made up, which no loss may look at
        known = known.new_full((1, known.shape[1]), -torch.inf)
        known[:, -1] = 0.0
        ids = None if ids is None else torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    return Given(
        there,
        None if ids is None else ids[place],
        known[place],
        plain=reading.plain,
        among=reading.among(size, known.device),
    )
