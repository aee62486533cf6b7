"""What a user wants of a run that is going on: stop, pause, save, evaluate. Safe to ask from any thread.

The loop looks here between two steps, so a wish never meets a step that is half done.
"""

from __future__ import annotations

import threading


class Controls:
    """Wishes, and whether the loop rests."""

    def __init__(self):
        self._changed = threading.Condition()
        self._stop: str | None = None
        self._wanted: list[str] = []
        self._paused = False

    def clear(self) -> None:
        """Forget every wish; a loop that starts has none to heed."""
        with self._changed:
            self._stop, self._paused = None, False
            self._wanted.clear()

    def stop(self, reason: str) -> None:
        with self._changed:
            self._stop = self._stop or reason
            self._changed.notify_all()

    def pause(self) -> None:
        with self._changed:
            self._paused = True

    def go_on(self) -> None:
        with self._changed:
            self._paused = False
            self._changed.notify_all()

    def want(self, what: str) -> None:
        """Ask for something that the loop does after its step: "save", "evaluate"."""
        with self._changed:
            if what not in self._wanted:
                self._wanted.append(what)
            self._changed.notify_all()

    def take(self) -> list[str]:
        """What was asked for since, in order; asked for no more."""
        with self._changed:
            found, self._wanted = self._wanted, []
            return found

    @property
    def stop_reason(self) -> str | None:
        return self._stop

    @property
    def paused(self) -> bool:
        return self._paused

    def rest(self, seconds: float) -> None:
        """Wait while paused, at most so long; a wish ends it early."""
        with self._changed:
            self._changed.wait_for(lambda: not self._paused or self._stop or self._wanted, timeout=seconds)
