"""A run in several processes: the first one runs the loop, the others take every step with it.

The unit is the micro-batch. Process ``r`` of ``W`` takes the micro-batches ``r``, ``r + W``, ... of every step, each
divided by the counts of the whole step, and the gradients are summed in one place. So the step is that of one process,
whatever a term compares within a micro-batch, and neither the order of the text nor a checkpoint depends on ``W``.
There is no wrapper for data-parallel training that would want every parameter used in every pass: a term may have
nothing to say in some micro-batches, and a process that runs out of memory takes its own ones in smaller pieces.

Between two steps the others wait for an order: take a step with these shares and this rate, or take over this state.
Nothing else reaches them, so no two processes can disagree about whether there is a next step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from accelerate.utils import set_seed
from torch import Tensor

from kd_kit.cursor import Cursor
from kd_kit.history import History
from kd_kit.processes import Processes, ProcessLost, portable
from kd_kit.session import StopRequests
from kd_kit.student_weights import mark_stepped
from kd_kit.train_step import StepResult, apply_gradients
from kd_kit.types import DistillBatch

_PLAIN = (
    "step",
    "tokens",
    "seconds",
    "skipped_steps",
    "best",
    "best_step",
    "decay_from",
    "stopped_early",
    "stop_reason",
    "save_number",
    "returns",
    "failed_at",
    "cursor",
    "_norms",
    "_resumed",
    "_holds_best",
    "_save_seconds",
    "_eval_seconds",
    "_longest_pause",
)  # what a trainer knows of its run beside tensors

T = TypeVar("T")


class ReadHistory(History):
    """The history of a run that another process writes: whatever is added here is not kept."""

    def append(self, record) -> None:
        pass

    def rewind(self, step: int) -> int:
        return 0

    def look(self) -> None:
        """Read what has been written since."""
        self._records = []
        if self.path is not None and self.path.exists():
            self._read(self.path)


class Together:
    """The part of a :class:`kd_kit.trainer.Trainer` that crosses processes.

    Attributes:
        processes: of the run.
    """

    processes: Processes

    def __init__(self):
        self._requests: StopRequests | None = None  # of the loop that runs
        self._feed_from: tuple | None = None  # what the others make their next feed from
        self._news: list[tuple[str, str]] = []  # events of a process that does not write
        self._differs = False  # the weights here are not those that the others have

    # --- what is done once ---------------------------------------------------------------------------------------

    def _led(self, what: str, work: Callable[[], T]) -> T:
        """``work()`` by the process that leads; its result, and the run's state after it, reach all."""
        processes, about = self.processes, f"{what} of {self.session.name}"
        if processes.count == 1 or processes.leading:
            return work()

        def whole() -> tuple[T, dict, bool]:
            result = work()
            plain = {name: getattr(self, name) for name in _PLAIN}
            return result, plain | {"weights": {t.name: t.weight for t in self.terms}}, self._differs

        result, plain, differs = processes.led(about, whole, self._obey)
        if not processes.leads:
            weights = plain.pop("weights")
            for name, value in plain.items():
                setattr(self, name, value)
            self.terms = self.module.terms = tuple(replace(t, weight=weights[t.name]) for t in self.terms)
            mark_stepped(self.student, self.step > 0)
            self.history.look()
        if differs:
            processes.share(self.module.state_dict().values())
            self._differs = False
        return result

    def _order(self, order: dict) -> None:
        if self.processes.count > 1:
            self.processes.order(f"Trainer.fit of {self.session.name}", order)

    def _follow_fit(self) -> str:
        """``fit()`` of a process that does not lead."""
        try:
            with StopRequests(quiet=True) as self._requests:
                return self._led("Trainer.fit", lambda: "")
        except BaseException as error:
            if isinstance(error, ProcessLost):
                error = self._lost(error)
            self.stop_reason = f"failed: {type(error).__name__}: {error}".removesuffix(": ")
            self._prepare()
            if isinstance(error, ProcessLost):
                raise error from error.__cause__
            raise
        finally:
            self._feed = None  # ends the processes that prepare batches

    def _obey(self, order: dict) -> None:
        if order["do"] == "state":
            self._take_over(order["state"])
        else:
            self._follow_step(order)

    # --- the state -----------------------------------------------------------------------------------------------

    def _hand_over(self) -> None:
        """Give every process the state that the next step starts from."""
        if self.processes.count == 1:
            return
        groups, state = self._state()
        self._order({"do": "state", "state": state | {"save_number": self.save_number}})
        self.processes.tensors({f"{group}/{name}": t for group, of in groups.items() for name, t in of.items()})
        self._differs = False

    def _take_over(self, state: dict) -> None:
        groups: dict[str, dict[str, Tensor]] = {"model": {}, "aux": {}, "optim": {}, "rng": {}}
        for name, tensor in self.processes.tensors(None).items():
            group, _, inner = name.partition("/")
            groups[group][inner] = tensor
        self._load(groups, state)
        # what dropout draws here is its own: the same masks in every process would be fewer draws
        seeds = [self.settings["seed"], self.processes.rank, self.step]
        set_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        self.module.train()
        self._feed = None

    # --- a step --------------------------------------------------------------------------------------------------

    def _follow_step(self, order: dict) -> None:
        """A step of a process that does not lead."""

        def fetch() -> list[DistillBatch]:
            if self.processes.own_error is not None:
                raise self.processes.own_error
            if order["feed"] is not None:
                self.step, end, cursor = order["feed"]
                self.cursor = Cursor.from_json(cursor)
                self._feed = self._new_feed(end)
            positions, batches = self._next_batches()
            if list(positions) != order["positions"]:
                raise RuntimeError(
                    f"Trainer.fit: expected batches {order['positions']} of the run's order, got {list(positions)}"
                )
            return batches

        mark_stepped(self.student, True)
        measured = self._joint_gradients(fetch, order["shares"], measure=False)
        apply_gradients(
            self.accelerator,
            self.optimizer,
            measured,
            module=self.module,
            rate=order["rate"],
            max_grad_norm=self.settings["max_grad_norm"],
        )
        self.step += 1
        self.cursor = self.cursor.behind(order["positions"][-1])

    def _order_step(self, positions: Sequence[int], shares: dict[str, float], rate: float) -> None:
        feed, self._feed_from = self._feed_from, None
        self._order({"do": "step", "positions": list(positions), "shares": shares, "rate": rate, "feed": feed})

    def _joint_gradients(
        self, fetch: Callable[[], Sequence[DistillBatch]], shares: dict[str, float], *, measure: bool
    ) -> StepResult:
        """The gradients of a step over the micro-batches of all processes, the same in each of them.

        Args:
            fetch: the micro-batches of this process.

        Raises:
            whatever went wrong here; RuntimeError: another process could not do its part.
        """

        def counted() -> tuple[Sequence[DistillBatch], list[int]]:
            batches = fetch()
            return batches, [sum(term.count(b) for b in batches) for term in self.terms]

        found, error = _attempt(counted)
        counts = [sum(of_term) for of_term in zip(*self._met(None if found is None else found[1], error), strict=True)]
        measured, error = _attempt(lambda: self._own_gradients(found[0], shares, measure, counts))
        trained = [p for p in self.module.parameters() if p.requires_grad]
        reached = [p.grad is not None for p in trained]
        parts = self._met(None if measured is None else (_on_host(measured), reached), error)
        for p, *used in zip(trained, *(reached for _, reached in parts), strict=True):
            if any(used) and p.grad is None:
                p.grad = torch.zeros_like(p)
        self.processes.add_up([p.grad for p in trained if p.grad is not None])
        return _joined(measured, [part for part, _ in parts])

    def _met(self, mine: T, error: BaseException | None) -> list[T]:
        """What all processes bring; raises in all of them where one could not do its part.

        What else they have to say comes with it: their events, and the signals that reached them.
        """
        news, self._news = self._news, []
        wish = None if self._requests is None else self._requests.reason
        heard = self.processes.gather((mine, None if error is None else portable(error), news, wish))
        if self.processes.leads:
            for rank, (_, _, told, wanted) in enumerate(heard):
                for what, text in told:
                    self._event(what, f"process {rank}: {text}")
                if self._requests is not None and self._requests.reason is None:
                    self._requests.reason = wanted
        if error is not None:
            raise error
        for rank, (_, failed, _, _) in enumerate(heard):
            if failed is not None:
                raise RuntimeError(
                    f"Trainer.fit: expected all {self.processes.count} processes to take step {self.step + 1:,}, got "
                    f"from process {rank}: {type(failed).__name__}: {failed}"
                ) from failed
        return [value for value, *_ in heard]

    def _lost(self, error: ProcessLost) -> ProcessLost:
        """The same in a sentence of the run."""
        saved = self._saved_step()
        where = f"the checkpoint of step {saved:,}" if saved else "the start, since nothing was saved yet"
        return ProcessLost(
            f"Trainer.fit: step {self.step + 1:,}: {error}; start the same script again: fit() goes on from {where}"
        )


def _attempt(work: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """The result or the error: the other processes hear of it before it goes on its way."""
    try:
        return work(), None
    except ProcessLost:
        raise
    except BaseException as error:
        return None, error


def _on_host(measured: StepResult) -> StepResult:
    tail = None if measured.tail is None else measured.tail.cpu()
    extras = {name: value.cpu() for name, value in measured.extras.items()}
    return replace(
        measured, sums=measured.sums.cpu(), total=measured.total.cpu(), tail=tail, extras=extras, gradients=None
    )


def _joined(mine: StepResult, parts: Sequence[StepResult]) -> StepResult:
    """What a step measured in all processes; what was compared is the first one's, of its first micro-batch."""
    device = mine.sums.device

    def added(values: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(values)).sum(0).to(device)

    extras: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, value in part.extras.items():
            extras.setdefault(name, []).append(value)
    return replace(
        mine,
        sums=added(p.sums for p in parts),
        total=added(p.total for p in parts),
        extras={name: added(values) for name, values in extras.items()},
        tail=None if mine.tail is None else added(p.tail for p in parts),
        tail_rows=sum(p.tail_rows for p in parts),
        predicted=sum(p.predicted for p in parts),
        aligned=sum(p.aligned for p in parts),
        taught=sum(p.taught for p in parts),
    )
