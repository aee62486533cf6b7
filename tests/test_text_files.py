"""kd_kit/text_files.py: files, folders, saved data sets and the hub by name, and every row of them that is no text."""

from __future__ import annotations

import csv
import json

import datasets
import pyarrow
import pytest
from helpers import pages, pair
from pyarrow import parquet

from kd_kit import build_data, text_files
from kd_kit.rows import BAD_BYTES, EMPTY, MISSING
from kd_kit.text_files import could_be_named, named_texts

LATIN = "caf\u00e9 au lait".encode("latin-1")


@pytest.fixture(autouse=True)
def no_inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path / "no-kaggle"))


def texts_of(path, **more) -> list:
    return list(named_texts(path, **more)[0])


def build(source, **arguments):
    given = {"held_out": [pages()[0]], "window": 32, "batch_size": 2, "max_refused": 1}
    return build_data(source, pair(), **(given | arguments))


def used(data) -> list[str]:
    """The documents, put together from their windows."""
    out = ["" for _ in data.train.documents]
    for index, (document, *_) in enumerate(data.train.table):
        out[document] += data.train.text(index)
    return out


# --- one path for every kind of file ---------------------------------------------------------------------------------


def as_text(path, rows):
    path.write_text("\n\n".join(rows))


def as_json_lines(path, rows):
    path.write_text("\n".join(json.dumps({"text": row, "n": 1}) for row in rows))


def as_json(path, rows):
    path.write_text(json.dumps([{"text": row, "n": 1} for row in rows], indent=1))


def as_one_object(path, rows):
    path.write_text(json.dumps({"data": [{"text": row} for row in rows]}))


def as_csv(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
            [["n", "text"], *([1, r] for r in rows)]
        )


def as_parquet(path, rows):
    parquet.write_table(pyarrow.table({"n": [1] * len(rows), "text": rows}), path)


KINDS = [
    ("a.txt", as_text),
    ("a.md", as_text),
    ("a.jsonl", as_json_lines),
    ("a.ndjson", as_json_lines),
    ("a.json", as_json),
    ("b.json", as_json_lines),
    ("c.json", as_one_object),
    ("a.csv", as_csv),
    ("a.tsv", as_csv),
    ("a.parquet", as_parquet),
]


@pytest.mark.parametrize(("name", "write"), KINDS)
def test_the_same_documents_from_every_kind_of_file(name, write, tmp_path):
    rows = ['The first, "quoted".', "second\nline", "na\u00efve \u2014 third", "NA", "12"]
    write(tmp_path / name, rows)
    assert texts_of(tmp_path / name) == rows
    data = build(tmp_path / name)
    assert used(data) == rows
    assert build(str(tmp_path / name)).fingerprint == data.fingerprint == build(rows).fingerprint
    assert len(build(tmp_path / name, maximum=2).train.documents) == 2


def test_a_file_that_begins_with_a_mark_of_utf8(tmp_path):
    for name, write in KINDS[:-1]:
        write(tmp_path / name, ["one", "two"])
        (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + (tmp_path / name).read_bytes())
        assert texts_of(tmp_path / name) == ["one", "two"], name


def test_bytes_that_are_no_utf8_are_counted_and_the_others_read(tmp_path):
    good = ["the first", "the last"]
    (tmp_path / "a.txt").write_bytes(b"the first\n\n" + LATIN + b"\n\nthe last")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "the first"}\n{"text": "' + LATIN + b'"}\n{"text": "the last"}\n')
    (tmp_path / "a.csv").write_bytes(b"text,n\nthe first,1\n" + LATIN + b",2\nthe last,3\n")
    raw = pyarrow.array([b"the first", LATIN, b"the last"], pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 3, raw.buffers())
    parquet.write_table(pyarrow.table({"n": [1, 2, 3], "text": strings}), tmp_path / "a.parquet")
    for name in ("a.txt", "a.jsonl", "a.csv", "a.parquet"):
        data = build(tmp_path / name)
        assert used(data) == good, name
        assert data.train.report.refused == {BAD_BYTES: [1]}, name
        assert "caf\\xe9" in data.train.report.beginnings[1], name
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.txt").write_text("a good text")
    (folder / "b.txt").write_bytes(LATIN)
    assert build(folder).train.report.refused == {BAD_BYTES: [1]}


def test_rows_of_every_kind_that_are_no_text_are_counted(tmp_path):
    values = ["good", None, 3, 2.5, ["a", "list"], {"a": {"deep": 1}}, "", " \n ", "\x00", "also good", True]
    lines = [json.dumps({"text": value}) for value in values]
    lines[4:4] = ["{broken", '{"other": 1}', "17", ""]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    report = build(tmp_path / "a.jsonl").train.report
    assert report.used == 2
    assert report.read == len(values) + 3, "an empty line is no row"
    assert {reason: len(rows) for reason, rows in report.refused.items()} == {
        MISSING: 2,
        "not text but int": 2,
        "not text but float": 1,
        "not text but list": 1,
        "not text but dict": 1,
        "not text but bool": 1,
        EMPTY: 2,
        "with a NUL character, the mark of binary data or of a wrong encoding": 1,
        "that could not be read: JSONDecodeError": 1,
    }


def test_a_huge_row_is_refused_and_the_next_one_read(tmp_path):
    as_csv(tmp_path / "a.csv", ["good", "x" * 20_000_001, "also good"])
    data = build(tmp_path / "a.csv")
    assert data.train.report.refused == {"longer than 20,000,000 characters": [1]}
    assert csv.field_size_limit() == 131_072, "the limit of other readers was changed"


def test_no_more_of_a_large_file_is_read_than_is_wanted(tmp_path, monkeypatch):
    as_json_lines(tmp_path / "a.jsonl", [f"row {n}" for n in range(50)])
    asked, there = [], text_files._json_line
    monkeypatch.setattr(text_files, "_json_line", lambda line: asked.append(line) or there(line))
    build(tmp_path / "a.jsonl", maximum=3)
    assert len(asked) == 3


def test_a_column_that_is_not_there_names_those_that_are(tmp_path):
    as_parquet(tmp_path / "a.parquet", ["one"])
    with pytest.raises(ValueError, match=r"expected a column 'body' in .*a\.parquet', got n, text; pass column='n'"):
        build(tmp_path / "a.parquet", column="body")
    (tmp_path / "chat.jsonl").write_text('{"id": 1, "messages": [{"role": "user", "content": "hi"}]}')
    with pytest.raises(ValueError, match=r"got id, messages; pass column='messages'"):
        build(tmp_path / "chat.jsonl")


# --- data sets -------------------------------------------------------------------------------------------------------


def test_a_data_set_dict_wants_a_split(tmp_path):
    both = datasets.DatasetDict(
        {name: datasets.Dataset.from_dict({"text": [f"the {name} one", "two"]}) for name in ("train", "test")}
    )
    both.save_to_disk(str(tmp_path / "saved"))  # which datasets 3.0 wants as text
    for source in (both, tmp_path / "saved"):
        with pytest.raises(
            ValueError, match=r"^build_data: expected one split, got a DatasetDict with train, test; pass"
        ):
            build(source)
        with pytest.raises(ValueError, match=r"with train, test and split='dev'; pass split='train'"):
            build(source, split="dev")
        assert used(build(source, split="test")) == ["the test one", "two"]
    both["train"].save_to_disk(tmp_path / "one")
    assert used(build(tmp_path / "one")) == ["the train one", "two"]


def test_held_out_text_by_name(tmp_path):
    as_text(tmp_path / "a.txt", ["one", "two"])
    data = build(pages(2), held_out=tmp_path / "a.txt")
    assert len(data.held_out.documents) == 2
    with pytest.raises(ValueError, match=r"^build_data: expected a text's folder"):
        build(pages(2), held_out=str(tmp_path / "none.txt"))


def test_a_name_of_the_hub_streams_so_many_rows(monkeypatch):
    asked, read = [], []

    def load(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))

        def rows():
            for n in range(10**9):
                read.append(n)
                yield {"body": f"row number {n}" if n % 2 else None}

        return rows()

    monkeypatch.setattr(text_files, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", False)
    data = build("me/text", column="body", config="english", split="validation", maximum=4)
    assert asked == [("me/text", "english", "validation", True)]
    assert data.train.report.used == 4
    assert data.train.report.read == len(read) == 8
    with pytest.raises(
        ValueError, match=r"expected maximum= with a data set of the hub, got none for the hub: me/text"
    ):
        build("me/text", column="body")


def test_a_name_of_the_hub_without_internet(monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr(text_files, "ask_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(
        ValueError, match=r"^build_data: expected 'me/text' among what datasets has fetched before.*unset"
    ):
        build("me/text", maximum=10)


@pytest.mark.parametrize("name", ["/nowhere/at/all.txt", "./none", "a/b/c.csv", "none.parquet/x/y"])
def test_a_path_that_is_not_there_asks_no_hub(name, monkeypatch):
    monkeypatch.setattr(text_files, "ask_hub", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(ValueError, match=r"^build_data: expected a text's folder, file, .* which is not here"):
        build(name)


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"expected \.txt, .* files, got .*, which has none of them"):
        build(tmp_path)


def test_a_damaged_file_is_said(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match=r"^build_data: expected texts to the end, got Arrow"):
        build(tmp_path / "a.parquet")


def test_a_text_is_told_from_a_name():
    assert not could_be_named("Once upon a time, there was a text.")
    assert not could_be_named("two words")
    assert not could_be_named("a/b\nc")
    assert not could_be_named("")
    assert all(map(could_be_named, ("imdb", "me/my-text", "data/train.csv", "my file.txt", "../folder/of it")))
    with pytest.raises(ValueError, match=r"got one string, .*pass \[text\], or a Path or the name of a file"):
        build("Once upon a time, there was a text.")
