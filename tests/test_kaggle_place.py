"""Kaggle's folders: known by a variable and a folder together, and what is attached by a file in it."""

from __future__ import annotations

from pathlib import Path

import pytest

from kd_kit.kaggle_place import attached, kaggle_input, kaggle_working, on_kaggle, run_type


def test_the_folders_are_kaggles_own_or_those_of_the_variable(monkeypatch, tmp_path):
    monkeypatch.delenv("KD_KIT_KAGGLE", raising=False)
    assert (kaggle_input(), kaggle_working()) == (Path("/kaggle/input"), Path("/kaggle/working"))
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    assert (kaggle_input(), kaggle_working()) == (tmp_path / "input", tmp_path / "working")


@pytest.mark.parametrize(
    ("variable", "folder", "expected"),
    [("Batch", True, "Batch"), ("Interactive", True, "Interactive"), ("Batch", False, None), ("", True, None)],
)
def test_a_session_is_known_by_variable_and_folder_together(monkeypatch, tmp_path, variable, folder, expected):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", variable)
    if folder:
        (tmp_path / "working").mkdir()
    assert run_type() == expected
    assert on_kaggle() == (expected is not None)


def test_what_is_attached_is_found_in_the_old_and_in_the_new_layout(monkeypatch, tmp_path):
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    assert list(attached("config.json")) == [], "without any input there is nothing"
    old, new = tmp_path / "input" / "my-model", tmp_path / "input" / "models" / "me" / "it" / "transformers" / "a" / "1"
    for folder in (old, new, tmp_path / "input" / "other"):
        folder.mkdir(parents=True)
    (old / "config.json").touch(), (new / "config.json").touch()
    assert list(attached("config.json")) == [new, old]
    assert list(attached("config.json", depth=2)) == [old]
