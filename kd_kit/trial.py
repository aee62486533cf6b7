"""A few real steps of a run, made beside it: on copies of its models, in a folder of its own that is gone afterwards.

What a run costs and what its first steps do is then known before it begins, and the run is as it was.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from kd_kit.evaluation import Agreement, agreement
from kd_kit.floor import teacher_pass, text_loss
from kd_kit.likelihood import Score, score
from kd_kit.memory import size_of
from kd_kit.module import DistillModule
from kd_kit.optimizer import clip_gradients
from kd_kit.run_lock import RunLocked, lock_run
from kd_kit.student_weights import mark_stepped
from kd_kit.tensor_tree import capture_rng, restore_rng
from kd_kit.terms import LossTerm, StudentOutput, lm_term
from kd_kit.trainer import Trainer
from kd_kit.types import DistillBatch, TeacherSignal

_FOLDER = ".preflight-"
_BEFORE_SAVE = 2  # steps before the trial's checkpoint; one more follows it
_PAIRS = 3  # of a full step and one at its floor, timed in turn
_SLOW = 5.0  # seconds of a step from which one such pair has to do
_WINDOWS = 16  # held-out windows that both models are scored on
_NEVER = sys.maxsize  # as ``measure_every``


class Trial:
    """What a few steps of a run measured. A stage that failed has what went wrong in ``errors``, by its name.

    Stages: "copy", "settle", "values", "student score", "teacher score", "agreement", "reach", "steps", "save",
    "clock", "resume".

    Attributes:
        values: {term: mean on the first batch, without autocast, or what went wrong}; None where it has no position.
        halved: the same with everything that the teacher says in half precision; empty where the teacher is.
        cells: {key of a reading: (cells per position, mean mass without a cell)}.
        span_tokens: student tokens of a span of more than one, mean over the first batch.
        scores: {"student" | "teacher": :class:`kd_kit.evaluation.Score`}. agreement: without autocast, as the scores.
        score_seconds: that the student's took, per window.
        reached: {parameter: whether its gradient was not 0 in some backward pass}; those without gradient are missing.
        records: of the trial's steps, as the run's history keeps them.
        rates: [(step, [(name of a parameter group, learning rate it had)])]; two groups may share a name.
        saved_bytes: of one checkpoint on disk. save_seconds: that it took.
        apart: largest difference between the weights of an uninterrupted and a resumed step.
        step_seconds, floor_seconds: of a step, and of one teacher body forward with one student step on the text alone;
            medians, None where not measured. measured_seconds: of a step that compares gradients.
        peak: of the card's memory, less what lay idle there; None on the CPU.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.errors: dict[str, Exception] = {}
        self.values: dict[str, float | Exception | None] = {}
        self.halved: dict[str, float | Exception | None] = {}
        self.cells: dict[str, tuple[int, float]] = {}
        self.span_tokens = 1.0
        self.scores: dict[str, Score] = {}
        self.score_seconds: float | None = None
        self.agreement: Agreement | None = None
        self.reached: dict[str, bool] = {}
        self.records: list[dict] = []
        self.rates: list[tuple[int, list[tuple[str, float]]]] = []
        self.saved_bytes: int | None = None
        self.save_seconds = 0.0
        self.apart: float | None = None
        self.step_seconds: float | None = None
        self.floor_seconds: float | None = None
        self.measured_seconds: float | None = None
        self.peak: int | None = None
        self._device = trainer.session.device
        self._seen: dict[str, Tensor] = {}
        self._copy: Trainer | None = None
        self._after: dict[str, Tensor] = {}  # weights after the step behind the checkpoint

    def need(self, *stages: str) -> None:
        """Raise what went wrong in one of these stages, if anything did."""
        for stage in stages:
            if stage in self.errors:
                raise self.errors[stage]

    def run(self) -> Trial:
        """All stages, one after the other; returns itself. The folder goes in any case."""
        rng = capture_rng()
        try:
            with contextlib.ExitStack() as stack:
                self._stages(lambda: stack.enter_context(_own_folder(self.trainer.session.folder)))
        finally:
            self._copy = None
            self._after.clear()
            gc.collect()  # what accelerate wraps refers to itself
            restore_rng(*rng)
        return self

    def _stages(self, enter: Callable[[], Path]) -> None:
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        self._stage("copy", lambda: self._make_copy(enter()))
        self._stage("settle", self._settle, "copy")
        self._stage("values", self._look, "settle")
        self._stage("student score", self._score_student, "copy")
        if self.trainer.teacher is not None:
            self._stage("teacher score", self._score_teacher, "copy")
            self._stage("agreement", self._agree, "copy")
        self._stage("reach", self._reach, "settle")
        self._stage("steps", self._steps, "settle")
        self._stage("save", self._save, "steps")
        self._stage("clock", self._clock, "steps")
        if cuda:
            # the trainer's own student and optimizer lie idle beside the copies; its run has them once
            idle = [*self.trainer.module.parameters()]
            idle += [t for state in self.trainer.optimizer.state.values() for t in state.values() if torch.is_tensor(t)]
            self.peak = torch.cuda.max_memory_allocated(self._device) - size_of(t for t in idle if t.is_cuda)
        self.reached = {name: bool(seen) for name, seen in self._seen.items()}
        self._copy = None
        gc.collect()  # the next one has an optimizer of its own
        self._stage("resume", self._resume, "save")

    def _stage(self, name: str, function: Callable[[], None], *after: str) -> None:
        failed = next((self.errors[stage] for stage in after if stage in self.errors), None)
        try:
            if failed is None:
                function()
        except Exception as error:  # said on the line that needs it; the other lines go on
            failed = error
        if failed is not None:
            self.errors[name] = failed.with_traceback(None)  # its frames would keep the copies alive

    # --- stages -------------------------------------------------------------------------------------------------

    def _make_copy(self, folder: Path) -> None:
        """A trainer at the place where the given one is, with nothing in common that a step changes."""
        self._folder = folder
        self._copy = self._new_trainer()
        groups, state = self.trainer._state()
        groups["optim"] = {name: t.clone() for name, t in groups["optim"].items()}  # loading it does not copy
        self._copy._load(groups, state | {"save_number": 0})
        self._copy._resumed = True
        for name, parameter in self._copy.module.named_parameters():
            if parameter.requires_grad:
                parameter.register_hook(functools.partial(self._saw, name))

    def _new_trainer(self) -> Trainer:
        one = self.trainer
        memo: dict = {} if one.teacher is None else {id(one.teacher.model): one.teacher.model}
        student = copy.deepcopy(one.student, memo)
        mark_stepped(student, False)  # to the trial's trainer it is a new one
        made = Trainer(
            student,
            one.teacher,
            one.data,
            [_copied(term, memo) for term in one.terms],
            session=one.session.within(self._folder.name),
            total_steps=one.planned_steps,
            settings=dict(one.settings),
            schedule=one.schedule,
            lr_schedule=one.lr_schedule,
            balance=one.balance,
        )
        made.callbacks = []
        made._holds_lock = True  # of its folder, by the block around the trial
        return made

    def _settle(self) -> None:
        self._copy.settle()
        every = self._copy.settings["accumulation"]
        self._places = list(self._copy.cursor.upcoming((_BEFORE_SAVE + 1) * every))
        found = list(self._copy.data.batches(self._copy.settings["seed"], self._places))
        self._batches = [found[i : i + every] for i in range(0, len(found), every)]

    def _look(self) -> None:
        """Every term without autocast, the teacher in its own precision and in half."""
        one, host = self._copy, self._batches[0][0]
        batch = host.to(self._device)
        lengths = host.span_student.diff(dim=1)[host.span_mask]
        if bool((lengths > 1).any()):
            self.span_tokens = float(lengths[lengths > 1].float().mean())
        asked = one.teacher is not None and one.module.needs.teacher
        signal = one.teacher.signal(batch) if asked else None
        one.module.eval()
        with torch.no_grad():
            output = one.module.output(batch)
            self.values = {t.name: self._value(t, output, signal, batch, host) for t in one.terms}
            if asked and next(one.teacher.model.parameters()).dtype == torch.float32:
                half = signal.mapped(_in_half)
                self.halved = {t.name: self._value(t, output, half, batch, host) for t in one.terms}
        for key, cells in {} if signal is None else signal.cells.items():
            tail = cells.tail.exp()
            self.cells[key] = (cells.log_probs.shape[-1], float(tail.mean()) if len(tail) else 0.0)

    def _value(
        self, term: LossTerm, output: StudentOutput, signal: TeacherSignal | None, batch: DistillBatch, host
    ) -> float | Exception | None:
        try:
            total = DistillModule(self._copy.student, [term]).values(output, signal, batch)[term.name].sum
            count = term.count(host)
            return float(total) / count if count else None
        except Exception as error:  # of this term alone
            return error.with_traceback(None)

    def _score_student(self) -> None:
        started, windows = time.monotonic(), self._copy.data.held_out
        self.scores["student"] = score(self._copy.student, windows, limit=_WINDOWS)
        self.score_seconds = (time.monotonic() - started) / min(len(windows), _WINDOWS)

    def _score_teacher(self) -> None:
        one = self._copy
        with one.teacher.awake():
            self.scores["teacher"] = score(one.teacher.model, one.data.held_out, side="teacher", limit=_WINDOWS)

    def _agree(self) -> None:
        one = self._copy
        with one.teacher.awake():
            found = agreement({"student": one.student}, one.teacher, one.data.held_out, batch_size=4, limit=4)
        self.agreement = found["student"]

    def _reach(self) -> None:
        """One backward pass through every term alike, whatever the schedule has them at now."""
        one, host = self._copy, self._batches[0][0]
        batch = host.to(self._device)
        one.module.train()
        signal = one.teacher.signal(batch) if one.teacher is not None and one.module.needs.teacher else None
        with one.accelerator.autocast():
            values = one.module.values(one.module.output(batch), signal, batch)
        means = [values[t.name].sum.float() / max(t.count(host), 1) for t in one.terms if t.weight > 0]
        one.accelerator.backward(torch.stack(means).sum())
        one.optimizer.zero_grad(set_to_none=True)

    def _saw(self, name: str, gradient: Tensor) -> None:
        moves = gradient.detach().ne(0).any()
        self._seen[name] = self._seen[name] | moves if name in self._seen else moves

    def _steps(self) -> None:
        one = self._copy
        one.module.train()
        one.settings["measure_every"] = 1
        self.measured_seconds = self._step(0)
        one.settings["measure_every"] = _NEVER
        for number in range(1, _BEFORE_SAVE):
            self.step_seconds = self._step(number)
        one._flush()
        self.records = [r for r in one.history.records if r["kind"] == "train"]

    def _step(self, number: int, one: Trainer | None = None) -> float:
        """A step of the trial's trainer, the seconds it took."""
        one = one or self._copy
        step = one.step
        started = self._now()
        every = one.settings["accumulation"]
        one._train_step(self._batches[number], started, self._places[number * every : (number + 1) * every])
        self.rates.append((step, [(group["name"], group["lr"]) for group in one.optimizer.param_groups]))
        return self._now() - started

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.monotonic()

    def _save(self) -> None:
        one = self._copy
        started = time.monotonic()
        info = one.save()
        self.save_seconds = time.monotonic() - started
        self.saved_bytes = sum(file.stat().st_size for file in info.path.iterdir())
        self._step(_BEFORE_SAVE)
        self._after = _weights(one)

    def _clock(self) -> None:
        """Full steps and steps at their floor in turn, so that a machine that is busy is as busy for both."""
        plain = DistillModule(self._copy.student, [lm_term(1.0)])
        full, floor = [], []
        for _ in range(_PAIRS if self.step_seconds < _SLOW else 1):
            full.append(self._step(_BEFORE_SAVE))
            floor.append(self._floor_step(plain))
        self.step_seconds, self.floor_seconds = statistics.median(full), statistics.median(floor)

    def _floor_step(self, plain: DistillModule) -> float:
        """The teacher's body over the text, where it is not cached, and the student's step on the text alone."""
        one, batches = self._copy, self._batches[_BEFORE_SAVE]
        started = self._now()
        count = sum(len(batch.rows) for batch in batches)
        for host in one._pieces(batches):
            batch = host.to(self._device, non_blocking=True)
            teacher_pass(one.teacher, batch)
            total = text_loss(plain, batch, one.accelerator, count)
            one.accelerator.backward(total)
        one.accelerator.unscale_gradients()
        clip_gradients(plain, one.settings["max_grad_norm"])
        one.optimizer.step()
        one.optimizer.zero_grad(set_to_none=True)
        return self._now() - started

    def _resume(self) -> None:
        """The step behind the checkpoint once more, by a trainer that has it from disk."""
        second = self._new_trainer()
        second.settings["measure_every"] = _NEVER
        second.resume()
        second.settle()
        second.module.train()
        self._step(_BEFORE_SAVE, second)
        again = _weights(second)
        self.apart = 0.0
        for name, before in self._after.items():
            if not torch.equal(before, again[name]):
                self.apart = max(self.apart, float((before.double() - again[name].double()).abs().max()))


def _copied(term: LossTerm, memo: dict) -> LossTerm:
    """A term whose trained parts and other state are copies; functions are what they are."""
    fields = {name: copy.deepcopy(getattr(term, name), memo) for name in ("rows", "value", "gather", "over")}
    return dataclasses.replace(term, **fields)


def _weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: t.detach().to("cpu", copy=True) for name, t in trainer.module.state_dict().items()}


def _in_half(tensor: Tensor) -> Tensor:
    """Floating-point numbers in float16, or in bfloat16 where some of them do not fit."""
    if not tensor.is_floating_point():
        return tensor
    half = tensor.half()
    return half if torch.equal(half.isinf(), tensor.isinf()) else tensor.bfloat16()


@contextlib.contextmanager
def _own_folder(run: Path) -> Iterator[Path]:
    """A folder inside the run's, on the same disk; removed at the end, with those that killed processes left."""
    there = run.exists()
    run.mkdir(parents=True, exist_ok=True)
    for old in run.glob(f"{_FOLDER}*"):
        with contextlib.suppress(RunLocked, OSError), lock_run(old):  # a living process has it
            shutil.rmtree(old, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=run))
    try:
        with lock_run(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not there:
            with contextlib.suppress(OSError):
                run.rmdir()
