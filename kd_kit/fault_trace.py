"""Where a step that was not finite came from: weights, teacher, student, term or gradient, and which windows cause it.

The step is repeated in its order, everything is listened to, and the first place that gives back what it was not given
is named. The run does not notice: random states, buffers, gradients and hooks are afterwards what they were.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kd_kit.finite import Numbers, Watch, dtype_name, floats_of, numbers_of
from kd_kit.head import alone_with, body_of, head_of
from kd_kit.reduce import chunks
from kd_kit.tensor_tree import capture_rng, restore_rng
from kd_kit.terms import StudentOutput
from kd_kit.types import DistillBatch, LossValue, TeacherSignal

Where = Literal["weights", "teacher", "student", "term", "gradient", "unknown"]
ORDER: tuple[Where, ...] = ("weights", "teacher", "student", "term", "gradient", "unknown")
"""Where it is looked, first to last."""

PASSES = 16
"""Parts of the batch that are run on their own, at most, to find the windows."""

_SCALED = "only with the loss scale of {:,.0f}: an overflow of float16 that the scaler answers by halving its scale"
_NORM = "every number is finite, and their norm is not: the largest is {:.2g}"


@dataclass(frozen=True)
class Trace:
    """The first place at which numbers stopped being finite.

    Attributes:
        where: one of "weights", "teacher", "student", "term", "gradient"; "unknown" where nothing was found.
        term: name of the term, of a value, a gradient or a part. layer: qualified name of a module or a parameter,
            "student.model.layers.3.mlp.down_proj", "teacher....", "parts.<term>....".
        dtype: of the numbers there. numbers: how many of them are what: "12 NaN of 4,096".
        windows: indices in the training set of those that cause it; all of the step where it takes them together, or
            nothing was found; none where weights are broken.
        note: what else is to be known.
    """

    where: Where
    term: str | None = None
    layer: str | None = None
    dtype: str | None = None
    numbers: str = ""
    windows: list[int] = field(default_factory=list)
    note: str = ""


def trace(
    trainer,
    batches: Sequence[DistillBatch],
    *,
    shares: Mapping[str, float],
    measure: bool = False,
    rng: tuple | None = None,
) -> Trace:
    """Where a step came from that was not finite and was not taken.

    Costs as much as two steps where nothing is found, and two to seven where the windows are to be found, too.

    Args:
        trainer: its weights are those that the step began with.
        batches: all micro-batches of the step, on the host or the device.
        shares: of the total, of every term, as in the step.
        measure: whether the step also compared the gradients of the terms.
        rng: random states from before the step (:func:`kd_kit.tensor_tree.capture_rng`), so that dropout drops the
            same; without them it draws anew.

    Returns:
        what was found; a search that cannot be finished (out of memory, say) is "unknown" with a note, no exception.
    """
    windows = [int(index) for batch in batches for index in batch.sample.tolist()]
    try:
        with untouched(trainer):
            if rng is not None:
                restore_rng(*rng)
            return _Search(trainer, batches, shares, measure).trace(windows)
    except Exception as error:  # the run goes on without the step, whether or not its reason can be said
        text = " ".join(str(error).split())[:300]
        note = f"the search for the place broke off: {type(error).__name__}: {text}"
        return Trace("unknown", windows=windows, note=note)


@contextlib.contextmanager
def untouched(trainer) -> Iterator[None]:
    """The models of a trainer to oneself; afterwards random states and buffers are what they were before."""
    with contextlib.ExitStack() as alone:
        for model in [trainer.student] + ([] if trainer.teacher is None else [trainer.teacher.model]):
            alone.enter_context(alone_with(model))
        rng = capture_rng()
        buffers = [(buffer, buffer.detach().clone()) for buffer in trainer.module.buffers()]
        try:
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            restore_rng(*rng)


# --- the first thing to look at


def broken_weights(trainer) -> Trace | None:
    """The first parameter or buffer of student, parts and teacher that is not finite; None where all are.

    Buffers may hold -inf: masks are kept in them.
    """
    models = {"": trainer.module}
    if trainer.teacher is not None:
        models["teacher."] = trainer.teacher.model
    first, others = None, 0
    for prefix, model in models.items():
        named = [(n, p, False) for n, p in model.named_parameters()] + [(n, b, True) for n, b in model.named_buffers()]
        for name, tensor, is_buffer in named:
            found = numbers_of(tensor)
            if found is None or (is_buffer and not found.nan and not found.above):
                continue
            others += first is not None
            first = first or (prefix + name, found)
    if first is None:
        return None
    name, found = first
    note = f"{others:,} more of the weights are not finite" if others else ""
    return Trace("weights", _term_of(trainer.module, name), name, found.dtype, str(found), note=note)


# --- one batch


@dataclass(frozen=True)
class Look:
    """What one batch showed.

    Attributes:
        found: the first place, without windows; None where everything was finite.
        sums: of every term that was reached.
        problems: {term: the place in its gradient} where all gradients were asked for.
    """

    found: Trace | None = None
    sums: Mapping[str, float] = field(default_factory=dict)
    problems: Mapping[str, Trace] = field(default_factory=dict)


def look(
    trainer,
    batch: DistillBatch,
    scales: Mapping[str, float],
    *,
    measure: bool = False,
    until: Where = "gradient",
    every: bool = False,
) -> Look:
    """Run both models over a batch, listening. To be used inside :func:`untouched`.

    Args:
        batch: on the trainer's device.
        scales: of the terms' sums; a term that has none, or 0, is not differentiated.
        until: the last stage to look at.
        every: look at the gradients of all terms, also behind the first that is not finite.
    """
    module, asked = trainer.module, trainer.teacher is not None and trainer.module.needs.teacher
    signal = None
    if asked and until != "student":
        signal, found = _of_teacher(trainer.teacher, batch)
        if found is not None or until == "teacher":
            return Look(found)
    with Watch({"student": module.student, "parts": module.parts}) as watch, torch.enable_grad():
        with trainer.accelerator.autocast():
            output = module.output(batch, meet=measure)
            found = _of_student(module, output, watch)
            if found is not None or until == "student":
                return Look(found)
            doors = _with_doors(output, watch)
            values = module.values(doors, signal, batch)
            found = _of_terms(module, output, values, watch, batch)
        sums = {name: float(value.sum.detach().float()) for name, value in values.items()}
        if found is not None or until == "term":
            return Look(found, sums)
        problems = {}
        for name, place in _of_gradients(trainer, values, scales, watch):
            problems[name] = place
            if not every:
                break
    return Look(next(iter(problems.values()), None), sums, problems)


def _of_teacher(teacher, batch: DistillBatch) -> tuple[TeacherSignal, Trace | None]:
    with Watch({"teacher": teacher.model}) as watch:
        signal = teacher.signal(batch)
    bad = _bad_signal(signal)
    if bad is None:
        return signal, None
    what, numbers = bad
    place = watch.forward_place()
    if place is None:
        with torch.inference_mode(), torch.autocast(teacher.device.type, enabled=False):
            ids = batch.teacher_ids.to(teacher.device)
            hidden = body_of(teacher.model)(input_ids=ids, use_cache=False).last_hidden_state
            place = _bad_logits(teacher.model, hidden.flatten(0, 1), "teacher")
    if place is None:
        note = f"the teacher's states and logits are finite, what is made of them is not: {what}"
        return signal, Trace("teacher", None, None, numbers.dtype, str(numbers), note=note)
    return signal, _trace("teacher", *place)


def _bad_signal(signal: TeacherSignal) -> tuple[str, Numbers] | None:
    """The first part of a signal that no term can use. A cell without any probability holds -inf by design."""
    rest = {name: getattr(signal, name) for name in ("row_states", "span_log_probs", "states", "routing", "attention")}
    for key, cells in signal.cells.items():
        for name in ("log_probs", "tail"):
            found = numbers_of(getattr(cells, name))
            if found is not None and (found.nan or found.above):
                return f"{name} of the reading {key}", found
    for name, value in rest.items():
        for tensor in floats_of(value):
            if (found := numbers_of(tensor)) is not None:
                return name.replace("_", " "), found
    return None


def _bad_logits(model: nn.Module, hidden: Tensor, side: str) -> tuple[str, Numbers] | None:
    """What is not finite in the logits of some final states, [n, D], with the head's name: no module computes them."""
    head = head_of(model)
    with torch.no_grad():
        for rows in chunks(len(hidden), head.chunk_rows()):
            found = numbers_of(head.logits(hidden[rows]))
            if found is not None:
                return _head_name(model, side), replace(found, dtype=_computed_in(head.weight))
    return None


def _head_name(model: nn.Module, side: str) -> str:
    layer = model.get_output_embeddings()
    return ".".join([side, *[name for name, module in model.named_modules() if module is layer][:1]])


def _computed_in(weight: Tensor) -> str:
    """The dtype of a product with this weight, in which it overflows or not: autocast's where that is on."""
    kind = weight.device.type
    if torch.is_autocast_enabled(kind):
        return str(torch.get_autocast_dtype(kind)).removeprefix("torch.")
    return dtype_name(weight)


def _of_student(module, output: StudentOutput, watch: Watch) -> Trace | None:
    used = [output.hidden, dict(output.states), dict(output.attention)]
    bad = next((n for tensor in floats_of(used) if (n := numbers_of(tensor)) is not None), None)
    if bad is None:
        return None
    place = watch.forward_place()
    return _trace("student", *(place or ("student", bad)))


def _with_doors(output: StudentOutput, watch: Watch) -> StudentOutput:
    """The student's output through views, which tell what gradient the terms send into it."""
    return replace(
        output,
        hidden=watch.hear("hidden", output.hidden),
        states={n: watch.hear(f"state {n}", s) for n, s in output.states.items()},
        attention={
            n: {name: watch.hear(f"{name} {n}", t) for name, t in parts.items()}
            for n, parts in output.attention.items()
        },
    )


def _of_terms(
    module, output: StudentOutput, values: Mapping[str, LossValue], watch: Watch, batch: DistillBatch
) -> Trace | None:
    for term in module.terms:
        total = values[term.name].sum
        found = numbers_of(total)
        if found is None:
            continue
        place = _bad_logits(module.student, output.hidden.detach().flatten(0, 1)[batch.rows], "student")
        if place is not None:
            return _trace("student", *place)
        kind = "NaN" if found.nan else "+inf" if found.above else "-inf"
        place = watch.forward_place()
        if place is not None and _term_of(module, place[0]) == term.name:
            return replace(_trace("term", *place), term=term.name, note=f"the sum of {term.name} is {kind}")
        return Trace("term", term.name, None, found.dtype, f"its sum is {kind}")
    return None


def _of_gradients(trainer, values, scales: Mapping[str, float], watch: Watch) -> Iterator[tuple[str, Trace]]:
    """Every term whose gradient is not finite: as it is, then, where a scaler multiplies losses, multiplied."""
    scaler = trainer.accelerator.scaler
    factors = [1.0] + ([float(scaler.get_scale())] if scaler is not None else [])
    named = {n: p for n, p in trainer.module.named_parameters() if p.requires_grad}
    bad = set()
    for factor in factors:
        for term in trainer.module.terms:
            total = values[term.name].sum
            scale = scales.get(term.name, 0.0) * factor
            if term.name in bad or not scale or not total.requires_grad:
                continue
            place = _of_gradient(named, total.float() * scale, watch, norm=factor == 1.0)
            if place is not None:
                bad.add(term.name)
                note = _SCALED.format(factor) if factor != 1.0 else place.note
                yield term.name, replace(place, term=term.name, note=note)


def _of_gradient(named: Mapping[str, Tensor], loss: Tensor, watch: Watch, *, norm: bool) -> Trace | None:
    """The place in the gradient of one loss, without the term."""

    def take():
        return torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)

    taken = {n: g for n, g in zip(named, watch.gradients(take), strict=True) if g is not None}
    found = {name: n for name, gradient in taken.items() if (n := numbers_of(gradient)) is not None}
    if not found:
        return _too_large(taken) if norm else None
    place = watch.backward_place({id(named[name]): n for name, n in found.items()})
    door = watch.heard()
    if door is not None and not (place and place[0].startswith("parts.")):
        note = "it arises in the term itself, behind what the student gives it"
        return Trace("gradient", None, None, door[1].dtype, str(door[1]), note=note)
    return _trace("gradient", *(place or next(reversed(found.items()))))


def _too_large(taken: Mapping[str, Tensor]) -> Trace | None:
    """Finite gradients whose norm is not: a clipped step needs it."""
    norms = {name: float(g.float().norm()) for name, g in taken.items()}
    if math.isfinite(torch.tensor(list(norms.values())).norm().item()):
        return None
    name = max(norms, key=norms.get)
    note = _NORM.format(float(taken[name].abs().max()))
    return Trace("gradient", None, name, dtype_name(taken[name]), "the norm is not finite", note=note)


def _trace(where: Where, name: str, numbers: Numbers) -> Trace:
    return Trace(where, None, name, numbers.dtype, str(numbers))


def _term_of(module, name: str) -> str | None:
    """The term whose part a qualified name lies in."""
    inside = (t for t in module.parts if name == f"parts.{t}" or name.startswith(f"parts.{t}."))
    return max(inside, key=len, default=None)


# --- all batches, and the windows in them


class _Search:
    def __init__(self, trainer, batches: Sequence[DistillBatch], shares: Mapping[str, float], measure: bool):
        self.trainer = trainer
        self.batches = batches
        self.measure = measure
        counts = {t.name: sum(t.count(b) for b in batches) for t in trainer.module.terms}
        self.scales = {name: shares[name] / count if count else 0.0 for name, count in counts.items()}

    def trace(self, windows: list[int]) -> Trace:
        found = broken_weights(self.trainer)
        if found is not None:
            return found
        looked = [self._look(b, measure=self.measure and n == 0) for n, b in enumerate(self.batches)]
        found = min((t for t in looked if t is not None), key=lambda t: ORDER.index(t.where), default=None)
        if found is None:
            note = "not repeated: the same batch gives finite numbers now; dropout draws anew, hardware may have failed"
            return Trace("unknown", windows=windows, note=note)
        groups = [b.sample.tolist() for b, t in zip(self.batches, looked, strict=True) if t and _alike(t, found)]
        return replace(found, windows=sorted(self._narrowed(groups, found)))

    def _look(self, batch: DistillBatch, *, measure: bool = False, until: Where = "gradient", scales=None):
        batch = batch.to(self.trainer.session.device)
        return look(self.trainer, batch, scales or self.scales, measure=measure, until=until).found

    def _shows(self, group: list[int], found: Trace) -> bool:
        """Whether these windows on their own show what was found."""
        scales = {found.term: self.scales[found.term]} if found.where == "gradient" else None
        in_head = found.layer == _head_name(self.trainer.student, "student")
        until = "term" if found.where == "student" and in_head else found.where
        seen = self._look(self.trainer.data.train.collate(group), until=until, scales=scales)
        return seen is not None and _alike(seen, found)

    def _narrowed(self, groups: list[list[int]], found: Trace) -> set[int]:
        """The windows of bad groups that are bad on their own, by halving; a group whose halves are not, as a whole."""
        guilty, passes, waiting = set(), 0, list(groups)
        while waiting:
            group = waiting.pop(0)
            if len(group) == 1 or passes + 2 > PASSES:
                guilty.update(group)
                continue
            middle = len(group) // 2
            bad = [half for half in (group[:middle], group[middle:]) if self._shows(half, found)]
            passes += 2
            waiting += bad
            if not bad:
                guilty.update(group)
        return guilty


def _alike(one: Trace, other: Trace) -> bool:
    return (one.where, one.term) == (other.where, other.term)
