"""Models and text by name: what is attached is found in any layout, what is missing is said all at once."""

from __future__ import annotations

import importlib.machinery
import json
import sys
import types
from types import SimpleNamespace

import pytest

from kd_kit import build_data, offline, sources, text_files
from kd_kit.sources import find_sources

PAIR = {"teacher": offline.TEACHER, "student": offline.STUDENT}


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    folder = tmp_path / "input"
    folder.mkdir()
    return folder


def model_at(folder):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qwen-lm/qwen-3/transformers/0.6b/1", "models/qwen-lm/qwen-3/Transformers/0.6b/1"),
        ("HuggingFaceTB/SmolLM-135M", "datasets/somebody/smollm-135m"),
        ("HuggingFaceTB/SmolLM-135M", "smollm-135m"),
        ("huihui-ai/Huihui-MoE-1B-A0.6B", "notebooks/me/fetch-models/Huihui-MoE-1B-A0.6B"),
    ],
)
def test_an_attached_model_is_found_by_the_end_of_its_path(inputs, name, path):
    model_at(inputs / "other" / "model")
    wanted = model_at(inputs / path)
    found = find_sources(teacher=name, student=offline.STUDENT, text="embedded")
    assert found.teacher == str(wanted)
    assert f"attached: {wanted}" in repr(found)


def test_the_whole_name_is_preferred_to_its_last_part(inputs):
    model_at(inputs / "a" / "mine")
    wanted = model_at(inputs / "b" / "you" / "mine")
    assert find_sources(teacher="you/mine", student=offline.STUDENT, text="embedded").teacher == str(wanted)


def test_another_version_of_an_attached_model_is_not_taken_for_it(inputs):
    model_at(inputs / "models" / "qwen-lm" / "qwen-3" / "transformers" / "0.6b" / "1")
    with pytest.raises(ValueError, match="which is not here"):
        find_sources(teacher="qwen-lm/qwen-3/transformers/1.7b/1", student=offline.STUDENT, text="embedded")


def test_what_is_said_about_a_text_is_not_read_as_the_text(inputs, tmp_path):
    (tmp_path / "README.md").write_text("# about it")
    (tmp_path / "LICENSE.txt").write_text("some terms")
    (tmp_path / "train.jsonl").write_text('{"text": "a row"}')
    assert texts_of(tmp_path) == ["a row"]
    (tmp_path / "train.jsonl").unlink()
    assert len(texts_of(tmp_path)) == 2, "where there is nothing else, it is what was meant"


def test_a_connection_that_breaks_while_rows_are_read_is_a_text_that_cannot_be_had(inputs, monkeypatch):
    import datasets

    class Rows:
        def __iter__(self):
            yield {"text": "one"}
            raise ConnectionError("peer closed")

    monkeypatch.setattr(text_files, "ask_hub", lambda *_: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: Rows())
    with pytest.raises(ValueError, match=r"text: expected 20,000 rows of 'me/text', got 1 and then ConnectionError"):
        find_sources(**PAIR, text="me/text")
    assert find_sources(**PAIR, text="me/text", offline_fallback=True).embedded


def test_all_that_is_missing_is_said_at_once_with_what_to_do(inputs):
    with pytest.raises(ValueError, match="3 of them not to be had") as caught:
        find_sources(teacher="me/teacher", student="me/student", text="me/text")
    said = str(caught.value)
    for line in ("teacher: expected 'me/teacher'", "student: expected 'me/student'", "text: expected 'me/text'"):
        assert line in said
    for cure in ("switch the internet on", "attach them", "OFFLINE_FALLBACK"):
        assert cure in said


def test_the_embedded_pair_stands_in_only_when_asked_for_and_says_so(inputs):
    found = find_sources(teacher="me/teacher", student=offline.STUDENT, text="embedded", offline_fallback=True)
    assert found.embedded
    assert (found.teacher, found.student) == (offline.TEACHER, offline.STUDENT)
    assert list(found.held_out) == offline.corpus("held_out")
    assert "INSTEAD" in repr(found)
    assert "me/teacher" in repr(found)
    few = find_sources(teacher="me/teacher", student="me/student", text="me/text", documents=3, offline_fallback=True)
    assert list(few.texts) == offline.corpus("student")[:3]
    there = find_sources(**PAIR, text="embedded", offline_fallback=True)
    assert not there.embedded, "nothing was missing"


def test_a_name_that_can_be_no_hub_name_asks_no_hub(inputs, monkeypatch):
    monkeypatch.setattr(sources, "ask_hub", lambda *_: pytest.fail("asked the hub"))
    for name in ("/nowhere/model", "./model", "a/b/c", "two words"):
        with pytest.raises(ValueError, match="which is not here"):
            find_sources(teacher=name, student=offline.STUDENT, text="embedded")


def test_a_folder_without_a_model_is_refused(inputs, tmp_path):
    with pytest.raises(ValueError, match=r"got .* which has none"):
        find_sources(teacher=str(tmp_path), student=offline.STUDENT, text="embedded")


def test_a_name_of_the_hub_is_asked_for_and_kept(inputs, monkeypatch):
    asked = []
    monkeypatch.setattr(sources, "ask_hub", lambda name, kind, file: asked.append((name, kind, file)))
    found = find_sources(teacher="me/teacher", student="me/student", text="embedded")
    assert (found.teacher, found.student) == ("me/teacher", "me/student")
    assert asked == [("me/teacher", "model", "config.json"), ("me/student", "model", "config.json")]


def test_a_kaggle_secret_signs_in_to_the_hub(inputs, monkeypatch):
    import huggingface_hub

    seen = []

    class Api:
        def repo_info(self, name, **_):
            seen.append((name, huggingface_hub.get_token()))

    secrets = types.ModuleType("kaggle_secrets")
    secrets.__spec__ = importlib.machinery.ModuleSpec("kaggle_secrets", None)
    secrets.UserSecretsClient = lambda: SimpleNamespace(get_secret=lambda name: f"the secret {name}")
    monkeypatch.setitem(sys.modules, "kaggle_secrets", secrets)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setenv("HF_TOKEN", "")  # so that it is as it was afterwards
    monkeypatch.setenv("HF_TOKEN_PATH", str(inputs / "none"))
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(inputs / "none"))
    find_sources(teacher="me/gated", student=offline.STUDENT, text="embedded")
    assert seen == [("me/gated", "the secret HF_TOKEN")]


def texts_of(text, **more) -> list[str]:
    return list(find_sources(**PAIR, text=str(text), **more).texts)


def test_text_files_are_cut_at_blank_lines_and_folders_of_them_are_not(inputs, tmp_path):
    (tmp_path / "one.txt").write_text("first\nline\n\nsecond\n \nthird")
    assert texts_of(tmp_path / "one.txt") == ["first\nline", "second", "third"]
    folder = tmp_path / "many"
    folder.mkdir()
    (folder / "a.txt").write_text("one\n\ntwo")
    (folder / "b.md").write_text("three")
    assert texts_of(folder) == ["one\n\ntwo", "three"]
    assert texts_of(tmp_path / "one.txt", documents=2) == ["first\nline", "second"]


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_tables_are_read_by_their_column(inputs, tmp_path, kind):
    import pandas

    table = pandas.DataFrame({"body": ["one", "two", "three"], "other": [1, 2, 3]})
    path = tmp_path / f"rows.{kind}"
    write = {"jsonl": lambda: path.write_text("\n".join(json.dumps(r) for r in table.to_dict("records")))}
    write |= {"csv": lambda: table.to_csv(path, index=False), "parquet": lambda: table.to_parquet(path)}
    write[kind]()
    assert texts_of(path, column="body", documents=2) == ["one", "two"]
    with pytest.raises(ValueError, match=r"expected a column 'text' in .*, got body, other"):
        texts_of(path)


def test_attached_text_is_found_by_the_end_of_its_path(inputs):
    folder = inputs / "datasets" / "me" / "novels"
    folder.mkdir(parents=True)
    (folder / "book.txt").write_text("one\n\ntwo")
    assert texts_of("me/novels") == ["one", "two"]


@pytest.mark.parametrize(("content", "message"), [(None, "has none of them"), ("  \n\n \n", "documents without any")])
def test_a_folder_without_text_is_refused(inputs, tmp_path, content, message):
    folder = tmp_path / "empty"
    folder.mkdir()
    if content is not None:
        (folder / "a.txt").write_text(content)
    with pytest.raises(ValueError, match=message):
        texts_of(folder)


def test_what_is_found_can_be_trained_on(inputs):
    from helpers import pair

    found = find_sources(**PAIR, text="embedded", documents=6, held_out=0.2)
    data = build_data(found.texts, pair(), held_out=found.held_out, window=64)
    assert len(data.train.documents) + len(data.held_out.documents) == 6


def test_a_single_document_cannot_be_held_out(inputs):
    with pytest.raises(ValueError, match="documents of at least 2"):
        find_sources(**PAIR, text="embedded", documents=1)
