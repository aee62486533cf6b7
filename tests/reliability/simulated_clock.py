"""Sessions whose clock is simulated: the steps are real, what they take is made up, and hours pass in a second."""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from campaign import Counts, uninterrupted
from same_run import begin, build_run, differences, outcome

from kd_kit import checkpoint
from kd_kit.session import Session, process_age

STEPS, EVAL_EVERY = 12, 5


class Clock:
    """Shows what it was set to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass(frozen=True)
class Pace:
    """What things take, in seconds: the session has ``budget`` of them, and a save is due after ``between_saves``."""

    budget: float
    start: float
    step: float
    save: float
    evaluation: float
    between_saves: float

    @property
    def most_unused(self) -> float:
        """What may be left of a session that stopped for its time: room for two steps, evaluations and saves."""
        return 30 + 2 * self.step + 2 * (self.evaluation + self.save)


def random_pace(chance: random.Random) -> Pace:
    """From steps of a tenth of a second to a minute; the session has room for at least a few."""
    step, save, evaluation = (10 ** chance.uniform(-1, top) for top in (1.8, 2, 2.3))
    # the first session evaluates teacher and student, takes a step, evaluates once more and saves
    least = 60 + 4 * step + 3 * (evaluation + save)
    return Pace(
        budget=least + step * chance.uniform(0, STEPS / 2),
        start=chance.uniform(0, 20),
        step=step,
        save=save,
        evaluation=evaluation,
        between_saves=chance.choice([0, 10 * step, 1e6]),
    )


@contextmanager
def simulated(clock: Clock) -> Iterator[None]:
    """Every file of kd_kit looks at this clock within the block."""
    shown = SimpleNamespace(**(vars(time) | {"monotonic": clock, "perf_counter": clock}))
    files = [m for name, m in list(sys.modules.items()) if name.startswith("kd_kit.") and vars(m).get("time") is time]
    write = checkpoint.save_checkpoint
    for file in files:
        file.time = shown
    try:
        yield
    finally:
        checkpoint.save_checkpoint = write
        for file in files:
            file.time = time


def session_at_pace(
    folder: Path, pace: Pace, number: int, clock: Clock, *, before_step: Mapping[int, float] | None = None
) -> tuple[str, float]:
    """One session; why it stopped, and how many seconds it had left then.

    Args:
        before_step: steps at which the clock jumps, and by how many seconds.
    """
    clock.now += pace.start
    session = Session(
        folder, device="cpu", precision="no", budget=process_age() + pace.budget - pace.start, clock=clock
    )
    begin(1000 + number if number else 5)
    settings = {"steps": STEPS, "eval_every": EVAL_EVERY, "save_minutes": pace.between_saves / 60}
    trainer = build_run(folder, again=number > 0, session=session, **settings)
    trainer.callbacks = []
    write, score, step = checkpoint.save_checkpoint, trainer._score, trainer._train_step

    def slow_save(*arguments, **more):
        clock.now += pace.save
        return write(*arguments, **more)

    def slow_score(*arguments):
        clock.now += pace.evaluation
        return score(*arguments)

    def slow_step(*arguments):
        clock.now += pace.step + (before_step or {}).get(trainer.step + 1, 0.0)
        return step(*arguments)

    checkpoint.save_checkpoint, trainer._score, trainer._train_step = slow_save, slow_score, slow_step
    try:
        return trainer.fit(), session.remaining()
    finally:
        checkpoint.save_checkpoint = write


def run_at_pace(folder: Path, pace: Pace) -> list[tuple[str, float]]:
    """Sessions, one after the other, until the run is finished: (why it stopped, seconds left) of each."""
    clock, sessions = Clock(), []
    with simulated(clock):
        while not sessions or sessions[-1][0] != "finished":
            assert len(sessions) < 3 * STEPS, f"comes to no end: {sessions}"
            sessions.append(session_at_pace(folder, pace, len(sessions), clock))
    return sessions


def faults_of(pace: Pace, sessions: list[tuple[str, float]]) -> list[str]:
    """What was wrong about the sessions of a run: too long, too short, or ended otherwise."""
    faults = []
    for number, (reason, left) in enumerate(sessions):
        if left < -0.5:  # a process's age is known to a few hundredths of a second
            faults.append(f"session {number} took {-left:.1f} s more than it had")
        if reason != "finished":
            if reason != "the session's time is over":
                faults.append(f"session {number} stopped: {reason}")
            if left > pace.most_unused:
                faults.append(f"session {number} left {left:.1f} s of {pace.budget:.1f} unused")
    return faults


def clock_campaign(folder: Path, seed: int, count: int, progress=lambda line: None) -> Counts:
    """``count`` runs at random paces, each through as many sessions as that takes."""
    counts, sessions_made = Counts("sessions that run out of time"), 0
    for number in range(count):
        pace, run = random_pace(random.Random(f"{seed} {number}")), folder / f"pace-{number}"
        sessions = run_at_pace(run, pace)
        sessions_made += len(sessions)
        counts.tried += 1
        if faults := faults_of(pace, sessions):
            counts.lost += 1
            counts.notes.append(f"seed {seed}, number {number}: {'; '.join(faults)}; {pace}")
        elif different := differences(outcome(run), uninterrupted(steps=STEPS, eval_every=EVAL_EVERY)):
            counts.silent += 1
            counts.notes.append(f"seed {seed}, number {number}: {len(different)} differ: {different[:3]}; {pace}")
        shutil.rmtree(run)
        progress(f"{counts.name} {counts.tried} of {count}")
    counts.notes.append(f"seed {seed}; {sessions_made} sessions in all")
    return counts
