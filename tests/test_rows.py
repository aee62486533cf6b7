"""kd_kit/rows.py: what of a data set is text, and an account of everything that is not."""

from __future__ import annotations

import json
import warnings

import datasets
import numpy as np
import pandas
import pytest
from bad_rows import LIMIT, WINDOW, Broken, Rows, bad_rows, kinds
from helpers import pages, pair
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit import build_data
from kd_kit.rows import RowReport, beginning_of, read_texts


def build(rows, **arguments):
    given_ones = {"held_out": [pages()[0]], "window": WINDOW, "batch_size": 2, "max_characters": LIMIT}
    return build_data(rows, pair(), **(given_ones | {"max_refused": 1} | arguments))


def spelled(windows) -> list[bytes]:
    """The bytes of every document, put together from its windows."""
    out = [b"" for _ in windows.documents]
    vocab = pair().student_vocab
    for index, (document, *_) in enumerate(windows.table):
        ids = windows.collate([index]).student_ids[0].tolist()
        out[document] += vocab.bytes_of(ids[1:])
    return out


def lines_of(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- every reason, counted exactly -----------------------------------------------------------------------------------


def check(rows: Rows, expected: dict[str, list[int]], report: RowReport) -> list[bytes]:
    assert report.refused == expected or {k: sorted(v) for k, v in report.refused.items()} == expected
    assert report.read == len(rows)
    assert report.used + report.refused_rows == report.read
    bad = {row for found in expected.values() for row in found}
    assert set(report.beginnings) == bad
    return [pair().normalise(text).encode() for row, text in enumerate(rows.rows) if row not in bad]


@pytest.mark.parametrize("seed", range(3))
def test_every_reason_is_counted_and_every_used_text_is_in_the_windows(seed):
    rows, expected = bad_rows(np.random.default_rng(seed), 300)
    assert set(expected) == set(kinds())
    data = build(rows)
    assert spelled(data.train) == check(rows, expected, data.train.report)


def test_held_out_texts_are_counted_in_the_same_way():
    rows, expected = bad_rows(np.random.default_rng(7), 200)
    data = build(pages(2), held_out=rows, stride=WINDOW)
    assert spelled(data.held_out) == check(rows, expected, data.held_out.report)
    assert not data.train.report.refused


def test_ten_thousand_rows():
    rows, expected = bad_rows(np.random.default_rng(1), 10_000)
    data = build(rows)
    assert len(data.train.documents) == len(check(rows, expected, data.train.report))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.one_of(
            st.sampled_from([(reason, i) for reason, values in kinds().items() for i in range(len(values))]),
            st.text(st.characters(codec="ascii", categories=["L", "N", "P"]), min_size=1, max_size=20),
        ),
        max_size=20,
    )
)
def test_any_mixture_of_rows(drawn):
    known, expected, values = kinds(), {}, ["One that always works."]
    for row, one in enumerate(drawn, start=1):
        values.append(one if isinstance(one, str) else known[one[0]][one[1]])
        if not isinstance(one, str):
            expected.setdefault(one[0], []).append(row)
    data = build(Rows(values))
    assert spelled(data.train) == check(Rows(values), expected, data.train.report)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.one_of(st.none(), st.text(max_size=20), st.binary(max_size=8), st.floats(), st.integers())))
def test_whatever_comes_is_used_or_refused(values):
    report = RowReport()
    try:
        out, report = read_texts(values, report=report)
    except ValueError as error:
        assert "at least one text" in str(error)
        out = []
    assert report.read == len(values) == len(out) + report.refused_rows
    assert out == [values[row] for row in report.kept]
    assert sorted([*report.kept, *report.beginnings]) == list(range(len(values)))


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_held_out_share_divides_the_counts(share):
    rows, expected = bad_rows(np.random.default_rng(3), 300)
    data = build(rows, held_out=share)
    reports = data.train.report, data.held_out.report
    found = {}
    for report in reports:
        assert report.used + report.refused_rows == report.read
        for reason, numbers in report.refused.items():
            found[reason] = sorted(found.get(reason, []) + numbers)
    assert found == expected
    assert sum(r.read for r in reports) == 300


def test_a_tokenizer_that_raises_refuses_the_text_alone(monkeypatch):
    encode = type(pair()).encode

    def touchy(self, texts):
        if any("xyzzy" in text for text in texts):
            raise KeyError("xyzzy")
        return encode(self, texts)

    monkeypatch.setattr(type(pair()), "encode", touchy)
    texts = [*pages(3, 100), "say xyzzy", "plugh"]
    data = build(texts)
    assert data.train.report.refused == {"on which a tokenizer raised KeyError": [3]}
    assert spelled(data.train) == [t.encode() for t in [*texts[:3], "plugh"]]


def test_nul_would_be_given_back_and_is_refused_all_the_same():
    """The embedded tokenizers know the character; who wants it left out of a text says so."""
    assert pair().encode(["a\0b"])[0] is not None
    assert build(["a\0b", "ab"]).train.report.refused_rows == 1
    assert build(["a\0b".replace("\0", ""), "ab"]).train.report.refused_rows == 0


# --- how rows are come by --------------------------------------------------------------------------------------------


def test_a_pandas_column_is_read_by_place_and_not_by_label():
    column = pandas.Series(["first text", None, float("nan"), "second text"], index=[3, 2, 1, 0])
    texts, report = read_texts(column)
    assert texts == ["first text", "second text"]
    assert report.refused == {"missing": [1, 2]}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (b"bytes", "got one string"),
        (pandas.DataFrame({"body": ["a"], "n": [1]}), "got a table with body, n"),
        ({"body": ["a"], "n": [1]}, "got a table with body, n"),
        ({"a", "b"}, "got a set"),
        (17, "got int"),
        ([{"body": "a"}], "got a row with body"),
    ],
)
def test_what_would_be_read_as_something_else_is_refused(rows, said):
    with pytest.raises(ValueError, match=f"^build_data: expected .*{said}"):
        build(rows)


def test_a_row_of_several_fields_without_the_column_is_missing():
    texts, report = read_texts([{"text": "a b"}, {"other": 1}, {"text": None}, {"text": "c d"}])
    assert texts == ["a b", "c d"]
    assert report.refused == {"missing": [1, 2]}


class Lazy(datasets.Dataset):
    """A data set of which some rows cannot be decoded, by whichever way they are asked for."""

    def __iter__(self):
        return (self[i] for i in range(len(self)))

    def __getitem__(self, key):
        if key in (2, 5):
            raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad row group")
        return super().__getitem__(key)


def test_a_data_set_whose_rows_raise_is_read_to_the_end():
    texts = [f"text number {i}" for i in range(8)]
    table = Lazy(datasets.Dataset.from_dict({"text": texts}).data)
    found, report = read_texts(table)
    assert found == [texts[i] for i in (0, 1, 3, 4, 6, 7)]
    assert report.refused == {"that could not be read: UnicodeDecodeError": [2, 5]}
    assert report.beginnings[2].startswith("UnicodeDecodeError: 'utf-8' codec")


def test_a_row_that_raises_index_error_does_not_end_the_reading():
    texts, report = read_texts(Rows(["a b", Broken(IndexError("no")), "c d", Broken(StopIteration()), "e f"]))
    assert texts == ["a b", "c d", "e f"]
    assert report.read == 5


def test_an_iterator_that_raises_names_the_row():
    def rows():
        yield "a b"
        yield None
        raise OSError("the connection was lost")

    with pytest.raises(ValueError, match=r"got OSError at row 2: the connection was lost; an iterator") as caught:
        build(rows())
    assert isinstance(caught.value.__cause__, OSError)


def test_interrupt_and_lack_of_memory_come_through():
    for error in (KeyboardInterrupt, MemoryError):
        with pytest.raises(error):
            read_texts(Rows(["a b", Broken(error())]))


def test_maximum_reads_no_further_than_it_has_to():
    asked = []

    def rows():
        for i in range(10):
            asked.append(i)
            yield f"text number {i}" if i % 2 else ""

    texts, report = read_texts(rows(), maximum=2)
    assert texts == ["text number 1", "text number 3"]
    assert report.read == len(asked) == 4


# --- too many --------------------------------------------------------------------------------------------------------


def test_at_most_that_share_may_be_refused():
    rows = ["a good text"] * 6 + [None] * 4
    assert build(rows, max_refused=0.4).train.report.used == 6
    with pytest.raises(
        ValueError, match=r"share of at most 0.39 of the rows of texts refused, got 4 of the 10(.|\n)*4 missing"
    ):
        build(rows, max_refused=0.39)
    with pytest.raises(ValueError, match=r"share of at most 0.39 of the rows of held_out refused"):
        build(pages(2), held_out=rows, max_refused=0.39)
    with pytest.raises(ValueError, match=r"at most 0 of the rows of texts refused, got 1 of the 3"):
        build(["a b", "c d", ""], max_refused=0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=r"^build_data: expected max_refused as a share"):
        build(pages(2), max_refused=share)


def test_reading_stops_as_soon_as_the_share_is_certain():
    asked = []

    class Sized(Rows):
        def __getitem__(self, row):
            asked.append(row)
            return super().__getitem__(row)

    head = [None] * 300
    with pytest.raises(ValueError, match=r"got 301 of the 301 read"):
        build(Sized(head + [""] * 300), max_refused=0.5)
    assert len(asked) == 301
    assert build(Sized(head + ["a good text"] * 300), max_refused=0.5).train.report.used == 300


def test_a_stream_is_judged_by_what_was_read_of_it():
    def endless():
        yield from ["a good text"] * 60
        while True:
            yield None

    with pytest.raises(ValueError, match=r"got 61 of the 121 read(.|\n)*60 of 121 documents used"):
        build(endless(), max_refused=0.5)


def test_texts_that_the_tokenizers_refuse_stop_it_before_all_are_tokenised(monkeypatch):
    counted = []
    encode = type(pair()).encode
    monkeypatch.setattr(type(pair()), "encode", lambda self, texts: counted.extend(texts) or encode(self, texts))
    strange = kinds()["not given back byte for byte by one of the tokenizers"][0]
    with pytest.raises(ValueError, match=r"share of at most 0.25 of the rows of texts refused"):
        build([strange] * 100 + pages(8) * 12, max_refused=0.25)
    assert len(counted) < 100


# --- what is shown and kept ------------------------------------------------------------------------------------------


def test_the_report_shows_the_first_five_with_their_beginnings():
    rows = [
        "a good text",
        *(f"\0 row {i} and so on, for quite a while and then some more" for i in range(7)),
        None,
        "\ud800",
    ]
    said = repr(build(rows).train.report)
    assert said.startswith("1 of 10 documents used\n  7 with a NUL character")
    for row in range(1, 6):
        assert f"row {row} '\\x00 row {row - 1} and so on" in said
    assert "row 6 " not in said
    assert "row 8 None" in said
    assert "row 9 '\\ud800'" in said
    assert max(map(len, said.splitlines())) < 120
    said.encode()


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        ("x" * 500, "x" * 200),
        (b"y" * 5000, "b'" + "y" * 198),
        (OSError("gone"), "OSError: gone"),
        (StopIteration(), "StopIteration"),
    ],
)
def test_the_beginning_of_a_value(value, shown):
    assert beginning_of(value) == shown


@pytest.mark.parametrize("kind", range(4))
def test_the_beginning_of_a_strange_value_is_short(kind):
    value = [10**5000, ["z" * 10**6] * 10**4, kinds()["not text but Unspeakable"][0], b"\xff" * 999][kind]
    assert 0 < len(beginning_of(value)) <= 200


def test_all_refused_rows_are_in_the_quarantine_file(tmp_path):
    rows, expected = bad_rows(np.random.default_rng(5), 200)
    path = tmp_path / "there" / "refused.jsonl"
    data = build(rows, held_out=0.3, quarantine=path)
    lines = lines_of(path)
    assert [line["row"] for line in lines] == sorted(row for found in expected.values() for row in found)
    for line in lines:
        assert line.keys() == {"source", "row", "reason", "beginning"}
        assert line["source"] == "texts"
        assert line["row"] in expected[line["reason"]]
        line["beginning"].encode()  # no half surrogate pair is in the file
        assert len(line["beginning"]) <= 300
    assert {p.name for p in path.parent.iterdir()} == {"refused.jsonl"}
    path.unlink()
    assert data.train.report.save(path) == path
    assert len(lines_of(path)) == data.train.report.refused_rows


def test_the_quarantine_file_is_written_when_building_stops_and_names_both_sources(tmp_path):
    path = tmp_path / "refused.jsonl"
    with pytest.raises(ValueError, match="held_out refused"):
        build(["a b", None], held_out=["c d", "", ""], max_refused=0.5, quarantine=path)
    assert [(line["source"], line["row"], line["reason"]) for line in lines_of(path)] == [
        ("texts", 1, "missing"),
        ("held_out", 1, "empty"),
        ("held_out", 2, "empty"),
    ]
    build(["a b"], quarantine=path)
    assert path.read_text() == "", "nothing refused this time"


def test_a_disk_that_refuses_is_a_warning_and_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "refused.jsonl"
    path.write_text("old\n")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(RuntimeWarning, match="could not be written: .*No space left"):
        data = build(["a b", None], quarantine=path)
    assert path.read_text() == "old\n"
    assert [p.name for p in tmp_path.iterdir()] == ["refused.jsonl"]
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.train.report.save(path)
    assert lines_of(path)[0]["row"] == 1


# --- special tokens and duplicates -----------------------------------------------------------------------------------


def test_rows_of_special_tokens_alone_are_refused():
    end = pair().student.eos_token
    other = pair().teacher.eos_token
    rows = [end, f" {end}\n{other}{end} ", f"{end} and more", "a good text", f"<{end}>"]
    data = build(rows)
    assert data.train.report.refused == {"nothing but special tokens": [0, 1]}
    assert spelled(data.train) == [row.encode() for row in rows[2:]]


def test_many_special_tokens_before_a_text_are_no_trap():
    """The pattern must not try all ways of cutting them."""
    texts, report = read_texts(["<s>" * 20_000 + "x", " " * 20_000 + "x", "<s> " * 20_000], special=["<s>", "<s><s>"])
    assert len(texts) == 2
    assert report.refused == {"nothing but special tokens": [2]}


def test_duplicates_are_counted_and_left_out_when_asked():
    rows = ["a good text", "another", "a good text", None, "a good text ", "another", "a good text"]
    data = build(rows)
    assert data.train.report.duplicates == [2, 5, 6]
    assert data.train.report.used == 6
    assert "3 used though the same text as an earlier row (row 2, row 5, row 6): deduplicate=True" in repr(
        data.train.report
    )
    assert "deduplicate=True leaves them out" in repr(data)
    once = build(rows, deduplicate=True)
    assert once.train.report.refused == {"the same text as an earlier row": [2, 5, 6], "missing": [3]}
    assert spelled(once.train) == [b"a good text", b"another", b"a good text "]
    assert "deduplicate" not in repr(once.train.report)


def test_duplicates_are_no_faults():
    rows = ["a good text"] * 300 + ["another"]
    data = build(rows, deduplicate=True, max_refused=0.1)
    assert data.train.report.used == 2
    with pytest.raises(ValueError, match=r"share of at most 0.1 of the rows of texts refused, got 37 of the 337 read"):
        build(rows[:300] + [None] * 60, deduplicate=True, max_refused=0.1)
