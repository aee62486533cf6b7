"""Copies of a run's newest checkpoint off the machine, sent in the background while the run trains on.

The training loop calls :meth:`Mirror.take` after a save and :meth:`Mirror.news` now and then; nothing here touches its
history, prints, or raises into it. Of several checkpoints that wait only the newest is sent.
"""

from __future__ import annotations

import itertools
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from kd_kit import checkpoint
from kd_kit.checkpoint_folder import MANIFEST, CheckpointInfo, checkpoint_root
from kd_kit.copied_run import SLOWEST, TEXTS, WEIGHTS, OldCopiesRemain, brief, link_or_copy
from kd_kit.remote_copy import Place


@dataclass
class _Snapshot:
    """A checkpoint as it was taken, in hard links, so that retention may delete the original."""

    step: int
    size: int
    folder: Path
    held: ExitStack

    def discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.held.close()


@dataclass
class _Attempt:
    """One upload, in a thread of its own."""

    snapshot: _Snapshot
    last_sign: float
    given_up: bool = False
    done: bool = False
    sent: int = 0
    error: BaseException | None = field(default=None)


class Mirror:
    """Sends snapshots of a run to a :class:`kd_kit.remote_copy.Place`. Its methods may be called from any thread.

    Args:
        place: made by :func:`kd_kit.mirror_places.open_place`.
        folder: the run folder.
        stall_seconds: an upload without a sign of life for so long, and a second more per megabyte, is given up; its
            thread cannot be ended, but blocks no later one.
        retry_seconds: waits after the first, second, ... failure in a row; the last one from then on.

    Attributes:
        sent: uploads that arrived.
        last_seconds: that the last of them took; 0.0 before the first.
        waited: seconds that callers of :meth:`take` and :meth:`flush` waited, in all.

    Raises:
        ValueError: the place is where the run itself lies.
    """

    def __init__(
        self,
        place: Place,
        folder: Path,
        *,
        stall_seconds: float = 900.0,
        retry_seconds: Sequence[float] = (30, 60, 120, 300, 600),
        clock=time.monotonic,
    ):
        self.place, self.folder = place, Path(folder)
        self.stall_seconds, self.retry_seconds, self._clock = stall_seconds, tuple(retry_seconds), clock
        self.sent, self.last_seconds, self.waited = 0, 0.0, 0.0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._next: _Snapshot | None = None  # the newest that has not arrived, also while it is being sent
        self._attempt: _Attempt | None = None
        self._failures = 0
        self._retry_at = 0.0
        self._hurry = False
        self._closed = False
        self._missed = False  # the newest save could not be taken
        self._said_cleanup = False
        self._news: list[tuple[str, str]] = []
        self._numbers = itertools.count(1)
        place.check_apart(self.folder)
        _remove_leftovers(self.folder)

    def take(self, info: CheckpointInfo) -> None:
        """Remember this checkpoint and send it in the background; returns in milliseconds and never raises."""
        started = self._clock()
        try:
            snapshot = self._snapshot(info)
            with self._changed:
                if self._closed:
                    snapshot.discard()
                    return
                before, self._next, self._missed = self._next, snapshot, False
                if before is not None and (self._attempt is None or self._attempt.snapshot is not before):
                    before.discard()
                if self._thread is None or not self._thread.is_alive():
                    self._thread = threading.Thread(target=self._run, name="kd_kit mirror", daemon=True)
                    self._thread.start()
                self._changed.notify_all()
        except Exception as error:
            self._missed = True
            self._say("alarm", f"step {info.step:,} is not copied to {self.place.address}: {brief(error)}")
        finally:
            with self._changed:
                self.waited += self._clock() - started

    def news(self) -> list[tuple[str, str]]:
        """What happened since the last call, as (kind, text); the kinds are "mirrored" and "alarm"."""
        with self._changed:
            said, self._news = self._news, []
        return said

    @property
    def arrived(self) -> bool:
        """Whether everything that was taken is at the place."""
        with self._changed:
            return self._next is None

    def flush(self, timeout: float, *, goes_on: Callable[[], bool] = lambda: True) -> bool:
        """Wait until the newest checkpoint taken has arrived; after a failure the next try is made at once.

        Args:
            goes_on: asked twice a second; the waiting ends where it says no.

        Returns:
            whether it has arrived; False when ``timeout`` seconds are over, after three failures in a row while it
            waits, or where the last save was not taken.
        """
        started, failures = self._clock(), self._failures
        with self._changed:
            self._hurry = True
            self._changed.notify_all()
            while self._next is not None and not self._closed:
                left = timeout - (self._clock() - started)
                if left <= 0 or self._failures >= failures + 3 or not goes_on():
                    break
                self._changed.wait(min(left, 0.5))
            self._hurry = False
            self.waited += self._clock() - started
            if self._next is None:
                return not self._missed
            waited = self._clock() - started
            text = f"step {self._next.step:,} is not at {self.place.address} after {waited:.0f} s of waiting"
            self._news.append(("alarm", f"{text}; it is in the run folder"))
            return False

    def close(self) -> None:
        """Send nothing more, and remove the snapshots. Harmless when repeated."""
        with self._changed:
            self._closed = True
            attempt, waiting = self._attempt, self._next
            if attempt is not None:
                attempt.given_up = True
            self._changed.notify_all()
        for snapshot in {id(s): s for s in (waiting, attempt and attempt.snapshot) if s is not None}.values():
            snapshot.discard()

    def _say(self, kind: str, text: str) -> None:
        with self._changed:
            self._news.append((kind, text))

    def _snapshot(self, info: CheckpointInfo) -> _Snapshot:
        self.folder.mkdir(parents=True, exist_ok=True)
        while (folder := self.folder / f".mirror-{next(self._numbers)}").exists():
            pass
        folder.mkdir()
        held = ExitStack()
        try:
            held.enter_context(checkpoint.held(folder))
            there = checkpoint_root(folder) / info.path.name
            there.mkdir(parents=True)
            for name in (*info.files, MANIFEST):
                link_or_copy(info.path / name, there / name)
            for name in WEIGHTS:  # replaced by rename, never rewritten, so a link keeps what it was
                if (self.folder / name).is_file():
                    link_or_copy(self.folder / name, folder / name)
            for name in TEXTS:
                if (self.folder / name).is_file():
                    shutil.copyfile(self.folder / name, folder / name)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            held.close()
            raise
        return _Snapshot(info.step, info.size, folder, held)

    # ---- the sending thread

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (self._next is None or self._pause() > 0):
                    self._changed.wait(None if self._next is None else self._pause())
                if self._closed:
                    return
                if self._failures:
                    self._hurry = False
                attempt = self._attempt = _Attempt(self._next, self._clock())
            self._try(attempt)

    def _pause(self) -> float:
        """Seconds until the next try; 0 when flush() is waiting for one."""
        return 0.0 if not self._failures or self._hurry else max(self._retry_at - self._clock(), 0.0)

    def _try(self, attempt: _Attempt) -> None:
        snapshot, started = attempt.snapshot, self._clock()
        patience = self.stall_seconds + snapshot.size / SLOWEST
        try:
            threading.Thread(target=self._upload, args=(attempt,), name="kd_kit mirror upload", daemon=True).start()
        except RuntimeError as error:
            attempt.error, attempt.done = error, True
        with self._changed:
            while not attempt.done and not self._closed:
                left = attempt.last_sign + patience - self._clock()
                if left <= 0:
                    attempt.given_up = True
                    attempt.error = TimeoutError(f"no sign of life for {patience:.0f} s")
                    break
                self._changed.wait(left)
            self._attempt = None
            if self._closed:
                return
            arrived = attempt.error is None or isinstance(attempt.error, OldCopiesRemain)
            if arrived:
                self._arrived(attempt, self._clock() - started)
            else:
                self._failed(attempt.error)
            superseded = self._next is not snapshot
            if arrived and not superseded:
                self._next = None
            if arrived or superseded:
                snapshot.discard()  # before flush() returns: close() could not find it any more
            self._changed.notify_all()

    def _upload(self, attempt: _Attempt) -> None:
        def alive() -> bool:
            attempt.last_sign = self._clock()
            return not attempt.given_up

        error = None
        try:
            attempt.sent = self.place.upload(attempt.snapshot.folder, alive)
        except BaseException as caught:  # nothing may reach the thread's own hook, which prints
            error = caught
        with self._changed:
            if not attempt.given_up:
                attempt.error, attempt.done = error, True
                self._changed.notify_all()

    def _arrived(self, attempt: _Attempt, seconds: float) -> None:
        self.sent += 1
        self.last_seconds = seconds
        again = f", after {self._failures} failed" if self._failures else ""
        self._failures = 0
        size = _bytes(attempt.sent or attempt.snapshot.size)
        text = f"step {attempt.snapshot.step:,} to {self.place.address} ({size} in {seconds:.0f} s{again})"
        self._news.append(("mirrored", text))
        if attempt.error is None:
            self._said_cleanup = False
        elif not self._said_cleanup:
            self._said_cleanup = True
            self._news.append(("alarm", brief(attempt.error)))

    def _failed(self, error: BaseException) -> None:
        wait = self.retry_seconds[min(self._failures, len(self.retry_seconds) - 1)]
        self._failures += 1
        self._retry_at = self._clock() + wait
        if self._failures == 1:
            reason = brief(error).removeprefix(f"{self.place.address}: ")
            text = f"the copy to {self.place.address} failed: {reason}"
            self._news.append(("alarm", f"{text}; training goes on, the next try is in {wait:.0f} s"))


def _remove_leftovers(folder: Path) -> None:
    """Remove what dead sessions left; a living one holds its snapshots."""
    for path in folder.glob(".mirror-*"):
        try:
            with checkpoint.held(path):
                shutil.rmtree(path)
        except OSError:  # held, or not to be removed
            continue


def _bytes(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.1f} GB"
