"""Memory that does not suffice, once or from then on, at any place of a run: it goes on in smaller pieces.

Every blow is one run of two sessions, compared with one that nothing strikes: the same windows in every step, and the
same losses but for the order in which numbers are added.
"""

from __future__ import annotations

import functools
import math
import random
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from campaign import Counts
from helpers import make_trainer, small_data, tiny_student
from same_run import begin

from kd_kit import feature_term, kd_term, lm_term
from kd_kit.history import History

STEPS, BATCH, PIECES = 8, 4, 3
"""Of the run: steps, windows of a micro-batch, and micro-batches of a step."""

CLOSE = 1e-4
"""How far a loss may be off, as a part of it: sums of floats depend on their order."""

TRAINING, EVALUATION, STATISTICS = "training step", "evaluation", "statistics before the first step"

PLACES = {
    "the student's forward pass": ("student", TRAINING),
    "the teacher's forward pass": ("teacher", TRAINING),
    "the backward pass": ("student", TRAINING),
    "the second of three micro-batches": ("student", TRAINING),
    "an evaluation": ("student", EVALUATION),
    "the teacher's evaluation": ("teacher", EVALUATION),
    "the statistics": ("student", STATISTICS),
    "the teacher in the statistics": ("teacher", STATISTICS),
}
"""{where memory lacks: the model that runs there, and what the run does meanwhile}"""

ERRORS: dict[str, Callable[[], Exception]] = {
    "CUDA": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a capacity of"),
    "the allocator of the CPU": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:114] data. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
        "8589934592 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "Python": MemoryError,
}


@dataclass(frozen=True)
class Lack:
    """Where memory lacks, and when.

    Attributes:
        place: one of ``PLACES``. error: one of ``ERRORS``.
        fits: windows at once that there is room for from then on; None where it fails once only.
        step: from which on, counted from 0. session: steps of the first session, which lie behind it.
    """

    place: str
    error: str
    fits: int | None
    step: int
    session: int

    @property
    def left(self) -> int:
        """Windows at once that the run comes down to."""
        found = BATCH
        while found > (self.fits or BATCH // 2):
            found = (found + 1) // 2
        return found


def random_lack(chance: random.Random, number: int) -> Lack:
    """Every place in turn, so that few blows meet all of them."""
    place = list(PLACES)[number % len(PLACES)]
    # before the first step: the teacher is evaluated there only, and the parts are settled
    early = place == "the teacher's evaluation" or PLACES[place][1] == STATISTICS
    step = 0 if early else chance.randint(0, STEPS - 3)
    return Lack(
        place,
        chance.choice(list(ERRORS)),
        chance.choice([None, 1, 2, 3]),
        step,
        # evaluations come after every second step
        chance.randint(step + 2, STEPS - 1),
    )


@contextmanager
def lacking(trainer, lack: Lack) -> Iterator[list[int]]:
    """Memory lacks within the block; gives how many windows there were each time that it did."""
    side, wanted = PLACES[lack.place]
    model = trainer.student if side == "student" else trainer.teacher.model
    doing, raised, calls = [""], [], [0]
    within = trainer.within_memory

    def told(work, what):
        def begun():
            doing[0], calls[0] = what, 0
            return work()

        try:
            return within(begun, what)
        finally:
            doing[0] = ""

    def fail(windows: int) -> None:
        if windows > (lack.fits or 0) and (lack.fits is not None or not raised):
            raised.append(windows)
            raise ERRORS[lack.error]()

    def before(module, arguments, named):
        if doing[0] != wanted or trainer.step < lack.step:
            return
        calls[0] += 1
        windows = len(named["input_ids"])
        if lack.place == "the second of three micro-batches" and calls[0] != 2:
            return
        if lack.place != "the backward pass":
            fail(windows)

    def behind(module, arguments, named, output):
        if lack.place == "the backward pass" and doing[0] == wanted and trainer.step >= lack.step:
            windows = len(named["input_ids"])
            output.last_hidden_state.register_hook(lambda gradient: fail(windows))

    trainer.within_memory = told
    body = model.get_decoder()
    handles = [
        body.register_forward_pre_hook(before, with_kwargs=True),
        body.register_forward_hook(behind, with_kwargs=True),
    ]
    try:
        yield raised
    finally:
        for handle in handles:
            handle.remove()


def build(folder: Path, *, again: bool = False):
    """A trainer of a run without dropout, which draws other numbers for other pieces."""
    trainer = make_trainer(
        folder,
        student=tiny_student(int(again), attention_dropout=0.0),
        data=small_data(batch_size=BATCH),
        terms=[lm_term(0.3), kd_term(0.5, top_k=8), feature_term(0.2)],
        steps=STEPS,
        eval_every=2,
        eval_windows=BATCH,
        accumulation=PIECES,
        measure_every=3,
        early_stopping=None,
    )
    trainer.callbacks = []
    return trainer


def told_by(folder: Path) -> tuple[list, list[float]]:
    """The batches of every step of a run, and its losses and evaluations, in order."""
    history = History.load(folder / "metrics.jsonl")
    steps = [r for r in history.records if r["kind"] == "train"]
    losses = [t["value"] for r in steps for t in r["terms"].values()] + [r["total"] for r in steps]
    return [(r["step"], r["batches"]) for r in steps], losses + history.evaluations()[1]


@functools.cache
def with_enough() -> tuple[list, list[float]]:
    """What the run tells for which memory suffices."""
    folder = Path(tempfile.mkdtemp(prefix="kd_kit-memory-"))
    begin(5)
    build(folder).fit()
    found = told_by(folder)
    shutil.rmtree(folder)
    return found


def alarms_of(folder: Path) -> list[str]:
    return [e["text"] for e in History.load(folder / "metrics.jsonl").events if e["what"] == "alarm"]


def run_lacking(folder: Path, lack: Lack) -> tuple[str, str]:
    """Two sessions of a run: what is wrong about it, and what it does not tell; "" where nothing is."""
    begin(5)
    trainer = build(folder)
    with lacking(trainer, lack) as raised:
        trainer.fit(lack.session)
    if not raised:
        return "memory never lacked: the blow shows nothing", ""
    begin(1000)
    again = build(folder, again=True)
    again.resume()
    if again.micro_batch != lack.left:
        return f"expected the second session to begin with {lack.left} windows at once, got {again.micro_batch}", ""
    with lacking(again, lack if lack.fits else Lack(lack.place, lack.error, BATCH, 0, 0)) as raised_again:
        reason = again.fit()
    if reason != "finished" or raised_again:
        return f"expected it to finish, and nothing to fail again, got {reason!r}, {raised_again}", ""
    (steps, losses), (expected, right) = told_by(folder), with_enough()
    if steps != expected or len(losses) != len(right):
        return "other batches, or other records", ""
    off = max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(losses, right, strict=True))
    if not off <= CLOSE:
        return f"a loss is off by {off:.2g} of it", ""
    if not all(bool(p.isfinite().all()) for p in again.module.parameters()):
        return "the weights are not finite", ""
    beginning = f"out of memory in the {PLACES[lack.place][1]}: "
    said = [text for text in alarms_of(folder) if text.startswith(beginning)]
    halvings = round(math.log2(BATCH / lack.left))
    return "", "" if len(said) == halvings else f"expected {halvings} alarms of {beginning!r}, got {alarms_of(folder)}"


def memory_campaign(
    folder: Path,
    seed: int,
    count: int,
    progress: Callable[[str], None] = lambda line: None,
    numbers: Sequence[int] | None = None,
) -> Counts:
    """``count`` runs whose memory does not suffice somewhere; ``numbers``: only these of them."""
    counts = Counts("lack of memory")
    for number in range(count) if numbers is None else numbers:
        lack, run = random_lack(random.Random(f"{seed} {number}"), number), folder / f"lack-{number}"
        counts.tried += 1
        try:
            broken, unsaid = run_lacking(run, lack)
        except Exception as error:  # the run is broken, the campaign is not
            broken, unsaid = f"{type(error).__name__}: {error}", ""
        counts.lost += bool(broken)
        counts.silent += bool(unsaid and not broken)
        if broken or unsaid:
            counts.notes.append(f"seed {seed}, number {number}: {broken or unsaid}; {lack}")
        shutil.rmtree(run, ignore_errors=True)
        progress(f"{counts.name} {counts.tried} of {count}")
    counts.notes.append(f"seed {seed}; memory lacked in {min(len(PLACES), counts.tried)} places of a run")
    return counts
