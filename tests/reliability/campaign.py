"""Runs that are struck while they train: a nursery of processes, and campaigns that strike and count.

A nursery is a process that has torch, tokenizers, text and teacher already and forks a child for each order, so that a
session costs a second instead of ten. Started as a script, this file is the nursery. Children tell what they do, a line
each, through a pipe that is read until they die.
"""

from __future__ import annotations

import atexit
import faulthandler
import functools
import itertools
import json
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from children import CHILDREN, PATIENCE
from helpers import pair, small_data, teacher, tiny_student
from same_run import differences, leftovers, newest_good, outcome


def tend_nursery() -> None:
    """Fork a child per order, until the orders end; then no child outlives them."""
    pair(), small_data(), teacher(), tiny_student()
    alive = set()
    for line in sys.stdin:
        order = json.loads(line)
        if "wait" in order:
            print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
            alive.discard(order["wait"])
            continue
        pid = os.fork()
        if pid == 0:
            live(order)
        alive.add(pid)
        print(pid, flush=True)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)


def live(order: dict) -> None:
    """The whole life of a child."""
    code = 1
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log, 1), os.dup2(log, 2)
        faulthandler.dump_traceback_later(PATIENCE, exit=True)
        told = os.open(order["told"], os.O_WRONLY)
        tell = lambda line: os.write(told, f"{line}\n".encode())  # noqa: E731
        tell("started")
        try:
            CHILDREN[order["child"]](tell, **order["arguments"])
            code = 0
        except BaseException as error:
            tell(f"failed {type(error).__name__}: {' '.join(str(error).split())}")
            raise
    except KeyboardInterrupt:
        code = 130  # as a program ends that was interrupted
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


class Child:
    """A process that the nursery made, what it has told so far, and its end."""

    def __init__(self, nursery: Nursery, pid: int, pipe: int, log: Path):
        self.nursery, self.pid, self.pipe, self.log = nursery, pid, pipe, log
        self.told: list[str] = []
        self.ended = False
        self._rest = b""

    def read(self, seconds: float = 0.0) -> bool:
        """Take in what it tells within so many seconds; False when there was nothing."""
        if self.ended or not select.select([self.pipe], [], [], seconds)[0]:
            return False
        found = os.read(self.pipe, 1 << 16)
        self.ended = not found
        *lines, self._rest = (self._rest + found).split(b"\n")
        self.told += [line.decode() for line in lines]
        return bool(found)

    def wait_for(self, beginning: str, count: int = 1) -> bool:
        """Wait until it tells a line that begins so, for the ``count``-th time; False if it ends before."""
        deadline = time.monotonic() + PATIENCE
        while sum(line.startswith(beginning) for line in self.told) < count and not self.ended:
            assert time.monotonic() < deadline, f"waited for {beginning!r}: {self.told[-5:]}\n{self.output()}"
            self.read(0.5)
        return not self.ended

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for something that it does and does not tell."""
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"{self.told[-5:]}\n{self.output()}"
            self.read(0.002)

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)  # not buried before wait(), so the number is still its own

    def go_on(self) -> None:
        """End its rest; see :func:`rest_inside`."""
        self.kill(signal.SIGUSR1)

    def wait(self) -> int:
        """Its exit code, and everything that it told."""
        code = int(self.nursery.ask({"wait": self.pid}))
        while self.read():
            pass
        os.close(self.pipe)
        return code

    def last(self, beginning: str) -> str | None:
        """What follows this beginning in the last line that has it."""
        found = [line for line in self.told if line.startswith(beginning)]
        return found[-1].removeprefix(beginning).strip() if found else None

    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


class Nursery:
    """Makes children; see the head of this file."""

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="kd_kit-nursery-"))
        self.numbers = itertools.count()
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        environment.pop("KD_KIT_CRASH_AT", None)
        self.process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, order: dict) -> str:
        print(json.dumps(order), file=self.process.stdin, flush=True)
        return self.process.stdout.readline()

    def start(self, child: str, folder: Path, **arguments) -> Child:
        """A living child that works in ``folder``."""
        number = next(self.numbers)
        told, log = self.folder / f"{number}.told", self.folder / f"{number}.log"
        os.mkfifo(told)
        pipe = os.open(told, os.O_RDONLY | os.O_NONBLOCK)
        order = {"child": child, "arguments": {"folder": str(folder)} | arguments, "told": str(told), "log": str(log)}
        return Child(self, int(self.ask(order)), pipe, log)

    def run(self, child: str, folder: Path, **arguments) -> Child:
        """A child that has ended well.

        Raises:
            AssertionError: it did not.
        """
        made = self.start(child, folder, **arguments)
        code = made.wait()
        assert code == 0, f"{child} ended with {code}: {made.told[-3:]}\n{made.output()}"
        return made

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@functools.cache
def nursery() -> Nursery:
    """The one of this process."""
    made = Nursery()
    atexit.register(made.close)
    return made


@functools.cache
def uninterrupted(**changes) -> dict[str, str]:
    """What the run gives when nothing strikes it; with other settings too."""
    folder = nursery().folder / f"uninterrupted-{next(nursery().numbers)}"
    nursery().run("train", folder, **changes)
    return outcome(folder)


@dataclass
class Counts:
    """How a campaign went.

    Attributes:
        tried: blows that fell. inside: those of them that fell inside a save.
        survived: after which everything saved was there and the run ended as an uninterrupted one.
        lost: something saved was gone, or the run could not go on.
        silent: it went on, and ended as another run without a word.
        notes: what else there is to know, and how each failure can be repeated.
    """

    name: str
    tried: int = 0
    inside: int = 0
    lost: int = 0
    silent: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def survived(self) -> int:
        return self.tried - self.lost - self.silent


def table(campaigns: Iterable[Counts]) -> str:
    """All campaigns as plain text."""
    rows = [("campaign", "tried", "survived", "lost", "silent")]
    rows += [(c.name, *(f"{n:,}" for n in (c.tried, c.survived, c.lost, c.silent))) for c in campaigns]
    lines = [f"{name:<44}" + "".join(f"{number:>10}" for number in numbers) for name, *numbers in rows]
    return "\n".join([*lines, *(f"{c.name}: {note}" for c in campaigns for note in c.notes)])


def strike(child: Child, chance: random.Random, aim: str) -> None:
    """SIGKILL at a random moment: while it starts, while it trains, or inside a save."""
    if aim == "start":
        time.sleep(chance.uniform(0, 0.4))
    elif aim == "step":
        child.wait_for("running")
        time.sleep(chance.uniform(0, 0.6))
    else:
        child.wait_for("saving", chance.randint(1, 5))
        time.sleep(chance.uniform(0, 0.03))
    child.kill()


def kill_campaign(folder: Path, seed: int, count: int, progress: Callable[[str], None] = lambda line: None) -> Counts:
    """``count`` SIGKILLs, a quarter and more of them aimed into saves, spread over as many runs as that takes."""
    chance, counts, runs = random.Random(seed), Counts("SIGKILL"), 0
    while counts.tried < count:
        runs += 1
        run, blows, saved, broken = folder / f"run-{runs}", 0, -1, ""
        while not broken:
            child = nursery().start("train", run, session=blows)
            if counts.tried + blows < count:
                strike(child, chance, chance.choice(["start", "step", "save", "save", "step"]))
            code = child.wait()
            saved = max([saved, *(int(line.split()[1]) for line in child.told if line.startswith("saved "))])
            newest, refusals = newest_good(run)
            if code == -signal.SIGKILL:
                blows += 1
                counts.inside += (child.told or [""])[-1].startswith("saving")
            if newest < saved or refusals:
                broken = f"step {saved} was saved, and the newest good checkpoint is {newest} ({refusals})"
            elif code == 0:
                break
            elif code != -signal.SIGKILL:
                broken = f"the session after ended with {code}: {child.told[-1:]}"
        counts.tried += blows
        if broken:
            counts.lost += blows
            counts.notes.append(f"seed {seed}, run {runs}, after kill {blows}: {broken}")
        elif different := differences(outcome(run), uninterrupted()) or leftovers(run):
            counts.silent += blows
            counts.notes.append(f"seed {seed}, run {runs}, {blows} kills: {len(different)} differ: {different[:3]}")
        progress(f"{counts.name} {counts.tried} of {count}, {runs} runs")
        shutil.rmtree(run, ignore_errors=True)
    counts.notes.append(f"seed {seed}; {counts.inside} of the kills fell inside a save; {runs} runs were compared")
    return counts


if __name__ == "__main__":
    tend_nursery()
