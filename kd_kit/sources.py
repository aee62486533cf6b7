"""Where a notebook's models and text come from: the hub, what is attached to the session, a path, the embedded pair.

Asked before anything long begins, so that a session without internet ends in its first minute with a list of what is
missing, and not hours later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from kd_kit import offline
from kd_kit.kaggle_place import attached
from kd_kit.named import ask_hub, attached_as, refuse_path
from kd_kit.text_files import named_texts


@dataclass(frozen=True)
class Sources:
    """What :func:`find_sources` found.

    Attributes:
        teacher, student: what the builders take: a hub name, a folder, a GGUF file, or a name of the embedded pair.
        texts: documents to learn from. held_out: the share of them, or the documents, to evaluate on.
        embedded: whether the embedded pair stands in for what could not be had.
        notes: where each of them is, in words.
    """

    teacher: str
    student: str
    texts: Sequence[str]
    held_out: float | Sequence[str]
    embedded: bool
    notes: tuple[str, ...]

    def __repr__(self) -> str:
        return "\n".join(self.notes)


def find_sources(
    *,
    teacher: str,
    student: str,
    text: str,
    column: str = "text",
    config: str | None = None,
    split: str = "train",
    documents: int = 20_000,
    held_out: float = 0.02,
    offline_fallback: bool = False,
) -> Sources:
    """Find two models and a text, or say all that is missing.

    Args:
        teacher, student: a hub name, a folder or GGUF file, or the end of the path of an attached model
            (``"qwen-lm/qwen-3/transformers/0.6b/1"``). An attached model of that name is preferred to the hub's.
        text: a data set of the hub, a file or folder, or the end of the path of an attached one, see
            :func:`kd_kit.text_files.named_texts`.
        column: that holds the text. config, split: of a data set of the hub.
        documents: read at most this many, from the first on; of the hub no more than these is fetched.
        held_out: share of the documents to evaluate on.
        offline_fallback: take the embedded pair and its novels, all three, where one of the three cannot be had.

    Raises:
        ValueError: one of them cannot be had (all that is missing is named), or there is no text in it.
    """
    if documents < 2:
        raise ValueError(f"find_sources: expected documents of at least 2, got {documents}; one of them is held out")
    missing, notes, found = [], [], {}
    for who, name in (("teacher", teacher), ("student", student)):
        try:
            found[who], note = _find_model(name)
            notes.append(f"{who:8} {note}")
        except ValueError as error:
            missing.append(f"{who}: {error}")
    texts: Sequence[str] = ()
    try:
        if not missing or not offline_fallback:
            texts, note = _find_text(text, column=column, config=config, split=split, documents=documents)
            notes.append(f"{'text':8} {note}")
    except ValueError as error:
        missing.append(f"text: {error}")
    if not missing:
        return Sources(found["teacher"], found["student"], texts, held_out, False, tuple(notes))
    if not offline_fallback:
        raise ValueError(
            f"find_sources: expected a teacher, a student and a text, got {len(missing)} of them not to be had:\n  "
            + "\n  ".join(missing)
            + "\nOn Kaggle: switch the internet on (Settings, Turn on internet; it wants a verified phone number), "
            "or attach them (Add Input) and name the end of their path. For a trial: OFFLINE_FALLBACK = True."
        )
    return Sources(
        offline.TEACHER,
        offline.STUDENT,
        offline.corpus("student")[:documents],
        offline.corpus("held_out"),
        True,
        (
            *(f"not to be had: {line}" for line in missing),
            "INSTEAD of them, as asked for: the embedded teacher (2.3 million parameters), its student and novels",
        ),
    )


# --- models -----------------------------------------------------------------------------------------------------------


def _find_model(name: str) -> tuple[str, str]:
    """What the builders take, and where it is."""
    name = os.fspath(name)
    if name in (offline.TEACHER, offline.STUDENT):
        offline.asset_folder(name)
        return name, "embedded in the package"
    path = Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return str(path), str(path)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"expected a model folder with config.json, got {name!r}, which has none")
        return str(path), str(path)
    if (here := attached_as(name, attached("config.json"))) is not None:
        return str(here), f"attached: {here}"
    refuse_path(name, "model")
    ask_hub(name, "model", "config.json")
    return name, f"the hub: {name}"


# --- text -------------------------------------------------------------------------------------------------------------


def _find_text(name: str, *, column: str, config: str | None, split: str, documents: int) -> tuple[list, str]:
    """The documents, and where they are."""
    if name == "embedded":
        return offline.corpus("student")[:documents], "embedded in the package"
    rows, where = named_texts(name, column=column, config=config, split=split)
    texts: list = []
    try:
        texts.extend(islice(rows, documents))
    except ValueError:  # says itself what it expected
        raise
    except Exception as error:  # a lost connection, a damaged file
        raise ValueError(
            f"expected {documents:,} rows of {name!r}, got {len(texts):,} and then {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    if not any(isinstance(text, list) or (isinstance(text, str) and text.strip()) for text in texts):
        raise ValueError(f"expected text in {name!r}, got {len(texts):,} documents without any")
    return texts, f"{where}: {len(texts):,} documents"
