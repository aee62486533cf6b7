"""Where a notebook's models and text come from: the hub, what is attached to the session, a path, the embedded pair.

Asked before anything long begins, so that a session without internet ends in its first minute with a list of what is
missing, and not hours later.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kd_kit import offline
from kd_kit.kaggle_place import attached, kaggle_input

PATIENCE = 15.0
"""Seconds that one question to the hub may take."""

_ABOUT = re.compile(r"(readme|licen[cs]e|dataset-metadata|dataset_infos?)\b", re.IGNORECASE)
_KINDS = {".txt": "text", ".md": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


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
        text: a data set of the hub, a file or folder (.txt, .md, .jsonl, .json, .csv, .parquet), or the end of the path
            of an attached one. A text file is cut into documents at blank lines; in a folder of them, each is one.
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
    if (here := _attached(name, attached("config.json"))) is not None:
        return str(here), f"attached: {here}"
    _refuse_path(name, "model")
    _ask_hub(name, "model", "config.json")
    return name, f"the hub: {name}"


def _attached(name: str, folders: Iterable[Path]) -> Path | None:
    """The first of ``folders`` whose path below the inputs has the name's parts in a row, or its last part alone.

    Kaggle's slugs have no capitals and no other signs than hyphens, so both sides are compared as slugs.
    """
    wanted = [_slug(part) for part in name.strip("/").split("/")]
    alone = None
    for folder in folders:
        parts = [_slug(part) for part in folder.relative_to(kaggle_input()).parts]
        if any(parts[at : at + len(wanted)] == wanted for at in range(len(parts))):
            return folder
        # of a longer path every part counts: its last one is a version
        if alone is None and len(wanted) <= 2 and wanted[-1] in parts:
            alone = folder
    return alone


def _slug(part: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")


def _refuse_path(name: str, kind: str) -> None:
    """Raise for what can be no name on the hub."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise ValueError(
            f"expected a {kind}'s folder, file, hub name or attached path, got {name!r}, which is not here"
        )


def _use_secret() -> None:
    """Sign in to the hub, for gated models, with a Kaggle Secret named HF_TOKEN, if one is attached."""
    from huggingface_hub import get_token

    if get_token() is None and importlib.util.find_spec("kaggle_secrets") is not None:
        from kaggle_secrets import UserSecretsClient

        with contextlib.suppress(Exception):  # no such secret, or none attached: what is public needs none
            os.environ["HF_TOKEN"] = UserSecretsClient().get_secret("HF_TOKEN")


def _ask_hub(name: str, kind: str, file: str | None) -> None:
    """Raise if the hub does not give this, unless it was fetched before."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    _use_secret()
    if file is not None and isinstance(try_to_load_from_cache(name, file), str):
        return
    try:
        HfApi().repo_info(name, repo_type=kind, timeout=PATIENCE)
    except Exception as error:  # no internet has many names: of sockets, of TLS, of the client's own offline mode
        reason = " ".join(str(error).split())[:160]
        raise ValueError(
            f"expected {name!r} on the Hugging Face hub or among the inputs, got {type(error).__name__}: {reason}"
        ) from error


# --- text -------------------------------------------------------------------------------------------------------------


def _find_text(name: str, *, column: str, config: str | None, split: str, documents: int) -> tuple[list[str], str]:
    """The documents, and where they are."""
    if name == "embedded":
        return offline.corpus("student")[:documents], "embedded in the package"
    path = Path(name).expanduser()
    if not path.exists():
        holders = (folder for suffix in _KINDS for folder in _holding(suffix))
        path = _attached(name, holders) or path
    if path.exists():
        texts = _read_files(path, column, documents)
        where = str(path)
    else:
        _refuse_path(name, "text")
        texts = _read_hub(name, config, split, column, documents)
        where = f"the hub: {name}" + (f", {config}" if config else "") + f", split {split!r}"
    if not any(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"expected text in {name!r}, got {len(texts):,} documents without any")
    return texts, f"{where}: {len(texts):,} documents"


def _holding(suffix: str) -> Iterable[Path]:
    """Folders below the inputs that hold files of this kind."""
    seen = set()
    for path in sorted(kaggle_input().glob(f"**/*{suffix}")) if kaggle_input().is_dir() else ():
        if path.parent not in seen:
            seen.add(path.parent)
            yield path.parent


def _read_files(path: Path, column: str, documents: int) -> list[str]:
    """The documents of a file, or of the files of the commonest readable kind in a folder."""
    from datasets import load_dataset

    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in _KINDS)
    if len(files) > 1:  # what is said about the text is none of it
        files = [p for p in files if not _ABOUT.match(p.name)] or files
    kinds = [_KINDS.get(p.suffix) for p in files]
    if not files or kinds[0] is None:
        raise ValueError(f"expected {', '.join(_KINDS)} files, got {str(path)!r}, which has none of them")
    kind = max(dict.fromkeys(kinds), key=kinds.count)  # of several as common, the first by name: so in every session
    files = [p for p, of in zip(files, kinds, strict=True) if of == kind]
    if kind == "text":
        texts: list[str] = []
        for file in files:
            content = file.read_text(encoding="utf-8", errors="replace")
            texts += re.split(r"\n\s*\n", content) if len(files) == 1 else [content]
            if len(texts) >= documents:
                break
        return texts[:documents]
    # only the head of large files is read; the reader of .csv would leave its file open
    streaming = kind != "csv"
    rows = load_dataset(kind, data_files=[str(p) for p in files], split="train", streaming=streaming)
    return _column(rows if streaming else rows.to_iterable_dataset(), column, documents, str(path))


def _read_hub(name: str, config: str | None, split: str, column: str, documents: int) -> list[str]:
    from datasets import load_dataset

    _ask_hub(name, "dataset", None)
    try:
        rows = load_dataset(name, config, split=split, streaming=True)
    except Exception as error:  # a split or configuration that is not there, a script, a lost connection
        raise ValueError(
            f"expected configuration {config!r}, split {split!r} of {name!r} on the hub, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error
    return _column(rows, column, documents, name)


def _column(rows, column: str, documents: int, name: str) -> list[str]:
    texts: list[str] = []
    try:
        for row in rows.take(documents):
            if column not in row:
                break
            texts.append(row[column])
        else:
            return texts
    except Exception as error:  # a lost connection, a damaged file
        raise ValueError(
            f"expected {documents:,} rows of {name!r}, got {len(texts):,} and then {type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    raise ValueError(f"expected a column {column!r} in {name!r}, got {', '.join(map(str, row))}")
