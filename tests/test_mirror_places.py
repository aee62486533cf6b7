"""Copies of a run at a folder and in memory: there and back, hostile, and with every call failing once."""

from __future__ import annotations

import json
import threading

import fsspec
import pytest
from copies import contents, fill, run_copy, save
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry, known_implementations

from kd_kit.checkpoint import DamagedCheckpoint, load_checkpoint
from kd_kit.checkpoint_folder import seal
from kd_kit.copied_run import GivenUp, OldCopiesRemain
from kd_kit.mirror import Mirror
from kd_kit.mirror_places import MirrorError, open_place


@pytest.fixture(params=["memory", "file", "address of a file"])
def place(request, tmp_path):
    addresses = {"memory": f"memory://{tmp_path.name}", "file": str(tmp_path / "away")}
    return open_place(addresses.get(request.param, f"file://{tmp_path}/away"), "run/main")


def spoil(place, name, change):
    content = place._read(name)
    place._fs.pipe_file(place._path(name), change(content))


def test_there_and_back_with_the_newest_two_kept(place, tmp_path):
    fill(place, tmp_path, 1, 2, 3)
    assert [remote.step for remote in place.newest()] == [3, 2]
    info = place.download(place.newest()[0], tmp_path / "back")
    assert load_checkpoint(info)[1] == {"step": 3} and place.refused == []
    assert contents(tmp_path / "back") == contents(tmp_path / "copy-3")


def test_a_run_that_went_back_leaves_the_abandoned_step_behind(place, tmp_path):
    fill(place, tmp_path, 5, 9)
    place.upload(run_copy(tmp_path / "again", 6, number=10), lambda: True)
    assert [remote.step for remote in place.newest()] == [6, 5]


def test_other_runs_checkpoints_stay_beside_those_of_this_one(place, tmp_path):
    place.upload(run_copy(tmp_path / "other", 1, run_id="b"), lambda: True)
    fill(place, tmp_path, 2, 3, 4)
    assert [(remote.step, remote.run_id) for remote in place.newest()] == [(4, "a"), (3, "a"), (1, "b")]


def test_what_is_there_already_is_not_sent_again(place, tmp_path):
    run = run_copy(tmp_path / "copy", 1)
    first = place.upload(run, lambda: True)
    assert place.upload(run, lambda: True) == sum((run / name).stat().st_size for name in ("RUN.json", "metrics.jsonl"))
    assert first > 1000


@pytest.mark.parametrize("change", [lambda c: c[:-1], lambda c: b"", lambda c: b"x" + c[1:]])
def test_a_damaged_file_is_never_used(place, tmp_path, change):
    fill(place, tmp_path, 1)
    remote = place.newest()[0]
    spoil(place, f"ckpt/{remote.name}/model.safetensors", change)
    with pytest.raises(DamagedCheckpoint, match=r"model\.safetensors"):
        place.download(remote, tmp_path / "back")
    assert list((tmp_path / "back").rglob("*")) == [tmp_path / "back" / "ckpt"]


@pytest.mark.parametrize(
    "change", [lambda c: c.replace(b'"step": 1', b'"step": 2'), lambda c: b"[]", lambda c: b"\0" * 9]
)
def test_a_damaged_manifest_is_passed_over(place, tmp_path, change):
    fill(place, tmp_path, 1)
    spoil(place, f"ckpt/{place.newest()[0].name}/MANIFEST.json", change)
    assert place.newest() == [] and len(place.refused) == 1


def test_a_sealed_manifest_that_leads_out_of_its_folder_is_passed_over(place, tmp_path):
    def lead_out(content):
        manifest = json.loads(content)
        del manifest["seal"]
        manifest["files"]["../../../evil.safetensors"] = manifest["files"]["model.safetensors"]
        return json.dumps(manifest | {"seal": seal(manifest)}).encode()

    fill(place, tmp_path, 1)
    spoil(place, f"ckpt/{place.newest()[0].name}/MANIFEST.json", lead_out)
    assert place.newest() == [] and "evil" in place.refused[0]


def test_an_upload_that_was_given_up_publishes_and_removes_nothing(place, tmp_path):
    fill(place, tmp_path, 1, 2)
    answers = iter([True] * 10)
    with pytest.raises(GivenUp):
        place.upload(run_copy(tmp_path / "late", 3), lambda: next(answers, False))
    assert [remote.step for remote in place.newest()] == [2, 1]


def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(tmp_path):
    place = open_place(str(tmp_path / "away"), "run")
    (tmp_path / "away").rmdir()
    (tmp_path / "away").write_text("a file")
    with pytest.raises(MirrorError, match=r"away: sending failed: .*; look whether that folder is there") as error:
        fill(place, tmp_path, 1)
    assert "Errno None" not in str(error.value)
    with pytest.raises(ValueError, match="expected a folder that can be made"):
        open_place(str(tmp_path / "away"), "run")


# ---------------------------------------------------------------------------- a file system that has its days


class Flaky(MemoryFileSystem):
    """Does ``action`` at its ``at``-th call; ``calls`` counts them."""

    protocol = "flaky"
    cachable = False
    calls, at, action = 0, None, None

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    @classmethod
    def prepare(cls, at=None, action=None):
        cls.calls, cls.at, cls.action = 0, at, action

    @classmethod
    def empty(cls):
        cls.store, cls.pseudo_dirs = {}, [""]
        cls.prepare()

    @classmethod
    def everything(cls):
        return {name: bytes(file.getbuffer()) for name, file in cls.store.items()}

    def now(self, name, *args):
        cls = type(self)
        number, cls.calls = cls.calls, cls.calls + 1
        if number == cls.at:
            return cls.action(self, name, *args)

    def put_file(self, lpath, rpath, **kwargs):
        if self.now("put_file", lpath, rpath) != "done":
            super().put_file(lpath, rpath, **kwargs)

    def find(self, path, **kwargs):
        self.now("find")
        return super().find(path, **kwargs)

    def info(self, path, **kwargs):
        self.now("info")
        return super().info(path, **kwargs)

    def _open(self, path, mode="rb", **kwargs):
        self.now("open")
        return super()._open(path, mode=mode, **kwargs)

    def rm(self, path, **kwargs):
        self.now("rm")
        super().rm(path, **kwargs)

    def mv(self, path1, path2, **kwargs):
        self.now("mv")
        super().mv(path1, path2, **kwargs)


def fail(self, name, *args):
    raise OSError(f"{name} failed")


def fail_at_a_file(self, name, *args):
    if name == "put_file":
        fail(self, name)
    type(self).at = type(self).calls  # the next call, then


def truncate(self, name, *args):
    if name != "put_file":
        raise TimeoutError(f"{name} timed out")
    with open(args[0], "rb") as file:
        content = file.read()
    self.pipe_file(args[1], content[: len(content) // 2])
    return "done"


@pytest.fixture
def flaky():
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    Flaky.empty()
    yield open_place("flaky://bucket/x", "run")
    Flaky.empty()
    _registry.pop("flaky")


@pytest.mark.parametrize("action", [fail, truncate])
def test_whichever_call_fails_there_is_a_good_copy_and_the_next_try_brings_the_new_one(flaky, tmp_path, action):
    fill(flaky, tmp_path, 1, 2)
    before, new = Flaky.everything(), run_copy(tmp_path / "copy-3", 3)
    for at in range(500):
        Flaky.empty()
        for name, content in before.items():
            flaky._fs.pipe_file(name, content)
        Flaky.prepare(at, action)
        try:
            flaky.upload(new, lambda: True)
        except OldCopiesRemain:
            steps = [3]
        except MirrorError as error:
            assert "flaky://bucket/x: " in str(error)
            steps = [3, 2]  # the last call may fail when all is there
        else:
            steps = [3]
        hit = Flaky.calls > at
        Flaky.prepare()
        (newest, *_) = flaky.newest()
        assert newest.step in steps
        back = tmp_path / f"back-{at}"
        assert load_checkpoint(flaky.download(newest, back))[1] == {"step": newest.step}
        flaky.upload(new, lambda: True)
        assert [remote.step for remote in flaky.newest()] == [3, 2]
        if not hit:
            break
    assert 30 < at < 499  # every call of an upload had its turn


def test_copies_go_on_arriving_through_failures(flaky, tmp_path):
    run = run_copy(tmp_path / "run", 1)
    mirror = Mirror(flaky, run, retry_seconds=(0.001,))
    for step in range(2, 8):
        Flaky.prepare(3 * step, fail_at_a_file)
        mirror.take(save(run, step))
        assert mirror.flush(30)
    assert [remote.step for remote in flaky.newest()] == [7, 6]
    kinds = [kind for kind, _ in mirror.news()]
    assert kinds.count("mirrored") == 6 and kinds.count("alarm") == 6
    mirror.close()


def test_a_stalled_upload_that_wakes_up_late_changes_nothing(flaky, tmp_path):
    go, woke = threading.Event(), threading.Event()

    def stall(self, name, lpath, rpath):
        go.wait(30)
        woke.set()

    def stall_at_the_model(self, name, *args):
        if name == "put_file" and "model" in args[1]:
            return stall(self, name, *args)
        type(self).at = type(self).calls  # the next one, then

    run = run_copy(tmp_path / "run", 1)
    mirror = Mirror(flaky, run, stall_seconds=0.3, retry_seconds=(0.001,))
    Flaky.prepare(0, stall_at_the_model)
    mirror.take(save(run, 2))
    assert mirror.flush(30) and [remote.step for remote in flaky.newest()] == [2]
    before = Flaky.everything()
    senders = [t for t in threading.enumerate() if t.name == "kd_kit mirror upload"]
    go.set()
    assert woke.wait(30)
    for sender in senders:
        sender.join(30)
    assert Flaky.everything() == before
    assert "no sign of life" in mirror.news()[0][1]
    mirror.close()


def test_a_slow_upload_is_ended_at_its_next_block(flaky, tmp_path):
    sent = []

    def blocks(self, name, lpath, rpath):
        sent.append(rpath)

    Flaky.prepare(4, blocks)
    answers = iter([True] * 3)
    with pytest.raises(GivenUp):
        flaky.upload(run_copy(tmp_path / "copy", 1), lambda: next(answers, False))
    assert not any(name.endswith("MANIFEST.json") for name in Flaky.store)


def test_the_manifest_is_sent_last(flaky, tmp_path, monkeypatch):
    sent, put_file = [], Flaky.put_file
    monkeypatch.setattr(Flaky, "put_file", lambda self, *args, **k: (sent.append(args[1]), put_file(self, *args, **k)))
    fill(flaky, tmp_path, 1)
    assert [name.rpartition("/")[2] for name in sent if "ckpt" in name] == [
        "model.safetensors",
        "state.json",
        "MANIFEST.json",
    ]


def test_a_copy_that_takes_the_name_of_another_is_none_until_it_is_whole(flaky, tmp_path):
    def fail_at_the_state(self, name, *args):
        if name == "put_file" and "state.json" in args[1]:
            fail(self, name)
        type(self).at = type(self).calls

    flaky.upload(run_copy(tmp_path / "other", 1, run_id="b"), lambda: True)
    Flaky.prepare(0, fail_at_the_state)
    with pytest.raises(MirrorError):
        fill(flaky, tmp_path, 1)
    Flaky.prepare()
    assert flaky.newest() == []


def test_old_copies_that_cannot_be_removed_cost_no_new_one(flaky, tmp_path, monkeypatch):
    fill(flaky, tmp_path, 1, 2)
    monkeypatch.setattr(Flaky, "rm", lambda self, path, **_: fail(self, "rm") if "ckpt" in path else None)
    with pytest.raises(OldCopiesRemain, match="expected to remove older copies, got OSError: rm failed"):
        fill(flaky, tmp_path, 3)
    assert [remote.step for remote in flaky.newest()] == [3, 2, 1]


def test_opening_connects_nothing(monkeypatch, tmp_path):
    def refuse(self, *_, **__):
        raise OSError("no route to host")

    fsspec.register_implementation("away", type("Away", (Flaky,), {"protocol": "away", "__init__": refuse}))
    place = open_place("away://me:secret@host/x", "run")
    with pytest.raises(MirrorError, match=r"^away://me:\*\*\*@host/x: looking .* no route to host; look whether the"):
        place.newest()
    place.check_apart(tmp_path)
    _registry.pop("away")


# ------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("nope://x", "a protocol that can be written"),
        ("", "or a folder"),
        (" ", "or a folder"),
        ("hf:/datasets/me/x", "or a folder"),
        ("hf:datasets/me/x", "or a folder"),
        ("/data/*", "or a folder"),
    ],
)
def test_an_address_that_cannot_be_used_says_what_to_write(address, message):
    with pytest.raises(ValueError, match=message):
        open_place(address, "run")


def test_a_package_that_is_missing_is_named(monkeypatch):
    entry = {"class": "nowherefs.core.FileSystem", "err": "Install nowherefs"}
    monkeypatch.setitem(known_implementations, "nowhere", entry)
    with pytest.raises(ValueError, match="writes to nowhere://, got none; pip install nowherefs"):
        open_place("nowhere://x", "run")


@pytest.mark.parametrize("run", ["", "..", "a/../b", "/a", "a\\b", "a[1]", "a*", "a\nb"])
def test_a_run_name_that_leads_elsewhere_is_refused(run):
    with pytest.raises(ValueError, match="a run's name"):
        open_place("memory://x", run)


@pytest.mark.parametrize("inside", ["", "run/copies"])
def test_a_place_inside_the_run_is_refused(tmp_path, inside):
    with pytest.raises(ValueError, match="apart from the run folder"):
        Mirror(open_place(str(tmp_path / inside), "run"), tmp_path / "run")
