"""What comes back from a place: only what is whole, in few words what is not, and nothing half done."""

from __future__ import annotations

import json
import shutil
import threading
from types import SimpleNamespace

import pytest
from copies import contents, fill, run_copy
from safetensors.torch import load_file

from kd_kit import remote_copy
from kd_kit.checkpoint import CheckpointError
from kd_kit.checkpoint_folder import seal
from kd_kit.mirror_places import MirrorError, open_place

DEEP = b"[" * 100_000


@pytest.fixture
def place(tmp_path):
    place = open_place(str(tmp_path / "away"), "run")
    fill(place, tmp_path, 1)
    return place


@pytest.fixture
def there(tmp_path, place):
    return tmp_path / "away/run"


def back(place, tmp_path):
    place.download(place.newest()[0], tmp_path / "back")
    return contents(tmp_path / "back")


def sealed(content):
    return json.dumps(content | {"seal": seal(content)}).encode()


def test_damaged_weights_beside_it_are_left_out_and_those_here_stay(place, there, tmp_path):
    content = (there / "best.safetensors").read_bytes()
    (there / "best.safetensors").write_bytes(content[:-1] + b"x")
    (tmp_path / "back").mkdir()
    (tmp_path / "back/best.safetensors").write_bytes(b"mine")
    found = back(place, tmp_path)
    assert found["best.safetensors"] == b"mine" and "initial.safetensors" in found
    (reason,) = place.refused
    assert reason.startswith("best.safetensors: ") and reason.endswith("; left out") and "sha256" in reason


def test_weights_of_the_right_hash_that_are_no_weights_are_left_out(tmp_path):
    place = open_place(str(tmp_path / "away"), "run")
    run = run_copy(tmp_path / "copy", 1)
    (run / "best.safetensors").write_bytes(b"nonsense")
    place.upload(run, lambda: True)
    assert "best.safetensors" not in back(place, tmp_path)
    assert place.refused[0].startswith("best.safetensors: SafetensorError")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"3",
        b"\xff",
        DEEP,
        b'{"files": {}, "seal": "0"}',
        sealed({"files": 3}),
        sealed({"files": {"best.safetensors": 3}}),
        sealed({"files": {"best.safetensors": {"size": "9", "sha256": []}}}),
        sealed({"files": {"../../evil": {"size": 9, "sha256": "0"}}}),
        None,
    ],
)
def test_weights_without_a_hash_to_believe_are_left_out(place, there, tmp_path, content):
    if content is None:  # what it was, with another seal
        content = json.dumps(json.loads((there / "COPY.json").read_bytes()) | {"seal": "0" * 64}).encode()
    (there / "COPY.json").write_bytes(content)
    found = back(place, tmp_path)
    assert [name for name in found if "/" not in name] == ["RUN.json", "metrics.jsonl"]
    assert len(place.refused) == 2


def test_weights_are_sent_again_where_their_hash_was_lost(place, there, tmp_path):
    (there / "COPY.json").write_bytes(b"{}")
    place.upload(tmp_path / "copy-1", lambda: True)
    assert back(place, tmp_path) == contents(tmp_path / "copy-1")


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", DEEP])
def test_a_run_json_that_is_none_is_left_out(place, there, tmp_path, content):
    (there / "RUN.json").write_bytes(content)
    assert "RUN.json" not in back(place, tmp_path)
    assert place.refused[0].startswith("RUN.json: ")


@pytest.mark.parametrize("name", ["RUN.json", "metrics.jsonl"])
def test_a_huge_text_is_not_fetched(place, tmp_path, monkeypatch, name):
    monkeypatch.setitem(remote_copy.LIMITS, name, 2)
    assert name not in back(place, tmp_path)
    assert place.refused == [f"{name}: ValueError: expected at most 2 bytes, got {place._list()[name]}; left out"]


@pytest.mark.parametrize("content", [b"x" * 4001, DEEP])
def test_a_huge_manifest_is_not_read(place, there, monkeypatch, content):
    monkeypatch.setattr(remote_copy, "JSON_LIMIT", 4000)
    monkeypatch.setattr(place, "_read", lambda name: pytest.fail("read"))
    (there / "ckpt/step-00000001-1/MANIFEST.json").write_bytes(content)
    assert place.newest() == []
    assert place.refused == [f"step-00000001-1: MANIFEST.json: expected at most 4000 bytes, got {len(content)}"]


def test_a_deep_manifest_is_passed_over(place, there):
    (there / "ckpt/step-00000001-1/MANIFEST.json").write_bytes(DEEP)
    assert place.newest() == [] and len(place.refused) == 1


@pytest.mark.parametrize("change", ["missing", "short"])
def test_a_checkpoint_of_another_size_than_its_manifest_says_is_passed_over(place, there, change):
    path = there / "ckpt/step-00000001-1/state.json"
    path.unlink() if change == "missing" else path.write_bytes(b"{}")
    assert place.newest() == []
    assert place.refused[0].startswith("step-00000001-1: state.json: expected ")


def test_many_reasons_are_counted(place, there):
    for number in range(2, 12):
        shutil.copytree(there / "ckpt/step-00000001-1", there / f"ckpt/step-00000001-{number}")
        (there / f"ckpt/step-00000001-{number}/MANIFEST.json").write_bytes(b"{}")
    assert len(place.newest()) == 1
    assert len(place.refused) == 6 and place.refused[-1] == "and 5 more that cannot be used"
    place.newest()
    assert len(place.refused) == 6


def test_names_that_are_not_ours_are_not_looked_at(place, there):
    for name in ("step-1", "other", "step-00000002-2x", ".tmp-00000001-1"):
        shutil.copytree(there / "ckpt/step-00000001-1", there / "ckpt" / name)
    assert [remote.name for remote in place.newest()] == ["step-00000001-1"] and place.refused == []


def test_without_room_nothing_is_fetched(place, tmp_path, monkeypatch):
    (remote,) = place.newest()
    usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(CheckpointError, match=r"bytes free .* got 10; nothing was fetched; make room there"):
        place.download(remote, tmp_path / "back")
    monkeypatch.setattr(shutil, "disk_usage", usage)
    assert contents(tmp_path / "back") == {}


def test_a_download_that_breaks_off_leaves_nothing(place, tmp_path, monkeypatch):
    (remote,) = place.newest()
    fetch = place._fetch

    def break_off(name, target, size):
        if name.endswith("state.json"):
            raise ConnectionError("reset by peer")
        return fetch(name, target, size)

    monkeypatch.setattr(place, "_fetch", break_off)
    with pytest.raises(MirrorError, match=r"away: fetching failed: ConnectionError: reset by peer; "):
        place.download(remote, tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").rglob("*")] == ["ckpt"]


def test_an_interrupt_leaves_nothing(place, tmp_path, monkeypatch):
    (remote,) = place.newest()
    monkeypatch.setattr(place, "_fetch", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        place.download(remote, tmp_path / "back")
    assert [path.name for path in (tmp_path / "back").rglob("*")] == ["ckpt"]


@pytest.mark.parametrize("what", ["newest", "download"])
def test_a_place_that_never_answers_is_given_up(place, tmp_path, monkeypatch, what):
    (remote,) = place.newest()
    go = threading.Event()
    monkeypatch.setattr(place, "_list", lambda: go.wait(30) and {})
    place.patience = 0.01
    with pytest.raises(MirrorError, match=r"away: expected an answer within 0 s, got none; try again later"):
        place.newest() if what == "newest" else place.download(remote, tmp_path / "back")
    go.set()


def test_a_second_download_lies_beside_the_first(place, tmp_path):
    back(place, tmp_path)
    back(place, tmp_path)
    assert sorted(path.name for path in (tmp_path / "back/ckpt").iterdir()) == ["step-00000001", "step-00000001-2"]


def test_what_comes_back_can_be_loaded(place, tmp_path):
    back(place, tmp_path)
    assert load_file(tmp_path / "back/best.safetensors")["w"].tolist() == [1.0] * 9
