"""kd_kit/floor.py: the least that a step can cost, measured without anything of the run noticing."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_run, assert_same_tensors, make_trainer, small_data, teacher, tiny_student, weights_of
from torch import nn

from kd_kit import build_cache, floor, kd_term, lm_term, run_preflight
from kd_kit.callbacks import PrintLines
from kd_kit.floor import LEAST_STEPS, PASSES, measure_floor, teacher_pass
from kd_kit.history import History, usual_times_floor
from kd_kit.tensor_tree import capture_rng


class Ticks:
    """A clock that goes on by one second each time it is looked at."""

    def __init__(self, by: float = 1.0):
        self.now, self.by = 0.0, by

    def __call__(self) -> float:
        self.now += self.by
        return self.now


def long_trainer(folder, **arguments):
    return make_trainer(folder, **({"steps": LEAST_STEPS, "eval_every": LEAST_STEPS} | arguments))


def floors(trainer) -> list[str]:
    return [event["text"] for event in trainer.history.events if event["what"] == "floor"]


def restless_student():
    """One with dropout, and with a buffer that its forward pass changes."""

    class Counts(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x):
            self.seen += 1
            return self.inner(x)

    student = tiny_student(attention_dropout=0.1)
    student.model.norm = Counts(student.model.norm)
    return student


def passes_seen(student) -> float:
    return float(student.model.norm.seen)


@pytest.mark.parametrize("make", [tiny_student, restless_student])
def test_a_run_is_the_same_bit_for_bit_with_and_without(tmp_path, monkeypatch, make):
    data = small_data()
    with_floor = long_trainer(tmp_path / "with", student=make(), data=data)
    with_floor.fit(steps=4)
    monkeypatch.setattr("kd_kit.trainer.LEAST_STEPS", 10**9)
    without = long_trainer(tmp_path / "without", student=make(), data=data)
    without.fit(steps=4)
    assert with_floor.floor_seconds > 0 and without.floor_seconds is None
    assert floors(with_floor) and not floors(without)
    assert_same_run(with_floor, without)
    assert_same_tensors(dict(with_floor.student.named_buffers()), dict(without.student.named_buffers()))


def test_it_leaves_no_gradient_and_no_draw_behind(tmp_path):
    trainer = long_trainer(tmp_path, student=restless_student())
    pieces = [next(iter(trainer.data.batches(0, [0])))]
    before, rng, seen = weights_of(trainer), capture_rng()[0], passes_seen(trainer.student)
    trainer.student.eval()
    assert measure_floor(trainer.student, trainer.teacher, pieces, accelerator=trainer.accelerator) > 0
    assert_same_tensors(before, weights_of(trainer))
    assert_same_tensors(rng, capture_rng()[0])
    assert all(p.grad is None for p in trainer.student.parameters())
    assert not trainer.student.training
    assert passes_seen(trainer.student) == seen


def test_what_breaks_it_off_leaves_everything_as_it_was(tmp_path, monkeypatch):
    trainer = long_trainer(tmp_path, student=restless_student())
    pieces = [next(iter(trainer.data.batches(0, [0])))]
    before, seen = weights_of(trainer), passes_seen(trainer.student)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(floor, "_optimizer_seconds", interrupted)
    with pytest.raises(KeyboardInterrupt):
        measure_floor(trainer.student, None, pieces, accelerator=trainer.accelerator)
    assert_same_tensors(before, weights_of(trainer))
    assert all(p.grad is None for p in trainer.student.parameters())
    assert passes_seen(trainer.student) == seen


def test_the_figure_is_that_of_all_micro_batches_and_the_optimizer(tmp_path):
    trainer = long_trainer(tmp_path)
    pieces = list(trainer.data.batches(0, [0, 1, 2]))
    # every pass and every optimizer step lies between two looks at the clock
    got = measure_floor(trainer.student, None, pieces, accelerator=trainer.accelerator, clock=Ticks())
    assert got == 3 * 1 + 1
    slow = Ticks(6.0)
    assert measure_floor(trainer.student, None, pieces, accelerator=trainer.accelerator, clock=slow) == 3 * 6 + 6
    assert slow.now == 2 * 6 + 3 * 2 * 6, "one pass over five seconds has to do"


def test_what_else_uses_the_machine_for_a_moment_is_not_part_of_it(tmp_path):
    """Of the three passes the second takes ten times as long, and the third twice: the first is what it can be."""
    trainer = long_trainer(tmp_path)
    pieces = [next(iter(trainer.data.batches(0, [0])))]
    looks = iter([0, 2, 3, 4, 10, 20, 30, 32, 40, 40, 50, 50, 60, 60])
    got = measure_floor(
        trainer.student, None, pieces, accelerator=trainer.accelerator, clock=lambda: float(next(looks))
    )
    assert got == 1


@pytest.mark.parametrize("steps, measured", [(LEAST_STEPS, True), (LEAST_STEPS - 1, False)])
def test_a_short_run_is_not_measured(tmp_path, steps, measured):
    trainer = long_trainer(tmp_path, steps=steps)
    trainer.fit(steps=1)
    assert (trainer.floor_seconds is not None) == measured
    record = trainer.history.last("train")
    assert (record["times_floor"] is not None) == measured
    assert len(floors(trainer)) == measured
    if measured:
        taken = record["seconds"] / trainer.floor_seconds
        assert record["times_floor"] == pytest.approx(taken, rel=1e-6)


def test_a_session_measures_once_and_the_next_one_again(tmp_path):
    trainer = long_trainer(tmp_path, steps=LEAST_STEPS + 10)
    trainer.fit(steps=2)
    first = trainer.floor_seconds
    trainer.fit(steps=2)
    assert trainer.floor_seconds == first and len(floors(trainer)) == 1
    later = long_trainer(tmp_path, steps=LEAST_STEPS + 10)
    assert later.floor_seconds is None
    later.fit(steps=1)
    assert later.step == 5 and later.floor_seconds is not None and len(floors(later)) == 2


def test_a_preflight_has_measured_it_already(tmp_path, monkeypatch):
    trainer = long_trainer(tmp_path)
    run_preflight(trainer)
    known = trainer.floor_seconds
    assert known is not None
    trainer.fit(steps=1)
    assert trainer.floor_seconds == known and not floors(trainer)


def test_from_a_cache_it_is_the_students_step_alone(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        floor, "run_body", lambda model, *rest, real=floor.run_body: asked.append(model) or real(model, *rest)
    )
    trainer = long_trainer(tmp_path)
    trainer.fit(steps=1)
    assert len(asked) == PASSES + 1
    assert floors(trainer)[0].endswith("at the least: the teacher's body, the student on the text")
    build_cache(trainer)
    assert trainer.floor_seconds is None
    trainer.planned_steps += 10  # so that enough of the run is left
    trainer.fit(steps=1)
    assert len(asked) == PASSES + 1
    assert floors(trainer)[1].endswith("at the least: the student on the text")


def test_a_teacher_that_no_term_asks_is_not_part_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(floor, "run_body", lambda *given: pytest.fail("the teacher was asked"))
    trainer = long_trainer(tmp_path, terms=[lm_term(1.0)])
    trainer.fit(steps=1)
    assert trainer.floor_seconds is not None


def test_too_little_memory_for_it_is_said_and_costs_nothing(tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("kd_kit.trainer.measure_floor", full)
    trainer = long_trainer(tmp_path)
    trainer.fit(steps=1)
    assert trainer.step == 1 and trainer.floor_seconds is None
    assert trainer.micro_batch == trainer.data.batch_size
    assert floors(trainer) == ["not measured: the memory did not suffice"]


def test_the_teachers_pass_runs_its_body_without_gradient(tmp_path):
    trainer = long_trainer(tmp_path)
    batch = next(iter(trainer.data.batches(0, [0])))
    seen = []

    def keep(module, args, given, output) -> None:
        seen.append((given["input_ids"], output.last_hidden_state.requires_grad))

    hook = teacher().model.register_forward_hook(keep, with_kwargs=True)
    teacher_pass(trainer.teacher, batch)
    hook.remove()
    [(ids, with_gradient)] = seen
    assert torch.equal(ids, batch.teacher_ids) and not with_gradient


def test_terms_that_no_longer_ask_the_teacher_have_another_floor(tmp_path):
    from kd_kit.trainer_builder import change_terms

    trainer = long_trainer(tmp_path)
    trainer.floor_seconds = 1.0
    change_terms(trainer, [lm_term(0.2), kd_term(0.8, top_k=8)])
    assert trainer.floor_seconds == 1.0
    change_terms(trainer, [lm_term(1.0)])
    assert trainer.floor_seconds is None


def test_the_usual_figure_leaves_out_steps_that_compared_gradients():
    history = History()
    assert usual_times_floor(history) is None
    for step in range(1, 31):
        record = {
            "kind": "train",
            "step": step,
            "total": 1.0,
            "terms": {},
            "times_floor": None if step == 30 else 1.5 + (step > 20),
        }
        history.append(record | ({"gradients": {}, "times_floor": 9.0} if step % 2 else {}))
    assert usual_times_floor(history, 4) == 2.5
    assert usual_times_floor(history, 30) == 1.5


def test_a_printed_line_says_it(tmp_path):
    lines: list[str] = []
    trainer = long_trainer(tmp_path)
    trainer.callbacks = [PrintLines(1, print=lines.append)]
    trainer.fit(steps=10)
    times = usual_times_floor(trainer.history)
    assert any(f" tok/s ({times:.1f} x floor)  " in line for line in lines), lines
    assert any(" s per step at the least: the teacher's body, the student on the text" in line for line in lines)
