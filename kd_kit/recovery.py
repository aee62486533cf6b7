"""A step that cannot be taken as it stands: too large for the memory, or without a finite gradient.

Out of memory: the same windows in halves, the step redone, nothing of it had been applied. Not finite: the step is not
taken, its cause is looked for and written down; after several in a row the run goes back to its last good checkpoint
and passes over those batches.
"""

from __future__ import annotations

import gc
import math
import statistics
from collections import deque
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from accelerate.utils.memory import should_reduce_batch_size

from kd_kit.fault import Fault, build_fault, write_fault
from kd_kit.fault_trace import Trace, broken_weights, trace
from kd_kit.train_step import StepResult
from kd_kit.types import DistillBatch

IN_A_ROW = 5
"""Steps without a finite gradient, one after the other, after which a run goes back to its last good checkpoint."""

MOST_RETURNS = 3
"""How often a run goes back from one place before it stops and asks its user."""

SPIKE = 10.0
"""Times the median of the gradient's norm from which a step is written down as a spike."""

_TRACED = 5  # faults of one session that are looked into; a trace costs several steps
_SPIKES = 3  # of one session that are written down
_MEMORY = 50  # steps that a spike is compared with

T = TypeVar("T")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether smaller batches may help: the card's or the host's memory did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, Exception) and bool(should_reduce_batch_size(error))


class Recovery:
    """The part of a :class:`kd_kit.trainer.Trainer` that gets over steps that fail.

    Attributes:
        micro_batch: windows, or rows of windows, that go through the models at once.
        returns: how often the run went back to a checkpoint without getting past the step at which it failed.
        failed_at: that step.
    """

    def __init__(self):
        self._traced = self._spikes = 0
        self._usual_norms: deque[float] = deque(maxlen=_MEMORY)

    # --- memory -------------------------------------------------------------------------------------------------

    def within_memory(self, work: Callable[[], T], what: str) -> T:
        """``work()``, again with half as many windows at once for as long as the memory does not suffice.

        ``work`` reads ``self.micro_batch`` and may be begun again at any time.

        Raises:
            RuntimeError: a single window is too much.
        """
        while True:
            try:
                return work()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                said = str(error).splitlines()[0][:200].rstrip(".") if str(error) else type(error).__name__
                if self.micro_batch == 1:
                    raise RuntimeError(
                        f"Trainer: expected one window of {self.data.window} tokens to fit into the memory of "
                        f"{self.session.device} in the {what}, got: {said}; use a smaller window=, fewer or smaller "
                        "terms, or a teacher in half precision"
                    ) from error
            # outside of the block above: the error holds on to all that was computed
            self.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            if self.session.device.type == "cuda":
                torch.cuda.empty_cache()
            before, self.micro_batch = self.micro_batch, (self.micro_batch + 1) // 2
            others = [t.name for t in self.terms if t.batchwise]
            note = f"; {', '.join(others)} compares what is in them, so its value changes" if others else ""
            self._event(
                "alarm",
                f"out of memory in the {what}: {said}. From here on {self.micro_batch} {self.data.unit} at once "
                f"instead of {before}, the same windows per step{note}",
            )

    def _pieces(self, batches: Sequence[DistillBatch]) -> list[DistillBatch]:
        """The same windows, no more than ``micro_batch`` of them, or rows of them, at once."""
        out = []
        for batch in batches:
            groups = self.data.batching.split(batch.sample.tolist(), self.micro_batch)
            out += [batch] if len(groups) == 1 else map(self.data.train.collate, groups)
        return out

    # --- numbers that are not finite ----------------------------------------------------------------------------

    def _went_back(self, done: StepResult, batches: Sequence[DistillBatch], positions: list[int]) -> bool:
        """After a step that was not taken: look for the cause; True where the run went back to a checkpoint."""
        scale = None if done.loss_scale is None else float(done.loss_scale)
        if scale is not None and scale > 1 and bool(torch.isfinite(done.total)):
            return False  # the scaler lowers its scale with every such step, down to 1
        self._bad.append(positions)
        guilty = None
        if self._traced < _TRACED:
            self._traced += 1
            guilty = self._write_down(batches, positions, scale)
        if guilty is not None and guilty.where == "weights" and str(guilty.layer).startswith("teacher"):
            self._flush()
            self.stop_reason = f"the teacher's weights are not finite: {guilty.layer}"
            return False
        if guilty is not None and guilty.where == "weights":
            harm = [max(positions[0] - 1, 0)]  # a batch of the step before, the one that did it
            return self._go_back("the weights are not finite", [harm, positions], harmed=True)
        if len(self._bad) >= IN_A_ROW:
            return self._go_back(f"{len(self._bad)} steps in a row without a finite gradient", self._bad)
        return False

    def _refuse_broken_weights(self, positions: Sequence[int]) -> None:
        """Behind the last step of a session: go back where it broke the weights, which no later step would show."""
        found = broken_weights(self)
        if found is not None and not str(found.layer).startswith("teacher"):
            self._go_back("the weights are not finite", [list(positions)], harmed=True)

    def _write_down(self, batches: Sequence[DistillBatch], positions: list[int], scale: float | None) -> Fault:
        if self.processes.count > 1:  # the first process has its own batches only
            batches = list(self.data.batches(self.settings["seed"], positions))
        fault = build_fault(
            self,
            trace(self, self._pieces(batches), shares=self.shares_at(self.step - 1)),
            step=self.step,
            positions=positions,
            learning_rate=self.rate_at(self.step - 1),
            loss_scale=scale,
        )
        self._event("alarm", f"{fault.title}; kd.last_fault() shows more")
        return write_fault(fault, batches, self.session.folder)

    def _go_back(self, why: str, bad: list[list[int]], *, harmed: bool = False) -> bool:
        """To the last good checkpoint, and past the batches of the steps that failed; False where the run stops.

        Args:
            bad: positions of these steps.
            harmed: the state itself is not finite, so that a run that stops goes back, too: it could not be saved.

        Raises:
            CheckpointError: there are checkpoints and none of them can be used; nothing has changed.
        """
        self._flush()
        failed = self.step
        if failed > self.failed_at:  # it had got past the last such place: this is another one
            self.returns = 0
        if self.returns >= MOST_RETURNS:
            times = f"after going back {self.returns} times"
            self.stop_reason = f"no finite gradient, {times}; kd.last_fault() shows where it began"
            if not harmed:
                return False
        first, behind = bad[0][0], bad[-1][-1] + 1
        left_out, returns = self.cursor.left_out, min(self.returns + 1, MOST_RETURNS)
        self._take_back()
        self.returns, self.failed_at = returns, failed
        for passed in left_out:  # also those that a disk without room kept out of the checkpoint
            self.cursor = self.cursor.without(*passed)
        first = max(first, self.cursor.position)  # the checkpoint is good, and so are the batches before it
        past = ""
        if first < behind:
            self.cursor = self.cursor.without(first, behind)
            which = f"batch {first:,}" if behind == first + 1 else f"batches {first:,} to {behind - 1:,}"
            past = f", and past {which} of the run's order"
        self._begin()
        self._event("alarm", f"{why}: back from step {failed:,} to step {self.step:,}{past}")
        self._save_or_warn()  # so that a session that ends now need not find this out once more
        return True

    def _take_back(self) -> None:
        """The state of the last good checkpoint, or of the start; what the user and the memory have asked for stays.

        Raises:
            CheckpointError: there are checkpoints and none of them can be used; nothing has changed.
        """
        stored = self._stored()  # before anything is given up for it
        kept = self.decay_from, self.micro_batch, self.save_number
        self._prepare()
        self._take(stored)
        self._resumed = True
        self.decay_from, self.micro_batch = kept[:2]
        self.save_number = max(self.save_number, kept[2])
        self._record_run()  # its length is that of the decay
        self.stopped_early = False  # of the session that wrote the checkpoint

    # --- spikes -------------------------------------------------------------------------------------------------

    def _look_for_spikes(self, records: Sequence[dict]) -> None:
        """Write down steps whose gradient was far above the usual: clipped they do little harm, but say something."""
        for record in records:
            norm = record["grad_norm"]
            if norm is None or not math.isfinite(norm):
                continue
            usual = statistics.median(self._usual_norms) if len(self._usual_norms) == _MEMORY else None
            self._usual_norms.append(norm)
            if usual is None or norm < SPIKE * usual or self._spikes >= _SPIKES:
                continue
            self._spikes += 1
            positions = record["batches"]
            batches = list(self.data.batches(self.settings["seed"], positions))
            said = f"gradient norm {norm:.3g}, usually {usual:.3g}; clipped to {self.settings['max_grad_norm']:g}"
            windows = [int(index) for batch in batches for index in batch.sample]
            fault = build_fault(
                self,
                Trace("unknown", windows=windows, note=said),
                step=record["step"],
                kind="spike",
                positions=positions,
                learning_rate=next(iter(record["lr"].values())),
                loss_scale=record["loss_scale"],
            )
            write_fault(fault, batches, self.session.folder)
            self._event("alarm", f"spike at step {record['step']:,}: {said}; kd.last_fault() shows the text of it")
