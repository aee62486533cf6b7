"""How good a model is, measured on text that nothing was trained on.

Bits per byte, because models with different tokenizers can be compared in it; perplexity per word, which is the same
likelihood over the words of the text; agreement with the teacher where both tokenizers stand at one byte; calibration,
size, and speed on this machine. Every figure but the speed is a sum over all held-out bytes, nothing is capped, and all
of it runs with or without autocast.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from kd_kit.calibration import Calibration, score_and_calibration
from kd_kit.data import WindowSet
from kd_kit.head import Given, LogitRows, head_losses, head_of
from kd_kit.likelihood import Score, evaluating, perplexity
from kd_kit.losses import forward_kl
from kd_kit.packed_body import hidden_states
from kd_kit.readings import Needs
from kd_kit.report import Report, Row
from kd_kit.speed import machine_words, tokens_per_second
from kd_kit.teacher import LiveTeacher, default_reading
from kd_kit.words import Words, count_words


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


def evaluate(trainer, *, control: bool = False, limit: int | None = None) -> Report:
    """Measure the student of a run on all held-out text, beside its teacher, its start and a control.

    One table and one figure: bits per byte, perplexity per word, agreement with the teacher and KL from it, calibration
    (ECE), size, and the speed on this machine; see :class:`kd_kit.report.Report`.

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

    def measured(model, side: str) -> tuple[Score, Calibration, float]:
        few = {"side": side, "batch_size": trainer.micro_batch}
        return (
            *score_and_calibration(model, windows, limit=limit, **few),
            tokens_per_second(model, windows, **few),
        )

    def work() -> tuple[dict[str, Agreement], dict[str, tuple[Score, Calibration, float]]]:
        with trainer.accelerator.autocast():
            agree = agreement(students, trainer.teacher, windows, limit=limit, batch_size=trainer.micro_batch)
            found = {name: measured(model, "student") for name, model in students.items()}
        return agree, found | {"teacher": measured(trainer.teacher.model, "teacher")}

    with trainer.teacher.awake():
        agree, found = trainer.within_memory(work, "evaluation")
    words = count_words(windows, limit)
    models = students | {"teacher": trainer.teacher.model}
    rows = {
        name: _row(likelihood, words, sure, speed, models[name], agree.get(name))
        for name, (likelihood, sure, speed) in found.items()
    }
    report = Report(
        rows,
        found["teacher"][0].bytes,
        trainer.best_step if trainer._holds_best else trainer.step,
        control_step,
        words=words.words,
        machine=machine_words(device),
        reliability={name: sure.points for name, (_, sure, _) in found.items()},
    )
    name = "report.json" if limit is None else f"report-{limit}-windows.json"
    (trainer.session.folder / name).write_text(report.to_json())
    return report


def _row(likelihood: Score, words: Words, sure: Calibration, speed: float, model, agree: Agreement | None) -> Row:
    return {
        "bits_per_byte": likelihood.bits_per_byte,
        "perplexity_per_word": perplexity(likelihood.nats / likelihood.bytes * words.bytes, words.words),
        "perplexity": likelihood.perplexity,
        "top1": agree.top1 if agree else None,
        "top5": agree.top5 if agree else None,
        "kl": agree.kl if agree else None,
        "ece": sure.ece,
        "parameters": float(sum(p.numel() for p in model.parameters())),
        "megabytes": sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6,
        "tokens_per_second": speed,
    }
