"""The last cell of a session: what was reached, the time it took, what lies in the output, and how to go on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from kd_kit.forecast import how_to_go_on
from kd_kit.kaggle_place import MOST_BYTES, MOST_FILES, kaggle_working, on_kaggle
from kd_kit.table import span


@dataclass(frozen=True)
class Summary:
    """What :meth:`kd_kit.trainer.Trainer.summary` returns: lines of (name, text), printed aligned.

    Attributes:
        done: whether the run is at its end, and its control if one was begun.
        problems: what of the output cannot stay as it is.
    """

    done: bool
    lines: tuple[tuple[str, str], ...]
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        width = max(len(name) for name, _ in self.lines)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in self.lines)


def summarise(trainer, report=None, *, expected: tuple[str | os.PathLike, ...] = ()) -> Summary:
    """See :meth:`kd_kit.trainer.Trainer.summary`."""
    session = trainer.session
    rest = trainer.how_to_go_on()
    lines = [("run", f"{session.name}: step {trainer.step:,} of {trainer.total_steps:,}, {_state(trainer, rest)}")]
    lines += [("reached", line) for line in _reached(trainer, report)]
    lines.append(("time", _time(trainer)))
    root = kaggle_working() if on_kaggle() else session.folder
    problems = []
    if root.is_dir():
        text, problems = _output(root, session.folder, [Path(path) for path in expected])
        lines.append(("output", text))
        lines += [("look", problem) for problem in problems]
    if rest is None and (left := _control_left(trainer)):
        rest = f"the LM-only control has {left:,} steps left; {how_to_go_on(session)}"
    lines.append(("next", rest or "nothing: the run is at its end"))
    return Summary(rest is None, tuple(lines), tuple(problems))


def _control_left(trainer) -> int:
    """Steps that a control which was begun still has before it; 0 for one that is at its end, or was never begun."""
    if trainer.control_history is None:
        return 0
    last = trainer.control_history.last("train")
    return max(trainer.total_steps - (last["step"] if last else 0), 0)


def _state(trainer, rest: str | None) -> str:
    if trainer.stopped_early:
        return "stopped early: the best weights are back"
    return "finished" if rest is None else (trainer.stop_reason or "not begun in this session")


def _reached(trainer, report) -> list[str]:
    steps, values = trainer.history.evaluations()
    values, steps = list(values), list(steps)
    lines = []
    if values:
        text = f"held-out bits per byte {values[0]:.3f} at step {int(steps[0]):,}"
        if len(values) > 1:
            text += f", {values[-1]:.3f} at step {int(steps[-1]):,}"
        if trainer.best is not None:
            text += f", best {trainer.best:.3f} at step {trainer.best_step:,}"
        if (teacher := trainer.history.references().get("teacher")) is not None:
            text += f"; teacher {teacher:.3f}"
        lines.append(f"{text} ({trainer.settings['eval_windows']} windows)")
    if report is not None:
        lines += report.sentences()
    return lines or ["nothing was measured yet"]


def _time(trainer) -> str:
    session = trainer.session
    text = f"this session {span(session.elapsed())}"
    if session.budget is not None:
        text += f" of {span(session.budget)}"
    if trainer.step and trainer.seconds:
        text += (
            f"; training {span(trainer.seconds)} over all sessions, {trainer.seconds / trainer.step:.2f} s per step, "
            f"{trainer.tokens / trainer.seconds:,.0f} tokens/s"
        )
    return text


def _output(root: Path, run: Path, expected: list[Path]) -> tuple[str, list[str]]:
    """What lies in the output folder, and what of it should not be there."""
    sizes: dict[str, int] = {}
    count = 0
    for folder, _, files in os.walk(root):
        for name in files:
            path = Path(folder) / name
            count += 1
            top = path.relative_to(root).parts[0]
            sizes[top] = sizes.get(top, 0) + path.lstat().st_size
    total = sum(sizes.values())
    parts = ", ".join(f"{name} {_size(size)}" for name, size in sorted(sizes.items(), key=lambda item: -item[1])[:6])
    problems = []
    if count > MOST_FILES:
        problems.append(f"{count:,} files: Kaggle keeps outputs of more than {MOST_FILES} badly; delete some of {root}")
    if total > MOST_BYTES:
        problems.append(f"{_size(total)}: Kaggle keeps {_size(MOST_BYTES)}; delete some of {root}")
    if on_kaggle():
        top = root.resolve()
        known = {p.relative_to(top).parts[0] for p in map(Path.resolve, (run, *expected)) if top in p.parents}
        if top not in run.resolve().parents:
            problems.append(f"the run lies in {run}, which Kaggle does not keep: use mirror=, or copy it to {root}")
        strange = sorted(name for name in sizes if name not in known and not name.startswith("__"))
        if strange:
            problems.append(f"{', '.join(strange[:6])} in {root} are no part of this run: they are kept with it")
    return f"{count:,} files, {_size(total)} in {root}: {parts}", problems


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
