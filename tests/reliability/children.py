"""What a child of the nursery does: a session of the run, which tells of itself and fails on order.

Everything here changes the process that it runs in, which is a child's own.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from same_run import begin, build_run

from kd_kit import Callback, checkpoint, student_weights

PATIENCE = 120.0
"""Seconds after which a child hangs: it is stopped, and says where it stood."""


class Say(Callback):
    """Tells of a run's start, evaluations and end."""

    def __init__(self, tell: Callable[[str], None]):
        self.tell = tell

    def on_start(self, trainer):
        self.tell(f"running {trainer.step}")

    def on_evaluate(self, trainer):
        self.tell(f"evaluated {trainer.step}")

    def on_stop(self, trainer):
        self.tell(f"stopped {trainer.stop_reason}")


def say_saves(tell: Callable[[str], None], crash_at: str = "", crash_save: int = 1) -> None:
    """Let every save tell of itself; from number ``crash_save`` on it dies at the point ``crash_at``."""
    write, numbers = checkpoint.save_checkpoint, itertools.count(1)

    def told(folder, *, step, **arguments):
        tell(f"saving {step}")
        if crash_at and next(numbers) >= crash_save:
            os.environ["KD_KIT_CRASH_AT"] = crash_at
        info = write(folder, step=step, **arguments)
        tell(f"saved {step}")
        return info

    checkpoint.save_checkpoint = told


def say_evaluations(trainer, tell: Callable[[str], None]) -> None:
    score = trainer._score

    def told(model, side="student"):
        tell(f"evaluating {trainer.step}")
        return score(model, side)

    trainer._score = told


def rest_inside(trainer, tell: Callable[[str], None], what: str) -> None:
    """Rest in the middle of a save ("saving") or of an evaluation, once, from the second save on, until SIGUSR1."""
    score, write = trainer._score, checkpoint.save_file

    def rest():
        if trainer.save_number >= 2 and not rested:
            rested.append(True)
            tell("resting")
            end = time.monotonic() + PATIENCE / 2
            while time.monotonic() < end and rested[-1] is True:
                time.sleep(0.01)

    rested = []
    signal.signal(signal.SIGUSR1, lambda *_: rested.append("enough"))

    def slow_score(model, side="student"):
        rest()
        return score(model, side)

    def slow_write(tensors, path, **arguments):
        write(tensors, path, **arguments)
        rest()

    if what == "saving":
        checkpoint.save_file = slow_write
    else:
        trainer._score = slow_score


def die_writing_weights(name: str) -> None:
    """Let the process be killed when half of the weights ``name`` are written."""
    write = student_weights.save_file

    def half(tensors, path, **arguments):
        write(tensors, path, **arguments)
        if name in path.name:
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    student_weights.save_file = half


def train(
    tell,
    folder: str,
    *,
    session: int = 0,
    steps_now: int | None = None,
    crash_at: str = "",
    crash_save: int = 1,
    die_writing: str = "",
    rest_in: str = "",
    forget_random_state: bool = False,
    **changes,
):
    """One session of the run in ``folder``: from where it stands to its end, or for ``steps_now`` steps."""
    folder = Path(folder)
    if die_writing:
        die_writing_weights(die_writing)
    again = any((folder / "ckpt").glob("step-*"))  # before the first save a run is made by its cells alone
    begin(1000 + session if again else 5)
    trainer = build_run(folder, again=again, **changes)
    say_saves(tell, crash_at, crash_save)
    if forget_random_state:
        trainer.resume()
        trainer._rng = None
        begin(1000 + session)
    say_evaluations(trainer, tell)
    if rest_in:
        rest_inside(trainer, tell, rest_in)
    trainer.callbacks.append(Say(tell))
    trainer.fit(steps_now)


FORBIDDEN = (
    *("pickle", "marshal", "subprocess", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "pty"),
    *("ctypes.dlopen", "socket.connect", "socket.bind", "socket.getaddrinfo", "os.chmod", "os.chown", "os.link"),
)
"""Audit events that a resume has no use for, by their beginnings."""


def resume_watched(tell, folder: str):
    """Resume under a hook that sees everything unpickled, started or opened; tells what must not be."""
    allowed = tuple(os.path.realpath(p) for p in (folder, sys.prefix, sys.base_prefix, *filter(None, sys.path)))
    watching, seen = [True], []

    def watch(event, arguments):
        if not watching[0]:
            return
        if event.startswith(FORBIDDEN):
            seen.append(event)
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.realpath(os.fsdecode(arguments[0]))
            if not path.startswith((*allowed, "/proc/")):
                seen.append(f"open {path}")

    sys.addaudithook(watch)
    import pickle

    pickle.loads(pickle.dumps(Path))
    with open(os.devnull):
        pass
    hooked = [event.split()[0] for event in seen]
    seen.clear()
    begin(77)
    trainer = build_run(Path(folder), again=True)
    trainer.resume()
    watching[0] = False
    tell(f"hook saw {' '.join(sorted(set(hooked)))}")
    tell(f"resumed {trainer.step}")
    tell(f"seen {json.dumps(seen)}")


CHILDREN = {function.__name__: function for function in (train, resume_watched)}
