"""Numbers that are not finite, put into a run at random places: it goes on, tells where, and is else the same run.

Every blow is one run. It is compared, bit for bit, with a run in which nothing is put anywhere, and which was told to
pass over the same batches and not to take the same steps.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from campaign import Counts
from helpers import measured, small_data, teacher, tiny_student
from same_run import SETTINGS, STEPS, begin, build_run, differences, outcome

from kd_kit import trainer as trainer_file
from kd_kit.fault import Fault, faults_of
from kd_kit.history import History
from kd_kit.recovery import IN_A_ROW, MOST_RETURNS
from kd_kit.types import DistillBatch

PIECES = SETTINGS["accumulation"]
"""Micro-batches of a step."""

KINDS = (
    *("student layer", "student layer", "teacher layer", "part layer", "term", "gradient"),
    *("weight", "teacher signal", "teacher weight"),
)
"""Where a blow falls. A student's layer is the likeliest in life, too."""

STOPPED = f"no finite gradient, after going back {MOST_RETURNS} times"


@dataclass(frozen=True)
class Blow:
    """What is put where, and when.

    Attributes:
        kind: one of ``KINDS``. place: a module, a parameter or a term, by its name; "" for the teacher's signal.
        value: NaN, +inf or -inf.
        first: the first step that is struck, counted from 0. steps: how many in a row; None for all that follow.
        one_window: of the step, and not all of them.
        piece, row, number: which micro-batch, which window in it, which number.
        resumed_after: steps of the first session; None where there is only one.
        saves: a checkpoint after every step; otherwise only behind the sessions, and by the best evaluations.
    """

    kind: str
    place: str
    value: float
    first: int
    steps: int | None
    one_window: bool
    piece: int
    row: int
    number: int
    resumed_after: int | None
    saves: bool

    def falls(self, positions: Sequence[int]) -> bool:
        """Whether it strikes the step of these batches."""
        end = math.inf if self.steps is None else PIECES * (self.first + self.steps)
        return any(PIECES * self.first <= position < end for position in positions)

    def guilty(self, batches: Sequence[DistillBatch]) -> set[int]:
        """The windows of a step that it goes into; of what the teacher says only those where anything is read."""
        pieces = []
        for batch in batches:
            read = batch.taught.any(-1) if self.kind.startswith("teacher") else [True] * len(batch.sample)
            pieces.append([int(window) for window, any_read in zip(batch.sample, read, strict=True) if any_read])
        if self.one_window:
            pieces = [piece for piece in pieces if piece]
            piece = pieces[self.piece % len(pieces)]
            return {piece[self.row % len(piece)]}
        return {window for piece in pieces for window in piece}

    @property
    def stops(self) -> str:
        """How the reason begins for which the run stops."""
        if self.kind == "teacher weight":
            return "the teacher's weights are not finite: "
        returns = math.inf if self.steps is None else self.steps if self.kind == "weight" else self.steps // IN_A_ROW
        return STOPPED if returns > MOST_RETURNS else "finished"


@cache
def places() -> dict[str, list[str]]:
    """{kind of blow: the names of the places that it can fall on}, in the order of the models."""
    student, model = tiny_student(), teacher()
    found = {}
    for kind, side, tokens in (("student layer", "student", student), ("teacher layer", "teacher", model)):
        names, handles = [], []

        def note(name: str, output, names=names, side=side) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if isinstance(states, torch.Tensor) and states.shape[:2] == (3, 5):  # one row per window
                names.append(f"{side}.{name}")

        for name, module in tokens.get_decoder().named_modules():
            name = f"model.{name}".removesuffix(".")
            # the body's output is the last norm's; and PyTorch's attention on the CPU makes finite numbers of queries
            # and keys that are not, where a window is short
            if name != "model" and not name.endswith(("q_proj", "k_proj", "q_norm", "k_norm")):
                handles.append(module.register_forward_hook(lambda m, a, out, name=name, note=note: note(name, out)))
        with torch.no_grad():
            tokens.get_decoder()(input_ids=torch.ones(3, 5, dtype=torch.long), use_cache=False)
        for handle in handles:
            handle.remove()
        found[kind] = names
    trained = [f"student.{name}" for name, _ in student.named_parameters()]
    trained += ["parts.part.guess.weight", "parts.part.guess.bias"]
    return found | {
        "part layer": ["parts.part.guess"],
        "term": ["lm", "kd", "part"],
        "gradient": trained,
        "weight": trained,
        "teacher signal": [""],
        # not all tokens and experts are used in every step
        "teacher weight": [
            f"teacher.{n}" for n, _ in model.named_parameters() if "embed" not in n and "expert" not in n
        ],
    }


def random_blow(chance: random.Random) -> Blow:
    kind = chance.choice(KINDS)
    steps = chance.choice([1, 1, chance.randint(2, 4), chance.randint(2, 4), chance.randint(5, 7), None])
    if kind == "weight" and steps is not None:
        steps = min(steps, chance.choice([1, 2, 3]))  # each of them takes the run back
    last = STEPS - 1 - min(steps or IN_A_ROW, IN_A_ROW)
    first = chance.randint(1, last)
    again = chance.random() < 0.3 and steps is not None and kind != "teacher weight"
    return Blow(
        kind,
        chance.choice(places()[kind]),
        # a gate gives -inf to what it leaves out, and so may a reading: there it is no fault by itself
        chance.choice([math.nan, math.inf] + [-math.inf] * (kind in ("term", "gradient", "weight", "teacher weight"))),
        first,
        steps,
        chance.random() < 0.5,
        chance.randrange(8),
        chance.randrange(8),
        chance.randrange(10**6),
        chance.randint(1, STEPS - 1) if again else None,
        chance.random() < 0.6,
    )


# --- the blow itself


@contextmanager
def struck(trainer, blow: Blow, batches: Sequence[DistillBatch]) -> Iterator[None]:
    """Within the block the number comes up whenever the models of a trainer see these batches."""
    guilty, seen = blow.guilty(batches), {}
    module, live = trainer.module, trainer.teacher
    output, values, signal = module.output, module.values, live.signal

    def rows(batch: DistillBatch) -> torch.Tensor:
        return torch.tensor([int(window) in guilty for window in batch.sample])

    def places_of(batch: DistillBatch, ids: torch.Tensor, packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In the rows that a model sees: whether a place belongs to a guilty window, and which token of it is there."""
        table = packed if packed.numel() else torch.arange(ids.numel()).view_as(ids)
        return rows(batch)[table.clamp(min=0) // ids.shape[1]] & (table >= 0), table % ids.shape[1]

    def noted_output(batch, **more):
        seen["student"] = places_of(batch, batch.student_ids, batch.student_packed)
        return output(batch, **more)

    def noted_signal(batch, *more):
        hit = rows(batch)
        seen["teacher"] = places_of(batch, batch.teacher_ids, batch.teacher_packed)
        said = signal(batch, *more)
        return spoilt_signal(said, blow) if blow.kind == "teacher signal" and hit.any() else said

    def noted_values(*arguments):
        found = values(*arguments)
        if blow.kind == "term" and seen["student"][0].any():
            found[blow.place] = dataclasses.replace(found[blow.place], sum=found[blow.place].sum * blow.value)
        return found

    def spoilt_output(layer, arguments, given):
        hit, token = seen[blow.place.partition(".")[0].replace("parts", "student")]
        if not hit.any():
            return None
        states = (given[0] if isinstance(given, tuple) else given).clone()
        if blow.kind == "part layer":
            factors = torch.ones_like(states)
            factors[blow.number % len(states)] = blow.value
            states = states * factors
        elif blow.kind == "student layer":
            states[hit & (token == 1 + blow.number % 3), blow.number % states.shape[-1]] = blow.value
        else:  # in one channel at all places: not all of them are read
            states[hit, ..., blow.number % states.shape[-1]] = blow.value
        return (states, *given[1:]) if isinstance(given, tuple) else states

    def spoilt_gradient(gradient):
        if not seen["student"][0].any():
            return None
        gradient = gradient.clone()
        gradient.view(-1)[blow.number % gradient.numel()] = blow.value
        return gradient

    module.output, module.values, live.signal = noted_output, noted_values, noted_signal
    with ExitStack() as undo:
        undo.callback(lambda: (delattr(module, "output"), delattr(module, "values"), delattr(live, "signal")))
        if blow.kind.endswith(" layer"):
            undo.callback(module_at(trainer, blow.place).register_forward_hook(spoilt_output).remove)
        elif blow.kind == "gradient":
            undo.callback(module.get_parameter(blow.place).register_hook(spoilt_gradient).remove)
        yield


def module_at(trainer, place: str):
    """The module of this name."""
    side, _, name = place.partition(".")
    return trainer.teacher.model.get_submodule(name) if side == "teacher" else trainer.module.get_submodule(place)


def spoilt_signal(said, blow: Blow):
    """A teacher's signal with one number of its cells replaced."""
    ((key, cells),) = said.cells.items()
    values = cells.log_probs.clone()
    values[blow.number % len(values), 0] = blow.value
    return dataclasses.replace(said, cells={key: dataclasses.replace(cells, log_probs=values)})


@dataclass
class Strikes:
    """A blow over all sessions of a run.

    Attributes:
        weights: steps whose weights were struck, by their first batch: once each.
        compared: {batches of a struck step: what it measured of the terms' gradients}.
    """

    blow: Blow
    weights: set[int] = field(default_factory=set)
    compared: dict[tuple[int, ...], torch.Tensor | None] = field(default_factory=dict)

    def strike(self, trainer) -> None:
        """Let the blow fall on this trainer, whenever its time comes."""
        step, write_down = trainer._train_step, trainer._write_down
        blow = self.blow

        def spoilt_step(batches, started, positions):
            if not blow.falls(positions):
                return step(batches, started, positions)
            if blow.kind.endswith("weight"):
                if positions[0] not in self.weights:
                    self.weights.add(positions[0])
                    self._strike_weight(trainer)
                return step(batches, started, positions)
            with struck(trainer, blow, batches):
                done = step(batches, started, positions)
            self.compared[tuple(positions)] = done.gradients
            return done

        def spoilt_search(batches, positions, scale):
            if blow.kind.endswith("weight") or not blow.falls(positions):
                return write_down(batches, positions, scale)
            with struck(trainer, blow, batches):
                return write_down(batches, positions, scale)

        trainer._train_step, trainer._write_down = spoilt_step, spoilt_search

    def _strike_weight(self, trainer) -> None:
        side, _, name = self.blow.place.partition(".")
        model, name = (trainer.teacher.model, name) if side == "teacher" else (trainer.module, self.blow.place)
        weight = model.get_parameter(name)
        with torch.no_grad():
            weight.view(-1)[self.blow.number % weight.numel()] = self.blow.value


# --- a run, and what it is compared with


def settings_of(blow: Blow, *, again: bool) -> dict:
    """Settings of a session. Without dropout where a run may go back to its very start, which draws anew."""
    dropout = 0.2 if blow.saves else 0.0
    return {
        "student": tiny_student(int(again), attention_dropout=dropout),
        "save_minutes": 0 if blow.saves else None,
    }


def run_struck(folder: Path, blow: Blow) -> tuple[str, Strikes]:
    """All sessions of a run under a blow: why the last one stopped, and what the blow knows."""
    strikes, reason = Strikes(blow), ""
    whole = teacher().state_dict()
    kept = {name: tensor.clone() for name, tensor in whole.items()} if blow.kind == "teacher weight" else {}
    try:
        for session, steps in enumerate([blow.resumed_after, None] if blow.resumed_after else [None]):
            begin(1000 + session if session else 5)
            trainer = build_run(folder, again=session > 0, **settings_of(blow, again=session > 0))
            trainer.callbacks = []
            strikes.strike(trainer)
            reason = trainer.fit(steps)
            if steps is not None and reason != "paused":
                break
    finally:
        with torch.no_grad():
            for name, tensor in kept.items():
                whole[name].copy_(tensor)
    return reason, strikes


def run_told(
    folder: Path,
    blow: Blow,
    *,
    left_out: Sequence[Sequence[int]] = (),
    compared: dict[tuple[int, ...], torch.Tensor | None] | None = None,
    steps: int | None = None,
) -> None:
    """The run that nothing strikes, and that passes over these batches and does not take these steps.

    Args:
        left_out: ranges of batches. compared: as of :class:`Strikes`, for the steps not to take.
        steps: it ends behind; None for all.
    """
    begin(5)
    trainer = build_run(folder, **settings_of(blow, again=False))
    trainer.callbacks = []
    trainer.resume()
    for first, behind in left_out:
        trainer.cursor = trainer.cursor.without(first, behind)
    step, take, compared = trainer._train_step, trainer_file.take_gradients, compared or {}

    def told_step(batches, started, positions):
        if tuple(positions) not in compared:
            return step(batches, started, positions)

        def without_gradient(*arguments, **more):
            done = take(*arguments, **more)
            next(p for p in trainer.module.parameters() if p.grad is not None).grad.fill_(math.nan)
            # a balance by gradients sees what the struck run saw
            return dataclasses.replace(done, gradients=compared[tuple(positions)])

        trainer_file.take_gradients = without_gradient
        try:
            return step(batches, started, positions)
        finally:
            trainer_file.take_gradients = take

    trainer._train_step, trainer._went_back = told_step, lambda *arguments: False
    if steps == 0:
        trainer.save()
    else:
        trainer.fit(steps)


RECOVERY = ("state/returns", "state/failed_at", "history/")
"""What a run that went back need not share with one that never had to; the history is compared by itself."""


def what_differs(folder: Path, other: Path, not_taken: Sequence[tuple[int, ...]]) -> list[str]:
    """Names of what two runs do not share, beside the count of returns and the losses of steps not taken."""
    found = []
    for run in (folder, other):
        one = {name: value for name, value in outcome(run).items() if not name.startswith(RECOVERY)}
        for number, record in enumerate(measured(History.load(run / "metrics.jsonl"))):
            if record["kind"] == "train" and tuple(record["batches"]) in not_taken:
                record = {name: record[name] for name in ("step", "batches", "tokens", "lr", "epoch", "skipped_steps")}
            one[f"history/{number}"] = json.dumps(record)
        found.append(one)
    return differences(*found)


# --- the verdict


def wrong_place(fault: Fault, blow: Blow, batches: Sequence[DistillBatch]) -> str:
    """What a fault says wrongly about where a blow fell; "" where it is right."""
    layer = blow.place or None
    expected = {
        "student layer": ("student", layer),
        "teacher layer": ("teacher", layer),
        "part layer": ("term", layer),
        "term": ("term", None),
        "gradient": ("gradient", layer),
        "weight": ("weights", layer),
        "teacher signal": ("teacher", None),
        "teacher weight": ("weights", layer),
    }[blow.kind]
    if (fault.where, fault.layer) != expected:
        return f"step {fault.step}: expected {expected}, got {(fault.where, fault.layer)}"
    if blow.kind == "term" and fault.term != blow.place:
        return f"step {fault.step}: expected the term {blow.place}, got {fault.term}"
    windows = set() if blow.kind.endswith("weight") else blow.guilty(batches)
    if set(fault.windows) != windows:
        return f"step {fault.step}: expected the windows {sorted(windows)}, got {fault.windows}"
    return ""


def broken_by(folder: Path, blow: Blow, reason: str, strikes: Strikes) -> str:
    """What is wrong with the run that a blow left in this folder; "" where nothing is."""
    state = json.loads(max((folder / "ckpt").glob("step-*")).joinpath("state.json").read_text())
    if not reason.startswith(blow.stops):
        return f"expected it to end as {blow.stops!r}, got {reason!r}"
    left_out = state["cursor"]["left_out"]
    records = [r for r in History.load(folder / "metrics.jsonl").records if r["kind"] == "train"]
    not_taken = [tuple(r["batches"]) for r in records if blow.falls(r["batches"])]
    told = folder.with_name(f"{folder.name}-told")
    try:
        if reason != "finished":
            # broken weights cannot be kept: then it stops as it stood at the checkpoint before
            run_told(told, blow, steps=state["step"] if blow.kind == "weight" else blow.first)
            tensors = ("model/", "aux/", "optim/")
            one, other = ({n: v for n, v in outcome(run).items() if n.startswith(tensors)} for run in (folder, told))
            different = differences(one, other)
            return f"not the weights of before: {different[:3]}" if different else ""
        again = blow.resumed_after is not None
        if not again and blow.kind != "weight":
            expected = [[PIECES * blow.first, PIECES * (blow.first + IN_A_ROW)]] if blow.steps >= IN_A_ROW else []
            if left_out != expected or len(not_taken) != blow.steps % IN_A_ROW:
                return f"expected the batches {expected} to be left out, got {left_out}; not taken: {not_taken}"
        compared = {batches: strikes.compared.get(batches) for batches in not_taken}
        run_told(told, blow, left_out=left_out, compared=compared)
        different = what_differs(folder, told, not_taken)
        return f"{len(different)} differ from the run that was told so: {different[:3]}" if different else ""
    finally:
        shutil.rmtree(told, ignore_errors=True)


def unsaid_by(folder: Path, blow: Blow, data) -> str:
    """What a run does not tell, or tells wrongly, about a blow; "" where it tells all."""
    alarms = [e["text"] for e in History.load(folder / "metrics.jsonl").events if e["what"] == "alarm"]
    if not any("it was not finite" in text or "back from step" in text for text in alarms):
        return f"no alarm: {alarms}"
    faults = [fault for fault in faults_of(folder) if fault.kind == "not finite"]
    if not faults:
        return "no fault was written"
    said = (wrong_place(f, blow, list(data.batches(0, f.positions))) for f in faults)
    return next((wrong for wrong in said if wrong), "")


def finite_campaign(
    folder: Path,
    seed: int,
    count: int,
    progress: Callable[[str], None] = lambda line: None,
    numbers: Sequence[int] | None = None,
) -> Counts:
    """``count`` runs, each with numbers that are not finite put into it somewhere; ``numbers``: only these of them."""
    counts, kinds = Counts("numbers that are not finite"), {}
    for number in range(count) if numbers is None else numbers:
        blow, run = random_blow(random.Random(f"{seed} {number}")), folder / f"blow-{number}"
        counts.tried += 1
        kinds[blow.kind] = kinds.get(blow.kind, 0) + 1
        try:
            reason, strikes = run_struck(run, blow)
            broken = broken_by(run, blow, reason, strikes)
        except Exception as error:  # the run is broken, the campaign is not
            broken = f"{type(error).__name__}: {error}"
        if broken:
            counts.lost += 1
            counts.notes.append(f"seed {seed}, number {number}: {broken}; {blow}")
        elif unsaid := unsaid_by(run, blow, small_data()):
            counts.silent += 1
            counts.notes.append(f"seed {seed}, number {number}: {unsaid}; {blow}")
        shutil.rmtree(run, ignore_errors=True)
        progress(f"{counts.name} {counts.tried} of {count}")
    counts.notes.append(f"seed {seed}; " + ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items())))
    return counts
