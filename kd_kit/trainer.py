"""The run: one loop that you can read, on accelerate.

Per optimizer step: fetch the micro-batches, count every term's positions in all of them, ask the teacher, run the
module forward and backward, clip, step, record. A run is a folder; ``fit()`` goes on where the folder says.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import math
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from kd_kit import checkpoint
from kd_kit.callbacks import PrintLines
from kd_kit.data import DistillData
from kd_kit.evaluation import score
from kd_kit.history import History
from kd_kit.module import DistillModule, settle_parts
from kd_kit.run_config import check_run, run_config
from kd_kit.run_lock import lock_run
from kd_kit.session import Session, StopRequests, shown
from kd_kit.stages import LearningRate, Schedule, constant
from kd_kit.step_log import StepLog
from kd_kit.teacher import LiveTeacher
from kd_kit.tensor_tree import capture_rng, flatten_optimizer, restore_rng, unflatten_optimizer
from kd_kit.terms import ROWS, LossTerm, lm_term
from kd_kit.types import DistillBatch

RECORD_EVERY = 10
"""Steps between two transfers of what was measured from the device to the host."""

_MAX_SKIPPED = 20  # more than a gradient scaler needs to find its scale
_STEPPED, _OWNER = "_kd_kit_stepped", "_kd_kit_owner"  # marks on a student: trained already, and by which trainer
_RATES = {"parts": 5.0, "projectors": 5.0, "routers": 5.0}  # what is thrown away at the end may move faster
_SETTLING_BATCHES = 16  # that the parts of the terms look at before the first step


class Trainer:
    """A distillation run. Made by :func:`kd_kit.build_trainer`, which explains the arguments.

    Attributes:
        step: optimizer steps done. total_steps: planned.
        history: everything measured, :class:`kd_kit.history.History`.
        control_history: of the LM-only control, once it exists.
        callbacks: objects with the hooks of :class:`kd_kit.callbacks.Callback`.
        stop_reason: None while there is something to do; set it to stop the run after the step.
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
    ):
        self.session = session
        self.student = student
        self.teacher = teacher
        self.data = data
        self.terms = tuple(terms)
        self.total_steps = total_steps
        self.settings = settings
        self.schedule = schedule
        self.lr_schedule = lr_schedule
        self.callbacks: list = [PrintLines(settings["log_every"])]
        self.stop_reason: str | None = None
        self._control: History | None = None
        self._control_student = None
        self._holds_lock = False
        self._longest_pause = 0.0  # seconds that evaluation and saving took after one step, at most
        self._last_save = time.monotonic()
        self._save_seconds = 0.0
        self._prepare()
        self._parts_start = copy.deepcopy(self.module.parts.state_dict())

        folder = session.folder
        self.history = History(folder / "metrics.jsonl")
        self._log = StepLog(self.history, self.terms)
        config = run_config(self)
        found = check_run(folder, config)
        if found is None and getattr(student, _STEPPED, False):
            raise ValueError(
                f"build_trainer: expected an untouched student for the new run in {str(folder)!r}, got one that "
                "another run has trained; build_student again"
            )
        self.run_id = found or uuid.uuid4().hex[:12]
        self._config = config
        if found is None:
            self._write_run()
        self._owner = object()
        setattr(student, _OWNER, self._owner)

    def _prepare(self) -> None:
        """The state of a run before its first step: counters, module, optimizer, scaler."""
        self.step = 0
        self.skipped_steps = 0
        self.tokens = 0
        self.seconds = 0.0  # of training, over all sessions
        self.save_number = 0
        self.best: float | None = None
        self._best_step: int | None = None
        self._skipped_in_row = 0
        self._resumed = False
        self.accelerator = self.session.engine()
        self.module = DistillModule(self.student, self.terms).to(self.session.device)
        self.optimizer = torch.optim.AdamW(self._groups(), betas=(0.9, 0.95), eps=1e-8)
        self._prepared, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)

    # --- what is asked of it ------------------------------------------------------------------------------------

    def fit(self, steps: int | None = None) -> str:
        """Train to the end, or for ``steps`` more steps, from the newest good checkpoint of the run folder.

        Ends early, having saved, when the session's time is over, on Interrupt or SIGTERM, or when a callback sets
        ``stop_reason``. Calling it again goes on.

        Returns:
            why it stopped, also in ``stop_reason``.
        """
        with self._locked(), StopRequests() as requests:
            self.resume()
            self.stop_reason = None
            end = self.total_steps if steps is None else min(self.total_steps, self.step + steps)
            if self.step < end:
                try:
                    self._run_to(end, requests)
                except BaseException:
                    self._prepare()  # a step may be half done: what goes on later goes on from the last checkpoint
                    self._log = StepLog(self.history, self.terms)
                    raise
            else:
                self.stop_reason = "finished" if self.step >= self.total_steps else "paused"
                print(
                    f"{self.session.folder.name}: {self.stop_reason} at step {self.step:,} of {self.total_steps:,}, "
                    "nothing is trained; other settings or more steps want a run of another name, or steps="
                )
        return self.stop_reason

    def _run_to(self, end: int, requests: StopRequests) -> None:
        """The loop itself, and the save behind it."""
        self._write_run()
        self._settle()
        self._reference_scores()
        self.module.train()
        self._tell("on_start")
        every = self.settings["accumulation"]
        batches = self.data.batches(
            self.settings["seed"], range(self.step * every, end * every), workers=self.settings["workers"]
        )
        self._last_save = time.monotonic()
        while self.step < end and self.stop_reason is None:
            started = time.monotonic()
            self._train_step([next(batches) for _ in range(every)], started)
            trained = time.monotonic()
            self.seconds += trained - started
            self._after_step(end)
            self._longest_pause = max(self._longest_pause, time.monotonic() - trained)
            if requests.reason:
                self.stop_reason = requests.reason
            elif self.stop_reason is None and self._time_is_over():
                self.stop_reason = "the session's time is over"
        self._flush()
        self.stop_reason = self.stop_reason or ("finished" if self.step >= self.total_steps else "paused")
        self.history.append({"kind": "event", "step": self.step, "what": "stopped", "text": self.stop_reason})
        self.save()
        self._tell("on_stop")

    def resume(self) -> bool:
        """Load the newest good checkpoint of the run folder, once per trainer; True if there was one.

        Raises:
            CheckpointError: there are checkpoints and none of them can be used.
            RunLocked: another living process trains in this folder.
            ValueError: another trainer was given this student since.
        """
        if getattr(self.student, _OWNER, None) is not self._owner:
            raise ValueError(
                f"Trainer: expected its student to itself, got one that a later trainer has taken over; for the run in "
                f"{str(self.session.folder)!r} build student and trainer again"
            )
        if self._resumed:
            return self.step > 0
        with self._locked():
            found = self._resume()
        self._resumed = True
        return found

    def _resume(self) -> bool:
        info, refusals = checkpoint.find_checkpoint(self.session.folder, run_id=self.run_id)
        if refusals:
            print(checkpoint.refusal_table(refusals))
        if info is None and (refusals or list((self.session.folder / "ckpt").glob(".bad-*"))):
            raise checkpoint.CheckpointError(
                f"Trainer: expected a usable checkpoint in {str(self.session.folder / 'ckpt')!r}, got only refused "
                "ones; repair it, or start anew under another name: build_session(run=...)"
            )
        if info is None:
            # the start that the folder holds, whatever an earlier cell or session did to this student
            _load_start(self.student, self.session.folder)
            self.module.parts.load_state_dict(self._parts_start)
            self.history.rewind(-1)
            self._record_run()
            return False
        groups, state = checkpoint.load_checkpoint(info)
        self._load(groups, state)
        self.history.rewind(self.step)
        self._record_run()
        text = f"from {info.path.name}, {self.seconds:.0f} s of training so far"
        self.history.append({"kind": "event", "step": self.step, "what": "resumed", "text": text})
        return True

    def save(self) -> checkpoint.CheckpointInfo:
        """Write a checkpoint now. Returns what was written.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
        """
        self.resume()
        with self._locked():
            return self._save()

    def _save(self) -> checkpoint.CheckpointInfo:
        started = time.monotonic()
        self._flush()
        groups, state = self._state()
        self.save_number += 1
        state["save_number"] = self.save_number
        info = checkpoint.save_checkpoint(
            self.session.folder,
            step=self.step,
            save_number=self.save_number,
            groups=groups,
            state=state,
            run_id=self.run_id,
            best=self.step == self._best_step,
        )
        self._last_save = time.monotonic()
        self._save_seconds = self._last_save - started
        self.history.append({"kind": "event", "step": self.step, "what": "saved", "text": info.path.name})
        self._tell("on_save")
        return info

    def evaluate_now(self) -> float:
        """Held-out bits per byte of the student on the run's evaluation windows, recorded in the history."""
        self.resume()
        self._flush()
        result = self._score(self.student)
        if self.best is None or result < self.best:
            self.best, self._best_step = result, self.step
        self.history.append({"kind": "eval", "step": self.step, "bits_per_byte": result, "seconds": self.seconds})
        self._tell("on_evaluate")
        return result

    def initial_student(self):
        """A copy of the student as it was before its first step."""
        student = copy.deepcopy(self.student)
        _load_start(student, self.session.folder)
        return student

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
            RuntimeError: it was stopped before its end (Interrupt, or the session's time); call again to go on.
        """
        if self._control_student is not None:
            return self._control_student
        print(f"control: the same student without a teacher, {self.total_steps:,} steps")
        control = Trainer(
            self.initial_student(),
            None,
            self.data,
            [lm_term(1.0)],
            session=self.session.within("control"),
            total_steps=self.total_steps,
            settings=self.settings,
            schedule=constant(),
            lr_schedule=self.lr_schedule,
        )
        control.callbacks = [PrintLines(self.settings["log_every"], prefix="control  ")]
        self._control = control.history
        if control.fit() != "finished":
            raise RuntimeError(
                f"train_control: stopped at step {control.step:,} of {control.total_steps:,} ({control.stop_reason}); "
                "call it again to go on"
            )
        self._control_student = control.student
        return control.student

    def __repr__(self) -> str:
        shares = self.schedule.shares({t.name: t.weight for t in self.terms}, self.step / self.total_steps)
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
                f"{'plan':{wide}} {self.total_steps:,} steps of {per_step} windows each ({self._steps_done():,} done), "
                f"{self.total_steps * self.settings['accumulation'] / self.data.batches_per_epoch:.2f} epochs",
                f"{'rate':{wide}} peak {self.settings['learning_rate']:g}, warm-up to step "
                f"{max(1, round(self.lr_schedule.warmup * self.total_steps)):,}, decay from step "
                f"{self.total_steps - round(self.lr_schedule.decay * self.total_steps):,}",
                f"{'trained':{wide}} {trained:,} parameters",
                f"{'run':{wide}} {shown(self.session.folder)} (id {self.run_id})",
            ]
        )

    def start_fingerprint(self) -> str | None:
        """Hash of some of every weight of a student that was not trained yet; None for one that was."""
        if getattr(self.student, _STEPPED, False):
            return None
        some = [p.detach().flatten()[:64].float().cpu() for p in self.student.parameters()]
        return hashlib.sha256(torch.cat(some).numpy().tobytes()).hexdigest()[:16]

    def _steps_done(self) -> int:
        """Steps that the run has behind it, also before this trainer has loaded them."""
        saved = [int(p.name.split("-")[1]) for p in (self.session.folder / "ckpt").glob("step-*")]
        return self.step if self._resumed else max([self.step, *saved])

    # --- the step -----------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Let the parts of the terms see the first batches of the run before its first step: statistics, starts."""
        first = range(min(_SETTLING_BATCHES, self.data.batches_per_epoch))
        batches = self.data.batches(self.settings["seed"], first)
        with self.accelerator.autocast():
            settle_parts(self.module, self.teacher, (b.to(self.session.device, non_blocking=True) for b in batches))

    def _clip(self) -> torch.Tensor:
        """Clip the gradients, the student's and the parts' each on their own: neither shrinks the other's step.

        Returns:
            the norm of the student's gradient before that.
        """
        most = self.settings["max_grad_norm"]
        self.accelerator.unscale_gradients()  # once for both: a scaler refuses it a second time
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), most)
        if len(self.module.parts):
            parts = torch.nn.utils.clip_grad_norm_(self.module.parts.parameters(), most)
            if not math.isfinite(float(parts)):
                return parts
        return norm

    def _train_step(self, batches: list[DistillBatch], started: float) -> None:
        """One optimizer step over all micro-batches, each term divided by its count in all of them.

        ``started`` is when its batches were asked for, so that a slow loader shows in the speed.
        """
        accelerator = self.accelerator
        shares = self.schedule.shares({t.name: t.weight for t in self.terms}, self.step / self.total_steps)
        rate = self.settings["learning_rate"] * self.lr_schedule.factor(self.step, self.total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["rate_factor"]
        counts = [sum(term.count(b) for b in batches) for term in self.terms]  # on the host, where they are made
        batches = [b.to(self.session.device, non_blocking=True) for b in batches]
        scales = [shares[t.name] / c if c else 0.0 for t, c in zip(self.terms, counts, strict=True)]
        self.optimizer.zero_grad(set_to_none=True)  # what a step that was broken off may have left
        asked = self.teacher is not None and self.module.needs.teacher
        sums = torch.zeros(len(self.terms), device=self.session.device)
        reading = next(iter(self.module.needs.readings), None)  # whose tail is recorded
        tail = torch.zeros((), device=self.session.device)
        extras: dict[str, torch.Tensor] = {}
        setattr(self.student, _STEPPED, True)
        for number, batch in enumerate(batches):
            signal = self.teacher.signal(batch) if asked else None
            last = number == len(batches) - 1
            with contextlib.nullcontext() if last else accelerator.no_sync(self._prepared):
                total, part, measured = self._prepared(batch, signal, scales)
                accelerator.backward(total)
            sums += part
            for name, value in measured.items():
                extras[name] = extras[name] + value if name in extras else value
            if reading is not None:
                tail += signal.cells[reading.key].tail.exp().sum()
        norm = self._clip()
        skipped = accelerator.scaler is None and not math.isfinite(float(norm))
        if not skipped:  # a scaler sees to this itself
            self.optimizer.step()
            skipped = bool(self.optimizer.step_was_skipped)
        self.skipped_steps += skipped
        self._skipped_in_row = self._skipped_in_row + 1 if skipped else 0
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        predicted = sum(len(b.rows) for b in batches)
        aligned = sum(len(b.aligned_rows) for b in batches)
        taught = sum(len(b.taught_rows) for b in batches)
        self.tokens += predicted
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": self.step * len(batches) / self.data.batches_per_epoch,
            "tokens": self.tokens,
            "seconds": self.seconds + time.monotonic() - started,
            "lr": {group["name"]: rate * group["rate_factor"] for group in self.optimizer.param_groups},
            "skipped_steps": self.skipped_steps,
            "tokens_per_second": predicted / max(time.monotonic() - started, 1e-9),
            "aligned_share": aligned / max(predicted, 1),
            "taught_share": taught / max(predicted, 1),
        }
        self._log.add(
            record,
            shares=shares,
            counts=counts,
            sums=sums,
            norm=norm,
            extras=extras,
            tail=tail if reading else None,
            tail_rows=sum(ROWS[reading.over](b) for b in batches) if reading else 0,
            skipping=accelerator.scaler is None,
        )

    def _flush(self) -> None:
        """Move what the last steps measured to the host and into the history."""
        if self._log.flush():
            self._tell("on_log")

    def _after_step(self, end: int) -> None:
        """Record, evaluate and save when it is time."""
        if self.step % RECORD_EVERY == 0:
            self._flush()
        if self.step % self.settings["eval_every"] == 0 or self.step == self.total_steps:
            self.evaluate_now()
        since = time.monotonic() - self._last_save
        # the best weights are worth a save of their own where that stays a small part of the time
        best = self._best_step == self.step and since >= 30 * self._save_seconds
        if self.step < end and (best or since >= self.settings["save_minutes"] * 60):
            self._save_or_warn()
        if self._skipped_in_row >= _MAX_SKIPPED:
            self._flush()
            self.stop_reason = f"{_MAX_SKIPPED} steps in a row had no finite gradient"

    def _save_or_warn(self) -> None:
        """A save in mid-run: a disk that refuses it now may take it later, so the run goes on and says so."""
        try:
            self.save()
        except checkpoint.CheckpointError as error:
            self._last_save = time.monotonic()
            self.history.append({"kind": "event", "step": self.step, "what": "alarm", "text": f"not saved: {error}"})

    def _time_is_over(self) -> bool:
        """Whether another step, with evaluation and saves, might not fit into what is left of the session."""
        return self.session.remaining() < 30 + 2 * self.seconds / max(self.step, 1) + 2 * self._longest_pause

    # --- state --------------------------------------------------------------------------------------------------

    def _state(self) -> tuple[dict, dict]:
        """Everything that the next step depends on, as named tensors and plain JSON."""
        optim, optim_state = flatten_optimizer(self.optimizer.state_dict())
        rng, rng_state = capture_rng()
        scaler = self.accelerator.scaler
        groups = {
            "model": self.student.state_dict(),
            "aux": self.module.parts.state_dict(),
            "optim": optim,
            "rng": rng,
        }
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "skipped_steps": self.skipped_steps,
            "best": self.best,
            "best_step": self._best_step,
            "optimizer": optim_state,
            "rng": rng_state,
            "scaler": None if scaler is None else scaler.state_dict(),
        }
        return groups, state

    def _load(self, groups: dict, state: dict) -> None:
        self.student.load_state_dict(groups["model"])
        self.module.parts.load_state_dict(groups["aux"])
        decays = [group["weight_decay"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(unflatten_optimizer(groups["optim"], state["optimizer"]))
        for group, decay in zip(self.optimizer.param_groups, decays, strict=True):
            group["weight_decay"] = decay  # a setting of this session, not a state
        restore_rng(groups["rng"], state["rng"])
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.skipped_steps, self.save_number = state["skipped_steps"], state["save_number"]
        self.best, self._best_step = state["best"], state["best_step"]
        setattr(self.student, _STEPPED, self.step > 0)

    def _groups(self) -> list[dict]:
        """Parameter groups: matrices with weight decay, vectors without, parts of terms at their own rate."""
        decay = self.settings["weight_decay"]
        student = [p for p in self.student.parameters() if p.requires_grad]
        groups = [
            {"name": "student", "params": [p for p in student if p.ndim >= 2], "weight_decay": decay},
            {"name": "student", "params": [p for p in student if p.ndim < 2], "weight_decay": 0.0},
        ]
        for name in _RATES:
            parts = [part for part in self.module.parts.values() if _group_of(part) == name]
            own = [p for part in parts for p in part.parameters()]
            groups.append({"name": name, "params": own, "weight_decay": 0.0})
        for group in groups:
            group["rate_factor"] = _RATES.get(group["name"], 1.0)
            group["lr"] = self.settings["learning_rate"] * group["rate_factor"]
        return [g for g in groups if g["params"]]

    def _write_run(self) -> None:
        """RUN.json, and with a new run the student's start."""
        folder = self.session.folder
        path = folder / "RUN.json"
        text = json.dumps({"run_id": self.run_id, "config": self._config}, indent=1)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_untied(self.student), folder / "initial.safetensors")
        elif path.read_text() == text:
            return
        beside = folder / "RUN.json.tmp"
        beside.write_text(text)
        beside.replace(path)  # whole or not there

    def _record_run(self) -> None:
        """The run's plan in its history: once, and again when a later session changed it."""
        terms = {t.name: t.meta for t in self.terms}
        record = {"kind": "run", "run_id": self.run_id, "total_steps": self.total_steps, "terms": terms}
        if self.history.last("run") != record:
            self.history.append(record)

    # --- small helps --------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _locked(self):
        """Keep other processes out of the run folder; once held, holding it again changes nothing."""
        if self._holds_lock:
            yield
            return
        with lock_run(self.session.folder):
            self._holds_lock = True
            try:
                yield
            finally:
                self._holds_lock = False

    def _score(self, model, side: str = "student") -> float:
        # the teacher is always read in its own dtype, as in training
        with self.accelerator.autocast() if side == "student" else contextlib.nullcontext():
            return score(model, self.data.held_out, side=side, limit=self.settings["eval_windows"]).bits_per_byte

    def _reference_scores(self) -> None:
        """The lines to compare with, once per run: the teacher, and the student before its first step."""
        if self.teacher is not None and "teacher" not in self.history.references():
            value = self._score(self.teacher.model, "teacher")
            self.history.append({"kind": "reference", "name": "teacher", "bits_per_byte": value})
        if self.step == 0 and not self.history.evaluations()[0]:
            self.evaluate_now()

    def _tell(self, hook: str) -> None:
        for callback in self.callbacks:
            getattr(callback, hook, lambda trainer: None)(self)


def _group_of(part) -> str:
    """Which parameter group a trained part of a term is in; its own word where that is one of ours."""
    group = getattr(part, "group", "parts")
    return group if group in _RATES else "parts"


def _load_start(model, folder: Path) -> None:
    """Give a student the weights that it had before the first step of the run in ``folder``."""
    model.load_state_dict(load_file(folder / "initial.safetensors"), strict=False)
    model.tie_weights()
    setattr(model, _STEPPED, False)


def _untied(model) -> dict[str, torch.Tensor]:
    """State of a model without the second name of a tied tensor, as safetensors wants it."""
    seen, out = set(), {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() not in seen or tensor.numel() == 0:
            out[name] = tensor.contiguous()
        seen.add(tensor.data_ptr())
    return out
