"""What a run measured: records in memory and, one JSON object per line, in ``metrics.jsonl``.

The trainer appends; figures, tables, early stopping and the dashboard only read. Five kinds of record:

    run        run_id, total_steps, terms {name: unit, healthy [lo, hi], impossible_below, impossible_above}
    train      step, epoch, batches (their positions in the run's order), tokens, seconds, total, lr, grad_norm,
               loss_scale, tokens_per_second, seconds_left, ...,
               terms {name: value, verdict, weight, contribution, share, count, extras}; where gradients were compared,
               also grad_norm, grad_share and cosine (with lm) of every term, and gradients {at, terms, cosines}
    eval       step, bits_per_byte (of the student, held out), seconds
    reference  name ("teacher"), bits_per_byte
    event      step, what (resumed, stopped, saved, plan, stage, changed, rests, mirrored, alarm, cleared), text; key
               of an alarm
"""

from __future__ import annotations

import json
import math
import os
import statistics
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

KINDS: dict[str, tuple[str, ...]] = {
    "run": ("run_id", "total_steps", "terms"),
    "train": ("step", "total", "terms"),
    "eval": ("step", "bits_per_byte"),
    "reference": ("name", "bits_per_byte"),
    "event": ("step", "what", "text"),
}
"""Kinds of record, each with the fields that it cannot do without."""

Verdict = Literal["healthy", "low", "high", "impossible", "absent"]

_SPELLED = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_WORDS = frozenset({"kind", "run_id", "name", "unit", "what", "text"})  # fields that stay text, even "nan"
_ROUNDING = 1e-6  # a KL divergence of -1e-8 is zero in float32, not a bug


def verdict(meta: Mapping[str, Any] | None, value: float | None) -> Verdict:
    """One word on the raw value of a term, judged by the ranges that the term declares.

    ``meta`` is one entry of :attr:`History.terms`. A term without a declared range is only checked for being
    finite. The limits of ``impossible_*`` bear rounding of 1e-6; a value that is not finite is impossible.

    Example:
        >>> verdict({"healthy": [0.1, 3.0], "impossible_below": 0.0, "impossible_above": 10.0}, 34.0)
        'impossible'
    """
    if value is None:
        return "absent"
    if not math.isfinite(value):
        return "impossible"
    meta = meta or {}
    below, above = meta.get("impossible_below"), meta.get("impossible_above")
    if below is not None and value < below - _ROUNDING * max(1.0, abs(below)):
        return "impossible"
    if above is not None and value > above + _ROUNDING * max(1.0, abs(above)):
        return "impossible"
    low, high = meta.get("healthy") or (-math.inf, math.inf)
    if value < low - _ROUNDING * max(1.0, abs(low)):
        return "low"
    return "high" if value > high else "healthy"


class History:
    """The records of one run, in order; with a ``path`` they are also in that file, line by line.

    A file that already exists is read and continued, so a notebook cell may be run twice. A last line that a
    killed process left torn is ignored, and removed at the next write. A disk that refuses a line does not
    end the run: one warning, and everything in memory is written again as soon as the disk takes it.

    Raises:
        ValueError: a line other than the last cannot be read; the message names file and line.

    Example:
        >>> history = History()
        >>> history.append({"kind": "eval", "step": 50, "bits_per_byte": 2.4})
        >>> history.evaluations()
        ([50], [2.4])
    """

    def __init__(self, path: str | Path | None = None):
        self.path = None if path is None else Path(path)
        self.write_error: str | None = None
        self._records: list[dict[str, Any]] = []
        self._rewrite_due = False  # the file is not what memory holds: a torn line, or a write that failed
        if self.path is not None and self.path.exists():
            self._read(self.path)

    @classmethod
    def load(cls, path: str | Path) -> History:
        """The history stored at ``path``; appending to it goes on in that file.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a line other than the last cannot be read.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"History.load: expected a metrics.jsonl, got no file {path}; History(path) starts one"
            )
        return cls(path)

    # Writing

    def append(self, record: Mapping[str, Any]) -> None:
        """Add one record, to memory and to the file.

        NaN and infinities are written as "nan", "inf", "-inf", since JSON has no word for them, and are read
        back as floats. Zero-dimensional tensors and arrays become numbers.

        Raises:
            ValueError: unknown kind, a required field is missing, or a value is not plain data.
        """
        checked = _checked(record, where="History.append")
        self._records.append(checked)
        if self.path is None:
            return
        if self._rewrite_due:
            self._write_all()
        else:
            self._write_line(checked)

    def rewind(self, step: int) -> int:
        """Forget what was measured after ``step`` (train, eval, event) and return how many records went.

        For a resume from a checkpoint older than the last line: without it the same steps stand there twice.
        The file is replaced in one move, so a kill in between leaves the old or the new one, never half.
        """
        kept = [r for r in self._records if r["kind"] in ("run", "reference") or r["step"] <= step]
        dropped = len(self._records) - len(kept)
        self._records = kept
        if self.path is not None and (dropped or self._rewrite_due):
            self._write_all()
        return dropped

    # Reading

    def series(self, term: str, field: str = "value") -> tuple[list[int], list[float]]:
        """(steps, values) of one term: its ``value``, ``weight``, ``contribution`` or ``count``.

        Steps at which the term was absent (null) are left out; NaN is kept, since it happened.
        """
        return _by_step((r["step"], r["terms"].get(term, {}).get(field)) for r in self._of("train"))

    def column(self, field: str, group: str | None = None) -> tuple[list[int], list[float]]:
        """(steps, values) of a field of the whole step: ``total``, ``grad_norm``, or ``lr`` of one group."""
        if group is None:
            return _by_step((r["step"], r.get(field)) for r in self._of("train"))
        return _by_step((r["step"], (r.get(field) or {}).get(group)) for r in self._of("train"))

    def evaluations(self) -> tuple[list[int], list[float]]:
        """(steps, bits per byte of held-out text) of the student."""
        return _by_step((r["step"], r["bits_per_byte"]) for r in self._of("eval"))

    def references(self) -> dict[str, float]:
        """{name: bits per byte} of what the student is compared with, such as the teacher."""
        return {r["name"]: r["bits_per_byte"] for r in self._of("reference")}

    def rows(self, kind: str = "train") -> list[dict[str, Any]]:
        """Records of one kind as flat dicts ("kd.value", "lr.student"), ready for ``pandas.DataFrame``."""
        _known(kind, where="History.rows")
        return [_flat(r) for r in self._of(kind)]

    def last(self, kind: str) -> dict[str, Any] | None:
        """The latest record of a kind, or None."""
        _known(kind, where="History.last")
        return next((r for r in reversed(self._records) if r["kind"] == kind), None)

    @property
    def records(self) -> tuple[dict[str, Any], ...]:
        """Every record, in order."""
        return tuple(self._records)

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened beside training: resumed, stopped, alarm, saved."""
        return list(self._of("event"))

    @property
    def terms(self) -> dict[str, dict[str, Any]]:
        """{name: unit and ranges}: the declared terms, then those that only appear in steps, without any."""
        found: dict[str, dict[str, Any]] = {}
        for record in self._of("run"):
            found.update(record["terms"])
        for record in self._of("train"):
            for name in record["terms"]:
                found.setdefault(name, {})
        return found

    @property
    def groups(self) -> list[str]:
        """Names of the learning-rate groups, in order of appearance."""
        return list(dict.fromkeys(name for r in self._of("train") for name in r.get("lr") or {}))

    @property
    def run_id(self) -> str | None:
        run = self.last("run")
        return None if run is None else run["run_id"]

    @property
    def total_steps(self) -> int | None:
        run = self.last("run")
        return None if run is None else run["total_steps"]

    def __len__(self) -> int:
        return len(self._records)

    def __repr__(self) -> str:
        train = self.last("train")
        steps, bits = self.evaluations()
        parts = [f"run {self.run_id}"] if self.run_id else []
        parts.append("no steps yet" if train is None else f"step {train['step']:,} of {self.total_steps or '?'}")
        if bits:
            parts.append(f"{bits[-1]:.3f} bits per byte at step {steps[-1]:,}")
        if self.terms:
            parts.append("terms " + " ".join(self.terms))
        if self.path is not None:
            parts.append(str(self.path))
        if self.write_error:
            parts.append(f"NOT ON DISK: {self.write_error}")
        return f"History({'; '.join(parts)})"

    # Inside

    def _of(self, kind: str) -> Iterator[dict[str, Any]]:
        return (r for r in self._records if r["kind"] == kind)

    def _read(self, path: Path) -> None:
        content = path.read_bytes()
        lines = [(number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
        for number, line in lines:
            try:
                record = _decoded(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError) as problem:  # JSON and UTF-8 errors are ValueErrors
                if number == lines[-1][0]:
                    self._rewrite_due = True
                    return
                raise ValueError(
                    f"History: expected one JSON object per line, got {line[:60]!r} in {path}, line {number} "
                    f"({problem}); remove that line, or start a new run folder"
                ) from problem
            self._records.append(_checked(record, where=f"History: {path}, line {number}"))
        self._rewrite_due = bool(content) and not content.endswith(b"\n")

    def _write_line(self, record: Mapping[str, Any]) -> None:
        assert self.path is not None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:  # opened per line: nothing to leak, and a replaced file is found
                file.write(_encoded(record))
                file.flush()
        except OSError as problem:
            self._failed(problem)

    def _write_all(self) -> None:
        assert self.path is not None
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.writelines(map(_encoded, self._records))
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self.path)
        except OSError as problem:
            self._failed(problem)
            try:
                beside.unlink(missing_ok=True)
            except OSError:
                pass  # the folder takes no change at all; the warning above has said so
            return
        self._rewrite_due, self.write_error = False, None

    def _failed(self, problem: OSError) -> None:
        if self.write_error is None:
            warnings.warn(
                f"History: {self.path} could not be written ({problem}); the run goes on and the lines are "
                "kept in memory; free some space, they are written with the next one",
                stacklevel=4,
            )
        self._rewrite_due, self.write_error = True, str(problem)


def usual_times_floor(history: History, steps: int = 20) -> float | None:
    """A step's seconds over the least that it can cost here, of late; None where that was not measured.

    A median over steps that compared no gradients: these cost several times as much.
    """
    times = [r.get("times_floor") for r in history.records[-3 * steps :] if "gradients" not in r]
    known = [t for t in times if t is not None][-steps:]
    return statistics.median(known) if known else None


def _known(kind: Any, *, where: str) -> tuple[str, ...]:
    if kind not in KINDS:
        raise ValueError(f"{where}: expected a kind out of {', '.join(KINDS)}, got {kind!r}")
    return KINDS[kind]


def _checked(record: Any, *, where: str) -> dict[str, Any]:
    """The record as plain data of its own, or a ValueError that says what is missing."""
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: expected a dict with a kind, got {type(record).__name__}")
    required = _known(record.get("kind"), where=where)
    missing = [field for field in required if field not in record]
    if missing:
        raise ValueError(
            f"{where}: expected a {record['kind']!r} record with {', '.join(required)}, "
            f"got none of {', '.join(missing)}; add the missing fields"
        )
    plain = _plain(record, where=where)
    if "terms" in required and not all(isinstance(t, dict) for t in _dict(plain["terms"]).values()):
        raise ValueError(f"{where}: expected terms as {{name: {{...}}}}, got {plain['terms']!r}")
    if "step" in required and (not isinstance(plain["step"], int) or isinstance(plain["step"], bool)):
        raise ValueError(f"{where}: expected a whole number as step, got {plain['step']!r}")
    return plain


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {"": value}


def _plain(value: Any, *, where: str) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where=where) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where=where) for item in value]
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return float(value)  # numpy's float64 is a float that prints differently
    if callable(getattr(value, "item", None)):
        return _plain(value.item(), where=where)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise ValueError(
        f"{where}: expected numbers, text, lists and dicts, got {type(value).__name__}; convert it before it is logged"
    )


def _encoded(record: Mapping[str, Any]) -> bytes:
    return json.dumps(_spelled(record), allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _spelled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _spelled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_spelled(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _decoded(value: Any, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _decoded(item, name) for name, item in value.items()}
    if isinstance(value, list):
        return [_decoded(item, key) for item in value]
    if isinstance(value, str) and key not in _WORDS:
        return _SPELLED.get(value, value)
    return value


def _by_step(pairs: Iterator[tuple[int, float | None]]) -> tuple[list[int], list[float]]:
    """Steps in order, each once: a step that was redone counts as it was done last."""
    latest = {step: value for step, value in pairs if value is not None}
    steps = sorted(latest)
    return steps, [latest[step] for step in steps]


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        if not prefix and key == "kind":
            continue
        if isinstance(value, dict):
            # "terms.kd.value" would say "terms" in every column
            flat.update(_flat(value, prefix if key == "terms" and not prefix else f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat
