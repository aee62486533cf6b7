"""Where a Kaggle session keeps things. ``KD_KIT_KAGGLE`` names another folder than /kaggle, for a trial elsewhere."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

MOST_FILES = 500
"""Files that an output may have: of more, Kaggle has kept only some."""

MOST_BYTES = 20 * 10**9
"""Bytes that /kaggle/working may hold when its session ends."""


def kaggle_root() -> Path:
    return Path(os.environ.get("KD_KIT_KAGGLE") or "/kaggle")


def kaggle_input() -> Path:
    """Attached data sets, models and outputs of other notebooks, read-only."""
    return kaggle_root() / "input"


def kaggle_working() -> Path:
    """What is kept as the notebook's output when it ends normally: 20 GB."""
    return kaggle_root() / "working"


def run_type() -> str | None:
    """``"Interactive"`` in Kaggle's editor, ``"Batch"`` for a pushed or saved version, None elsewhere.

    Both the variable and the folder are asked for: other tools set ``KAGGLE_`` variables, too.
    """
    return os.environ.get("KAGGLE_KERNEL_RUN_TYPE") or None if kaggle_working().is_dir() else None


def on_kaggle() -> bool:
    """Whether this process runs in a Kaggle session."""
    return run_type() is not None


def attached(marker: str, depth: int = 8) -> Iterator[Path]:
    """Folders below the inputs that hold a file of the name ``marker``, in order of their paths.

    Kaggle has moved its mounts before (``input/SLUG``, ``input/datasets/OWNER/SLUG``), so what is attached is known by
    a file that lies in it and not by its path.
    """
    top = kaggle_input()
    for folder, inside, files in os.walk(top):
        inside.sort()
        if len(Path(folder).relative_to(top).parts) >= depth:
            inside.clear()
        if marker in files:
            yield Path(folder)


def room(folder: Path, free: int) -> int:
    """Bytes that may still be written to a folder, ``free`` of which its disk has.

    Below Kaggle's output folder the disk may be larger than what is kept of it.
    """
    working = kaggle_working()
    if not on_kaggle() or not folder.resolve().is_relative_to(working.resolve()):
        return free
    there = 0
    for inside, _, files in os.walk(working):
        for name in files:
            with contextlib.suppress(FileNotFoundError):  # another thread clears up
                there += (Path(inside) / name).lstat().st_size
    return min(free, MOST_BYTES - there)
