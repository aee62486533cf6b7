"""kd_kit/recovery.py: steps that do not fit into the memory, and steps without a finite gradient."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import (
    assert_same_run,
    assert_same_tensors,
    make_trainer,
    measured,
    part_term,
    small_data,
    tiny_student,
    weights_of,
    with_scaler,
)

from kd_kit import LearningRate, contrastive_term, kd_term, last_fault, lm_term
from kd_kit.checkpoint import CheckpointError, find_checkpoint
from kd_kit.history import History
from kd_kit.module import DistillModule
from kd_kit.recovery import IN_A_ROW, MOST_RETURNS, is_out_of_memory
from kd_kit.terms import LossTerm
from kd_kit.trainer import Trainer
from kd_kit.trainer_builder import change_terms
from kd_kit.types import LossValue


def terms(seed: int = 0):
    return [lm_term(0.3), kd_term(0.6, top_k=8), part_term(0.1, seed=seed)]


def trainer_at(folder, *, seed: int = 0, **arguments):
    settings = {"terms": terms(seed), "steps": 12, "eval_every": 12, "data": small_data(batch_size=4)}
    return make_trainer(folder, student=tiny_student(seed, attention_dropout=0.0), **(settings | arguments))


def alarms(trainer) -> list[str]:
    return [e["text"] for e in trainer.history.events if e["what"] == "alarm"]


def losses(trainer) -> list[float]:
    return trainer.history.column("total")[1]


def test_what_killed_processes_left_half_written_is_cleared_away(tmp_path):
    trainer = trainer_at(tmp_path / "run")
    trainer.fit(steps=1)
    left = [tmp_path / "run" / name for name in (".best.safetensors.123.tmp", ".tmp2Pm8fl", ".metrics.jsonl.9.tmp")]
    for path in left:
        path.write_bytes(b"half")
    trainer_at(tmp_path / "run").resume()
    assert not [path for path in left if path.exists()]


# --- memory ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_memory(monkeypatch):
    """A function that lets a forward pass with more windows than this fail; None lifts it."""
    limit: list = [None]
    forward = DistillModule.forward

    def limited(self, batch, *arguments, **more):
        if limit[0] is not None and len(batch.sample) > limit[0]:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return forward(self, batch, *arguments, **more)

    monkeypatch.setattr(DistillModule, "forward", limited)

    def of(windows):
        limit[0] = windows

    return of


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(("windows", "halves"), [(3, [2]), (2, [2]), (1, [2, 1])])
def test_out_of_memory_goes_on_with_the_same_samples_in_smaller_pieces(
    tmp_path, small_memory, accumulation, windows, halves
):
    whole = trainer_at(tmp_path / "whole", accumulation=accumulation, steps=6)
    whole.fit()
    trainer = trainer_at(tmp_path / "run", accumulation=accumulation, steps=6)
    trainer.fit(steps=2)
    small_memory(windows)
    assert trainer.fit() == "finished"
    assert trainer.micro_batch == halves[-1]
    assert [r["batches"] for r in measured_trains(trainer)] == [r["batches"] for r in measured_trains(whole)]
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-4)
    assert [len(alarms(trainer)), trainer.skipped_steps] == [len(halves), 0]
    assert alarms(trainer)[0].startswith(
        "out of memory in the training step: CUDA out of memory. Tried to allocate 2.00 GiB. From here on 2 windows "
        "at once instead of 4"
    )
    for name, value in weights_of(whole).items():
        torch.testing.assert_close(weights_of(trainer)[name], value, rtol=2e-3, atol=2e-4)


def measured_trains(trainer):
    return [r for r in trainer.history.records if r["kind"] == "train"]


def test_a_step_that_ran_out_half_way_is_redone_from_nothing(tmp_path, monkeypatch):
    """The second of three micro-batches fails: the gradient of the first must not count twice."""
    whole = trainer_at(tmp_path / "whole", accumulation=3, steps=3)
    whole.fit()
    trainer = trainer_at(tmp_path / "run", accumulation=3, steps=3)
    forward, calls = DistillModule.forward, []

    def failing(self, *arguments, **more):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: ...")
        return forward(self, *arguments, **more)

    monkeypatch.setattr(DistillModule, "forward", failing)
    trainer.fit()
    assert len(calls) == 2 + 6 * 3
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-4)


def test_one_window_that_does_not_fit_is_an_error_that_says_what_to_do(tmp_path, small_memory):
    trainer = trainer_at(tmp_path / "run")
    small_memory(0)
    with pytest.raises(RuntimeError, match=r"expected one window of 32 tokens to fit .* use a smaller window="):
        trainer.fit()
    small_memory(None)
    assert trainer.fit() == "finished", "nothing is broken"


def test_a_resumed_session_on_the_same_machine_knows_what_fits(tmp_path, small_memory):
    trainer = trainer_at(tmp_path / "run")
    small_memory(2)
    trainer.fit(steps=2)
    again = trainer_at(tmp_path / "run", seed=1)
    again.fit(steps=2)
    assert again.micro_batch == 2 and len(alarms(again)) == 1
    small_memory(None)
    whole = trainer_at(tmp_path / "whole")
    small_memory(2)
    whole.fit()
    again.fit()
    assert_same_run(whole, again)


def test_another_machine_finds_out_by_itself(tmp_path, small_memory, monkeypatch):
    trainer = trainer_at(tmp_path / "run")
    small_memory(2)
    trainer.fit(steps=2)
    small_memory(None)
    monkeypatch.setattr("kd_kit.session.Session.machine", "a larger card, 80 GiB")
    again = trainer_at(tmp_path / "run", seed=1)
    again.resume()
    assert again.micro_batch == 4


def test_evaluation_and_statistics_fit_into_the_memory_too(tmp_path, monkeypatch):
    trainer = trainer_at(tmp_path / "run", terms=[lm_term(0.5), contrastive_term(0.5)])
    from kd_kit import recovery
    from kd_kit import trainer as trainer_file

    score, settle = trainer_file.score, trainer_file.settle_parts

    def small_score(*arguments, batch_size, **more):
        if batch_size > 2:
            raise MemoryError
        return score(*arguments, batch_size=batch_size, **more)

    def small_settle(module, teacher, batches):
        def checked():
            for batch in batches:
                if len(batch.sample) > 1:
                    raise torch.OutOfMemoryError("HIP out of memory. Tried to allocate")
                yield batch

        settle(module, teacher, checked())

    assert recovery.is_out_of_memory(MemoryError())
    monkeypatch.setattr(trainer_file, "score", small_score)
    monkeypatch.setattr(trainer_file, "settle_parts", small_settle)
    trainer.fit(steps=1)
    texts = alarms(trainer)
    assert [t.split(":")[0] for t in texts] == ["out of memory in the statistics before the first step"] * 2
    assert texts[0].endswith("the same windows per step; contrastive compares what is in them, so its value changes")
    trainer.micro_batch = 4
    assert math.isfinite(trainer.evaluate_now())
    assert alarms(trainer)[-1].startswith("out of memory in the evaluation: MemoryError. From here on 2 windows")


def test_other_errors_are_not_taken_for_a_lack_of_memory(tmp_path, monkeypatch):
    assert not is_out_of_memory(RuntimeError("expected all tensors on one device"))
    assert not is_out_of_memory(KeyboardInterrupt())
    trainer = trainer_at(tmp_path / "run")

    def broken(*arguments, **more):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(DistillModule, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        trainer.fit()


# --- numbers that are not finite -------------------------------------------------------------------------------------


@pytest.fixture
def bad_batches(monkeypatch):
    """A function that makes the gradient of these positions NaN."""
    wanted: set[int] = set()
    own = Trainer._train_step

    def spoilt(self, batches, started, positions):
        if not wanted & set(positions):
            return own(self, batches, started, positions)
        head = next(self.student.parameters())
        handle = head.register_hook(lambda gradient: gradient * math.nan)
        try:
            return own(self, batches, started, positions)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "_train_step", spoilt)
    return wanted


def test_one_bad_step_is_not_taken_and_the_run_goes_on(tmp_path, bad_batches):
    bad_batches.add(3)
    trainer = trainer_at(tmp_path / "run")
    trainer.fit(steps=3)
    before = weights_of(trainer)
    trainer.fit(steps=1)
    assert_same_tensors(before, weights_of(trainer))
    assert trainer.fit() == "finished"
    assert trainer.skipped_steps == 1 and trainer.returns == 0
    text = alarms(trainer)[0]
    assert text.startswith("Step 4 was not taken: it was not finite") and text.endswith("; kd.last_fault() shows more")
    assert all(t.isfinite().all() for t in weights_of(trainer).values())


@pytest.mark.parametrize("saved", [0, 2])
def test_five_in_a_row_go_back_to_the_checkpoint_and_past_those_batches(tmp_path, bad_batches, saved):
    bad_batches.update(range(4, 4 + IN_A_ROW))
    trainer = trainer_at(tmp_path / "run")
    if saved:
        trainer.fit(steps=saved)
        trainer = trainer_at(tmp_path / "run", seed=1)
    assert trainer.fit() == "finished"
    assert trainer.returns == 1 and trainer.cursor.left_out == ((4, 9),)
    assert [r["batches"] for r in measured_trains(trainer)] == [[p] for p in [0, 1, 2, 3, *range(9, 17)]]
    assert alarms(trainer)[-1].startswith(
        f"5 steps in a row without a finite gradient: back from step 9 to step {saved}, and past batches 4 to 8"
    )
    assert trainer.step == 12 and trainer.skipped_steps == 0, "the steps that failed are forgotten"


def test_after_going_back_the_run_is_the_one_that_never_met_those_batches(tmp_path, bad_batches):
    bad_batches.update(range(4, 9))
    trainer = trainer_at(tmp_path / "run")
    trainer.fit(steps=2)
    trainer.fit()
    bad_batches.clear()
    other = trainer_at(tmp_path / "other")
    other.cursor = other.cursor.without(4, 9)
    other._resumed = True
    other.fit()
    assert_same_tensors(weights_of(other), weights_of(trainer))


def test_a_session_that_dies_after_going_back_knows_what_to_leave_out(tmp_path, bad_batches):
    bad_batches.update(range(4, 9))
    whole = trainer_at(tmp_path / "whole")
    whole.fit()
    trainer = trainer_at(tmp_path / "run")
    saves = []
    trainer.callbacks = [type("Stop", (), {"on_save": lambda self, t: saves.append(1) or t.stop("killed")})()]
    trainer.fit()
    again = trainer_at(tmp_path / "run", seed=1)
    again.resume()
    assert again.returns == 1 and again.cursor.left_out == ((4, 9),)
    again.fit()
    assert_same_run(whole, again)
    assert measured(History.load(tmp_path / "run" / "metrics.jsonl")) == measured(whole.history)


def test_a_teacher_that_is_not_finite_is_an_alarm_and_ends_the_run(tmp_path, monkeypatch):
    """NaN from a teacher that overflows in half precision must not become a loss of 0."""
    trainer = trainer_at(tmp_path / "run", steps=60, eval_every=60)
    monkeypatch.setattr(trainer.teacher, "signal", spoilt_signal(trainer.teacher.signal))
    before = weights_of(trainer)
    assert trainer.fit() == "no finite gradient, after going back 3 times; kd.last_fault() shows where it began"
    assert_same_tensors(before, weights_of(trainer))
    assert any(
        t.startswith("kd was not finite; its steps are skipped, since step 1. Likely: ") for t in alarms(trainer)
    )
    assert math.isnan(trainer.history.series("kd")[1][0])


def test_places_that_fail_far_apart_do_not_add_up(tmp_path, bad_batches):
    bad_batches.update(p for start in (4, 14, 24, 34) for p in range(start, start + IN_A_ROW))
    trainer = trainer_at(tmp_path / "run", steps=40, eval_every=40, save_minutes=0)
    assert trainer.fit() == "finished"
    assert len(trainer.cursor.left_out) == 4 and trainer.returns == 1


def test_a_run_that_is_never_finite_stops_and_says_so(tmp_path, bad_batches):
    bad_batches.update(range(1000))
    trainer = trainer_at(tmp_path / "run", steps=60, eval_every=60)
    before = weights_of(trainer)
    reason = trainer.fit()
    assert reason == "no finite gradient, after going back 3 times; kd.last_fault() shows where it began"
    assert trainer.step == IN_A_ROW and trainer.returns == MOST_RETURNS
    assert trainer.cursor.left_out == ((0, IN_A_ROW * MOST_RETURNS),)
    assert_same_tensors(before, weights_of(trainer))


def test_bad_steps_with_good_ones_between_them_do_not_go_back(tmp_path, bad_batches):
    bad_batches.update({0, 1, 2, 3, 5, 6, 7, 8})
    trainer = trainer_at(tmp_path / "run")
    assert trainer.fit() == "finished"
    assert trainer.returns == 0 and trainer.skipped_steps == 8


def test_weights_that_are_not_finite_are_the_checkpoints_again(tmp_path):
    whole = trainer_at(tmp_path / "whole")
    whole.cursor = whole.cursor.without(4, 6)
    whole._resumed = True
    whole.fit()

    class Spoil:
        def on_log(self, trainer):
            if trainer.step == 5 and not trainer.returns:
                with torch.no_grad():
                    trainer.student.get_input_embeddings().weight[:, 3] = math.nan

    trainer = trainer_at(tmp_path / "run", measure_every=4)
    trainer.fit(steps=2)
    trainer.callbacks.append(Spoil())
    assert trainer.fit() == "finished"
    (text,) = [t for t in alarms(trainer) if "back from" in t]
    assert text.startswith("the weights are not finite: back from step 6 to step 2, and past batches 4 to 5")
    assert all(t.isfinite().all() for t in weights_of(trainer).values())


@pytest.mark.parametrize("stop", [None, 7])
def test_weights_that_break_in_the_last_step_of_a_session_are_the_checkpoints_again(tmp_path, stop):
    class Spoil:
        def on_evaluate(self, trainer):
            if trainer.step == (stop or 12) and trainer.failed_at == 0:
                with torch.no_grad():
                    next(trainer.student.parameters())[0] = math.nan

    trainer = trainer_at(tmp_path / "run", eval_every=stop or 12)
    trainer.fit(steps=3)
    trainer.callbacks.append(Spoil())
    assert trainer.fit(steps=stop and stop - 3) == ("finished" if stop is None else "paused")
    assert trainer.step == (stop or 12) and trainer.cursor.left_out != ()
    assert all(t.isfinite().all() for t in weights_of(trainer).values())
    assert find_checkpoint(tmp_path / "run")[0].step == trainer.step


def test_a_run_that_ends_with_broken_weights_time_after_time_stops_with_the_last_good_ones(tmp_path):
    class Spoil:
        def on_evaluate(self, trainer):
            if trainer.step == 12:
                with torch.no_grad():
                    next(trainer.student.parameters())[0] = math.nan

    trainer = trainer_at(tmp_path / "run")
    trainer.fit(steps=3)
    trainer.callbacks.append(Spoil())
    assert trainer.fit().startswith("no finite gradient, after going back 3 times")
    assert trainer.step == 3
    assert all(t.isfinite().all() for t in weights_of(trainer).values())


def test_a_loss_that_is_not_finite_is_not_learnt_from_even_if_its_gradient_is(tmp_path):
    def wild(output, signal, batch):
        constant = math.nan if 5 in batch.sample.tolist() else 0.0
        return LossValue(output.hidden.float().sum() * 0 + constant, torch.ones(()))

    spoilt = LossTerm(name="wild", weight=0.1, unit="", healthy=(0, 1), value=wild, over=lambda batch: 1)
    trainer = trainer_at(tmp_path / "run", terms=[lm_term(0.9), spoilt])
    assert trainer.fit() == "finished"
    assert trainer.skipped_steps >= 1
    assert (last_fault(trainer).where, last_fault(trainer).term) == ("term", "wild")


def test_going_back_to_the_start_draws_the_same_random_numbers(tmp_path, bad_batches):
    bad_batches.update(range(4, 9))

    def dropping(name: str):
        student = tiny_student(0, attention_dropout=0.3)
        return make_trainer(tmp_path / name, student=student, terms=terms(), steps=10, eval_every=10)

    trainer = dropping("run")
    trainer.fit()
    bad_batches.clear()
    torch.rand(7)
    other = dropping("other")
    other.cursor = other.cursor.without(4, 9)
    other._resumed = True
    other.fit()
    assert_same_tensors(weights_of(other), weights_of(trainer))


def test_a_state_that_is_not_finite_is_not_saved_and_the_run_goes_back(tmp_path):
    class Spoil:
        def on_evaluate(self, trainer):
            if trainer.step == 6 and not trainer.returns:
                with torch.no_grad():
                    next(iter(trainer.module.parts.parameters())).fill_(math.inf)
                trainer._save_or_warn()

    trainer = trainer_at(tmp_path / "run", eval_every=6)
    trainer.fit(steps=2)
    trainer.callbacks.append(Spoil())
    assert trainer.fit() == "finished"
    texts = alarms(trainer)
    assert any(
        t.startswith("the state is not finite: back from step 6 to step 2, and past batch 5 of the run") for t in texts
    )
    assert all(t.isfinite().all() for t in trainer.module.state_dict().values())


def test_a_teacher_whose_weights_are_not_finite_stops_the_run_at_once(tmp_path, monkeypatch):
    from kd_kit import build_teacher

    teacher = build_teacher(device="cpu")
    trainer = trainer_at(tmp_path / "run", model=teacher)
    trainer.fit(steps=1)
    with torch.no_grad():
        teacher.get_output_embeddings().weight[5, 5] = math.nan
    assert trainer.fit().startswith("the teacher's weights are not finite: teacher.")
    assert trainer.step == 2


def test_a_gradient_scaler_that_looks_for_its_scale_is_no_fault(tmp_path, monkeypatch):
    """With loss scaling the first steps may overflow; the scaler sees to that alone, however many they are."""
    data = small_data(batch_size=2)
    trainer = with_scaler(trainer_at(tmp_path / "run", steps=20, data=data), monkeypatch, scale=2.0**127)
    trainer.accelerator.scaler.set_growth_interval(10**6)
    trainer.fit()
    assert IN_A_ROW < trainer.skipped_steps < 20
    assert trainer.returns == 0 and not [t for t in alarms(trainer) if "finite gradient" in t]


def test_with_a_gradient_scaler_losses_that_are_not_finite_are_a_fault(tmp_path, monkeypatch):
    trainer = with_scaler(trainer_at(tmp_path / "run"), monkeypatch)
    monkeypatch.setattr(trainer.teacher, "signal", spoilt_signal(trainer.teacher.signal))
    assert trainer.fit().startswith("no finite gradient, after going back 3 times")


def spoilt_signal(right):
    """A teacher that says NaN, as one that overflows in half precision does."""

    def signal(batch, here=None):
        said = right(batch, here)
        ((key, cells),) = said.cells.items()
        spoilt = dataclasses.replace(cells, log_probs=cells.log_probs * math.nan, tail=cells.tail * math.nan)
        return dataclasses.replace(said, cells={key: spoilt})

    return signal


# --- spikes ----------------------------------------------------------------------------------------------------------


def test_a_spike_is_written_down_with_its_text_and_the_run_goes_on(tmp_path, monkeypatch):
    trainer = trainer_at(tmp_path / "run", steps=70, eval_every=70, measure_every=1000)
    own = Trainer._train_step

    def louder(self, batches, started, positions):
        if self.step != 60:
            return own(self, batches, started, positions)
        handle = next(self.student.parameters()).register_hook(lambda gradient: gradient * 1000)
        try:
            return own(self, batches, started, positions)
        finally:
            handle.remove()

    monkeypatch.setattr(Trainer, "_train_step", louder)
    assert trainer.fit() == "finished"
    (text,) = [t for t in alarms(trainer) if t.startswith("spike")]
    assert text.startswith("spike at step 61: gradient norm ") and "clipped to 1" in text
    fault = last_fault(trainer)
    assert (fault.kind, fault.step, fault.positions, len(fault.windows)) == ("spike", 61, [60], 4)
    assert fault.texts[0] == trainer.data.train.text(fault.windows[0])[: len(fault.texts[0])]


# --- what going back keeps, and what it may not break ----------------------------------------------------------------


def test_the_search_for_the_cause_fits_into_the_memory_too(tmp_path, bad_batches, monkeypatch):
    output, seen = DistillModule.output, []

    def limited(self, batch, *arguments, **more):
        seen.append(len(batch.sample))
        if len(batch.sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return output(self, batch, *arguments, **more)

    monkeypatch.setattr(DistillModule, "output", limited)
    bad_batches.add(3)
    trainer = trainer_at(tmp_path / "run", steps=6)
    assert trainer.fit() == "finished"
    assert "broke off" not in last_fault().note and seen.count(4) == 1


def test_bad_steps_before_an_interrupt_do_not_count_after_it(tmp_path, bad_batches, monkeypatch):
    """The run is at its checkpoint again: what was bad behind that is not behind it any more."""
    bad_batches.update({8, 9, 10})
    trainer = trainer_at(tmp_path / "run", steps=20, eval_every=20)
    trainer.fit(steps=2)

    def interrupted(end):
        if trainer.step == 11:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer, "_after_step", interrupted)
        trainer.fit()
    bad_batches.clear()
    bad_batches.update({2, 3})
    assert trainer.fit() == "finished"
    assert trainer.returns == 0 and trainer.cursor.left_out == () and trainer.skipped_steps == 2


def test_going_back_to_damaged_checkpoints_alone_gives_nothing_up(tmp_path, bad_batches):
    bad_batches.update(range(4, 9))
    trainer = trainer_at(tmp_path / "run")
    trainer.fit(steps=2)
    weights = next((tmp_path / "run" / "ckpt").glob("step-*")) / "model.safetensors"
    weights.write_bytes(bytes(reversed(weights.read_bytes())))
    with pytest.raises(CheckpointError, match="got only refused ones"):
        trainer.fit()
    assert trainer.step == 9, "the state is still here"
    assert trainer.save().step == 9
    assert trainer.fit() == "finished"


def test_a_disk_without_room_does_not_make_the_run_forget_what_it_left_out(tmp_path, bad_batches, monkeypatch):
    """Also what a control was told to leave out, and an early decay, outlive going back to a start."""

    def full(*arguments, **more):
        raise CheckpointError(28, "save_checkpoint: no room")

    trainer = trainer_at(tmp_path / "run", steps=40, eval_every=40, lr_schedule=LearningRate(decay=0.25))
    trainer.cursor = trainer.cursor.without(1, 3)
    trainer.decay_from, trainer._resumed = 15, True
    bad_batches.update(range(4, 9))
    with monkeypatch.context() as patch:
        patch.setattr("kd_kit.checkpoint.save_checkpoint", full)
        with pytest.raises(CheckpointError, match="no room"):
            trainer.fit()
    assert trainer.cursor.left_out == ((1, 3), (4, 9))
    assert trainer.step == trainer.total_steps == 25
    assert trainer.history.last("run")["total_steps"] == 25


def test_a_run_that_was_stopped_early_and_went_on_is_not_stopped_after_going_back(tmp_path, bad_batches):
    trainer = trainer_at(tmp_path / "run", steps=20)
    trainer.fit(steps=2)
    trainer.stopped_early = True
    trainer.save()
    bad_batches.update(range(4, 9))
    again = trainer_at(tmp_path / "run", seed=1, steps=20, early_stopping=None)
    assert again.fit(steps=8) == "paused"
    assert again.returns == 1 and not again.stopped_early


def test_other_terms_before_the_first_step_keep_what_was_left_out(tmp_path, bad_batches):
    bad_batches.update(range(IN_A_ROW))
    trainer = trainer_at(tmp_path / "run")
    trainer.callbacks = [type("Stop", (), {"on_save": lambda self, t: t.stop("enough")})()]
    trainer.fit()
    trainer.micro_batch = 2
    change_terms(trainer, [lm_term(0.4), *terms()[1:]])
    assert trainer.step == 0 and trainer.micro_batch == 2 and trainer.cursor.left_out == ((0, IN_A_ROW),)
