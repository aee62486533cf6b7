"""A student to give away: a plain transformers folder, with a card that says where it comes from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from kd_kit.model_card import model_card
from kd_kit.models import write_student
from kd_kit.offline import STUDENT, TEACHER, asset_folder
from kd_kit.pair import TokenizerPair
from kd_kit.processes import is_first
from kd_kit.report import Report

PICTURE = "evaluation.png"


def export(
    student,
    folder: str | os.PathLike,
    tokenizers: TokenizerPair | None = None,
    *,
    report: Report | None = None,
    names: Mapping[str, str] | None = None,
    card: str | None = None,
) -> Path:
    """Write the student as a plain transformers folder: weights, configuration, tokenizer and, of a run, its card.

    Of several processes the first one writes; the others do not wait for it.

    Args:
        student: a trainer, whose student is written as it is now, with its tokenizer and a README.md: data, recipe,
            versions, figures and limits (:func:`kd_kit.model_card.model_card`); or a model alone, without a card.
        folder: made if it is not there.
        tokenizers: with a model alone: the student's is written, too.
        report: of :func:`kd_kit.evaluate`, for the card's figures. Left out: the ``report.json`` of the run, where it
            is about this very step; else the run's own evaluations.
        names: for the card: "teacher", "student" and "text", as people would look for them. Left out: what the models
            were loaded from.
        card: a text of your own for README.md.

    Raises:
        ValueError: names or a report without a trainer, or an unknown one among the names.
    """
    folder = Path(folder)
    trainer = student if hasattr(student, "total_steps") else None
    if trainer is None and (names is not None or report is not None):
        raise ValueError(
            f"export: expected a trainer beside report= or names=, got {type(student).__name__}; kd.export(trainer, "
            "folder, report=report) writes the card, too"
        )
    unknown = sorted(set(names or ()) - {"teacher", "student", "text"})
    if unknown:
        raise ValueError(f"export: expected names of teacher, student and text, got {', '.join(unknown)}")
    if trainer is not None:
        trainer.resume()  # in a new session the cell that trains may have been left out
    if not is_first():
        return folder
    if trainer is not None:
        tokenizers, student = tokenizers or trainer.data.pair, trainer.student
        report = report or _report_of(trainer)
        if report is not None and card is None:
            folder.mkdir(parents=True, exist_ok=True)
            report.figure().savefig(folder / PICTURE)
        card = card or model_card(trainer, report, picture=PICTURE, **{**_loaded_names(trainer), **(names or {})})
    write_student(student, folder, None if tokenizers is None else tokenizers.student)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _report_of(trainer) -> Report | None:
    """The report in the run's folder, if it is about the student as it is now."""
    path = trainer.session.folder / "report.json"
    if not path.is_file():
        return None
    report = Report.from_json(path.read_text(encoding="utf-8"))
    now = trainer.best_step if trainer._holds_best else trainer.step
    return report if report.step == now else None


def _loaded_names(trainer) -> dict[str, str]:
    """What the models were loaded from: a hub's name as it is, of a folder only its last part."""

    def name(model, otherwise: str) -> str:
        found = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
        path = Path(found)
        if found in (str(asset_folder(TEACHER)), str(asset_folder(STUDENT))):
            return f"the embedded {path.name} of kd_kit"
        return (path.name if path.is_absolute() or path.exists() else found) or otherwise

    teacher = None if trainer.teacher is None else trainer.teacher.model
    return {
        "teacher": name(teacher, "a teacher"),
        "student": name(trainer.student, "a student from scratch"),
        "text": "a text that its maker has not named",
    }
