"""Sending in the background: newest wins, failures are retried, a hung upload blocks no later one."""

import shutil
import threading

from copies import contents, save

from kd_kit.copied_run import MirrorError, OldCopiesRemain, read_local
from kd_kit.mirror import Mirror
from kd_kit.remote_copy import Place


class FakePlace(Place):
    """Does at each upload what it is told, then notes the step; every snapshot must be whole when it is sent."""

    def __init__(self, *actions):
        super().__init__("fake://x")
        self.actions, self.steps = list(actions), []

    def _upload(self, local, alive):
        if self.actions:
            self.actions.pop(0)(alive)
        for files in (local.files, local.weights, local.texts):
            assert all(path.is_file() for path in files.values())
        self.steps.append(local.checkpoint.step)
        return local.checkpoint.size


def fail(alive):
    raise RuntimeError("no network")


def test_a_checkpoint_arrives_and_is_told(tmp_path):
    mirror = Mirror(FakePlace(), tmp_path)
    mirror.take(save(tmp_path, 1200))
    assert mirror.flush(30) and mirror.sent == 1
    ((kind, text),) = mirror.news()
    assert kind == "mirrored" and text.startswith("step 1,200 to fake://x (") and mirror.news() == []
    mirror.close()
    assert list(tmp_path.glob(".mirror-*")) == []


def test_the_newest_of_those_waiting_is_sent_though_retention_deleted_its_original(tmp_path):
    busy, go = threading.Event(), threading.Event()
    place = FakePlace(lambda alive: (busy.set(), go.wait(30)))
    mirror = Mirror(place, tmp_path)
    mirror.take(save(tmp_path, 1))
    assert busy.wait(30)
    for step in (2, 3):
        mirror.take(save(tmp_path, step))
    shutil.rmtree(tmp_path / "ckpt")
    go.set()
    assert mirror.flush(30) and place.steps == [1, 3]
    mirror.close()


def test_failures_are_told_once(tmp_path):
    mirror = Mirror(FakePlace(fail, fail), tmp_path, retry_seconds=(0.001,))
    mirror.take(save(tmp_path, 1))
    assert mirror.flush(30)
    kinds, texts = zip(*mirror.news(), strict=True)
    assert kinds == ("alarm", "mirrored") and "no network" in texts[0] and "after 2 failed" in texts[1]
    mirror.close()


def test_flush_does_not_wait_for_a_place_that_only_fails(tmp_path):
    mirror = Mirror(FakePlace(*[fail] * 100), tmp_path, retry_seconds=(0.001,))
    mirror.take(save(tmp_path, 1))
    assert not mirror.flush(1e6)
    assert not mirror.flush(1e6, goes_on=lambda: False)
    assert not mirror.arrived and "is not at" in mirror.news()[-1][1]
    mirror.close()


def test_flush_tries_again_at_once(tmp_path):
    mirror = Mirror(FakePlace(fail), tmp_path, retry_seconds=(1e6,))
    mirror.take(save(tmp_path, 1))
    assert mirror.flush(30) and mirror.sent == 1
    mirror.close()


def test_a_hung_upload_is_given_up_and_blocks_no_later_one(tmp_path):
    go, seen, ended = threading.Event(), [], threading.Event()

    def hang(alive):
        go.wait(30)
        seen.append(alive())
        ended.set()
        raise MirrorError("late")

    mirror = Mirror(FakePlace(hang), tmp_path, stall_seconds=0.01, retry_seconds=(0.001,))
    mirror.take(save(tmp_path, 1))
    assert mirror.flush(30) and mirror.sent == 1
    go.set()
    assert ended.wait(30) and seen == [False]
    mirror.close()


def test_flush_gives_up_in_time_and_says_so(tmp_path):
    go = threading.Event()
    mirror = Mirror(FakePlace(lambda alive: go.wait(30)), tmp_path)
    mirror.take(save(tmp_path, 1))
    assert not mirror.flush(0.01)
    assert mirror.news()[-1][0] == "alarm"
    mirror.close()
    go.set()


def test_take_never_raises(tmp_path):
    info = save(tmp_path, 1)
    shutil.rmtree(info.path)
    mirror = Mirror(FakePlace(), tmp_path)
    mirror.take(info)
    assert not mirror.flush(30) and mirror.news()[0][0] == "alarm"


def test_leftovers_of_dead_sessions_are_removed_and_living_ones_stay(tmp_path):
    go = threading.Event()
    first = Mirror(FakePlace(lambda alive: go.wait(30)), tmp_path)
    first.take(save(tmp_path, 1))
    (tmp_path / ".mirror-99").mkdir()
    Mirror(FakePlace(), tmp_path)
    assert [path.name for path in tmp_path.glob(".mirror-*")] == [".mirror-1"]
    go.set()
    assert first.flush(30)
    first.close()


def test_a_snapshot_is_all_that_is_needed(tmp_path):
    mirror = Mirror(FakePlace(fail), tmp_path, retry_seconds=(1e6,))
    mirror.take(save(tmp_path, 7))
    assert read_local(tmp_path / ".mirror-1").checkpoint.step == 7
    mirror.close()


def test_a_snapshot_is_links_and_costs_no_second_copy(tmp_path):
    mirror = Mirror(FakePlace(fail), tmp_path, retry_seconds=(1e6,))
    info = save(tmp_path, 7, groups=("model", "optim", "aux"))
    mirror.take(info)
    links = [path for path in (tmp_path / ".mirror-1").rglob("*") if path.is_file()]
    assert len(links) == 5 and all(path.stat().st_nlink == 2 for path in links)
    assert all(path.samefile(info.path / path.name) for path in links)
    mirror.close()


def test_what_is_being_sent_stays_as_it_was_however_many_saves_follow(tmp_path):
    busy, go, before, after = threading.Event(), threading.Event(), [], []

    def look_twice(alive):
        before.append(contents(tmp_path / ".mirror-1"))
        busy.set()
        go.wait(30)
        after.append(contents(tmp_path / ".mirror-1"))

    (tmp_path / "metrics.jsonl").write_text("{}\n")
    (tmp_path / "best.safetensors").write_bytes(b"of step 1")
    place = FakePlace(look_twice)
    mirror = Mirror(place, tmp_path)
    mirror.take(save(tmp_path, 1))
    assert busy.wait(30)
    for step in (2, 3, 4):
        with open(tmp_path / "metrics.jsonl", "a") as log:
            log.write("{}\n")
        (tmp_path / "best.new").write_bytes(b"of a later step")
        (tmp_path / "best.new").replace(tmp_path / "best.safetensors")
        mirror.take(save(tmp_path, step))
    assert sorted(path.name for path in tmp_path.glob(".mirror-*")) == [".mirror-1", ".mirror-4"]
    go.set()
    assert mirror.flush(30) and place.steps == [1, 4] and mirror.sent == 2
    assert before == after and before[0]["best.safetensors"] == b"of step 1"
    assert list(tmp_path.glob(".mirror-*")) == []
    mirror.close()


def test_the_seconds_of_the_last_copy_that_arrived(tmp_path):
    now = [0.0]

    def take(seconds):
        def action(alive):
            now[0] += seconds

        return action

    def fail_late(alive):
        now[0] += 100
        raise RuntimeError("no network")

    mirror = Mirror(FakePlace(take(7), take(11), fail_late), tmp_path, retry_seconds=(1e6,), clock=lambda: now[0])
    assert mirror.last_seconds == 0.0
    for step, seconds in ((1, 7), (2, 11)):
        mirror.take(save(tmp_path, step))
        assert mirror.flush(1e3) and mirror.last_seconds == seconds
    mirror.take(save(tmp_path, 3))
    mirror.close()
    assert mirror.last_seconds == 11


def test_old_copies_that_remain_are_told_once_until_they_are_gone(tmp_path):
    def remain(alive):
        raise OldCopiesRemain("x: expected to remove older copies, got OSError")

    mirror = Mirror(FakePlace(remain, remain, lambda alive: None, remain), tmp_path)
    told = []
    for step in (1, 2, 3, 4):
        mirror.take(save(tmp_path, step))
        assert mirror.flush(30)
        told.append([kind for kind, _ in mirror.news()])
    assert told == [["mirrored", "alarm"], ["mirrored"], ["mirrored"], ["mirrored", "alarm"]] and mirror.sent == 4
    mirror.close()


def test_closing_in_the_middle_leaves_no_snapshot_and_sends_no_more(tmp_path):
    busy, go, ended, seen = threading.Event(), threading.Event(), threading.Event(), []

    def hang(alive):
        busy.set()
        go.wait(30)
        seen.append(alive())
        ended.set()
        raise MirrorError("given up")

    place = FakePlace(hang)
    mirror = Mirror(place, tmp_path)
    mirror.take(save(tmp_path, 1))
    assert busy.wait(30)
    mirror.take(save(tmp_path, 2))
    mirror.close()
    mirror.close()
    assert list(tmp_path.glob(".mirror-*")) == []
    go.set()
    assert ended.wait(30) and seen == [False]
    mirror.take(save(tmp_path, 3))
    assert place.steps == [] and list(tmp_path.glob(".mirror-*")) == []


def test_the_reason_of_a_failure_names_the_place_once(tmp_path):
    def refuse(alive):
        raise MirrorError("fake://x: sending failed: 403; give the token rights")

    mirror = Mirror(FakePlace(refuse), tmp_path, retry_seconds=(0.001,))
    mirror.take(save(tmp_path, 1))
    assert mirror.flush(30)
    assert mirror.news()[0] == (
        "alarm",
        "the copy to fake://x failed: sending failed: 403; give the token rights; training goes on, the next try is in "
        "0 s",
    )
    mirror.close()
