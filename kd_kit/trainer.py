"""The run: one loop that you can read, on accelerate.

Per optimizer step: fetch the micro-batches, count every term's positions in all of them, ask the teacher, run the
module forward and backward, clip, step, record. A run is a folder; ``fit()`` goes on where the folder says. What a
user wants of a run that is going on (stop, pause, save, evaluate) is looked at between two steps.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import os
import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate.utils import set_seed

from kd_kit import checkpoint
from kd_kit.balance import Balance, fixed
from kd_kit.callbacks import EarlyStopping, PrintLines
from kd_kit.cursor import Cursor
from kd_kit.data import DistillData
from kd_kit.evaluation import ControlUnfinished
from kd_kit.floor import LEAST_STEPS, floor_of, measure_floor
from kd_kit.gradients import place_name
from kd_kit.history import History
from kd_kit.keeping import START, Keeping
from kd_kit.learning_rate import LearningRate
from kd_kit.likelihood import score
from kd_kit.mirror import Mirror
from kd_kit.module import DistillModule, all_needs, settle_parts
from kd_kit.optimizer import build_optimizer
from kd_kit.processes import Processes, ProcessLost
from kd_kit.recovery import Recovery, is_out_of_memory
from kd_kit.run_config import changed_settings, check_run, refuse_other_run, run_config
from kd_kit.session import Session, StopRequests, shown
from kd_kit.stages import Schedule, constant
from kd_kit.steering import TIME_OVER, Steering
from kd_kit.step_log import StepLog
from kd_kit.student_weights import (
    mark_stepped,
    own,
    save_weights,
    start_fingerprint,
    was_stepped,
)
from kd_kit.summary import Summary, summarise
from kd_kit.table import short
from kd_kit.teacher import LiveTeacher
from kd_kit.tensor_tree import capture_rng, restore_rng
from kd_kit.terms import LossTerm, lm_term
from kd_kit.together import ReadHistory, Together
from kd_kit.train_step import StepResult, apply_gradients, take_gradients
from kd_kit.types import DistillBatch

SETTLING_BATCHES = 16
"""Batches of the run that the parts of the terms look at before its first step."""

SAVE_SECONDS = 600
"""Between two checkpoints, where the user says nothing else and saving is quick."""

SAVE_SHARE = 100
"""A save comes no sooner than this many times the seconds that the last one took: 1% of the time at most."""

PACE_AFTER = 20
"""Steps of a session after which it is said how long the run will take."""

RECORD_EVERY = 10
"""Steps between two transfers of what was measured from the device to the host."""

_RUNNING: weakref.WeakValueDictionary[str, Trainer] = weakref.WeakValueDictionary()  # loops of this process, by folder


def save_interval(minutes: float | None, save_seconds: float) -> float:
    """Seconds between two checkpoints, given what the user wants (None: what suits) and what the last one took."""
    return max(SAVE_SECONDS, SAVE_SHARE * save_seconds) if minutes is None else 60 * minutes


def _refuse_other_parts(before: Sequence[LossTerm], after: Sequence[LossTerm]) -> None:
    """Raise where the trained parts of terms have other shapes than those that a run trains."""
    shapes = [
        {t.name: {name: tuple(v.shape) for name, v in t.part.state_dict().items()} for t in terms if t.part}
        for terms in (before, after)
    ]
    if shapes[0] != shapes[1]:
        raise ValueError(
            "change_terms: expected trained parts of the shapes that the run has, got others; a run that has begun "
            "keeps its parts, so give one with other parts another name: build_session(run=...)"
        )


def refuse_uneven(accumulation: int, processes: int) -> None:
    """Raise where the batches of a step cannot be shared out evenly.

    Raises:
        ValueError: they cannot.
    """
    if accumulation % processes:
        below = accumulation // processes * processes
        fit = f"{below} or {below + processes}" if below else f"{processes} or {2 * processes}"
        raise ValueError(
            f"build_trainer: expected accumulation as a multiple of the {processes} processes, got {accumulation}; it "
            f"counts the batches of a step in all processes together, so pass accumulation={fit}"
        )


def refuse_beside_a_running_one(folder: Path, student) -> None:
    """Raise where a run in the background trains in this folder, or trains this student.

    Raises:
        ValueError: one does.
    """
    if str(folder.resolve()) in _RUNNING or any(other.student is student for other in _RUNNING.values()):
        raise ValueError(
            f"build_trainer: expected a run at rest, got one that trains in the background in {str(folder)!r}, or with "
            "this student; stop it first: trainer.stop(); trainer.wait()"
        )


class Trainer(Keeping, Steering, Recovery, Together):
    """A distillation run. Made by :func:`kd_kit.build_trainer`, which explains the arguments.

    Attributes:
        step: optimizer steps done. total_steps: planned.
        history: everything measured, :class:`kd_kit.history.History`.
        control_history: of the LM-only control, once it exists.
        best, best_step: the lowest held-out bits per byte so far, and the step it was seen at.
        callbacks: objects with the hooks of :class:`kd_kit.callbacks.Callback`.
        cursor: where the run stands in its text. micro_batch: windows that go through the models at once; fewer than
            the data's batch_size once the memory did not suffice.
        stop_reason: None while there is something to do; set it to stop the run after the step.
        decay_from: the step at which the learning rate began to fall before its planned time; None if it did not.
        floor_seconds: of a step at its least possible cost on this machine, see :mod:`kd_kit.floor`; measured when
            ``fit()`` begins a session long enough for that, or by :func:`kd_kit.run_preflight`; else None.
    """

    def __init__(
        self,
        student,
        teacher: LiveTeacher | None,
        data: DistillData,
        terms: Sequence[LossTerm],
        *,
        session: Session,
        total_steps: int,
        settings: dict,
        schedule: Schedule,
        lr_schedule: LearningRate,
        balance: Balance | None = None,
        early_stopping: EarlyStopping | None = None,
    ):
        Steering.__init__(self)
        Recovery.__init__(self)
        Together.__init__(self)
        self.session = session
        self.student = student
        self.teacher = teacher
        self.data = data
        self.terms = tuple(terms)
        self.planned_steps = total_steps
        self.settings = settings
        self.schedule = schedule
        self.lr_schedule = lr_schedule
        self.balance = balance or fixed()
        self.callbacks: list = [PrintLines(settings["log_every"])]
        if early_stopping is not None:
            self.callbacks.append(early_stopping)
        self.floor_seconds: float | None = None
        self._control: History | None = None
        self._control_student = None
        self._holds_lock = False
        self._lead = 0.0  # seconds of the session before that
        self._last_save = self.session.now()
        self._save_seconds = self._eval_seconds = 0.0
        self._mirror: Mirror | None = None
        folder = session.folder
        refuse_beside_a_running_one(folder, student)
        self._prepare()
        self._parts_start = copy.deepcopy(self.module.parts.state_dict())
        self.run_id, self._config = self.processes.led(f"build_trainer of {session.name}", self._find_or_begin)
        path = folder / "metrics.jsonl"
        self.history = History(path) if self.processes.leads else ReadHistory(path)
        self._log = self._new_log()
        self._owner = object()
        own(student, self._owner)

    def _find_or_begin(self) -> tuple[str, dict]:
        """The id and the configuration of the run in the folder; a new one begins there."""
        folder, student, config = self.session.folder, self.student, run_config(self)
        self._bring_here(config)
        found = check_run(folder, config)
        History(folder / "metrics.jsonl")  # what cannot be read shows before anything is written
        if found is None and was_stepped(student):
            raise ValueError(
                f"build_trainer: expected an untouched student for the new run in {str(folder)!r}, got one that "
                "another run has trained; build_student again"
            )
        self._config = config
        self.run_id = found or uuid.uuid4().hex[:12]
        if found is None:
            with self._locked():  # of two processes that begin this run at once, one does
                found = check_run(folder, config)
                self.run_id = found or self.run_id
                if found is None:
                    self._write_run()
        elif not (folder / START).exists() and start_fingerprint(student) == config["start"]:
            save_weights(student, folder / START)  # the run was found as a bare checkpoint
        return self.run_id, config

    def _prepare(self) -> None:
        """The state of a run before its first step: counters, module, optimizer, scaler."""
        self.step = 0
        self.skipped_steps = 0
        self.tokens = 0
        self.seconds = 0.0  # of training, over all sessions
        self.save_number = 0
        self.best: float | None = None
        self.best_step: int | None = None
        self.decay_from: int | None = None
        self.stopped_early = False
        self._norms: dict[str, float] = {}  # moving averages of the terms' gradient norms
        self.cursor = Cursor()
        self.micro_batch = self.data.batch_size
        self.returns = self.failed_at = 0
        self._feed = None  # (position, batch) after (position, batch), from the cursor on
        self._bad: list[list[int]] = []  # positions of the steps in a row that had no finite gradient
        self._resumed = False
        self._holds_best = False
        self._rng: tuple | None = None  # of the run while it is at rest: what other cells draw is not drawn from it
        self.accelerator = self.session.engine()
        self.processes = Processes(self.accelerator.state)
        self.module = DistillModule(self.student, self.terms).to(self.session.device)
        self.optimizer = build_optimizer(
            self.module, learning_rate=self.settings["learning_rate"], weight_decay=self.settings["weight_decay"]
        )
        # without a wrapper that would sum gradients in every backward pass: see kd_kit.together
        self._prepared = self.accelerator.prepare_model(self.module, evaluation_mode=True)
        self.optimizer = self.accelerator.prepare_optimizer(self.optimizer)

    # --- what is asked of it ------------------------------------------------------------------------------------

    def _fit(self, steps: int | None) -> str:
        if not self.processes.leads:
            return self._follow_fit()
        return self._led("Trainer.fit", lambda: self._fit_here(steps))

    def _fit_here(self, steps: int | None) -> str:
        with self._locked(), StopRequests() as requests:
            self._requests = requests
            if self._holds_best:
                self._resumed = False  # what goes on goes on from the last weights, not from the best
            self.resume()
            self.stop_reason = None
            end = self.total_steps if steps is None else min(self.total_steps, self.step + steps)
            early = self.stopped_early and self._early_stopping is not None
            if self.step < end and not early:
                if _RUNNING.get(self._address, self) is not self:
                    raise ValueError(
                        f"Trainer.fit: expected a run at rest in {str(self.session.folder)!r}, got another trainer "
                        "that trains there in the background; trainer.stop() and trainer.wait() on that one"
                    )
                if self.teacher is not None:
                    self.teacher.check_terms(self.terms, "Trainer.fit")
                self._loop = threading.current_thread()
                _RUNNING[self._address] = self
                place = self.session.place()
                self._mirror = None if place is None else Mirror(place, self.session.folder)
                try:
                    self._run_to(end, requests)
                except BaseException as error:
                    if isinstance(error, ProcessLost):
                        error = self._lost(error)
                    self.stop_reason = f"failed: {type(error).__name__}: {error}".removesuffix(": ")
                    self.controls.clear()
                    with contextlib.suppress(Exception):  # what ended the run is what is said
                        self._tell("on_stop")
                    if isinstance(error, checkpoint.CheckpointError):  # the save behind the last step: all is whole
                        print(
                            f"{self.session.folder.name}: step {self.step:,} is not saved yet, and still here: make "
                            f"room, then trainer.save() or fit(); {self._save_weights_alone()}"
                        )
                        raise
                    saved = self._saved_step()
                    print(
                        f"{self.session.folder.name}: broken off at step {self.step:,}; fit() goes on from "
                        + (f"the checkpoint of step {saved:,}" if saved else "the start, since nothing was saved yet")
                    )
                    self._prepare()  # a step may be half done: what goes on later goes on from the last checkpoint
                    self._log = self._new_log()
                    if isinstance(error, ProcessLost):
                        raise error from error.__cause__
                    raise
                finally:
                    self._loop = None
                    if self._mirror is not None:
                        self._mirror.close()
                        self._mirror = None
                    _RUNNING.pop(self._address, None)
            else:
                self.stop_reason = "finished" if self.step >= self.total_steps else "paused"
                hint = "other settings or more steps want a run of another name, or steps="
                if early:
                    self.stop_reason, hint = "stopped early", "build_trainer(early_stopping=None) goes on"
                print(
                    f"{self.session.folder.name}: {self.stop_reason} at step {self.step:,} of {self.total_steps:,}, "
                    f"nothing is trained; {hint}"
                )
            if self.stopped_early and self._early_stopping is not None:
                if (self.session.folder / "best.safetensors").exists():
                    self.load_best()
                else:
                    self._event("alarm", "the best weights were not kept; the student has those of the last step")
        return self.stop_reason

    def _run_to(self, end: int, requests: StopRequests) -> None:
        """The loop itself, and the save behind it."""
        self.stopped_early = False
        self._write_run()
        self._begin()
        self._find_floor()
        self._lead = self._lead or self.session.elapsed()
        self._tell_forecast()
        self._last_save = self.session.now()
        if self._time_is_over():
            self.stop_reason = TIME_OVER
        while self.step < min(end, self.total_steps) and self.stop_reason is None:
            started = self.session.now()
            if self._feed is None:  # at the start, and after going back
                self._feed = self._new_feed(end)
                self._feed_from = self.step, end, self.cursor.to_json()
            positions, batches = self._next_batches()
            done = self._train_step(batches, started, positions)
            trained = self.session.now()
            self.seconds += trained - started
            self._step_seconds.append(trained - started)
            if not done.skipped:
                self._bad.clear()
            if not done.skipped or not self._went_back(done, batches, list(positions)):
                self._after_step(end)
            self._longest_pause = max(self._longest_pause, self.session.now() - trained)
            self._heed(requests)
            if self.step >= min(end, self.total_steps) or self.stop_reason is not None:
                self._refuse_broken_weights(positions)
        self._rng = capture_rng()
        self._feed = None  # ends the processes that prepare batches
        self._flush()
        self.stop_reason = self.stop_reason or ("finished" if self.step >= self.total_steps else "paused")
        self.history.append({"kind": "event", "step": self.step, "what": "stopped", "text": self.stop_reason})
        self.save()
        self._flush_copies(requests)
        for what in self.controls.take():  # asked for during the last step's evaluation and save
            {"save": lambda: None, "evaluate": self.evaluate_now, "decay": self._begin_decay}[what]()
        self._tell("on_stop")

    def _begin(self) -> None:
        """What comes before the first step of a session, and before the first one after going back."""
        self.settle()
        self._reference_scores()
        self.module.train()
        self._tell("on_start")
        self._feed = None
        self._first_step = self.step
        if self._rng is not None:
            restore_rng(*self._rng)
        elif self.step == 0:  # so that dropout draws the same in every such run, also when it is back at its start
            set_seed(self.settings["seed"])
        self._hand_over()

    def _find_floor(self) -> None:
        """What a step of this run costs here at the least, once per session; the run goes on as if nothing had been."""
        if self.floor_seconds is not None or self.total_steps - self.step < LEAST_STEPS:
            return
        upcoming = self.cursor.upcoming(self.settings["accumulation"])
        pieces = self._pieces(list(self.data.batches(self.settings["seed"], upcoming)))
        teacher = self.teacher if self.module.needs.teacher else None
        try:
            self.floor_seconds = measure_floor(
                self.student, teacher, pieces, accelerator=self.accelerator, clock=self.session.now
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._event("floor", "not measured: the memory did not suffice")
            return
        self._event("floor", f"{short(self.floor_seconds)} s per step at the least: {floor_of(teacher)}")

    def replace_terms(self, terms: Sequence[LossTerm]) -> str:
        """Go on with these terms, bound to the models; see :func:`kd_kit.trainer_builder.change_terms`."""
        self.resume()
        if self._holds_best:
            raise ValueError(
                "Trainer: expected the weights of the last step, got the best ones, which load_best() put in their "
                "place; build student and trainer again"
            )
        if self.teacher is not None:
            self.teacher.check_terms(terms, "change_terms")
        before = self.terms, self.teacher, run_config(self)
        self.terms = tuple(terms)
        if self.teacher is not None:
            self.teacher = self.teacher.asked(all_needs(self.terms))
        try:
            config = run_config(self)
            if self.step or self._steps_done():
                refuse_other_run(self.session.folder, before[2], config)
                _refuse_other_parts(before[0], self.terms)
        except ValueError:
            self.terms, self.teacher = before[:2]
            raise
        kept = self._state() if self.step else None
        save_number, best = self.save_number, (self.best, self.best_step)
        stays = self.cursor, self.micro_batch, self.decay_from, self.returns, self.failed_at
        self._prepare()
        self.save_number, self.best, self.best_step = save_number, *best
        self.cursor, self.micro_batch, self.decay_from, self.returns, self.failed_at = stays
        self._parts_start = copy.deepcopy(self.module.parts.state_dict())
        if kept is not None:
            groups, state = kept
            self._load(groups, state | {"save_number": save_number})
        self._resumed = True
        if all_needs(before[0]).teacher != self.module.needs.teacher:
            self.floor_seconds = None
        self._config = config | {"start": before[2]["start"] or self._config["start"]}
        self._log = self._new_log()
        self._write_run()
        self._record_run()
        changes = changed_settings(before[2], config)
        text = ", ".join(changes) or "nothing"
        if changes:
            self._event("changed", text)
            self._led("change_terms", self._save_anew)
        return text

    def _save_anew(self) -> None:
        """What is on disk goes on with the terms of now."""
        if any((self.session.folder / "ckpt").glob("step-*")):
            self.save()

    @property
    def _address(self) -> str:
        return str(self.session.folder.resolve())

    def shares_at(self, step: int) -> dict[str, float]:
        """Share of the total of every term at an optimizer step (the first is 0), as things stand now.

        One function for the step itself, for figures of the plan and for whatever weighs losses elsewhere.
        """
        weights = self.balance.weights({t.name: t.weight for t in self.terms}, self._norms)
        return self.balance.floored(self.schedule.shares(weights, min(step / self.total_steps, 1.0)))

    def rate_at(self, step: int) -> float:
        """The student's learning rate at an optimizer step (the first is 0)."""
        factor = self.lr_schedule.factor(step, self.planned_steps, self.decay_from)
        return self.settings["learning_rate"] * factor

    @property
    def rate_factors(self) -> dict[str, float]:
        """{parameter group: its rate relative to the student's}."""
        return {group["name"]: group["rate_factor"] for group in self.optimizer.param_groups}

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run: those planned, fewer where the decay was begun early."""
        if self.decay_from is None:
            return self.planned_steps
        return self.decay_from + self.lr_schedule.decay_steps(self.planned_steps)

    @property
    def _early_stopping(self) -> EarlyStopping | None:
        return next((c for c in self.callbacks if isinstance(c, EarlyStopping)), None)

    def evaluate_now(self) -> float | None:
        """Held-out bits per byte of the student on the run's evaluation windows, recorded in the history.

        Not recorded while the student holds its best weights (:meth:`load_best`), which are of another step. None
        where a run in the background was asked to do it.
        """
        if self._elsewhere():
            return self.controls.want("evaluate")
        return self._led("Trainer.evaluate_now", self._evaluate_now)

    def _evaluate_now(self) -> float:
        self.resume()
        self._flush()
        started = self.session.now()
        result = self._score(self.student)
        self._eval_seconds = self.session.now() - started
        if self._holds_best:
            return result  # of other weights than those of this step: no part of its history
        if math.isfinite(result) and (self.best is None or result < self.best):
            self.best, self.best_step = result, self.step
            self._keep_best()
        self.history.append({"kind": "eval", "step": self.step, "bits_per_byte": result, "seconds": self.seconds})
        self._tell("on_evaluate")
        return result

    def summary(self, report=None, *, expected: Sequence[str | os.PathLike] = ()) -> Summary:
        """For the last cell of a notebook: what was reached, the time it took, the output folder, and how to go on.

        Args:
            report: of :func:`kd_kit.evaluate`, whose sentences are then part of it.
            expected: what else the notebook wrote into Kaggle's output folder, such as the export; anything beside
                that and the run's folder is named, since it is kept as well.
        """
        return summarise(self, report, expected=tuple(expected))

    @property
    def control_history(self) -> History | None:
        """Of the LM-only control; None until it has been trained."""
        path = self.session.folder / "control" / "metrics.jsonl"
        if self._control is None and path.exists():
            self._control = History(path)
        return self._control

    def train_control(self):
        """The student that the same start, tokens, order and rates give without a teacher.

        Trained in ``<run>/control``, once: a second call, also in another session, finds it there. Rates that suit
        distillation need not suit the control: when the difference matters, give both their best.

        Returns:
            the trained student.

        Raises:
            ControlUnfinished: it was stopped before its end (Interrupt, or the session's time); call again to go on.
            MissingStart: the run's start is not there.
        """
        if self._control_student is not None:
            return self._control_student
        self.resume()
        self.processes.say(f"control: the same student without a teacher, {self.total_steps:,} steps")
        control = Trainer(
            self.initial_student(),
            None,
            self.data,
            [lm_term(1.0)],
            session=self.session.within("control", lasting=True),
            total_steps=self.planned_steps,
            settings=self.settings | {"finish_in_session": False},
            schedule=constant(),
            lr_schedule=self.lr_schedule,
        )
        control.resume()
        control.decay_from = self.decay_from
        control._record_run()
        for first, behind in self.cursor.left_out:
            control.cursor = control.cursor.without(first, behind)
        control.callbacks = [PrintLines(self.settings["log_every"], prefix="control  ")]
        self._control = control.history
        if control.fit() != "finished":
            raise ControlUnfinished(
                f"train_control: stopped at step {control.step:,} of {control.total_steps:,} ({control.stop_reason}); "
                "call it again to go on"
            )
        self._control_student = control.student
        return control.student

    def __repr__(self) -> str:
        shares = self.shares_at(self.step)
        wide = max(9, *(len(t.name) for t in self.terms))
        lines = [
            f"{t.name:{wide}} share {shares[t.name]:.2f}, healthy {t.healthy[0]:g} to {t.healthy[1]:g} {t.unit}"
            for t in self.terms
        ]
        per_step = self.data.batch_size * self.settings["accumulation"]
        trained = sum(p.numel() for p in self.module.parameters() if p.requires_grad)
        return "\n".join(
            [
                *lines,
                f"{'plan':{wide}} {self.total_steps:,} steps of {per_step} {self.data.unit} each "
                f"({self._steps_done():,} done), "
                f"{self.total_steps * self.settings['accumulation'] / self.data.batches_per_epoch:.2f} epochs",
                f"{'rate':{wide}} peak {self.settings['learning_rate']:g}, warm-up to step "
                f"{max(1, round(self.lr_schedule.warmup * self.total_steps)):,}, decay from step "
                f"{self.total_steps - round(self.lr_schedule.decay * self.total_steps):,}",
                f"{'trained':{wide}} {trained:,} parameters",
                f"{'run':{wide}} {shown(self.session.folder)} (id {self.run_id})",
            ]
        )

    # --- the step -----------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Let the parts of the terms see the first batches of the run before its first step: statistics, starts."""
        first = range(min(SETTLING_BATCHES, self.data.batches_per_epoch))

        def work() -> None:
            pieces = self._pieces(list(self.data.batches(self.settings["seed"], first)))
            with self.accelerator.autocast():
                settle_parts(self.module, self.teacher, (b.to(self.session.device, non_blocking=True) for b in pieces))

        if not all(getattr(part, "ready", True) for part in self.module.parts.values()):
            self.within_memory(work, "statistics before the first step")

    def _new_feed(self, end: int) -> Iterator[tuple[int, DistillBatch]]:
        """Position and batch, in order, from the cursor to the end of the run; those that this process takes."""
        count = (end - self.step) * self.settings["accumulation"]
        processes = self.processes

        def own() -> Iterator[int]:
            return itertools.islice(self.cursor.upcoming(count), processes.rank, None, processes.count)

        whole = self.teacher is not None and self.micro_batch >= self.data.batch_size  # not taken in pieces
        batches = self.data.batches(
            self.settings["seed"],
            own(),
            workers=self.settings["workers"],
            on_trouble=lambda text, path: self._event("alarm", text + (f" (stacks: {path})" if path else "")),
            dump_folder=self.session.folder / "faults",
            then=self.teacher.read_ahead if whole else None,
        )
        return zip(own(), batches, strict=True)

    def _next_batches(self) -> tuple[tuple[int, ...], tuple[DistillBatch, ...]]:
        """Positions of all batches of the next step, and those of its batches that this process takes."""
        count = self.settings["accumulation"]
        positions, batches = zip(*itertools.islice(self._feed, count // self.processes.count), strict=True)
        return positions if self.processes.count == 1 else tuple(self.cursor.upcoming(count)), batches

    def _own_gradients(
        self,
        batches: Sequence[DistillBatch],
        shares: dict[str, float],
        measure: bool,
        counts: Sequence[int] | None = None,
    ) -> StepResult:
        """Forward and backward over these batches; ``counts`` are those of the whole step, where they are a part."""
        return self.within_memory(
            lambda: take_gradients(
                self.accelerator,
                self._prepared,
                self.optimizer,
                self._pieces(batches),
                module=self.module,
                teacher=self.teacher,
                shares=shares,
                measure=measure,
                counts=counts,
            ),
            "training step",
        )

    def _train_step(self, batches: Sequence[DistillBatch], started: float, positions: Sequence[int]) -> StepResult:
        """Take a step and record it.

        Args:
            batches: of the step; of several processes, those that this one takes.
            started: when its batches were asked for, so that a slow loader shows in the speed.
            positions: of all its batches in the run's order.
        """
        shares, rate = self.shares_at(self.step), self.rate_at(self.step)
        measure = self.step % self.settings["measure_every"] == 0 and len(self.terms) > 1
        mark_stepped(self.student, True)
        if self.processes.count == 1:
            measured = self._own_gradients(batches, shares, measure)
        else:
            self._order_step(positions, shares, rate)
            measured = self._joint_gradients(lambda: batches, shares, measure=measure)
        done = apply_gradients(
            self.accelerator,
            self.optimizer,
            measured,
            module=self.module,
            rate=rate,
            max_grad_norm=self.settings["max_grad_norm"],
        )
        self.skipped_steps += done.skipped
        self.step += 1
        self.cursor = self.cursor.behind(positions[-1])
        self.tokens += done.predicted
        seconds = self.session.now() - started
        left = self.session.remaining()
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": self.cursor.position / self.data.batches_per_epoch,
            "batches": list(positions),
            "tokens": self.tokens,
            "seconds": self.seconds + seconds,
            "lr": {group["name"]: rate * group["rate_factor"] for group in self.optimizer.param_groups},
            "skipped_steps": self.skipped_steps,
            "tokens_per_second": done.predicted / max(seconds, 1e-9),
            "times_floor": None if self.floor_seconds is None else seconds / self.floor_seconds,
            "seconds_left": None if math.isinf(left) else left,
            "seconds_to_finish": (self.total_steps - self.step) * (self.seconds + seconds) / self.step,
            "aligned_share": done.aligned / max(done.predicted, 1),
            "taught_share": done.taught / max(done.predicted, 1),
        }
        self._log.add(record, done, shares)
        if measure:  # now, and not when the log is next written: the weights of the next step depend on it
            self._flush()
        return done

    def _flush(self) -> None:
        """Move what the last steps measured to the host and into the history."""
        records = self._log.flush()
        for record in records:
            if "gradients" in record:
                norms = {name: term["grad_norm"] for name, term in record["terms"].items()}
                self._norms = self.balance.smoothed(self._norms, norms)
        if records:
            self._look_for_spikes(records)
            self._tell("on_log")

    def _new_log(self) -> StepLog:
        warm = self.lr_schedule.warmup_steps(self.planned_steps)
        return StepLog(
            self.history,
            self.terms,
            meeting_point=place_name(self.module.meeting_layer),
            grace=max(warm, min(200, self.planned_steps // 4)),
        )

    def _event(self, what: str, text: str) -> None:
        if not self.processes.leads:
            self._news.append((what, text))
            return
        self.history.append({"kind": "event", "step": self.step, "what": what, "text": text})

    def _after_step(self, end: int) -> None:
        """Record, evaluate and save when it is time."""
        if self.step % RECORD_EVERY == 0:
            self._flush()
            self._tell_of_copies()
        if self.step - self._first_step == PACE_AFTER:
            self._tell_forecast()
        for step, text in self._stages():
            if step == self.step:
                self._event("stage", text)
        if self.step % self.settings["eval_every"] == 0 or self.step == self.total_steps:
            self.evaluate_now()
        since = self.session.now() - self._last_save
        # best weights are worth a save of their own where that stays a small part of the time
        best = self.best_step == self.step and since >= SAVE_SHARE * self._save_seconds
        # not between steps that fail: what they go back to shall lie before the first of them
        due = since >= save_interval(self.settings["save_minutes"], self._save_seconds)
        if self.step < end and not self._bad and (best or due):
            self._save_or_warn()

    def _stages(self) -> list[tuple[int, str]]:
        """What changes at which step of the run, in words."""
        changes = self.schedule.changes({t.name: t.weight for t in self.terms}, self.total_steps)
        return changes + self.lr_schedule.changes(self.planned_steps, self.decay_from)

    # --- small helps --------------------------------------------------------------------------------------------

    def _score(self, model, side: str = "student") -> float:
        # the teacher is always read in its own dtype, as in training
        def work() -> float:
            with self.accelerator.autocast() if side == "student" else contextlib.nullcontext():
                windows, limit = self.data.held_out, self.settings["eval_windows"]
                return score(model, windows, side=side, limit=limit, batch_size=self.micro_batch).bits_per_byte

        return self.within_memory(work, "evaluation")

    def _reference_scores(self) -> None:
        """The lines to compare with, once per run: the teacher, and the student before its first step."""
        if self.teacher is not None and "teacher" not in self.history.references():
            with self.teacher.awake():
                value = self._score(self.teacher.model, "teacher")
            self.history.append({"kind": "reference", "name": "teacher", "bits_per_byte": value})
        if self.step == 0 and not self.history.evaluations()[0]:
            self.evaluate_now()

    def _tell(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook, lambda trainer: None)(self)
