"""Rows as they come out of the world: for every reason to refuse one, rows that must be refused for it."""

from __future__ import annotations

import datetime
import decimal

import numpy as np
from helpers import pages, pair

WINDOW = 32  # tokens; the rows without common boundaries have none within a window of this size
LIMIT = 5_000  # characters; the rows that are too long are longer than this


class Broken:
    """A row that raises when it is read."""

    def __init__(self, error: Exception):
        self.error = error


class Rows:
    """Rows that can be indexed, as a ``datasets`` object can; a :class:`Broken` one raises."""

    def __init__(self, rows: list):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int):
        value = self.rows[row]
        if isinstance(value, Broken):
            raise value.error
        return value


class Unspeakable:
    """A value that cannot even be shown."""

    def __repr__(self) -> str:
        raise RuntimeError("no words")


def undecodable() -> str:
    """A character with a byte that the student's tokenizer has no symbol for."""
    known = {t[0] for t in pair().student_vocab.tokens if len(t) == 1}
    for code in (0xE0000, 0x10FFFF, 0x40000, 0xA0000, *range(0x10000, 0x11000)):
        if any(byte not in known for byte in chr(code).encode()):
            return chr(code)
    raise AssertionError("every byte is known")


def kinds() -> dict[str, list]:
    """{reason: rows that are refused for it} by the embedded pair, in windows of WINDOW and documents of LIMIT."""
    import pandas

    strange = undecodable()
    return {
        "missing": [None, float("nan"), np.float32("nan"), pandas.NA, pandas.NaT],
        "empty": ["", " ", "\n\t \r\n", "\u2003\u00a0", "\x1c"],
        f"longer than {LIMIT:,} characters": [
            "a" * (LIMIT + 1),
            "word " * LIMIT,
            "\0" * (LIMIT + 1),
            " " * (LIMIT + 1),
        ],
        "not text but int": [0, -3, 10**400],
        "not text but float": [1.5, float("inf")],
        "not text but bool": [True, False],
        "not text but list": [["a", "b"], [], ["x"] * 10_000],
        "not text but tuple": [("a",)],
        "not text but ndarray": [np.zeros(3)],
        "not text but date": [datetime.date(1811, 10, 30)],
        "not text but Decimal": [decimal.Decimal("1.5")],
        "not text but Unspeakable": [Unspeakable()],
        "bytes instead of text: decode them, row.decode()": [b"plain", "caf\u00e9".encode(), b"", bytearray(b"ab")],
        "bytes that are not UTF-8: decode them with the encoding that they are in": [
            "caf\u00e9".encode("latin-1"),
            b"\xff\xfeh\x00i\x00",
            b"\xed\xa0\x80",  # half a surrogate pair
            b"\xf0\x9f\x99",  # cut within a character
        ],
        "with half a surrogate pair, which no encoding can hold": ["half \ud800 pair", "\udfff", "ends in \ud83d"],
        "with a NUL character, the mark of binary data or of a wrong encoding": [
            "a\0b",
            "\0",
            "h\0i\0",
            "\0\ud800",  # the first reason that is found counts
        ],
        "that could not be read: UnicodeDecodeError": [Broken(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"))],
        "that could not be read: OSError": [Broken(OSError("the file is gone"))],
        "that could not be read: IndexError": [Broken(IndexError("row group"))],
        "that could not be read: StopIteration": [Broken(StopIteration())],
        "not given back byte for byte by one of the tokenizers": [strange, f"Strange {strange} sign."],
        "without two common boundaries within a window": ["the" * 50, "the" * 77],
    }


def bad_rows(rng: np.random.Generator, count: int) -> tuple[Rows, dict[str, list[int]]]:
    """``count`` rows in a random order, about half of them good, and the row numbers to be refused by reason.

    Every reason is there once ``count`` is at least 100. To be read with ``max_characters=LIMIT`` and
    ``window=WINDOW``, by the embedded pair. What is in ``rows.rows`` and in no list of row numbers is good text.
    """
    bad = [(reason, value) for reason, values in kinds().items() for value in values]
    good = [page[start : start + size] for page in pages(8) for start, size in ((0, 80), (100, 300), (211, 40))]
    good += ["caf\u00e9 \u2014 na\u00efve", "a\ufeffb", "\x01 a", "nan", "None", "x"]
    chosen = [bad[i] for i in rng.permutation(len(bad))][:count]
    while len(chosen) < count:
        if rng.random() < 0.5 or len(chosen) < 2 * len(bad):
            chosen.append((None, good[rng.integers(len(good))]))
        else:
            chosen.append(bad[rng.integers(len(bad))])
    rows, expected = [], {}
    for row, i in enumerate(rng.permutation(count)):
        reason, value = chosen[i]
        rows.append(value)
        if reason is not None:
            expected.setdefault(reason, []).append(row)
    return Rows(rows), expected
