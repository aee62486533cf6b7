"""How good a model is, measured on text that nothing was trained on.

Bits per byte, because models with different tokenizers can be compared in it and in nothing else; perplexity from the
language-model likelihood alone; agreement with the teacher where both tokenizers stand at one byte. Every figure is a
sum over all held-out bytes, nothing is capped, and all of it runs with or without autocast.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import nn

from kd_kit.data import WindowSet
from kd_kit.head import Given, LogitRows, head_losses, head_of
from kd_kit.likelihood import Score, evaluating, score
from kd_kit.losses import forward_kl
from kd_kit.packed_body import hidden_states
from kd_kit.readings import Needs
from kd_kit.table import Table
from kd_kit.teacher import LiveTeacher, default_reading


class ControlUnfinished(RuntimeError):
    """The LM-only control was stopped before its end."""


class MissingStart(ValueError):
    """A run does not hold the student as it was before its first step."""


@dataclass(frozen=True)
class Agreement:
    """How far a student says what the teacher says, at aligned positions, in the student's vocabulary.

    Attributes:
        top1: share of positions with the same first choice. top5: mean overlap of the five first choices.
        kl: KL(teacher || student) over the kept cells and the tail, nats per position. positions: how many.
    """

    top1: float
    top5: float
    kl: float
    positions: int


_TEACHER = "teacher"  # what the losses below are given


def _top1(rows: LogitRows) -> torch.Tensor:
    return (rows.logits.argmax(-1) == rows.given[_TEACHER].ids[:, 0]).float()


def _top5(rows: LogitRows) -> torch.Tensor:
    theirs = rows.given[_TEACHER].ids[:, :5]
    ours = rows.logits.topk(theirs.shape[1], dim=-1).indices
    return (ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1).float().mean(-1)


def _kl(rows: LogitRows) -> torch.Tensor:
    return forward_kl(rows.student(_TEACHER), rows.teacher(_TEACHER))


def agreement(
    students: Mapping[str, nn.Module],
    teacher: LiveTeacher,
    windows: WindowSet,
    *,
    batch_size: int = 8,
    limit: int | None = None,
) -> dict[str, Agreement]:
    """Compare students' next-token distributions with the teacher's, through the same bridge as in training.

    The teacher reads the text once for all of them.
    """
    losses = {"top1": _top1, "top5": _top5, "kl": _kl}
    sums = {name: torch.zeros(len(losses), dtype=torch.float64) for name in students}
    positions = 0
    reading = default_reading(teacher.bridge, over="aligned")
    asked = teacher.asked(Needs((reading,)))
    with contextlib.ExitStack() as modes:
        for student in students.values():
            modes.enter_context(evaluating(student))
        for batch in windows.in_order(batch_size, limit):
            positions += len(batch.aligned_rows)
            batch = batch.to(teacher.device)
            found = asked.signal(batch).cells[reading.key]
            cells = torch.cat([found.log_probs, found.tail.unsqueeze(-1)], dim=-1)
            there = torch.ones(len(cells), dtype=torch.bool, device=cells.device)
            given = Given(there, found.ids, cells)
            for name, student in students.items():
                device = next(student.parameters()).device
                rows = batch.aligned_rows.to(device)
                hidden = hidden_states(student, batch.student_ids.to(device), batch.student_packed.to(device))
                values = head_losses(
                    hidden.flatten(0, 1)[rows],
                    head_of(student),
                    losses,
                    targets=batch.targets.to(device).flatten()[rows],
                    given={_TEACHER: given.to(device)},
                )
                sums[name] += torch.stack([values[n].double().sum() for n in losses]).cpu()
    means = {name: (value / max(positions, 1)).tolist() for name, value in sums.items()}
    return {name: Agreement(*mean, positions) for name, mean in means.items()}


@dataclass(frozen=True)
class Report:
    """The result of a run as one table. Rows: the student before, the LM-only control, distilled, the teacher.

    Attributes:
        rows: {name: {"bits_per_byte", "perplexity", "top1", "top5", "kl", "parameters"}}; None where it has no meaning.
        bytes: held-out bytes that every likelihood runs over. step: optimizer steps of the distilled student.
        control_step: of the control, None without one. It may differ where one of the two was stopped early.
    """

    rows: dict[str, dict[str, float | None]]
    bytes: int
    step: int
    control_step: int | None = None

    @property
    def gain(self) -> float | None:
        """Bits per byte that distillation saves against the LM-only control; None without control."""
        if "LM-only control" not in self.rows:
            return None
        return self.rows["LM-only control"]["bits_per_byte"] - self.rows["distilled"]["bits_per_byte"]

    @property
    def retention(self) -> float | None:
        """Share of the gap between the student before and the teacher that is closed, in bits per byte.

        None where the student before is not known.
        """
        if "before" not in self.rows:
            return None
        before, now, best = (self.rows[n]["bits_per_byte"] for n in ("before", "distilled", "teacher"))
        return (before - now) / (before - best) if before != best else float("nan")

    def sentences(self) -> list[str]:
        """What the table says, in words."""
        out = []
        best = self.rows["teacher"]["bits_per_byte"]
        before = self.rows["before"]["bits_per_byte"] if "before" in self.rows else None
        if before is not None and best < before:
            out.append(
                f"After {self.step:,} steps the student closed {self.retention:.0%} of the gap to its teacher "
                f"in bits per byte on {self.bytes:,} held-out bytes."
            )
        if self.bytes < 10_000:
            out.append(f"{self.bytes:,} held-out bytes are few: these figures mean little, hold out more text.")
        if self.gain is not None:
            word = "below" if self.gain > 0 else "above"
            tokens = "on the same tokens"
            if self.control_step != self.step:
                tokens = f"for {self.control_step or 0:,} steps: these are not the same tokens, so finish both first"
            out.append(
                f"It lies {abs(self.gain):.3f} bits per byte {word} the same student trained without a teacher "
                f"{tokens}."
            )
        if before is not None and best >= before:
            out.append("The teacher is no better than the student was on this text: it has nothing to teach here.")
        return out

    _COLUMNS = (
        ("bits_per_byte", "bits per byte", "{:.4f}"),
        ("perplexity", "perplexity per own token", "{:.2f}"),
        ("top1", "same first choice", "{:.1%}"),
        ("top5", "top-5 overlap", "{:.1%}"),
        ("kl", "KL from teacher (nats)", "{:.3f}"),
        ("parameters", "parameters", "{:,.0f}"),
    )

    @property
    def table(self) -> Table:
        """The rows as a table, with what they say in words below."""
        rows = tuple(
            (name, *("-" if row[key] is None else spec.format(row[key]) for key, _, spec in self._COLUMNS))
            for name, row in self.rows.items()
        )
        columns = ("", *(title for _, title, _ in self._COLUMNS))
        return Table("", columns, rows, note="\n".join(self.sentences()), words=("",))

    def __repr__(self) -> str:
        return str(self.table)

    def _repr_html_(self) -> str:
        return self.table._repr_html_()

    def to_json(self) -> str:
        """As JSON; a figure that is not finite is spelled as text, for which JSON has no number."""
        plain = {**asdict(self), "gain": self.gain, "retention": self.retention}

        def spelled(value):
            if isinstance(value, dict):
                return {name: spelled(v) for name, v in value.items()}
            return str(value) if isinstance(value, float) and not math.isfinite(value) else value

        return json.dumps(spelled(plain), indent=1)


def evaluate(trainer, *, control: bool = False, limit: int | None = None) -> Report:
    """Measure the student of a run on all held-out text, beside its teacher, its start and a control.

    Writes ``report.json`` into the run folder, or ``report-<limit>-windows.json``. Of several processes the first one
    measures and writes, and all get the report.

    Args:
        control: also the student that the same start, tokens and rates give without a teacher; it is trained now if
            ``trainer.train_control()`` was not called before, and left out where the session's time does not suffice.
        limit: only so many held-out windows; all of them if left out, which takes a while on much text.

    Raises:
        ValueError: the trainer has no teacher.
    """
    if trainer.teacher is None:
        raise ValueError("evaluate: expected a trainer with a teacher, got one without; use score(model, windows)")
    trainer.resume()  # in a new session the cell that trains may have been left out
    say = trainer.processes.say
    students, control_step = {}, None
    try:
        students["before"] = trainer.initial_student()
    except MissingStart as error:
        say(f"evaluate: without the row of the student before training: {error}")
    if limit is not None and limit < 1:
        raise ValueError(f"evaluate: expected a limit of at least 1 window, got {limit}")
    if control and trainer.stop_reason in ("interrupted", "terminated"):
        say(f"evaluate: the run was {trainer.stop_reason}, so no control is trained now")
    elif control:
        try:
            students["LM-only control"] = trainer.train_control()
            control_step = trainer.total_steps
        except (ControlUnfinished, MissingStart) as error:
            say(error)
    students["distilled"] = trainer.student
    return trainer._led("evaluate", lambda: _measured(trainer, students, limit, control_step))


def _measured(trainer, students: dict[str, nn.Module], limit: int | None, control_step: int | None) -> Report:
    """The report on these students, written into the run's folder."""
    windows, device = trainer.data.held_out, trainer.session.device
    for model in students.values():
        model.to(device)

    def work() -> tuple[dict, Score]:
        few = {"limit": limit, "batch_size": trainer.micro_batch}
        with trainer.accelerator.autocast():
            agree = agreement(students, trainer.teacher, windows, **few)
            rows = {n: _row(score(model, windows, **few), model, agree[n]) for n, model in students.items()}
        return rows, score(trainer.teacher.model, windows, side="teacher", **few)

    with trainer.teacher.awake():
        rows, best = trainer.within_memory(work, "evaluation")
    rows["teacher"] = _row(best, trainer.teacher.model, None)
    step = trainer.best_step if trainer._holds_best else trainer.step
    report = Report(rows, best.bytes, step, control_step)
    name = "report.json" if limit is None else f"report-{limit}-windows.json"
    (trainer.session.folder / name).write_text(report.to_json())
    return report


def _row(likelihood: Score, model, agree: Agreement | None) -> dict[str, float | None]:
    return {
        "bits_per_byte": likelihood.bits_per_byte,
        "perplexity": likelihood.perplexity,
        "top1": agree.top1 if agree else None,
        "top5": agree.top5 if agree else None,
        "kl": agree.kl if agree else None,
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }
