"""A step that went wrong, as one record: what, where, in which text, what it may come from and what helps.

It is kept with its batch in the run folder (``faults/step-00000123``), so that it can be looked at and run again in
another session: ``kd.last_fault()``, ``fault.replay(trainer)``.
"""

from __future__ import annotations

import html
import json
import math
import os
import shutil
import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Literal, get_args

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kd_kit.checkpoint_folder import free_path
from kd_kit.fault_advice import Advice, advice
from kd_kit.fault_replay import Replay, replay
from kd_kit.fault_trace import ORDER, Trace
from kd_kit.table import plain
from kd_kit.types import DistillBatch

Kind = Literal["not finite", "spike", "out of memory", "loader"]

MOST_KEPT, FIRST_KEPT = 20, 5
"""Faults that a run folder holds, and how many of them are the first ones, which are never given up for later ones."""

MOST_BYTES = 32 * 2**20
"""Of the batches of one fault; micro-batches with windows that caused it go first."""

_FORMAT = 1
_FILE = "fault.json"
_JSON_LIMIT = 2**22
_TEXT, _TEXTS = 300, 32  # characters of a window's beginning, and windows with a text
_SHOWN = 3  # windows in print

_HEADS = {
    "not finite": "Step {step:,} was not taken: it was not finite",
    "spike": "Step {step:,}: its gradient leapt up",
    "out of memory": "Step {step:,}: out of memory",
    "loader": "Step {step:,}: the batch could not be loaded",
}
_PLACES = {
    "weights": "the weights, before the step",
    "teacher": "the teacher's forward pass",
    "student": "the student's forward pass",
    "term": "the value of a term",
    "gradient": "the gradient",
    "unknown": "not found",
}


@dataclass(frozen=True, repr=False)
class Fault:
    """A step that went wrong. Prints what, where, the text, and what to try.

    Attributes:
        step: its number in the run's history, the first is 1. kind: "not finite", "spike", "out of memory" or "loader".
        where: "weights", "teacher", "student", "term", "gradient" or "unknown".
        term, layer, dtype, numbers: the place, see :class:`kd_kit.fault_trace.Trace`; None or "" where it has none.
        windows: indices in the training set of the windows that cause it. rows: the rows of the training texts that
            they were cut from. texts: their beginnings, of the first 32.
        positions: numbers of the step's batches in the order of the run.
        learning_rate: of the student. loss_scale: of float16; None without. precision: of the session.
        folder: where it is kept with its batches; None where it is not.
        note: what else is to be known.
    """

    step: int
    kind: Kind
    where: str = "unknown"
    term: str | None = None
    layer: str | None = None
    dtype: str | None = None
    numbers: str = ""
    windows: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    learning_rate: float | None = None
    loss_scale: float | None = None
    precision: str = "no"
    folder: Path | None = None
    note: str = ""

    def __post_init__(self):
        for name, known in (("kind", get_args(Kind)), ("where", ORDER)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"Fault: expected {name} one of {', '.join(map(repr, known))}, got {getattr(self, name)!r}"
                )

    @property
    def advice(self) -> Advice:
        """What it may come from, and what to try, likeliest first."""
        return advice(self)

    def to_json(self) -> dict:
        """As plain JSON; numbers that are not finite as words. ``folder`` is left out: it is where the file lies."""
        out = asdict(self)
        del out["folder"]
        return {n: str(v) if isinstance(v, float) and not math.isfinite(v) else v for n, v in out.items()}

    @classmethod
    def from_json(cls, content: dict, folder: Path | None = None) -> Fault:
        """What :meth:`to_json` made.

        Raises:
            ValueError: it is something else.
        """
        names = {f.name for f in fields(cls)} - {"folder"}
        numbers = {"learning_rate", "loss_scale"}
        lists = {"windows": int, "rows": int, "positions": int, "texts": str}
        try:
            if content.keys() != names or type(content["step"]) is not int:
                raise ValueError(f"other fields: {', '.join(sorted(content.keys() ^ names)) or 'step is no number'}")
            for name, kind in lists.items():
                if type(content[name]) is not list or any(type(one) is not kind for one in content[name]):
                    raise ValueError(f"{name} is no list of {kind.__name__}")
            for name in names - lists.keys() - numbers - {"step"}:
                if not isinstance(content[name], str) and (content[name], name in _OPTIONAL) != (None, True):
                    raise ValueError(f"{name} is no text")
            floats = {n: None if content[n] is None else float(content[n]) for n in numbers}
            return cls(**content | floats, folder=folder)
        except (TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"Fault: expected the fields of a fault, got {error}; it is damaged") from error

    def replay(self, trainer) -> Replay:
        """The kept batches through the models of a trainer as they are now; nothing is trained, nothing changes.

        Shows per window the mean of every term, and whether forward pass and gradient are finite.

        Raises:
            ValueError: it was not kept, the trainer trains in the background, or has another text.
        """
        if trainer.running:
            return replay(trainer, [])  # says so before anything is read
        batches = _kept_in_memory(self)
        if batches is None and self.folder is not None:
            _, batches = read_fault(self.folder)
        if not batches:
            raise ValueError(
                "Fault.replay: expected a fault whose batches were kept, got one without; "
                f"{self.note or 'the folder of the run holds those that were: kd.last_fault(trainer)'}"
            )
        return replay(trainer, batches, self.windows if self.where != "unknown" else ())

    # --- printing

    def _lines(self) -> list[tuple[str, str]]:
        """What is said beside the texts: a word, and what it says."""
        at = self.layer or ("" if self.term is None else f"term {self.term}")
        of = f"term {self.term}" if self.term is not None and self.layer is not None else ""
        count = len(self.windows)
        rate = "" if self.learning_rate is None else f"learning rate {plain(self.learning_rate)}"
        scale = "" if self.loss_scale is None else f"loss scale {plain(self.loss_scale)}"
        precision = {"no": "float32", "fp16": "float16 autocast", "bf16": "bfloat16 autocast"}
        lines = [
            ("where", ", ".join(x for x in (_PLACES[self.where], of) if x)),
            ("place", at),
            ("numbers", ", ".join(x for x in (self.numbers, self.dtype) if x)),
            ("note", self.note),
            ("windows", f"{count:,}: {_numbers(self.windows)} (row {_numbers(self.rows)})" if count else ""),
            ("step", ", ".join(x for x in (rate, scale, precision.get(self.precision, self.precision)) if x)),
            ("batches", f"{_numbers(self.positions)} in the run's order" if self.positions else ""),
            ("may be", "; ".join(self.advice.causes)),
            ("try", "; ".join(self.advice.cures)),
            ("kept", "" if self.folder is None else f"{self.folder}; fault.replay(trainer) runs it again"),
        ]
        return [(word, said) for word, said in lines if said]

    @property
    def title(self) -> str:
        """One line: the step, what happened, and the place."""
        head = _HEADS[self.kind].format(step=self.step)
        place = self.layer or self.term
        if self.where == "unknown":
            return head
        return f"{head}, first in {place or _PLACES[self.where]}" + (f" ({self.dtype})" if self.dtype else "")

    def __repr__(self) -> str:
        out = [self.title]
        for word, said in self._lines():
            out += textwrap.wrap(said, 108, initial_indent=f"  {word:8}  ", subsequent_indent=" " * 12)
        for window, text in self._texts():
            shown = json.dumps(text if len(text) <= 160 else text[:159] + "…", ensure_ascii=False)
            name = f"  text      window {window}: "
            out += textwrap.wrap(shown, 108, initial_indent=name, subsequent_indent=" " * 12)
        return "\n".join(out)

    def _repr_html_(self) -> str:
        cell = "text-align:left;vertical-align:top;padding:2px 8px"
        rows = [(word, html.escape(said)) for word, said in self._lines()]
        for window, text in self._texts():
            rows.append((f"window {window}", f"<code style='white-space:pre-wrap'>{html.escape(text)}</code>"))
        body = "".join(
            f'<tr><th style="{cell};white-space:nowrap">{html.escape(word)}</th>'
            f'<td style="{cell};max-width:52em;overflow-wrap:anywhere">{said}</td></tr>'
            for word, said in rows
        )
        return f"<div><b>{html.escape(self.title)}</b><table><tbody>{body}</tbody></table></div>"

    def _texts(self) -> list[tuple[int, str]]:
        return list(zip(self.windows, self.texts, strict=False))[:_SHOWN]


_OPTIONAL = {"term", "layer", "dtype"}


def _numbers(values: Sequence[int]) -> str:
    """The first eight of them, as in "3, 4, 9"."""
    return ", ".join(f"{v}" for v in values[:8]) + (", …" if len(values) > 8 else "")


def build_fault(
    trainer,
    found: Trace,
    *,
    step: int,
    kind: Kind = "not finite",
    positions: Sequence[int] = (),
    learning_rate: float | None = None,
    loss_scale: float | None = None,
) -> Fault:
    """A fault of a run out of what was found, with the texts of its windows.

    Args:
        found: of :func:`kd_kit.fault_trace.trace`; for other kinds ``Trace("unknown", windows=..., note=...)``.
    """
    windows = trainer.data.train
    report = windows.report
    refused = {row for rows in report.refused.values() for row in rows}
    used = [row for row in report.kept if row not in refused]  # one per document, in order
    documents = [int(windows.table[i, 0]) for i in found.windows]
    texts = []
    for index in found.windows[:_TEXTS]:
        text = windows.text(index)
        texts.append(text if len(text) <= _TEXT else text[: _TEXT - 1] + "…")
    return Fault(
        step=step,
        kind=kind,
        **{f.name: getattr(found, f.name) for f in fields(Trace)} | {"windows": list(found.windows)},
        rows=[used[d] for d in documents],
        texts=texts,
        positions=[int(p) for p in positions],
        learning_rate=learning_rate,
        loss_scale=loss_scale,
        precision=trainer.session.precision,
    )


# --- the last one of this process

_LAST: list[tuple[Fault, list[DistillBatch] | None]] = []  # at most one, with its batches where no disk has them


def remember(fault: Fault, batches: Sequence[DistillBatch] | None = None) -> None:
    """Make this the fault that :func:`last_fault` gives in this process.

    Args:
        batches: to replay it with, where they are not on disk.
    """
    _LAST[:] = [(fault, None if batches is None else [b.to("cpu") for b in batches])]


def last_fault(run=None) -> Fault | None:
    """The newest fault: of this process, or of a run. None where nothing went wrong.

    Args:
        run: a trainer or a run folder; its newest on disk.

    Example:
        >>> fault = last_fault()
        >>> fault.replay(trainer)
    """
    if run is None:
        return _LAST[0][0] if _LAST else None
    session = getattr(run, "session", None)
    found = _readable(Path(run if session is None else session.folder))
    return max(found, key=lambda one: one[0])[1] if found else None


def _kept_in_memory(fault: Fault) -> list[DistillBatch] | None:
    return next((batches for one, batches in _LAST if one == fault), None)


# --- on disk


def write_fault(fault: Fault, batches: Sequence[DistillBatch], folder: str | os.PathLike[str]) -> Fault:
    """Keep a fault with its batches below a run folder, and remember it.

    The folder appears whole or not at all. A disk that refuses ends nothing: the fault then has no folder and a note,
    and its batches stay in memory until the next one.

    Args:
        folder: of the run.

    Returns:
        the fault with its ``folder``.
    """
    root = Path(folder) / "faults"
    name = f"step-{fault.step:08d}"
    staging = root / f".tmp-{name}-{os.getpid()}"
    chosen = _fitting(batches, fault.windows)
    note = fault.note
    if len(chosen) < len(batches):
        more = f"{len(chosen)} of {len(batches)} micro-batches are kept for replay, since together they are large"
        note = "; ".join(x for x in (note, more) if x)
    kept = replace(fault, folder=None, note=note)
    try:
        root.mkdir(parents=True, exist_ok=True)
        number = 1 + max((n for n, _ in _readable(Path(folder))), default=0)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        for place, batch in enumerate(chosen):
            tensors = {f.name: getattr(batch, f.name).cpu().contiguous() for f in fields(DistillBatch)}
            save_file(tensors, staging / f"batch-{place}.safetensors")
        content = {"format": _FORMAT, "number": number, "batches": len(chosen), "fault": kept.to_json()}
        (staging / _FILE).write_text(json.dumps(content, indent=1, allow_nan=False))
        path = free_path(root, name)
        staging.rename(path)
    except (OSError, SafetensorError, RuntimeError) as error:
        shutil.rmtree(staging, ignore_errors=True)
        text = f"not kept on disk: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        kept = replace(kept, note="; ".join(x for x in (note, text) if x))
        remember(kept, chosen)
        return kept
    kept = replace(kept, folder=path)
    remember(kept)
    _give_up_old_ones(Path(folder))
    return kept


def _fitting(batches: Sequence[DistillBatch], guilty: Sequence[int]) -> list[DistillBatch]:
    """Batches of at most ``MOST_BYTES`` together, and one at least: those with guilty windows first."""
    wanted, room, chosen = set(guilty), MOST_BYTES, []
    for batch in sorted(batches, key=lambda b: wanted.isdisjoint(b.sample.tolist())):
        size = sum(t.numel() * t.element_size() for t in (getattr(batch, f.name) for f in fields(DistillBatch)))
        if not chosen or size <= room:
            chosen.append(batch)
            room -= size
    return [b for b in batches if any(b is one for one in chosen)]


def read_fault(folder: str | os.PathLike[str]) -> tuple[Fault, list[DistillBatch]]:
    """What :func:`write_fault` kept in this folder: the fault, and its batches on the host.

    Raises:
        ValueError: it is no such folder, or damaged.
    """
    path = Path(folder)
    content = _read(path)
    names = {f.name for f in fields(DistillBatch)}
    needed = {f.name for f in fields(DistillBatch) if f.default_factory is MISSING}
    batches = []
    for place in range(content["batches"]):
        file = path / f"batch-{place}.safetensors"
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"read_fault: expected a batch in {str(file)!r}, got {error}") from error
        if not needed <= tensors.keys() <= names:
            raise ValueError(f"read_fault: expected the tensors of a batch in {str(file)!r}, got others")
        batches.append(DistillBatch(**tensors))
    return Fault.from_json(content["fault"], path), batches


def _read(path: Path) -> dict:
    """fault.json of a folder, looked through."""
    file = path / _FILE
    try:
        if file.is_symlink() or file.stat().st_size > _JSON_LIMIT:
            raise ValueError("a link, or a file too large")
        content = json.loads(file.read_text())
        if content["format"] != _FORMAT:
            raise ValueError(f"format {content['format']!r}")
        if type(content["number"]) is not int or type(content["batches"]) is not int:
            raise ValueError("other fields")
        Fault.from_json(content["fault"], path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"read_fault: expected a fault in {str(file)!r}, got {error!r}") from error
    return content


def _folders(run_folder: Path) -> list[Path]:
    root = run_folder / "faults"
    return sorted(p for p in root.glob("step-*") if p.is_dir()) if root.is_dir() else []


def _readable(run_folder: Path) -> list[tuple[int, Fault]]:
    """(number in the order of writing, fault); what cannot be read is left out with a warning."""
    found = []
    for path in _folders(run_folder):
        try:
            content = _read(path)
        except ValueError as error:
            warnings.warn(f"a fault cannot be read: {error}", stacklevel=3)
        else:
            found.append((content["number"], Fault.from_json(content["fault"], path)))
    return found


def faults_of(run_folder: str | os.PathLike[str]) -> list[Fault]:
    """All faults that a run folder holds, by step; one that is damaged is left out with a warning."""
    return [fault for _, fault in sorted(_readable(Path(run_folder)), key=lambda one: (one[1].step, one[0]))]


def _give_up_old_ones(run_folder: Path) -> None:
    """Remove the oldest behind the first ``FIRST_KEPT`` until ``MOST_KEPT`` are there; damaged ones first."""
    whole = [fault.folder for _, fault in sorted(_readable(run_folder), key=lambda one: one[0])]
    damaged = [path for path in _folders(run_folder) if path not in whole]
    spare = [*damaged, *whole[FIRST_KEPT:]]
    for path in spare[: max(len(whole) + len(damaged) - MOST_KEPT, 0)]:
        shutil.rmtree(path, ignore_errors=True)  # one that stays is removed next time
