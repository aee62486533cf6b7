"""Rows to texts: what a data set holds, what of it is text, and an account of everything that is not.

A row that cannot be used is refused with a reason, counted, and never ends the reading.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import reprlib
import warnings
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kd_kit.chats import MALFORMED, Template, as_chat, messages_of, plain

MAX_CHARACTERS = 20_000_000  # of one document; tokenising a longer one takes minutes and gigabytes
_SHOWN = 5  # rows of every reason in a report
_BEGINNING = 200  # characters that are kept of a refused row
_LINE = 60  # of them in a report
_SURE = 100  # rows that are read before a share of them means something

MISSING = "missing"
EMPTY = "empty"
BYTES = "bytes instead of text: decode them, row.decode()"
BAD_BYTES = "bytes that are not UTF-8: decode them with the encoding that they are in"
SURROGATE = "with half a surrogate pair, which no encoding can hold"
NUL = "with a NUL character, the mark of binary data or of a wrong encoding"
SPECIAL = "nothing but special tokens"
SAME = "the same text as an earlier row"
NOT_GIVEN_BACK = "not given back byte for byte by one of the tokenizers"
NO_BOUNDARIES = "without two common boundaries within a window"
_NOT_TEXT = (
    "missing",
    "bytes",
    "not text",
    "that could not be read",
    "a conversation",
)  # reasons whose rows hold no text to quote


def too_long(limit: int) -> str:
    """The reason for refusing a document of more characters than ``limit``."""
    return f"longer than {limit:,} characters"


def not_text(value: object) -> str:
    """The reason for refusing a value that is neither text nor bytes nor missing."""
    return f"not text but {type(value).__name__}"


def unreadable(error: Exception) -> str:
    """The reason for refusing a row that raised ``error`` instead of giving its value."""
    return f"that could not be read: {type(error).__name__}"


def unencodable(error: Exception) -> str:
    """The reason for refusing a text on which a tokenizer raised ``error``."""
    return f"on which a tokenizer raised {type(error).__name__}"


@dataclass
class RowReport:
    """What became of the rows that were given: counts, and the beginning of every refused one.

    Attributes:
        read: rows looked at. used: those that are in the windows. refused: {reason: row numbers}.
        kept: row number of every text that was read from them, so that later refusals can name it.
        beginnings: {row number: the first 200 characters of a refused row}; of what is not text its ``repr``, and of a
            row that could not be read the error.
        duplicates: numbers of the rows whose text an earlier row has, too, to the last letter.
        chats: how many of the rows are conversations that were made text.
        source: which argument of ``build_data`` the row numbers belong to, "texts" or "held_out".
    """

    read: int = 0
    used: int = 0
    refused: dict[str, list[int]] = field(default_factory=dict)
    kept: list[int] = field(default_factory=list)
    beginnings: dict[int, str] = field(default_factory=dict)
    duplicates: list[int] = field(default_factory=list)
    chats: int = 0
    source: str = "texts"

    def refuse(self, reason: str, row: int, value: object = None) -> None:
        """Count a row that cannot be used, and keep the beginning of what it holds."""
        self.refused.setdefault(reason, []).append(row)
        self.beginnings[row] = beginning_of(value)

    @property
    def refused_rows(self) -> int:
        """How many rows were refused, for whatever reason."""
        return sum(map(len, self.refused.values()))

    @property
    def faulty_rows(self) -> int:
        """How many rows were refused because something is wrong with them."""
        return self.refused_rows - len(self.refused.get(SAME, ()))

    def save(self, path: str | os.PathLike) -> Path | None:
        """Write every refused row to a JSON-lines file, see :func:`save_refused`."""
        return save_refused(path, [self])

    def __repr__(self) -> str:
        lines = [f"{self.used:,} of {self.read:,} documents used"]
        if self.chats:
            lines.append(f"  {self.chats:,} of the rows are conversations, made text")
        if self.duplicates and SAME not in self.refused:
            some = ", ".join(f"row {row}" for row in self.duplicates[:_SHOWN])
            more = ", ..." if len(self.duplicates) > _SHOWN else ""
            lines.append(
                f"  {len(self.duplicates):,} used though {SAME} ({some}{more}): deduplicate=True leaves them out"
            )
        for reason, rows in self.refused.items():
            quoted = not reason.startswith(_NOT_TEXT)
            shown = []
            for row in rows[:_SHOWN]:
                text = repr(self.beginnings[row]) if quoted else self.beginnings[row]
                shown.append(f"row {row} {text if len(text) <= _LINE else text[:_LINE] + '...'}")
            if len(rows) > _SHOWN:
                shown.append("...")
            lines.append(f"  {len(rows):,} {reason}")
            one_line = ", ".join(shown)
            lines += [f"      {one_line}"] if len(one_line) <= 100 else [f"      {row}" for row in shown]
        return "\n".join(lines)


def beginning_of(value: object) -> str:
    """The first 200 characters of a value: of a text itself, of an error its message, else of its ``repr``."""
    if isinstance(value, str):
        return str(value[:_BEGINNING])
    if isinstance(value, Exception):
        shown = f"{type(value).__name__}: {value}".removesuffix(": ")
    else:
        short = reprlib.Repr()
        short.maxother = short.maxstring = short.maxlong = 4 * _BEGINNING
        try:
            shown = short.repr(value[:_BEGINNING] if isinstance(value, (bytes, bytearray)) else value)
        except Exception as error:  # the value's own __repr__
            shown = f"<{type(value).__name__}, whose repr raised {type(error).__name__}>"
    return shown.encode(errors="backslashreplace").decode()[:_BEGINNING]


def save_refused(path: str | os.PathLike, reports: Iterable[RowReport]) -> Path | None:
    """Write all refused rows of these reports to a JSON-lines file, in the order of the rows.

    A line is ``{"source", "row", "reason", "beginning"}``; a file without lines says that nothing was refused. The file
    appears whole or not at all. Where it cannot be written there is a warning, and what was there before stays.

    Returns:
        the path; None if it could not be written.
    """
    path = Path(path)
    lines = {}
    for report in reports:
        for reason, rows in report.refused.items():
            for row in rows:
                beginning = report.beginnings[row].encode(errors="backslashreplace").decode()  # no half surrogate pair
                line = {"source": report.source, "row": row, "reason": reason, "beginning": beginning}
                lines[report.source != "texts", row] = json.dumps(line)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged.open("w") as file:
            file.writelines(lines[key] + "\n" for key in sorted(lines))
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            staged.unlink(missing_ok=True)
        warnings.warn(f"build_data: the refused rows could not be written: {error}", RuntimeWarning, stacklevel=2)
        return None
    return path


def refuse_share(reports: Iterable[RowReport], max_refused: float, rows: int | None = None) -> None:
    """Stop when too many of the rows of one source were refused.

    Args:
        reports: all reports about the source.
        rows: how many rows there are, where it is known before all of them were read; all that were read if left out.

    Raises:
        ValueError: more than ``max_refused`` of the rows were refused.
    """
    reports = list(reports)
    refused, read = sum(r.faulty_rows for r in reports), sum(r.read for r in reports)
    if refused > max_refused * (read if rows is None else rows):
        tables = "\n".join(repr(report) for report in reports if report.refused)
        raise ValueError(
            f"build_data: expected a share of at most {max_refused:.4g} of the rows of {reports[0].source} refused, "
            f"got {refused:,} of the {read:,} read; mend them, or pass max_refused= with the share that you accept\n"
            f"{tables}"
        )


def read_texts(
    texts: Iterable,
    *,
    column: str | None = "text",
    maximum: int | None = None,
    max_characters: int = MAX_CHARACTERS,
    max_refused: float = 1.0,
    report: RowReport | None = None,
    special: Iterable[str] = (),
    template: Template = plain,
    deduplicate: bool = False,
) -> tuple[list[str], RowReport]:
    """Texts out of a list of strings, a pandas column or a ``datasets`` object, with every unusable row counted.

    Refused are rows that are missing (None, NaN), empty or all white space, longer than ``max_characters``, not text,
    hold nothing but special tokens, or raise when they are read. A list of messages is made text. Bytes are never
    decoded here: whoever has them knows the encoding. A text with a NUL character is refused although byte-level
    tokenizers give it back: nobody writes one, binary files and UTF-16 read as something else are full of them, and
    other programs end the text there; ``text.replace("\\0", "")`` keeps it.

    Args:
        column: where a row that has several fields keeps its text; None where rows are its values already.
        maximum: read no more than this many usable texts.
        max_refused: share of the rows above which reading stops. Where the number of rows is known, it stops as soon
            as that share of them all is exceeded; elsewhere from 100 rows on at the share of those read.
        report: to be filled in place of a new one, so that it can be looked at when reading stops.
        special: how the tokenizers write their special tokens.
        template: what makes a conversation a text, see :mod:`kd_kit.chats`.
        deduplicate: refuse a text that an earlier row has, too; counted it is in any case, and it never counts as a
            fault.

    Raises:
        ValueError: something that is no sequence of texts, a stream of ``datasets`` without ``maximum``, a data set
            without that column, nothing usable at all, too much of it unusable, or an iterator that raised and so
            cannot go on.
    """
    report = RowReport() if report is None else report
    columns = _columns_of(texts, column)
    if maximum is None and columns is not None and not hasattr(texts, "__len__"):
        raise ValueError(
            "build_data: expected maximum= with a stream of datasets, which does not say where it ends, got none; pass "
            "how many documents to read of it, maximum=20_000"
        )
    marks = _only_special(special)
    seen_texts: set[bytes] = set()
    total = _length_of(texts) if maximum is None else None
    out, seen = [], columns is not None
    for row, value in _rows_of(texts) if maximum != 0 else ():
        report.read += 1
        if column is not None and (columns is not None or isinstance(value, Mapping)):
            value, seen = _field(value, column, seen)
        chat, reason = None if isinstance(value, str) else as_chat(value), None
        if chat is not None:
            value, reason = _rendered(chat, template)
        reason = reason or _refusal(value, max_characters)
        if reason is None and marks is not None and marks.fullmatch(value):
            reason = SPECIAL
        if reason is None:
            key = hashlib.blake2b(value.encode(), digest_size=16).digest()
            if key in seen_texts:
                report.duplicates.append(row)
                reason = SAME if deduplicate else None
            seen_texts.add(key)
        if reason is None:
            out.append(value)
            report.kept.append(row)
            report.chats += chat is not None
        else:
            report.refuse(reason, row, value)
            if report.read >= _SURE:
                report.used = len(out)
                refuse_share([report], max_refused, None if total is None else max(total, report.read))
        if maximum is not None and len(out) >= maximum:
            break
    report.used = len(out)
    if not out:
        raise ValueError(f"build_data: expected at least one text with something in it, got none: {report!r}")
    refuse_share([report], max_refused)
    return out, report


def _columns_of(texts, column: str) -> list[str] | None:
    """The columns of a ``datasets`` object, None for anything else; refuses what would be read as something else."""
    if isinstance(texts, (str, bytes, bytearray)):
        raise ValueError(
            "build_data: expected a list of texts, got one string, which would be read letter by letter; pass [text], "
            "or a Path or the name of a file"
        )
    if texts is None:
        raise ValueError("build_data: expected texts, got None; pass a list of strings or a datasets object")
    columns = getattr(texts, "column_names", None)
    if isinstance(columns, dict):
        raise ValueError(
            f"build_data: expected one split, got a DatasetDict with {', '.join(columns)}; "
            f"pass split={next(iter(columns), 'train')!r}, or texts[...] of it"
        )
    if isinstance(texts, Mapping) or (hasattr(texts, "iloc") and hasattr(texts, "columns")):
        names = ", ".join(map(str, getattr(texts, "columns", texts)))
        raise ValueError(
            f"build_data: expected a list of texts, got a table with {names}, which would be read as these names; pass "
            "the column that holds the text, table['name']"
        )
    if isinstance(texts, Set):
        raise ValueError(
            "build_data: expected texts in an order, got a set, which has another one in every process; pass a list"
        )
    if not hasattr(texts, "__iter__") and not hasattr(texts, "__getitem__"):
        raise ValueError(
            f"build_data: expected texts, got {type(texts).__name__}; pass a list of strings or a datasets object"
        )
    if columns is not None and column not in columns:
        raise ValueError(
            f"build_data: expected a column {column!r}, got a data set with {', '.join(columns)}; "
            f"pass column={columns[0]!r} or whichever holds the text"
        )
    return columns


def _length_of(texts) -> int | None:
    try:
        return len(texts)
    except Exception:  # a stream, or a data set that cannot tell
        return None


def _rows_of(texts) -> Iterator[tuple[int, object]]:
    """(row number, what it holds); in place of a row that raises its error, if the rows can be had one by one."""
    at, rows, failure = 0, iter(texts), None
    while failure is None:
        try:
            value = next(rows)
        except StopIteration:
            break
        except MemoryError:
            raise
        except Exception as error:
            failure = error
        else:
            yield at, value
            at += 1
    one_by_one, total = getattr(texts, "iloc", texts), _length_of(texts)
    if total is None or not hasattr(one_by_one, "__getitem__"):
        if failure is None:
            return
        raise ValueError(
            f"build_data: expected texts to the end, got {type(failure).__name__} at row {at}: {failure}; an iterator "
            "cannot go on after that: mend the row, or pass a list or a data set that can be indexed"
        ) from failure
    # Python takes an IndexError or a StopIteration of one row for the end of all, so what is missing is asked for
    for row in range(at, total):
        try:
            value = one_by_one[row]
        except MemoryError:
            raise
        except Exception as error:
            value = error
        yield row, value


def _only_special(special: Iterable[str]) -> re.Pattern | None:
    """A pattern for texts of special tokens and white space alone; None where there are no such tokens."""
    marks = sorted({mark for mark in special if mark and not mark.isspace()}, key=len, reverse=True)
    if not marks:
        return None
    # possessive, ++ and *+: a long row is looked through once, whatever the tokens have in common
    return re.compile(rf"\s*+(?:(?:{'|'.join(map(re.escape, marks))})\s*+)++")


def _rendered(chat: list[Mapping], template: Template) -> tuple[object, str | None]:
    """A conversation's text, or what it is and why there is none."""
    messages = messages_of(chat)
    if messages is None:
        return chat, MALFORMED
    if not messages:
        return "", None
    try:
        text = template(messages)
    except MemoryError:
        raise
    except Exception as error:  # a template may refuse roles that do not alternate
        return error, f"a conversation on which the template raised {type(error).__name__}"
    return text, None


def _field(value, column: str, seen: bool) -> tuple[object, bool]:
    """The text of a row of several fields, None where it has no such field; and whether any row had it."""
    if isinstance(value, Exception):
        return value, seen
    if not seen and column not in value:
        raise ValueError(
            f"build_data: expected a column {column!r}, got a row with {', '.join(map(str, value))}; "
            "pass column= with the one that holds the text"
        )
    try:
        return value[column], True
    except MemoryError:
        raise
    except KeyError:
        return None, seen
    except Exception as error:  # a row that decodes its fields when asked
        return error, True


def _refusal(value, max_characters: int) -> str | None:
    """Why a value cannot be used; None if it can."""
    if isinstance(value, str):
        if len(value) > max_characters:
            return too_long(max_characters)
        if not value or value.isspace():
            return EMPTY
        if "\0" in value:
            return NUL
        return None if _encodable(value) else SURROGATE
    if value is None or type(value).__name__ in ("NAType", "NaTType"):  # pandas' own
        return MISSING
    if isinstance(value, (float, np.floating)) and value != value:
        return MISSING
    if isinstance(value, (bytes, bytearray, memoryview)):
        try:
            bytes(value).decode()
        except UnicodeDecodeError:
            return BAD_BYTES
        return BYTES
    if isinstance(value, Exception):
        return unreadable(value)
    return not_text(value)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
