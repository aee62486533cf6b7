"""Sending in the background: newest wins, failures are retried, a hung upload blocks no later one."""

import shutil
import threading

import pytest
import torch

from kd_kit.checkpoint import save_checkpoint
from kd_kit.mirror import Mirror
from kd_kit.mirror_places import open_place
from kd_kit.copied_run import MirrorError, read_local
from kd_kit.remote_copy import Place


class FakePlace(Place):
    """Does at each upload what it is told, then notes the step; every snapshot must be whole when it is sent."""

    def __init__(self, *actions):
        super().__init__("fake://x")
        self.actions, self.steps = list(actions), []

    def _upload(self, local, alive):
        if self.actions:
            self.actions.pop(0)(alive)
        self.steps.append(local.checkpoint.step)
        return local.checkpoint.size


def fail(alive):
    raise RuntimeError("no network")


def save(run, step):
    return save_checkpoint(
        run, step=step, save_number=step, run_id="a", groups={"model": {"w": torch.ones(9)}}, state={}
    )


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


def test_a_place_inside_the_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="apart from the run folder"):
        Mirror(open_place(str(tmp_path), "run"), tmp_path / "run")
