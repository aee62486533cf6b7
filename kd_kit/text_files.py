"""Text by name: files, folders and data sets of the hub, as rows that are read one after the other.

Files are read here and not by ``datasets``, which copies them into its cache first, and ends at the first byte that is
no UTF-8: a row that cannot be used comes out as what it is (bytes, None, the error), to be counted in
:mod:`kd_kit.rows`, and the next one follows.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from kd_kit.kaggle_place import kaggle_input
from kd_kit.named import ask_hub, attached_as, refuse_path

KINDS = {
    ".txt": "text",
    ".md": "text",
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
"""How files of an ending are read."""

_ABOUT = re.compile(r"(readme|licen[cs]e|dataset-metadata|dataset_infos?)\b", re.IGNORECASE)
_SAVED = ("dataset_dict.json", "state.json")  # in a folder that save_to_disk of datasets wrote
_FIELD = 2**31 - 1  # characters of one field of a .csv, which ends at 131,072 otherwise; what fits into a C long


def named_texts(
    name: str | os.PathLike, *, column: str = "text", config: str | None = None, split: str | None = None
) -> tuple[Iterator, str]:
    """What a text's name stands for: an iterator over the values of its column, and where they come from, in words.

    A text file is cut into documents at blank lines; in a folder of them, each is one. Of a folder the files of the
    commonest kind are read, in the order of their paths.

    Args:
        name: a file or folder (.txt, .md, .jsonl, .json, .csv, .tsv, .parquet), a folder that ``save_to_disk`` wrote,
            the end of the path of an attached one, or a data set of the hub, of which no more is fetched than is read.
        column: that holds the text; text files have none.
        config: of a data set of the hub. split: of one, "train" if left out, or of a saved ``DatasetDict``.

    Raises:
        ValueError: nothing readable there, a split that is not there, or, when the first row is read, no such column.
    """
    text = os.fspath(name)
    path = Path(text).expanduser()
    if not path.exists():
        holders = (folder for suffix in KINDS for folder in _holding(suffix))
        path = attached_as(text, holders) or path
    if path.exists():
        return _column(_local_rows(path, split), column, str(path)), str(path)
    refuse_path(text, "text")
    where = f"the hub: {text}" + (f", {config}" if config else "") + f", split {split or 'train'!r}"
    return _column(_hub_rows(text, config, split or "train"), column, text), where


def could_be_named(text: str) -> bool:
    """Whether a string names something to read, and is no text itself."""
    if len(text) > 1000 or "\n" in text or not text.strip():
        return False
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", text) is not None or Path(text).suffix in KINDS or "/" in text


def _holding(suffix: str) -> Iterable[Path]:
    """Folders below the inputs that hold files of this kind."""
    seen = set()
    for path in sorted(kaggle_input().glob(f"**/*{suffix}")) if kaggle_input().is_dir() else ():
        if path.parent not in seen:
            seen.add(path.parent)
            yield path.parent


def one_split(rows, split: str | None):
    """One split of a ``DatasetDict``; anything else as it is.

    Raises:
        ValueError: several splits and none chosen, or one that is not there.
    """
    columns = getattr(rows, "column_names", None)
    if not isinstance(columns, dict):
        return rows
    if split is None or split not in columns:
        raise ValueError(
            f"expected one split, got a DatasetDict with {', '.join(columns)}"
            + ("" if split is None else f" and split={split!r}")
            + f"; pass split={next(iter(columns), 'train')!r}"
        )
    return rows[split]


def _column(rows: Iterable, column: str, name: str) -> Iterator:
    """The values of a column; None where a later row has no such field."""
    seen = False
    for row in rows:
        if not isinstance(row, Mapping):  # a document, bytes that are no row, or the error in a row's place
            yield row
            continue
        if not seen and column not in row:
            chats = [known for known in ("messages", "conversations") if known in row]
            raise ValueError(
                f"expected a column {column!r} in {name!r}, got {', '.join(map(str, row))}; "
                f"pass column={(chats or list(row) or ['...'])[0]!r} or whichever holds the text"
            )
        seen = True
        yield row.get(column)


# --- on the hub ------------------------------------------------------------------------------------------------------


def _hub_rows(name: str, config: str | None, split: str) -> Iterable:
    """A stream of a data set's rows; without internet by its own setting, what ``datasets`` kept of it."""
    import datasets

    away = datasets.config.HF_DATASETS_OFFLINE or datasets.config.HF_HUB_OFFLINE
    if not away:
        ask_hub(name, "dataset", None)
    try:
        return datasets.load_dataset(name, config, split=split, streaming=not away)
    except Exception as error:  # a split or configuration that is not there, a script, a lost connection
        if away:
            raise ValueError(
                f"expected {name!r} among what datasets has fetched before, since HF_DATASETS_OFFLINE or "
                f"HF_HUB_OFFLINE is set, got {type(error).__name__}: {' '.join(str(error).split())[:200]}; "
                "unset it where there is internet, or name a file or folder"
            ) from error
        raise ValueError(
            f"expected configuration {config!r}, split {split!r} of {name!r} on the hub, got {type(error).__name__}: "
            f"{' '.join(str(error).split())[:300]}"
        ) from error


# --- in files --------------------------------------------------------------------------------------------------------


def _local_rows(path: Path, split: str | None) -> Iterable:
    if path.is_dir() and any((path / name).is_file() for name in _SAVED):
        from datasets import load_from_disk

        return one_split(load_from_disk(str(path)), split)
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.suffix in KINDS)
    if len(files) > 1:  # what is said about the text is none of it
        files = [p for p in files if not _ABOUT.match(p.name)] or files
    kinds = [KINDS.get(p.suffix) for p in files]
    if not files or kinds[0] is None:
        raise ValueError(f"expected {', '.join(KINDS)} files, got {str(path)!r}, which has none of them")
    kind = max(dict.fromkeys(kinds), key=kinds.count)  # of several as common, the first by name: so in every session
    files = [p for p, of in zip(files, kinds, strict=True) if of == kind]
    if kind == "text":
        return _paragraphs(files[0]) if len(files) == 1 else (_decoded(_content(file)) for file in files)
    read = {"json lines": _json_lines, "json": _json, "csv": _csv, "parquet": _parquet}[kind]
    return (row for file in files for row in read(file))


def _content(file: Path) -> bytes:
    """The bytes of a file without the mark that some editors put first."""
    return file.read_bytes().removeprefix(b"\xef\xbb\xbf")


def _decoded(content: bytes) -> str | bytes:
    """Text; the bytes themselves where they are none."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return content


def _paragraphs(file: Path) -> Iterator[str | bytes]:
    for part in re.split(rb"\r?\n\s*\n", _content(file)):
        yield _decoded(part)


def _json_line(line: bytes):
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError:
        return line
    except (ValueError, RecursionError) as error:
        return error


def _json_lines(file: Path) -> Iterator:
    with file.open("rb") as lines:
        for number, line in enumerate(lines):
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 0 else line
            if line.strip():
                yield _json_line(line)


def _json(file: Path) -> Iterator:
    """Rows of a list, of the one list in an object, or of lines."""
    content = _content(file)
    try:
        whole = json.loads(content)
    except (ValueError, RecursionError):  # several values, one a line
        yield from _json_lines(file)
        return
    if isinstance(whole, dict):
        lists = [value for value in whole.values() if isinstance(value, list)]
        whole = lists[0] if len(lists) == len(whole) == 1 else [whole]
    yield from whole if isinstance(whole, list) else [whole]


def _csv(file: Path) -> Iterator[dict]:
    before = csv.field_size_limit(_FIELD)
    try:
        # a byte that is no UTF-8 stays recognisable, so that the row can be refused and not the file
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
            rows = csv.DictReader(lines, delimiter="\t" if file.suffix == ".tsv" else ",")
            for row in rows:
                yield {key: _unescaped(value) for key, value in row.items() if key is not None}
    finally:
        csv.field_size_limit(before)


def _unescaped(value):
    """The bytes of a field that was no UTF-8."""
    if isinstance(value, str) and not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="surrogateescape")
    return value


def _parquet(file: Path) -> Iterator[dict]:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=1024):
            try:
                yield from batch.to_pylist()
                continue
            except UnicodeDecodeError:  # in some row of them
                pass
            columns = {}
            for name, values in zip(batch.schema.names, batch.columns, strict=True):
                if pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type):
                    raw = values.cast(pyarrow.large_binary()).to_pylist()
                    columns[name] = [None if value is None else _decoded(value) for value in raw]
                else:
                    columns[name] = values.to_pylist()
            for row in zip(*columns.values(), strict=True):
                yield dict(zip(columns, row, strict=True))
