"""What a copy consists of: names, what to send, what to remove, and errors in words."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from copies import run_copy, save

from kd_kit.checkpoint import CheckpointError
from kd_kit.copied_run import (
    GivenUp,
    MirrorError,
    brief,
    link_or_copy,
    manifests,
    read_local,
    still_wanted,
    superfluous,
    take_in,
    without_secrets,
)


def remote(step, number, run_id="a"):
    return SimpleNamespace(name=f"step-{step:08d}-{number}", step=step, save_number=number, run_id=run_id)


def listed(*remotes):
    return {f"ckpt/{r.name}/{file}": 1 for r in remotes for file in ("MANIFEST.json", "state.json")}


def removed(found, written, **there):
    everything = [*found, written]
    return superfluous(listed(*everything) | there.get("beside", {}), everything, written)


def test_the_older_of_more_than_two_go():
    assert removed([remote(3, 3), remote(2, 2), remote(1, 1)], remote(4, 4)) == ["step-00000001-1", "step-00000002-2"]
    assert removed([remote(1, 1)], remote(2, 2)) == []


def test_steps_that_the_run_has_gone_back_from_go():
    assert removed([remote(9, 9), remote(5, 5)], remote(6, 10)) == ["step-00000009-9"]


def test_newer_ones_and_other_runs_stay():
    others = [remote(8, 8, "b"), remote(2, 2, "b"), remote(1, 1, "b")]
    assert removed([remote(9, 12), *others], remote(6, 10)) == []


def test_uploads_that_were_never_finished_go_and_foreign_names_stay():
    beside = {"ckpt/step-00000001-1/model.safetensors": 1, "ckpt/notes/a.txt": 1, "ckpt/readme": 1, "RUN.json": 1}
    assert removed([], remote(2, 2), beside=beside) == ["step-00000001-1"]


def test_manifests_are_those_of_folders_with_our_names():
    names = ["ckpt/step-00000001/MANIFEST.json", "ckpt/x/MANIFEST.json", "ckpt/step-00000002-2/a/MANIFEST.json"]
    assert list(manifests(dict.fromkeys(names, 1))) == [(names[0], "step-00000001")]


def test_a_copy_is_named_by_step_and_save(tmp_path):
    local = read_local(run_copy(tmp_path / "run", 3, number=7))
    assert local.manifest == "ckpt/step-00000003-7/MANIFEST.json"
    assert sorted(local.files) == [f"ckpt/step-00000003-7/{name}" for name in ("model.safetensors", "state.json")]
    assert sorted(local.weights) == sorted(local.about) == ["best.safetensors", "initial.safetensors"]


def test_what_is_missing_beside_the_checkpoint_is_not_sent(tmp_path):
    save(tmp_path, 1)
    local = read_local(tmp_path)
    assert (local.weights, local.texts, local.about) == ({}, {}, {})


@pytest.mark.parametrize("steps", [(), (1, 2)])
def test_a_folder_without_one_checkpoint_is_refused(tmp_path, steps):
    for step in steps:
        save(tmp_path, step)
    with pytest.raises(CheckpointError, match=f"expected one checkpoint .* got {len(steps)}"):
        read_local(tmp_path)


def test_a_stream_is_cut_soon_after_its_size(tmp_path):
    content = bytes(30 * 2**20)
    assert take_in(io.BytesIO(content), tmp_path / "a", len(content)).size == len(content)
    assert take_in(io.BytesIO(content), tmp_path / "b", 5).size == 2**22
    with pytest.raises(FileExistsError):
        take_in(io.BytesIO(b""), tmp_path / "a", 0)


def test_a_link_where_it_can_be_and_a_copy_where_not(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    link_or_copy(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").samefile(tmp_path / "a")
    monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("cross-device")))
    link_or_copy(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c").read_text() == "x" and not (tmp_path / "c").samefile(tmp_path / "a")


def test_nobody_waits_any_more():
    still_wanted(lambda: True)
    with pytest.raises(GivenUp):
        still_wanted(lambda: False)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MirrorError(None, "a: b"), "a: b"),
        (MirrorError("a: b"), "a: b"),
        (CheckpointError(28, "no room"), "no room"),
        (ValueError("two\n\n  lines"), "ValueError: two lines"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 400), f"ValueError: {'x' * 185}..."),
        (MirrorError("x" * 400), "x" * 400),
    ],
)
def test_an_error_is_one_line(error, text):
    assert brief(error) == text


def test_an_error_of_ours_reads_as_it_was_written():
    error = MirrorError(28, "a: no room")
    assert str(error) == "a: no room" and error.errno == 28


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("ftp://me:pass@host/x", "ftp://me:***@host/x"),
        ("GET 'https://x.y/z?Signature=1&a=2' failed", "GET 'https://x.y/z' failed"),
        ("Bearer hf_abcdefghijk", "Bearer hf_***"),
        ("hf://datasets/me/hf_run", "hf://datasets/me/hf_run"),
    ],
)
def test_secrets_are_not_shown(text, shown):
    assert without_secrets(text) == shown
