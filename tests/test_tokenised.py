"""kd_kit/tokenised.py: documents from a file are those in memory, and only a whole file of theirs is ever read."""

from __future__ import annotations

import gc
import json
import os
import pickle
import shutil

import datasets
import numpy as np
import pytest
import torch
from bad_rows import LIMIT, WINDOW, bad_rows, undecodable
from helpers import pages, pair, toy_data, toy_pair

from kd_kit import build_data, build_tokenizers, tokenised
from kd_kit.offline import STUDENT, TEACHER, asset_folder
from kd_kit.tokenised import ENCODE_AT_ONCE, Document, StoredDocuments, tokenise


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where the files go; every text is large."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(tokenised, "LARGE", 1)
    return tmp_path / "cache" / "kd_kit"


@pytest.fixture
def encoded(monkeypatch):
    """All texts that were tokenised."""
    texts, encode = [], type(pair()).encode

    def counted(self, some):
        texts.extend(some)
        return encode(self, some)

    monkeypatch.setattr(type(pair()), "encode", counted)
    return texts


def many(count: int = 3 * ENCODE_AT_ONCE + 5) -> list[str]:
    """Documents for several calls of a tokenizer."""
    text = "".join(pages(8, 900))
    return [text[40 * i : 40 * i + 60 + i] for i in range(count)]


def everything(_start, found) -> list[bool]:
    """Keep all documents."""
    return [isinstance(one, Document) for one in found]


def build(texts, **arguments):
    return build_data(texts, pair(), **({"held_out": 0.3, "window": WINDOW, "batch_size": 2} | arguments))


def in_memory(monkeypatch, texts, **arguments):
    with monkeypatch.context() as patch:
        patch.setattr(tokenised, "LARGE", 10**9)
        data = build(texts, **arguments)
    assert isinstance(data.train.documents, list)
    return data


def assert_same(one, other) -> None:
    """Windows, documents, reports and batches."""
    assert one.fingerprint == other.fingerprint
    assert repr(one) == repr(other)
    for ours, theirs in ((one.train, other.train), (one.held_out, other.held_out)):
        assert ours.report == theirs.report
        assert ours.fingerprint == theirs.fingerprint
        assert np.array_equal(ours.table, theirs.table)
        assert np.array_equal(ours.lengths, theirs.lengths)
        assert len(ours.documents) == len(theirs.documents)
        for a, b in zip(ours.documents, theirs.documents, strict=True):
            for name in Document._fields:
                assert getattr(a, name).dtype == getattr(b, name).dtype
                assert np.array_equal(getattr(a, name), getattr(b, name))
    for a, b in zip(one.batches(0, range(4)), other.batches(0, range(4)), strict=True):
        for name in a.__dataclass_fields__:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def names(folder) -> list[str]:
    return sorted(path.suffix or path.name for path in folder.iterdir())


# --- the same as in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.3, 0.9])
def test_whatever_the_rows_are_the_file_gives_what_memory_gives(folder, monkeypatch, encoded, capsys, share):
    rows, expected = bad_rows(np.random.default_rng(1), 300)
    arguments = {"held_out": share, "max_characters": LIMIT, "max_refused": 1}
    memory = in_memory(monkeypatch, rows, **arguments)
    first = build(rows, **arguments)
    encoded.clear()
    second = build(rows, **arguments)
    assert encoded == [], "the second call reads the file"
    for data in (first, second):
        assert isinstance(data.train.documents, StoredDocuments)
        assert isinstance(data.held_out.documents, StoredDocuments)
        assert_same(memory, data)
    assert set(first.train.report.refused) | set(first.held_out.report.refused) == set(expected)
    assert names(folder) == [".arrow", ".arrow", ".json", ".json"]
    said = capsys.readouterr()
    assert said.out + said.err == "", "neither a word nor a progress bar"


def test_other_windows_are_cut_from_the_same_file(folder, monkeypatch, encoded):
    build(many())
    encoded.clear()
    assert_same(in_memory(monkeypatch, many(), window=20), build(many(), window=20))
    assert len(encoded) == len(many()), "those of memory"


def test_a_tokenizer_that_raises_on_one_text_is_recorded(folder, monkeypatch):
    encode = type(pair()).encode

    def touchy(self, texts):
        if any("xyzzy" in text for text in texts):
            raise KeyError("xyzzy")
        return encode(self, texts)

    monkeypatch.setattr(type(pair()), "encode", touchy)
    texts = [*many(), "say xyzzy", f"strange {undecodable()}", "plugh"]
    memory = in_memory(monkeypatch, texts, held_out=[pages()[0]])
    assert memory.train.report.refused["on which a tokenizer raised KeyError"] == [len(many())]
    for _ in range(2):
        assert_same(memory, build(texts, held_out=[pages()[0]]))


def test_too_much_refused_stops_as_early_with_the_same_words(folder, monkeypatch, encoded):
    texts = [*many(ENCODE_AT_ONCE), *([undecodable()] * 5 * ENCODE_AT_ONCE), *many(ENCODE_AT_ONCE)]
    said = []
    for way in (in_memory, lambda _, *a, **b: build(*a, **b)):
        encoded.clear()
        with pytest.raises(ValueError, match=r"expected a share of at most 0\.2") as caught:
            way(monkeypatch, texts, held_out=[pages()[0]], max_refused=0.2)
        said.append((str(caught.value), len(encoded)))
    assert said[0] == said[1]
    assert said[0][1] < len(texts)
    assert names(folder) == []


def test_nothing_readable_has_the_same_error(folder, monkeypatch):
    said = []
    for way in (in_memory, lambda _, *a, **b: build(*a, **b), lambda _, *a, **b: build(*a, **b)):
        with pytest.raises(ValueError, match="both tokenizers can read, got none") as caught:
            way(monkeypatch, [undecodable()] * 3, held_out=[pages()[0]], max_refused=1)
        said.append(str(caught.value))
    assert len(set(said)) == 1


# --- stopping --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt("stop"), OSError("not the disk's"), SystemExit(3), ValueError("x")]
)
def test_what_is_raised_to_stop_comes_through_and_leaves_nothing(folder, encoded, capsys, error):
    taken = []

    def take(start, found):
        assert not list(folder.glob("*.arrow")), "nothing has its name before it is whole"
        assert all(isinstance(one, Document) for one in found)
        taken.append((start, len(found)))
        if len(taken) == 3:
            raise error
        return [True] * len(found)

    texts = many()
    with pytest.raises(type(error)) as caught:
        tokenise(texts, pair(), take)
    assert caught.value is error
    assert taken == [(0, 32), (32, 32), (64, 32)]
    assert names(folder) == []
    assert len(tokenise(texts, pair(), everything)) == len(texts)
    assert len(encoded) == 96 + len(texts), "nothing of the stopped call was taken for a whole file"
    assert capsys.readouterr().out == ""


def test_every_text_is_taken_once_in_order_from_a_file_too(folder):
    texts = many()
    wanted = np.arange(len(texts)) % 3 == 1
    for _ in range(2):
        taken: list[tuple[int, int]] = []

        def take(start, found, taken=taken):
            taken.append((start, len(found)))
            return wanted[start : start + len(found)].tolist()

        documents = tokenise(texts, pair(), take)
        assert taken == [(0, 32), (32, 32), (64, 32), (96, 5)]
        assert len(documents) == wanted.sum()
        for row, document in zip(np.flatnonzero(wanted), documents, strict=True):
            assert pair().student_vocab.bytes_of(document.student_ids) == texts[row].encode()


# --- a file that is not whole ----------------------------------------------------------------------------------------


def halve(path):
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def flip(path):
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


def put_another_in_its_place(path):
    there = set(path.parent.glob("*.arrow"))
    tokenise(many()[::-1], pair(), everything)
    (other,) = set(path.parent.glob("*.arrow")) - there
    for suffix in (".arrow", ".json"):
        shutil.copy(other.with_suffix(suffix), path.with_suffix(suffix))


DAMAGE = {
    "half of it": halve,
    "one bit": flip,
    "empty": lambda path: path.write_bytes(b""),
    "no seal": lambda path: path.with_suffix(".json").unlink(),
    "a seal that is none": lambda path: path.with_suffix(".json").write_text("\x00{"),
    "of another text": put_another_in_its_place,
    "of another program": lambda path: path.write_text("mine"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_or_foreign_file_is_noticed_and_made_again(folder, monkeypatch, encoded, capsys, how):
    texts = many()
    build(texts, held_out=[pages()[0]])
    path = max(folder.glob("*.arrow"), key=lambda p: p.stat().st_size)
    content = path.read_bytes()
    DAMAGE[how](path)
    capsys.readouterr()
    encoded.clear()
    again = build(texts, held_out=[pages()[0]])
    assert encoded == texts
    assert capsys.readouterr().out == f"build_data: {path} is damaged, or another program's; it is made again\n"
    assert path.read_bytes() == content
    assert_same(in_memory(monkeypatch, texts, held_out=[pages()[0]]), again)
    encoded.clear()
    build(texts, held_out=[pages()[0]])
    assert encoded == []


def test_what_a_killed_process_left_is_never_read_and_goes_in_time(folder, encoded):
    texts = many()
    build(texts)
    for name, age in (("making-old", 10 * 24 * 3600), ("making-new", 60)):
        (folder / name).mkdir()
        for path in folder.glob("*.arrow"):
            shutil.copy(path, folder / name / path.name)
            halve(folder / name / path.name)
        then = (folder / name).stat().st_mtime - age
        os.utime(folder / name, (then, then))
    for path in [*folder.glob("*.arrow"), *folder.glob("*.json")]:
        path.unlink()
    encoded.clear()
    build(texts)
    assert sorted(encoded) == sorted(texts)
    assert names(folder) == [".arrow", ".arrow", ".json", ".json", "making-new"]


# --- no file ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_to_is_said_and_memory_is_used(folder, monkeypatch, capsys):
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the folder should be")
    texts = many()
    data = build(texts, held_out=[pages()[0]])
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2, "one line for each of the two sets of texts"
    assert all(line.startswith(f"build_data: tokens stay in memory, not in {folder}: ") for line in said)
    assert isinstance(data.train.documents, list)
    assert_same(in_memory(monkeypatch, texts, held_out=[pages()[0]]), data)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves its file open then
@pytest.mark.parametrize("when", [1, 3, "closing"])
def test_a_disk_that_fills_up_is_said_and_memory_is_used(folder, monkeypatch, capsys, when):
    from datasets.arrow_writer import ArrowWriter

    written, write = [], ArrowWriter.write_table

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    def fills_up(self, *arguments, **more):
        written.append(1)
        if len(written) == when:
            full()
        return write(self, *arguments, **more)

    monkeypatch.setattr(ArrowWriter, "write_table", fills_up)
    monkeypatch.setattr(ArrowWriter, "finalize", full)
    rows, _ = bad_rows(np.random.default_rng(2), 200)
    arguments = {"held_out": 0.1, "max_characters": LIMIT, "max_refused": 1}
    data = build(rows, **arguments)
    said = capsys.readouterr().out.splitlines()
    assert said
    assert all(line.endswith("OSError: [Errno 28] No space left on device") for line in said)
    assert names(folder) == []
    assert_same(in_memory(monkeypatch, rows, **arguments), data)
    del data, said
    gc.collect()  # here, where it is expected


def test_a_disk_without_room_is_found_before_tokenising(folder, monkeypatch, capsys, encoded):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(tokenised.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    texts = many()
    assert isinstance(build(texts).train.documents, list)
    assert len(encoded) == len(texts)
    assert "GB free for the tokens, got 0.00" in capsys.readouterr().out


def test_little_text_and_what_has_no_rules_to_tell_it_by_stay_in_memory(folder, monkeypatch):
    assert isinstance(toy_data(toy_pair()).train.documents, list)
    texts = many()
    monkeypatch.setattr(tokenised, "LARGE", sum(map(len, texts)) + 1)
    assert isinstance(build(texts).train.documents, list)
    assert not folder.exists()


def test_caching_that_the_user_switched_off_stays_off(folder):
    datasets.disable_caching()
    try:
        assert isinstance(build(many()).train.documents, list)
        assert not datasets.is_caching_enabled()
    finally:
        datasets.enable_caching()
    assert not folder.exists()


# --- what a file is for ----------------------------------------------------------------------------------------------


def test_another_cut_of_the_same_tokens_is_another_file(folder, tmp_path):
    """A tokenizer that reads digits one by one, or not, may have the vocabulary of the other."""
    shutil.copytree(asset_folder(STUDENT), tmp_path / "other", ignore=shutil.ignore_patterns("*.safetensors"))
    path = tmp_path / "other" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:100]
    path.write_text(json.dumps(content))
    other = build_tokenizers(TEACHER, tmp_path / "other")
    assert other.fingerprint == pair().fingerprint
    texts = many()
    ours, theirs = tokenise(texts, pair(), everything), tokenise(texts, other, everything)
    assert len(list(folder.glob("*.arrow"))) == 2
    assert len(theirs[0].student_ids) > len(ours[0].student_ids)


def test_the_same_letters_in_other_documents_are_another_file(folder):
    assert len(tokenise(["ab", "c"], pair(), everything)[0].student_ends) >= 1
    assert tokenise(["a", "bc"], pair(), everything)[0].student_ends.tolist() == [1]


def test_a_tokenizer_that_was_used_in_between_finds_its_file(folder, encoded):
    texts = many()
    build(texts)
    encoded.clear()
    pair().student(["a", "b c d"], padding=False, truncation=True, max_length=2)
    build(texts)
    assert encoded == []


# --- in use ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shown", [True, False])
def test_the_progress_bar_is_as_it_was_also_after_an_error(folder, capsys, shown):
    (datasets.enable_progress_bars if shown else datasets.disable_progress_bars)()
    try:
        build(many())
        assert datasets.are_progress_bars_disabled() != shown
        with pytest.raises(RuntimeError, match="stop"):
            tokenise(many()[1:], pair(), lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
        assert datasets.are_progress_bars_disabled() != shown
    finally:
        datasets.enable_progress_bars()
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_worker_makes_the_same_batches_from_the_file(folder, monkeypatch):
    texts = many()
    data = build(texts)
    expected = list(in_memory(monkeypatch, texts).batches(1, range(5)))
    trouble = []
    found = list(data.batches(1, range(5), workers=1, on_trouble=lambda text, _: trouble.append(text)))
    assert trouble == []
    for a, b in zip(expected, found, strict=True):
        for name in a.__dataclass_fields__:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_documents_go_to_another_process_as_a_path(folder):
    documents = build([undecodable(), *many()], held_out=[pages()[0]]).train.documents
    sent = pickle.dumps(documents)
    assert len(sent) < 2000
    received = pickle.loads(sent)
    for a, b in zip(documents, received, strict=True):
        assert np.array_equal(a.student_ids, b.student_ids)
        assert np.array_equal(a.teacher_ends, b.teacher_ends)


def test_documents_are_views_of_the_file_and_indexed_like_a_list(folder):
    documents = build(many()).train.documents
    count = len(documents)
    for array in (documents[0].student_ids, documents[-1].teacher_ends):
        assert not array.flags.owndata
        assert not array.flags.writeable
    assert np.array_equal(documents[-1].student_ids, documents[np.int64(count - 1)].student_ids)
    assert [d.student_ids.tolist() for d in documents[2:9:3]] == [documents[i].student_ids.tolist() for i in (2, 5, 8)]
    for outside in (count, -count - 1):
        with pytest.raises(IndexError):
            documents[outside]
