"""The metrics.jsonl of a run that comes from elsewhere: what can be read of it, or what a checkpoint knows instead."""

from __future__ import annotations

import errno
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kd_kit.checkpoint_folder import CheckpointError, CheckpointInfo, read_state
from kd_kit.history import History

METRICS = "metrics.jsonl"


def keep_readable_lines(source: Path, target: Path) -> int:
    """Copy the lines that a history can read; returns how many it cannot, a torn last line not counted."""
    bad = 0
    with open(source, "rb") as lines, open(target, "xb") as kept:
        for line in lines:
            if not line.strip():
                continue
            try:
                History().append(json.loads(line.decode("utf-8")))
            except (ValueError, RecursionError, TypeError, AttributeError):
                bad += line.endswith(b"\n")
                continue
            kept.write(line if line.endswith(b"\n") else line + b"\n")
    return bad


def write_evaluations(target: Path, info: CheckpointInfo) -> None:
    """The evaluations in a checkpoint's state as a metrics.jsonl, and an event that says what is missing.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        evaluations = read_state(info).get("evaluations")
    except CheckpointError:
        evaluations = None
    records = [
        {"kind": "eval", "step": item[0], "bits_per_byte": item[1]}
        for item in (evaluations if isinstance(evaluations, list) else [])
        if isinstance(item, list) and [type(value) for value in item] in ([int, float], [int, int])
    ]
    text = f"from a checkpoint without its {METRICS}: of the curve up to here only the evaluations are kept"
    append_records(target, [*records, {"kind": "event", "step": info.step, "what": "resumed", "text": text}])


def append_records(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Add records to a metrics.jsonl.

    Raises:
        OSError: the file cannot be written.
    """
    history = History(path)
    for record in records:
        history.append(record)
    if history.write_error is not None:
        raise OSError(errno.EIO, f"{path.name}: expected to be written, got {history.write_error}")
