"""A run is a folder: resuming from it, saving into it, and the weights that it keeps beside its checkpoints."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from dataclasses import replace
from importlib import metadata
from pathlib import Path

from safetensors import SafetensorError

from kd_kit import checkpoint
from kd_kit.cursor import Cursor
from kd_kit.evaluation import MissingStart
from kd_kit.resume_search import find_run
from kd_kit.run_config import refuse_other_run
from kd_kit.run_lock import RunLocked, lock_run
from kd_kit.student_weights import is_owned, load_weights, mark_stepped, save_weights, weights_about
from kd_kit.table import span
from kd_kit.tensor_tree import capture_rng, flatten_optimizer, restore_rng, unflatten_optimizer

START = "initial.safetensors"
"""The student before its first step."""

LAST = "last.safetensors"
"""Weights alone, where the disk had no room for a checkpoint."""

PAUSE_PART = 8
"""At most this part of a session is taken for the length of a pause only because an earlier session had such a one."""


class Keeping:
    """The half of a :class:`kd_kit.trainer.Trainer` that knows its folder."""

    def _bring_here(self, config: dict) -> None:
        """Find the run's newest checkpoint wherever it may lie, and bring it into the run folder."""
        session = self.session
        if session.lone:
            return
        place = session.place()
        try:
            with self._locked():
                found = find_run(
                    session.folder,
                    session.name,
                    lambda before: refuse_other_run(session.folder, before, config),
                    given=session.resume_from,
                    inputs=session.inputs,
                    place=place,
                )
        except RunLocked:
            if session.resume_from is not None:
                raise
            return  # a living process trains here, which fit() says; the newest is what that one has
        if place is not None and found.origin == "new":
            asked = [reason for path, reason in found.refusals if path == place.address and "cannot be asked" in reason]
            held = [path for path, _ in found.refusals if str(path).startswith(f"{place.address}: ")]
            if asked or held:
                print(found)
                what = "no answer" if asked else f"{len(held)} checkpoints there that this run cannot go on from"
                raise checkpoint.CheckpointError(
                    f"build_trainer: expected {place.address} to hold nothing of {session.name!r}, or a run to go on "
                    f"with, got {what} (above); a new run would begin from nothing: repair what is said there, give "
                    "the run another name, build_session(run=...), or leave mirror= out"
                )
        # what lies here and is another run's, or of another format, is said by those who read it
        here = [r for r in found.refusals if isinstance(r.path, Path) and r.path.parent.parent == session.folder]
        news = [r for r in found.refusals if r not in here or not r.path.exists()]
        if found.adopted_from is not None or news or found.stopped_looking:
            print(replace(found, refusals=news))

    def resume(self) -> bool:
        """Load the newest good checkpoint of the run folder, once per trainer; True if there was one.

        Raises:
            CheckpointError: there are checkpoints and none of them can be used.
            RunLocked: another living process trains in this folder.
            ValueError: another trainer was given this student since, or it trains in the background.
        """
        if self._elsewhere():
            raise ValueError(
                "Trainer: expected a run at rest, got one that trains in the background; trainer.wait() for its end, "
                "or trainer.stop()"
            )
        if not is_owned(self.student, self._owner):
            raise ValueError(
                f"Trainer: expected its student to itself, got one that a later trainer has taken over; for the run in "
                f"{str(self.session.folder)!r} build student and trainer again"
            )
        if self._resumed:
            return self.step > 0
        return self._led("Trainer.resume", self._resume_once)

    def _resume_once(self) -> bool:
        with self._locked():
            found = self._resume()
        self._resumed = True
        best = self.session.folder / "best.safetensors"
        if self.stopped_early and self._early_stopping is not None and best.exists():
            self.load_best()  # as the session that stopped it left the student
        return found

    def _resume(self) -> bool:
        return self._take(self._stored())

    def _stored(self) -> tuple[checkpoint.CheckpointInfo, dict, dict] | None:
        """The newest good checkpoint of the run folder, with what is in it; None where there is none.

        Raises:
            CheckpointError: there are checkpoints and none of them can be used.
        """
        checkpoint.remove_leftovers(self.session.folder)
        # half-written by a process that was killed, by us and by safetensors: the lock is ours
        for path in (*self.session.folder.glob(".*.tmp"), *self.session.folder.glob(".tmp??????")):
            with contextlib.suppress(OSError):
                path.unlink()
        info, refusals = checkpoint.find_checkpoint(self.session.folder, run_id=self.run_id)
        if refusals:
            print(checkpoint.refusal_table(refusals))
        if info is None and (refusals or list((self.session.folder / "ckpt").glob(".bad-*"))):
            raise checkpoint.CheckpointError(
                f"Trainer: expected a usable checkpoint in {str(self.session.folder / 'ckpt')!r}, got only refused "
                "ones; repair it, or start anew under another name: build_session(run=...)"
            )
        return None if info is None else (info, *checkpoint.load_checkpoint(info))

    def _take(self, stored: tuple[checkpoint.CheckpointInfo, dict, dict] | None) -> bool:
        """Go on from what :meth:`_stored` found; False where that is the start."""
        self._holds_best = False
        self._differs = True
        if stored is None:
            # the start that the folder holds, whatever an earlier cell or session did to this student
            self._load_start(self.student)
            self.module.parts.load_state_dict(self._parts_start)
            self.history.rewind(-1)
            self._log = self._new_log()
            self._record_run()
            return False
        info, groups, state = stored
        self._load(groups, state)
        last = self.history.last("train")
        lost = 0 if last is None else last["step"] - self.step
        self.history.rewind(self.step)
        self._find_best()
        self._log = self._new_log()
        self._record_run()
        text = f"from {info.path.name}, {span(self.seconds)} of training so far"
        if lost > 0:
            text += f"; the {lost:,} steps that were done after it are done again"
        if (was := info.versions.get("torch")) not in (None, now := metadata.version("torch")):
            text += f"; it was written with torch {was}, this is {now}: the same run, though not to the last bit"
        self.history.append({"kind": "event", "step": self.step, "what": "resumed", "text": text})
        return True

    def save(self) -> checkpoint.CheckpointInfo | None:
        """Write a checkpoint now. Returns what was written; None where a run in the background was asked to do it.

        Raises:
            CheckpointError: it could not be written; older checkpoints are untouched.
            ValueError: the student holds its best weights, which are no state to go on from.
        """
        if self._elsewhere():
            return self.controls.want("save")
        if self._holds_best:
            raise ValueError(
                "Trainer.save: expected the weights of the last step, got the best ones, which load_best() put in "
                "their place; they are in best.safetensors, and fit() goes on from the last ones"
            )
        return self._led("Trainer.save", self._save_locked)

    def _save_locked(self) -> checkpoint.CheckpointInfo:
        self.resume()
        with self._locked():
            return self._save()

    def _save(self) -> checkpoint.CheckpointInfo:
        started = self.session.now()
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
            best=self.step == self.best_step,
        )
        self._last_save = self.session.now()
        self._save_seconds = self._last_save - started
        with contextlib.suppress(OSError):
            (self.session.folder / LAST).unlink(missing_ok=True)
        if self._mirror is not None:
            self._mirror.take(info)
        self.history.append({"kind": "event", "step": self.step, "what": "saved", "text": info.path.name})
        self._tell("on_save")
        return info

    def _save_or_warn(self) -> None:
        """A save in mid-run: a disk that refuses it now may take it later, so the run goes on and says so.

        Then at least the weights are written, a third of a checkpoint: good for evaluation and export.
        """
        try:
            self.save()
        except checkpoint.CheckpointError as error:
            self._last_save = self.session.now()
            self._event("alarm", f"not saved: {error}; {self._save_weights_alone()}")
        except ValueError as error:  # the state itself is not finite
            self._last_save = self.session.now()
            self._event("alarm", f"not saved: {error}")
            if self._loop is None:
                raise
            self._go_back("the state is not finite", [[self.cursor.position - 1]], harmed=True)

    def _save_weights_alone(self) -> str:
        """Where there is no room for a checkpoint. Returns what became of it, in words."""
        try:
            save_weights(self.student, self.session.folder / LAST, step=self.step)
        except (OSError, SafetensorError) as error:
            return f"nor were the weights alone: {error}"
        return f"the weights alone are in {LAST}, where kd.load_weights(student, path) reads them"

    def _keep_best(self) -> None:
        """Write the weights that scored best; a disk that refuses them costs these weights and not the run."""
        try:
            save_weights(
                self.student, self.session.folder / "best.safetensors", step=self.step, bits_per_byte=self.best
            )
        except (OSError, SafetensorError) as error:
            self._event("alarm", f"the best weights so far were not kept: {error}")

    def _find_best(self) -> None:
        """The lowest evaluation up to this step: one that was asked for at rest is in no checkpoint."""
        found = [(bits, step) for step, bits in zip(*self.history.evaluations(), strict=True) if math.isfinite(bits)]
        if found:
            self.best, self.best_step = min(found)
        kept = self.session.folder / "best.safetensors"
        if not kept.exists():
            return
        try:
            step = int(weights_about(kept).get("step", 0))
        except (OSError, SafetensorError, ValueError) as error:  # a machine that lost its power, a flipped bit
            self._event("alarm", f"{kept.name} cannot be read, and is given up: {error}")
            step = math.inf
        if step > self.step:
            kept.unlink()  # damaged, or of steps that are forgotten
            if self.best_step == self.step:
                self._keep_best()

    def load_best(self) -> tuple[int, float]:
        """Put the weights with the lowest held-out bits per byte into the student, for evaluation and export.

        ``fit()`` goes on from the last weights all the same.

        Returns:
            the step that they are of, and their bits per byte.

        Raises:
            ValueError: nothing has been evaluated yet.
        """
        return self._led("Trainer.load_best", self._load_best)

    def _load_best(self) -> tuple[int, float]:
        self.resume()
        path = self.session.folder / "best.safetensors"
        if not path.exists():
            raise ValueError(
                f"Trainer.load_best: expected weights in {str(path)!r}, got none; they are written when an evaluation "
                "is the best so far: trainer.evaluate_now()"
            )
        about = load_weights(self.student, path)
        self._holds_best = self._differs = True
        return int(about["step"]), float(about["bits_per_byte"])

    def initial_student(self):
        """A copy of the student as it was before its first step.

        Raises:
            MissingStart: the run was gone on from a checkpoint alone, with a student of another start.
        """
        student = copy.deepcopy(self.student)
        self._led("Trainer.initial_student", lambda: self._load_start(student))
        if not self.processes.leading:
            self.processes.share(student.state_dict().values())
        mark_stepped(student, False)
        return student

    def _load_start(self, student) -> None:
        path = self.session.folder / START
        if not path.exists():
            raise MissingStart(
                f"Trainer: expected the student's weights before its first step in {str(path)!r}, got no such file; "
                "the run was gone on from a checkpoint alone, with a student of another start: build the student as "
                "the first session did"
            )
        load_weights(student, path)
        mark_stepped(student, False)

    def _state(self) -> tuple[dict, dict]:
        """Everything that the next step depends on, as named tensors and plain JSON."""
        optim, optim_state = flatten_optimizer(self.optimizer.state_dict())
        rng, rng_state = capture_rng() if self._loop is not None or self._rng is None else self._rng
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
            "step_seconds": self._pace(),
            "longest_pause": self._longest_pause,
            "skipped_steps": self.skipped_steps,
            "best": self.best,
            "best_step": self.best_step,
            "decay_from": self.decay_from,
            "stopped_early": self.stopped_early,
            "gradient_norms": dict(self._norms),
            "cursor": self.cursor.to_json(),
            "returns": self.returns,
            "failed_at": self.failed_at,
            "micro_batch": [self.session.machine, self.micro_batch],
            "evaluations": [[step, bits] for step, bits in zip(*self.history.evaluations(), strict=True)],
            "run": {"name": self.session.name, "config": self._config},
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
        self._rng = groups["rng"], state["rng"]
        restore_rng(*self._rng)
        if state["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        if not self._step_seconds:
            self._step_seconds.append(state["step_seconds"])
        # once a disk stood still for hours: no session may be too short for that from then on
        pause = min(state["longest_pause"], (self.session.budget or math.inf) / PAUSE_PART)
        self._longest_pause = max(self._longest_pause, pause)
        self.skipped_steps, self.save_number = state["skipped_steps"], state["save_number"]
        self.best, self.best_step = state["best"], state["best_step"]
        self.decay_from = state["decay_from"]
        self.stopped_early = state["stopped_early"]
        self._norms = dict(state["gradient_norms"])
        self.cursor = Cursor.from_json(state["cursor"])
        self.returns, self.failed_at = state["returns"], state["failed_at"]
        machine, micro_batch = state["micro_batch"]
        if machine == self.session.machine:  # another one may have more memory, and finds out by itself
            self.micro_batch = micro_batch
        mark_stepped(self.student, self.step > 0)

    def _write_run(self) -> None:
        """RUN.json, and with a new run the student's start."""
        if not self.processes.leads:
            return
        folder = self.session.folder
        path = folder / "RUN.json"
        content = {"run_id": self.run_id, "name": self.session.name, "config": self._config}
        text = json.dumps(content, indent=1)
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            save_weights(self.student, folder / START)
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

    def _steps_done(self) -> int:
        """Steps that the run has behind it, also before this trainer has loaded them."""
        return self.step if self._resumed else max(self.step, self._saved_step())

    def _saved_step(self) -> int:
        """Of the newest checkpoint; 0 without any."""
        return max([0, *(int(p.name.split("-")[1]) for p in (self.session.folder / "ckpt").glob("step-*"))])

    @contextlib.contextmanager
    def _locked(self):
        """Keep other processes out of the run folder; once held, holding it again changes nothing."""
        if self._holds_lock or not self.processes.leads:
            yield
            return
        with lock_run(self.session.folder):
            self._holds_lock = True
            try:
                yield
            finally:
                self._holds_lock = False
