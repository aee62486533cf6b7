"""A disk that fills within a save: the run goes on and says so, nothing earlier is lost, nothing lies about."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import warnings
from pathlib import Path

import pytest
from campaign import uninterrupted
from same_run import begin, build_run, differences, leftovers, outcome
from small_disk import KINDS, PAGE, MountedDisk, can_mount, full

from kd_kit import checkpoint
from kd_kit.checkpoint import CheckpointError, find_checkpoint, inspect_checkpoint
from kd_kit.history import History

DISK = 24 * 2**20
STEPS = 10
FULL_FROM, FULL_TO = 4, 9
"""Steps between which the disk takes no checkpoint."""

# Bytes that are left when a save begins, or that a file may have: none, a page, every file's first and last pages and
# places between them. A checkpoint here has 262 pages: 85 of the model, 1 of the part, 170 of the optimizer, 4 of the
# random states, 4 of the state and 1 of the manifest.
LEFT = [PAGE * n for n in (0, 1, 2, 20, 40, 60, 84, 85, 86, 87, 88, 100, 130, 160, 190, 220, 250, 255, 256, 257, 260)]
LEFT += [PAGE * n for n in (261, 262, 263, 264)]
LONGEST = [0, 1, 8, 200, 331, 333, 900, 5_000, 15_000, 100_000, 346_831, 695_047]


def cases():
    for kind in KINDS:
        for left in LEFT if kind is MountedDisk else LONGEST:
            yield pytest.param(kind, left, id=f"{kind.__name__}-{left}")


@contextlib.contextmanager
def history_may_warn():
    """Where the disk takes no byte, it takes no line of the history either."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "History: .* could not be written", UserWarning)
        yield


@pytest.fixture
def disk(request, tmp_path):
    made = request.param(tmp_path / "disk", DISK)
    yield made
    made.empty()
    made.close()


class FilledLate:
    """Saves of the steps from ``FULL_FROM`` on find the disk filled by someone else, after they looked at its room;
    from ``FULL_TO`` on there is room again. After each that failed: what the folder holds then.
    """

    def __init__(self, disk, left: int, monkeypatch):
        self.failed, self.saved = [], []
        write, forecast = checkpoint.save_checkpoint, checkpoint._forecast_space

        def save(folder, *, step, **arguments):
            full = FULL_FROM <= step < FULL_TO

            def fill_late(root, needed):
                disk.empty()
                forecast(root, needed)
                if full:
                    disk.fill(left)

            monkeypatch.setattr(checkpoint, "_forecast_space", fill_late)
            try:
                info = write(folder, step=step, **arguments)
            except CheckpointError as error:
                about = sorted(p.name for p in (folder / "ckpt").iterdir())
                self.failed.append((step, error.errno, find_checkpoint(folder), about))
                raise
            finally:
                if not disk.stays_full:
                    disk.empty()
            self.saved.append(step)
            return info

        monkeypatch.setattr(checkpoint, "save_checkpoint", save)


@pytest.mark.parametrize(("disk", "left"), list(cases()), indirect=["disk"])
def test_a_disk_that_fills_at_this_byte_of_a_save(disk, left, monkeypatch):
    folder = disk.folder / "run"
    begin(5)
    trainer = build_run(folder, save_minutes=0, steps=STEPS)
    trainer.callbacks = []  # prints: where no file may grow, pytest cannot keep them
    seen = FilledLate(disk, left, monkeypatch)
    with history_may_warn():
        assert trainer.fit() == "finished"
    assert [step for step, *_ in seen.failed] == list(range(FULL_FROM, FULL_TO)), "no save met the full disk"
    for _, number, (found, refusals), about in seen.failed:
        assert number in (errno.ENOSPC, errno.EFBIG)
        assert (found.step, refusals) == (FULL_FROM - 1, [])
        assert all(name.startswith("step-") for name in about), "what was begun takes no room"
    assert seen.saved[-1] == STEPS
    assert FULL_TO in seen.saved, "the first save that had room"
    alarms = [e for e in trainer.history.events if e["what"] == "alarm" and e["text"].startswith("not saved")]
    assert [e["step"] for e in alarms] == list(range(FULL_FROM, FULL_TO))
    assert History.load(folder / "metrics.jsonl").records == trainer.history.records
    assert leftovers(folder) == []
    assert differences(outcome(folder), uninterrupted(steps=STEPS)) == []


@pytest.mark.parametrize("left", [0, PAGE * 120])
@pytest.mark.parametrize("disk", KINDS, indirect=True)
def test_a_session_that_ends_on_a_full_disk_and_the_next_that_begins_on_it(disk, left, monkeypatch):
    folder = disk.folder / "run"
    begin(5)
    trainer = build_run(folder, steps=STEPS)
    trainer.callbacks = []
    trainer.fit(steps=4)
    write = checkpoint.save_checkpoint

    def save_on_a_full_disk(*arguments, **more):
        with full(disk, left):
            return write(*arguments, **more)

    with monkeypatch.context() as patch, history_may_warn():
        patch.setattr(checkpoint, "_forecast_space", lambda root, needed: None)
        patch.setattr(checkpoint, "save_checkpoint", save_on_a_full_disk)
        with pytest.raises(CheckpointError, match="earlier checkpoints are untouched"):
            trainer.fit(steps=3)
    assert trainer.step == 7, "what it knows is still here"

    begin(1007)
    later = build_run(folder, again=True, steps=STEPS)
    later.callbacks = []
    with history_may_warn(), full(disk, left):
        if left:
            assert later.resume()
            assert later.step == 4
        else:  # not even the lock can be written
            with pytest.raises(OSError, match=r"No space left on device|File too large"):
                later.resume()
    assert later.fit() == "finished"
    assert History.load(folder / "metrics.jsonl").records == later.history.records
    assert leftovers(folder) == []
    assert differences(outcome(folder), uninterrupted(steps=STEPS)) == []


def test_a_disk_that_is_full_before_a_save_is_told_by_the_forecast(tmp_path, monkeypatch):
    """Nothing is written then; the alarm says how much is wanted."""
    begin(5)
    trainer = build_run(tmp_path, save_minutes=0, steps=STEPS)
    usage = shutil.disk_usage(tmp_path)
    full = lambda path: usage._replace(free=1_000_000 if FULL_FROM <= trainer.step < FULL_TO else 10**9)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", full)
    assert trainer.fit() == "finished"
    alarms = [e for e in trainer.history.events if e["what"] == "alarm"]
    assert [e["step"] for e in alarms] == list(range(FULL_FROM, FULL_TO))
    assert all("bytes free" in e["text"] and "got 1,000,000; nothing was written" in e["text"] for e in alarms)
    assert differences(outcome(tmp_path), uninterrupted(steps=STEPS)) == []


class Remounted:
    """Nothing below the folder can be changed while the run is between two steps."""

    def __init__(self, change):
        self.change = change

    def on_evaluate(self, trainer):
        if trainer.step in (FULL_FROM, FULL_TO):
            self.change(trainer.step == FULL_FROM)


@pytest.mark.parametrize("way", ["remount", "refused"] if can_mount() else ["refused"])
def test_a_disk_that_turns_read_only_and_back(tmp_path, monkeypatch, way):
    """By a real remount where that is allowed; and by a system that refuses every new folder and file."""
    disk = MountedDisk(tmp_path / "disk", DISK) if way == "remount" else None
    mkdir, opened = os.mkdir, Path.open

    def refuse(*arguments, **more):
        raise OSError(errno.EROFS, "Read-only file system")

    def change(to_read_only: bool) -> None:
        if disk is not None:
            disk.read_only(to_read_only)
        elif to_read_only:
            monkeypatch.setattr(os, "mkdir", refuse), monkeypatch.setattr(Path, "open", refuse)
        else:
            monkeypatch.setattr(os, "mkdir", mkdir), monkeypatch.setattr(Path, "open", opened)

    folder = tmp_path / "disk" / "run"
    try:
        begin(5)
        trainer = build_run(folder, save_minutes=0, steps=STEPS, eval_every=1)
        trainer.callbacks.append(Remounted(change))
        with history_may_warn():
            assert trainer.fit() == "finished"
        alarms = [e for e in trainer.history.events if e["what"] == "alarm" and e["text"].startswith("not saved")]
        assert [e["step"] for e in alarms] == list(range(FULL_FROM, FULL_TO))
        assert all("Read-only file system" in e["text"] for e in alarms)
        assert History.load(folder / "metrics.jsonl").records == trainer.history.records
        assert leftovers(folder) == []
        assert inspect_checkpoint(folder / "ckpt" / f"step-{STEPS:08}").step == STEPS
        assert differences(outcome(folder), uninterrupted(steps=STEPS, eval_every=1)) == []
    finally:
        if disk is not None:
            disk.close()
