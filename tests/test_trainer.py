"""kd_kit/trainer.py: a run is the same run however often it is interrupted, and says what it did."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import time

import pytest
import torch
from conftest import cells_of, untaught
from helpers import (
    Part,
    assert_same_run,
    assert_same_tensors,
    make_trainer,
    measured,
    pages,
    pair,
    part_term,
    session_at,
    small_data,
    teacher,
    tiny_student,
    weights_of,
    with_scaler,
)
from safetensors.torch import load_file
from torch import nn

from kd_kit import (
    Callback,
    LearningRate,
    agreement,
    audit,
    build_data,
    build_student,
    contrastive_term,
    evaluate,
    export,
    feature_term,
    kd_term,
    lm_term,
    piecewise,
    router_term,
    score,
)
from kd_kit.checkpoint import CheckpointError, find_checkpoint, inspect_checkpoint
from kd_kit.history import History, verdict
from kd_kit.module import DistillModule
from kd_kit.readings import BridgeReading, Needs
from kd_kit.session import Session, process_age
from kd_kit.terms import LossTerm
from kd_kit.trainer_builder import build_trainer
from kd_kit.types import LossValue


@pytest.fixture(autouse=True)
def quiet_precision(tmp_path):
    """accelerate keeps its precision in the process: the next test starts from float32."""
    yield
    session_at(tmp_path / "after", precision="no").engine()


def all_terms(seed: int = 0) -> list[LossTerm]:
    return [lm_term(0.2), kd_term(0.7, top_k=8), part_term(0.1, seed=seed)]


def dropout_student(seed: int = 0):
    """A student that draws random numbers in every step, so that a lost random state shows."""
    return tiny_student(seed, attention_dropout=0.2)


def fresh(folder, *, seed: int = 0, **arguments):
    """A trainer as a new session makes it; with another ``seed`` everything it starts with is wrong."""
    settings = {
        "steps": 7,
        "eval_every": 3,
        "schedule": piecewise(kd=[(0, 0.2), (0.4, 1)]),
        "lr_schedule": LearningRate(warmup=0.3, decay=0.3),
        "terms": all_terms(seed),
    }
    return make_trainer(folder, student=dropout_student(seed), **(settings | arguments))


# --- resumed is uninterrupted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stops", [(1,), (4,), (6,), (2, 5), (3, 4)])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, accumulation, stops):
    torch.manual_seed(5)
    whole = fresh(tmp_path / "whole", accumulation=accumulation)
    assert whole.fit() == "finished"

    torch.manual_seed(5)
    trainer = fresh(tmp_path / "parts", accumulation=accumulation)
    for number, stop in enumerate(stops):
        assert trainer.fit(steps=stop - trainer.step) == "paused"
        assert trainer.step == stop
        torch.manual_seed(1000 + number)  # another session has another random state
        trainer = fresh(tmp_path / "parts", seed=number + 1, accumulation=accumulation)
        assert trainer.step == 0
        assert trainer.resume()
        assert trainer.step == stop
    assert trainer.fit() == "finished"
    assert_same_run(whole, trainer)
    assert trainer.best == whole.best
    assert trainer.tokens == whole.tokens
    assert measured(History.load(tmp_path / "parts" / "metrics.jsonl")) == measured(whole.history)
    assert [e["what"] for e in trainer.history.events].count("resumed") == len(stops)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_thrice_within_one_epoch_with_and_without_workers(tmp_path, accumulation, workers):
    """The same samples in the same order, the same losses and weights, whoever prepares the batches."""
    arguments = {"accumulation": accumulation, "data": small_data(count=20), "steps": 8}
    torch.manual_seed(5)
    whole = fresh(tmp_path / "whole", **arguments)
    assert whole.fit() == "finished"
    assert whole.cursor.position == 8 * accumulation <= arguments["data"].batches_per_epoch
    torch.manual_seed(5)
    trainer = fresh(tmp_path / "parts", workers=workers, **arguments)
    for number, stop in enumerate((2, 3, 6)):
        trainer.fit(steps=stop - trainer.step)
        torch.manual_seed(1000 + number)
        trainer = fresh(tmp_path / "parts", seed=number + 1, workers=workers, **arguments)
    assert trainer.fit() == "finished"
    assert_same_run(whole, trainer)
    assert measured(History.load(tmp_path / "parts" / "metrics.jsonl")) == measured(whole.history)
    seen = [r["batches"] for r in trainer.history.records if r["kind"] == "train"]
    assert [p for of_step in seen for p in of_step] == list(range(8 * accumulation))


class Killed(Exception):
    pass


class Kill(Callback):
    """Ends the session at a step as a kill does: nothing is saved, nothing is told."""

    def __init__(self, step: int):
        self.step = step

    def on_evaluate(self, trainer):
        if trainer.step >= self.step:
            raise Killed


def test_a_killed_run_goes_on_from_its_last_save_and_forgets_what_came_after(tmp_path):
    torch.manual_seed(5)
    whole = fresh(tmp_path / "whole", eval_every=1)
    whole.fit()

    torch.manual_seed(5)
    trainer = fresh(tmp_path / "killed", eval_every=1)
    trainer.fit(steps=3)
    trainer.callbacks = [Kill(5)]
    with pytest.raises(Killed):
        trainer.fit()
    assert trainer.history.evaluations()[0][-1] == 5
    torch.manual_seed(99)
    again = fresh(tmp_path / "killed", seed=3, eval_every=1)
    again.resume()
    assert again.step == 3
    assert again.history.evaluations()[0][-1] == 3, "what came after the checkpoint is forgotten"
    assert again.history.series("lm")[0] == [1, 2, 3]
    again.fit()
    assert_same_run(whole, again)


def test_a_run_killed_before_its_first_save_starts_again_from_its_own_start(tmp_path):
    torch.manual_seed(5)
    whole = make_trainer(tmp_path / "whole", eval_every=1)
    whole.fit()
    student = tiny_student()
    trainer = make_trainer(tmp_path / "killed", student=student, eval_every=1)
    trainer.callbacks = [Kill(2)]
    with pytest.raises(Killed):
        trainer.fit()
    # the cell of the trainer runs again, the one of the student does not: it has two steps behind it
    again = make_trainer(tmp_path / "killed", student=student, eval_every=1)
    again.fit()
    assert_same_run(whole, again)


def test_a_damaged_checkpoint_is_said_and_passed_over(tmp_path, capsys):
    torch.manual_seed(5)
    whole = fresh(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(5)
    trainer = fresh(tmp_path / "run")
    trainer.fit(steps=2)
    trainer.fit(steps=2)
    path = tmp_path / "run" / "ckpt" / "step-00000004" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    again = fresh(tmp_path / "run", seed=1)
    again.fit()
    assert "step-00000004" in capsys.readouterr().out
    assert_same_run(whole, again)


def test_a_step_that_was_broken_off_leaves_no_gradient_behind(tmp_path):
    """A second Interrupt may fall between two micro-batches; the next fit() in the same process goes on."""
    whole = make_trainer(tmp_path / "whole", accumulation=3)
    whole.fit()
    calls = itertools.count()

    def interrupted(rows):
        if next(calls) == 10:
            raise KeyboardInterrupt
        return lm_term().rows(rows)

    lm = lm_term(0.1)
    object.__setattr__(lm, "rows", interrupted)
    trainer = make_trainer(tmp_path / "broken", accumulation=3, terms=[lm, kd_term(0.9, top_k=8)])
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert trainer.step == 0, "a step that was broken off may be half done: it goes on from the last checkpoint"
    trainer.fit()
    assert_same_run(whole, trainer)


def test_the_same_cells_run_twice_go_on(tmp_path):
    student = tiny_student()
    make_trainer(tmp_path / "run", student=student).fit(steps=2)
    trainer = make_trainer(tmp_path / "run", student=student)
    assert trainer.fit(steps=2) == "paused"
    assert trainer.step == 4
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    trainer.fit()
    assert_same_run(whole, trainer)


def test_fit_after_the_end_does_nothing(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    assert trainer.fit() == "finished"
    before, lines = weights_of(trainer), len(trainer.history)
    saved = sorted(p.name for p in (tmp_path / "run" / "ckpt").iterdir())
    assert trainer.fit() == "finished"
    assert trainer.fit(steps=3) == "finished"
    assert_same_tensors(before, weights_of(trainer))
    assert len(trainer.history) == lines
    assert sorted(p.name for p in (tmp_path / "run" / "ckpt").iterdir()) == saved
    assert make_trainer(tmp_path / "run").fit() == "finished"


def test_no_steps_are_no_end(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    assert trainer.fit(steps=0) == "paused"
    assert trainer.step == 0


def test_a_finished_run_can_be_lengthened(tmp_path):
    make_trainer(tmp_path / "run", steps=2).fit()
    trainer = make_trainer(tmp_path / "run", steps=5)
    assert trainer.fit() == "finished"
    assert trainer.step == 5
    assert trainer.history.series("lm")[0] == [1, 2, 3, 4, 5]
    assert trainer.history.total_steps == 5


def test_checkpoints_hold_tensors_and_json_and_no_pickle(tmp_path):
    make_trainer(tmp_path / "run", terms=all_terms()).fit(steps=2)
    files = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != "LOCK"]
    assert {p.suffix for p in files} == {".safetensors", ".json", ".jsonl"}
    names = {p.name for p in (tmp_path / "run" / "ckpt" / "step-00000002").iterdir()}
    assert names == {
        "model.safetensors",
        "aux.safetensors",
        "optim.safetensors",
        "rng.safetensors",
        "state.json",
        "MANIFEST.json",
    }
    for path in files:
        assert path.read_bytes()[:2] != b"\x80\x02"


# --- the step --------------------------------------------------------------------------------------------------------


def uneven_data(batch_size: int):
    """Windows of very different lengths, so that micro-batches have different counts."""
    words = "It is a truth universally acknowledged, that a single man must be in want of a wife. "
    texts = [(words * 3)[: 4 + 11 * i % 95] + "." for i in range(32)]
    return build_data(texts, pair(), held_out=[pages()[0]], window=48, batch_size=batch_size, pack=True)


def gradients_of(trainer, monkeypatch) -> dict[str, torch.Tensor]:
    """Gradients of one step, which is not taken."""
    found = {}

    def keep():
        found.update({n: p.grad.clone() for n, p in trainer.module.named_parameters()})

    monkeypatch.setattr(trainer.optimizer, "step", keep)
    trainer.fit(steps=1)
    return found


def assert_close(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    """Equal but for the order of sums: a gradient of a hundred rows rounds at the size of its largest numbers."""
    assert (one - other).norm() <= 1e-5 * other.norm(), name


def test_micro_batches_are_one_batch(tmp_path, monkeypatch):
    common = {"max_grad_norm": 1e9, "steps": 2}
    large = make_trainer(tmp_path / "large", data=uneven_data(8), terms=all_terms(), **common)
    small = make_trainer(tmp_path / "small", data=uneven_data(2), terms=all_terms(), accumulation=4, **common)
    sizes = [len(b.rows) for b in uneven_data(2).batches(0, range(4))]
    assert max(sizes) > 1.3 * min(sizes), sizes
    one, other = gradients_of(large, monkeypatch), gradients_of(small, monkeypatch)
    assert one.keys() == other.keys()
    for name in one:
        assert_close(one[name], other[name], name)
    a, b = large.history.last("train"), small.history.last("train")
    assert a["total"] == pytest.approx(b["total"], rel=1e-5)
    assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    for term in ("lm", "kd", "part"):
        assert a["terms"][term]["count"] == b["terms"][term]["count"]
        assert a["terms"][term]["value"] == pytest.approx(b["terms"][term]["value"], rel=1e-5)
    for field in ("tokens", "aligned_share", "tail_mass"):
        assert a[field] == pytest.approx(b[field], rel=1e-5), field


def test_every_term_is_divided_by_its_count_in_the_whole_step(tmp_path, monkeypatch):
    """The gradient of the step is that of the sum of share times mean, worked out without a trainer."""
    data, terms = uneven_data(2), all_terms()
    trainer = make_trainer(tmp_path / "run", data=data, accumulation=3, max_grad_norm=1e9, terms=terms)
    found = gradients_of(trainer, monkeypatch)
    *others, _ = trainer.terms
    module = DistillModule(tiny_student(), [*others, part_term(0.1)])
    module.parts["part"].load_state_dict(terms[2].value.state_dict())
    batches = list(data.batches(0, range(3)))
    signals = [trainer.teacher.signal(b) for b in batches]
    for position, term in enumerate(module.terms):
        count = sum(term.count(b) for b in batches)
        scale = torch.zeros(3)
        scale[position] = term.weight / count
        for batch, known in zip(batches, signals, strict=True):
            module(batch, known, scale)[0].backward()
    for name, parameter in module.named_parameters():
        assert_close(found[name], parameter.grad, name)


def test_the_data_follow_the_position_whatever_the_accumulation(tmp_path, monkeypatch):
    data, seen = small_data(), []
    collate = type(data.train).collate

    def spy(self, indices):
        if self is data.train:
            seen.extend(indices)
        return collate(self, indices)

    monkeypatch.setattr(type(data.train), "collate", spy)
    orders = []
    for accumulation, steps in ((1, 6), (3, 2)):
        seen.clear()
        trainer = make_trainer(tmp_path / str(accumulation), data=data, steps=steps, accumulation=accumulation, seed=4)
        trainer.fit(steps=1)
        trainer.fit()
        orders.append(list(seen))
    expected = [i for p in range(6) for i in data.indices(4, p).tolist()]
    assert orders[0] == orders[1] == expected


def test_records_are_complete(tmp_path):
    trainer = make_trainer(tmp_path / "run", terms=all_terms(), steps=13, eval_every=4)
    trainer.fit()
    run, *_ = trainer.history.records
    assert run["kind"] == "run"
    assert run["run_id"] == trainer.run_id
    assert run["total_steps"] == 13
    assert set(run["terms"]) == {"lm", "kd", "part"}
    for meta in run["terms"].values():
        assert set(meta) == {"unit", "healthy", "impossible_below", "impossible_above"}
    records = [r for r in trainer.history.records if r["kind"] == "train"]
    assert [r["step"] for r in records] == list(range(1, 14))
    tokens = 0
    for record in records:
        assert set(record) == {
            "kind",
            "step",
            "epoch",
            "tokens",
            "seconds",
            "total",
            "terms",
            "lr",
            "grad_norm",
            "skipped_steps",
            "batches",
            "tokens_per_second",
            "aligned_share",
            "taught_share",
            "tail_mass",
            "loss_scale",
            "times_floor",
            "seconds_left",
            "seconds_to_finish",
        } | ({"gradients"} if record["step"] in (1, 11) else set())
        batch = next(small_data().batches(0, [record["step"] - 1]))
        tokens += len(batch.rows)
        assert record["tokens"] == tokens
        assert record["epoch"] == pytest.approx(record["step"] / small_data().batches_per_epoch)
        assert record["aligned_share"] == pytest.approx(len(batch.aligned_rows) / len(batch.rows))
        assert record["taught_share"] == pytest.approx(len(batch.taught_rows) / len(batch.rows))
        assert 0 < record["tail_mass"] < 1
        assert record["grad_norm"] > 0
        assert record["lr"]["parts"] == pytest.approx(5 * record["lr"]["student"])
        assert sum(t["weight"] for t in record["terms"].values()) == pytest.approx(1)
        for term in record["terms"].values():
            compared = {"grad_norm", "grad_share", "cosine"} if record["step"] in (1, 11) else set()
            assert set(term) == {"value", "verdict", "weight", "contribution", "share", "count"} | compared
            assert term["contribution"] == pytest.approx(term["weight"] * term["value"])
        assert record["total"] == pytest.approx(sum(t["contribution"] for t in record["terms"].values()))
        assert record["terms"]["kd"]["count"] == len(batch.taught_rows)
    assert trainer.history.evaluations()[0] == [0, 4, 8, 12, 13]
    assert set(trainer.history.references()) == {"teacher"}
    assert [e["what"] for e in trainer.history.events][-2:] == ["stopped", "saved"]
    assert {e["what"] for e in trainer.history.events} == {"stopped", "saved", "stage"}
    assert [(e["step"], e["text"]) for e in trainer.history.events if e["what"] == "stage"] == [
        (10, "the learning rate decays from here on")
    ]
    assert trainer.history.records == History.load(tmp_path / "run" / "metrics.jsonl").records


def test_the_first_record_is_the_student_before_any_step(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=1)
    batch = next(small_data().batches(0, [0]))
    module = DistillModule(tiny_student(), trainer.terms)
    with torch.no_grad():
        _, sums, _ = module(batch, trainer.teacher.signal(batch), torch.ones(2))
    trainer.fit()
    record = trainer.history.last("train")
    for term, total in zip(trainer.terms, sums.tolist(), strict=True):
        assert record["terms"][term.name]["value"] == pytest.approx(total / term.count(batch), rel=1e-5)


def test_gradients_are_clipped_and_the_norm_is_that_before(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", max_grad_norm=0.01)
    found = gradients_of(trainer, monkeypatch)
    norm = math.sqrt(sum(float((g.double() ** 2).sum()) for g in found.values()))
    assert norm == pytest.approx(0.01, rel=1e-3)
    assert trainer.history.last("train")["grad_norm"] > 0.1


def test_matrices_decay_and_vectors_do_not(tmp_path):
    trainer = make_trainer(tmp_path / "run", terms=all_terms(), weight_decay=0.2)
    matrices, vectors, parts = trainer.optimizer.param_groups
    assert [g["weight_decay"] for g in (matrices, vectors, parts)] == [0.2, 0.0, 0.0]
    assert all(p.ndim >= 2 for p in matrices["params"])
    assert all(p.ndim < 2 for p in vectors["params"])
    count = sum(p.numel() for g in trainer.optimizer.param_groups for p in g["params"])
    assert count == sum(p.numel() for p in trainer.module.parameters())


def inf_at(step: int) -> LossTerm:
    calls = itertools.count(1)

    def value(output, signal, batch) -> LossValue:
        factor = math.inf if next(calls) == step else 1.0
        return LossValue((output.hidden.flatten(0, 1)[batch.rows] ** 2).sum() * factor, torch.tensor(1.0))

    return LossTerm(name="wild", weight=0.1, unit="", healthy=(0, 100), value=value)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_not_finite_is_skipped_and_counted(tmp_path, accumulation):
    trainer = make_trainer(
        tmp_path / "run", terms=[lm_term(0.9), inf_at(2 * accumulation + 1)], accumulation=accumulation
    )
    trainer.fit(steps=2)
    before = weights_of(trainer)
    trainer.fit(steps=1)
    assert trainer.step == 3
    assert trainer.skipped_steps == 1
    assert_same_tensors(before, weights_of(trainer))
    record = trainer.history.last("train")
    assert record["skipped_steps"] == 1
    assert record["terms"]["wild"]["value"] == math.inf
    assert verdict(trainer.history.terms["wild"], record["terms"]["wild"]["value"]) == "impossible"
    assert not math.isfinite(record["grad_norm"])
    assert math.isfinite(record["terms"]["lm"]["value"])
    trainer.fit()
    assert trainer.skipped_steps == 1
    assert any(not torch.equal(before[n], t) for n, t in weights_of(trainer).items())
    assert all(t.isfinite().all() for t in weights_of(trainer).values())
    assert History.load(tmp_path / "run" / "metrics.jsonl").series("wild")[1][2] == math.inf


def test_a_term_of_weight_zero_is_shown_and_teaches_nothing(tmp_path, monkeypatch):
    with_zero = make_trainer(tmp_path / "zero", terms=[lm_term(1.0), kd_term(0.0, top_k=8)])
    alone = make_trainer(tmp_path / "alone", terms=[lm_term(1.0)], model=None)
    one, other = gradients_of(with_zero, monkeypatch), gradients_of(alone, monkeypatch)
    for name in one:
        assert_close(one[name], other[name], name)
    record = with_zero.history.last("train")
    assert record["terms"]["kd"]["value"] > 0
    assert record["terms"]["kd"]["contribution"] == 0


def test_a_batch_without_one_taught_position_teaches_by_the_text_alone(tmp_path, monkeypatch):
    """The teacher then has no row to give; nothing is divided by zero."""
    data = build_data(pages(4, 200), pair(), held_out=[pages()[0]], window=32, batch_size=1)
    collate = type(data.train).collate

    def nowhere(self, indices):
        batch = collate(self, indices)
        if self is not data.train:
            return batch
        return untaught(batch)

    monkeypatch.setattr(type(data.train), "collate", nowhere)
    trainer = make_trainer(tmp_path / "run", data=data, steps=2)
    trainer.fit()
    record = trainer.history.last("train")
    assert record["terms"]["kd"] == {
        "value": None,
        "verdict": "absent",
        "weight": 0.9,
        "contribution": None,
        "share": None,
        "count": 0,
    }
    assert record["tail_mass"] is None
    assert record["total"] == pytest.approx(0.1 * record["terms"]["lm"]["value"])
    assert trainer.skipped_steps == 0


def test_it_learns(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=40, eval_every=40, eval_windows=8)
    trainer.fit()
    _, bits = trainer.history.evaluations()
    assert bits[-1] < bits[0] - 0.3
    values = trainer.history.series("kd")[1]
    assert sum(values[-5:]) < sum(values[:5])


# --- the crash of the earlier run ------------------------------------------------------------------------------------


class FromTeacher(nn.Module):
    """A float32 part that reads what the teacher says, as the projector did that an fp16 teacher crashed."""

    def __init__(self):
        super().__init__()
        self.projector = nn.Linear(8, 32)

    def forward(self, output, signal, batch):
        wanted = self.projector(cells_of(signal).log_probs.clamp(min=-20))
        error = (output.hidden.flatten(0, 1)[batch.taught_rows].float() - wanted.float()) ** 2
        return LossValue(error.mean(-1).sum(), torch.tensor(float(len(wanted))))


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_half_precision_teacher_and_float32_parts_work_everywhere(tmp_path, precision, dtype):
    half = teacher(dtype)
    assert next(half.parameters()).dtype == dtype
    own = {"name": "projected", "weight": 0.1, "unit": "", "healthy": (0, 1)}
    needs = Needs((BridgeReading("bridge", pair().bridge, 8),))
    projected = LossTerm(**own, value=FromTeacher(), over="taught", needs=needs)
    terms = [lm_term(0.2), kd_term(0.7, top_k=8), projected]
    trainer = make_trainer(
        tmp_path / "run", session=session_at(tmp_path / "run", precision=precision), model=half, terms=terms, steps=3
    )
    assert trainer.fit() == "finished"
    assert trainer.skipped_steps == 0
    assert {p.dtype for p in trainer.module.parameters()} == {torch.float32}
    held_out = small_data().held_out
    # outside autocast, whatever the run's precision was: here the earlier run died after 12,500 steps
    assert math.isfinite(score(trainer.student, held_out, limit=4).bits_per_byte)
    assert math.isfinite(score(half, held_out, side="teacher", limit=4).bits_per_byte)
    assert math.isfinite(agreement({"it": trainer.student}, trainer.teacher, held_out, limit=4)["it"].kl)
    assert audit(pair(), small_data(), half).homed_mass > 0.5
    report = evaluate(trainer, limit=4)
    assert all(math.isfinite(row["bits_per_byte"]) for row in report.rows.values())
    for record in trainer.history.records:
        if record["kind"] == "train":
            assert all(math.isfinite(t["value"]) for t in record["terms"].values())


def test_half_precision_changes_the_figures_little(tmp_path):
    values = []
    for precision, dtype in (("no", None), ("bf16", torch.float16)):
        trainer = make_trainer(
            tmp_path / precision,
            session=session_at(tmp_path / precision, precision=precision),
            model=teacher(dtype),
            steps=2,
        )
        trainer.fit()
        values.append((trainer.history.evaluations()[1][0], trainer.history.references()["teacher"]))
    assert values[0] == pytest.approx(values[1], rel=0.02)


# --- early errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"model": None}, "expected a teacher for kd, got None"),
        ({"terms": []}, "one or more terms with different names, got \\[\\]"),
        ({"terms": [lm_term(), lm_term()]}, r"different names, got \['lm', 'lm'\]"),
        ({"steps": 0}, "at least one step, got 0"),
        ({"steps": -3}, "at least one step, got -3"),
        ({"steps": None, "epochs": 0.0}, "at least one step, got 0"),
        ({"accumulation": 0}, "accumulation of at least 1, a whole number, got 0"),
        ({"measure_every": 0}, "measure_every of at least 1, a whole number, got 0"),
        ({"eval_every": 0}, "eval_every of at least 1, a whole number, got 0"),
        ({"accumulation": 1.5}, "accumulation of at least 1, a whole number, got 1.5"),
        ({"schedule": 0.5}, "expected schedule to be such as kd.curriculum()"),
        ({"lr_schedule": 0.1}, "expected lr_schedule to be a kd.LearningRate"),
        ({"balance": "fixed"}, "expected balance to be kd.fixed"),
        ({"early_stopping": 5}, "expected early_stopping to be a kd.EarlyStopping"),
        ({"log_every": 0}, "log_every of at least 1, a whole number, got 0"),
        ({"eval_windows": 0}, "eval_windows of at least 1, a whole number, got 0"),
        ({"learning_rate": 0.0}, "learning_rate above 0, got 0"),
        ({"learning_rate": -1.0}, "learning_rate above 0, got -1"),
        ({"learning_rate": math.nan}, "learning_rate above 0, got nan"),
        ({"terms": [lm_term(), kd_term(top_k=5000)]}, "top_k <= 2048"),
        ({"terms": [kd_term()]}, "an lm_term with a weight above 0"),
        ({"terms": [lm_term(0.0), kd_term()]}, "an lm_term with a weight above 0"),
        ({"terms": [lm_term(0.0)]}, "at least one term with weight"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_begins(tmp_path, arguments, said):
    with pytest.raises(ValueError, match=said):
        make_trainer(tmp_path / "run", **arguments)
    assert not (tmp_path / "run" / "RUN.json").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_epochs_become_steps(tmp_path):
    data = small_data()
    assert make_trainer(tmp_path / "a", steps=None, epochs=1).total_steps == data.batches_per_epoch
    trainer = make_trainer(tmp_path / "b", steps=None, epochs=2, accumulation=4)
    assert trainer.total_steps == round(data.batches_per_epoch / 2)


def test_a_teacher_that_no_term_needs_is_not_asked(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", terms=[lm_term()], steps=1)
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer.teacher), "signal", lambda *_: pytest.fail("the teacher was asked"))
        assert trainer.fit() == "finished"
    assert "distilled" in evaluate(trainer, limit=2).rows, "it is there to be compared with"


def test_without_a_session_there_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    trainer = build_trainer(tiny_student(), teacher(), small_data(), steps=1)
    assert trainer.session.folder == tmp_path / "kd_runs" / "run"


def test_repr_says_what_will_happen(tmp_path):
    said = repr(make_trainer(tmp_path / "run", accumulation=2))
    for part in (
        "lm        share 0.10",
        "kd        share 0.90",
        "6 steps of 4 windows each (0 done)",
        "peak 0.01",
        str(tmp_path),
    ):
        assert part in said


# --- stopping --------------------------------------------------------------------------------------------------------


class SendSignal(Callback):
    def __init__(self, number, step):
        self.number, self.step = number, step

    def on_evaluate(self, trainer):
        if trainer.step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize(("number", "reason"), [(signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")])
def test_a_signal_stops_after_the_step_saved_and_the_run_goes_on(tmp_path, number, reason):
    torch.manual_seed(5)
    whole = fresh(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(5)
    trainer = fresh(tmp_path / "run")
    trainer.callbacks = [SendSignal(number, 3)]
    assert trainer.fit() == reason
    assert trainer.step == 3
    assert find_checkpoint(tmp_path / "run", run_id=trainer.run_id)[0].step == 3
    again = fresh(tmp_path / "run", seed=1)
    assert again.fit() == "finished"
    assert_same_run(whole, again)


def test_out_of_time_stops_saved_and_goes_on(tmp_path):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    now = [0.0]

    class Later(Callback):
        def on_evaluate(self, trainer):
            now[0] += 40.0 if trainer.step else 0.0

    def session(hours):
        return Session(
            tmp_path / "run", device="cpu", precision="no", budget=process_age() + hours * 3600, clock=lambda: now[0]
        )

    trainer = make_trainer(tmp_path / "run", session=session(0.045))  # 162 seconds: at 82, two more pauses do not fit
    trainer.callbacks = [Later()]
    assert trainer.fit() == "the session's time is over"
    assert trainer.step == 4
    assert find_checkpoint(tmp_path / "run", run_id=trainer.run_id)[0].step == 4
    assert trainer.history.events[-2]["text"] == "the session's time is over"
    again = make_trainer(tmp_path / "run", session=session(100), student=tiny_student(8))
    assert again.fit() == "finished"
    assert_same_run(whole, again)


def test_it_saves_by_the_clock(tmp_path):
    trainer = make_trainer(tmp_path / "run", save_minutes=0, steps=4)
    trainer.fit()
    saved = [e["step"] for e in trainer.history.events if e["what"] == "saved"]
    assert saved == [1, 2, 3, 4]
    trainer = make_trainer(tmp_path / "other", save_minutes=10, steps=4, eval_every=4)
    trainer.fit()
    assert [e["step"] for e in trainer.history.events if e["what"] == "saved"] == [4]


def test_the_best_weights_are_saved_and_kept(tmp_path):
    trainer = make_trainer(tmp_path / "run", save_minutes=10, steps=8, eval_every=1)
    scores = iter([3.0, 2.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0])
    trainer._score = lambda model, side="student": next(scores) if side == "student" else 1.0

    class Free(Callback):
        """Saves that cost nothing, so that every best evaluation is worth one."""

        def on_save(self, trainer):
            trainer._save_seconds = 0.0

    trainer.callbacks.append(Free())
    trainer.fit()
    found = {int(p.name.split("-")[1]): p for p in (tmp_path / "run" / "ckpt").glob("step-*")}
    assert 2 in found, "the evaluation after step 2 was the best"
    assert inspect_checkpoint(found[2]).best
    again = make_trainer(tmp_path / "run", steps=8, eval_every=1)
    again.resume()
    assert (again.best, again.best_step) == (1.0, 2)


# --- control ---------------------------------------------------------------------------------------------------------


def test_the_control_sees_the_same_start_order_and_rates(tmp_path, monkeypatch):
    data, seen = small_data(), []
    batches = type(data).batches

    def spy(self, seed, positions, **more):
        for batch in batches(self, seed, positions, **more):
            seen.append(batch.sample.tolist())
            yield batch

    monkeypatch.setattr(type(data), "batches", spy)
    trainer = make_trainer(tmp_path / "run", steps=5, seed=3, data=data)
    assert trainer.control_history is None
    start = {n: t.clone() for n, t in trainer.student.state_dict().items()}
    trainer.fit()
    distilled, ours = weights_of(trainer), list(seen)
    seen.clear()
    control = trainer.train_control()
    assert seen == ours
    assert_same_tensors(distilled, weights_of(trainer))
    history = trainer.control_history
    assert history.path == tmp_path / "run" / "control" / "metrics.jsonl"
    assert history.column("lr", "student") == trainer.history.column("lr", "student")
    assert history.column("tokens") == trainer.history.column("tokens")
    assert history.terms.keys() == {"lm"}
    assert history.evaluations()[1][0] == trainer.history.evaluations()[1][0], "both start from the same student"
    assert history.series("lm")[1][0] == pytest.approx(trainer.history.series("lm")[1][0], rel=1e-5)
    assert_same_tensors(start, trainer.initial_student().state_dict())

    # it is what a run without a teacher gives
    alone = make_trainer(tmp_path / "alone", steps=5, seed=3, data=data, model=None, terms=[lm_term(1.0)])
    alone.fit()
    assert_same_tensors(alone.student.state_dict(), control.state_dict())

    # and it is trained once, also for another session
    lines = len(trainer.control_history)
    again = make_trainer(tmp_path / "run", steps=5, seed=3, data=data)
    assert_same_tensors(again.train_control().state_dict(), control.state_dict())
    assert len([r for r in again.control_history.records if r["kind"] == "train"]) == 5
    assert lines <= len(again.control_history)


def test_the_start_is_kept_with_tied_and_untied_weights(tmp_path):
    for tied in (True, False):
        student = tiny_student(tie_word_embeddings=tied)
        start = {n: t.clone() for n, t in student.state_dict().items()}
        trainer = make_trainer(tmp_path / str(tied), student=student, steps=2)
        trainer.fit()
        kept = trainer.initial_student()
        assert_same_tensors(start, kept.state_dict())
        same = kept.get_output_embeddings().weight is kept.get_input_embeddings().weight
        assert same is tied
        again = make_trainer(tmp_path / str(tied), student=tiny_student(3, tie_word_embeddings=tied), steps=2)
        again.resume()
        assert_same_tensors(trainer.student.state_dict(), again.student.state_dict())


# --- two at once -----------------------------------------------------------------------------------------------------


def test_two_trainers_in_one_process_do_not_meet(tmp_path):
    alone = [make_trainer(tmp_path / f"alone{s}", student=tiny_student(s), seed=s) for s in (0, 1)]
    for trainer in alone:
        trainer.fit()
    together = [make_trainer(tmp_path / f"both{s}", student=tiny_student(s), seed=s) for s in (0, 1)]
    for steps in (2, 1, 3):
        for trainer in together:
            trainer.fit(steps=steps)
    for one, other in zip(alone, together, strict=True):
        assert_same_run(one, other)


def test_the_run_folder_is_held_while_it_trains(tmp_path):
    owners = []

    class Look(Callback):
        def on_log(self, trainer):
            owners.append(json.loads((tmp_path / "run" / "LOCK").read_text())["pid"])

    trainer = make_trainer(tmp_path / "run", steps=2)
    trainer.callbacks = [Look()]
    trainer.fit()
    assert set(owners[:1]) == {os.getpid()}
    assert (tmp_path / "run" / "LOCK").read_text() == ""


def test_timing_is_kept_over_sessions(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.fit(steps=2)
    before = trainer.seconds
    assert before > 0
    again = make_trainer(tmp_path / "run", steps=4)
    started = time.monotonic()
    again.fit()
    assert before < again.seconds < before + time.monotonic() - started


# --- a student belongs to one trainer, and a broken run says so -----------------------------------------------------


def test_a_student_that_was_trained_starts_no_new_run(tmp_path):
    student = tiny_student()
    make_trainer(tmp_path / "one", student=student, steps=2).fit()
    with pytest.raises(ValueError, match=r"untouched student for the new run .*build_student again"):
        make_trainer(tmp_path / "two", student=student, steps=2)


def test_a_trainer_that_lost_its_student_says_so(tmp_path):
    student = tiny_student()
    first = make_trainer(tmp_path / "one", student=student, steps=2)
    make_trainer(tmp_path / "two", student=student, steps=2)
    for use in (first.fit, first.save, first.evaluate_now, lambda: evaluate(first)):
        with pytest.raises(ValueError, match="a later trainer has taken over"):
            use()


def test_only_damaged_checkpoints_stop_the_run_and_keep_its_records(tmp_path):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.fit(steps=2)
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    for path in (tmp_path / "run" / "ckpt").glob("step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):  # the second time they are set aside already
        with pytest.raises(CheckpointError, match="expected a usable checkpoint"):
            make_trainer(tmp_path / "run", steps=4).fit()
        assert (tmp_path / "run" / "metrics.jsonl").read_text() == lines


def test_a_control_that_was_interrupted_is_no_control(tmp_path, monkeypatch, capsys):
    trainer = make_trainer(tmp_path / "run", steps=4)
    trainer.fit()
    with monkeypatch.context() as patch:
        limit = [2, 3]
        patch.setattr("kd_kit.trainer.Trainer._time_is_over", lambda self: self.step >= limit[0])
        with pytest.raises(RuntimeError, match=r"train_control: stopped at step 2 of 4 .*call it again"):
            trainer.train_control()
        del limit[0]
        report = evaluate(trainer, control=True, limit=2)
    assert "LM-only control" not in report.rows
    assert "stopped at step 3 of 4" in capsys.readouterr().out, "it went on where it had stopped, for a step"
    assert "LM-only control" in evaluate(trainer, control=True, limit=2).rows


# --- parts of terms: settled, saved, resumed, left out of the export -------------------------------------------------


def knowing_terms(experts: int | None = 3) -> list[LossTerm]:
    """Terms of every kind that has something of its own to train."""
    return [
        lm_term(0.2),
        kd_term(0.4, top_k=8),
        kd_term(0.1, method="projector", name="projected"),
        feature_term(0.1, experts=experts, active=2),
        router_term(0.1),
        contrastive_term(0.1),
    ]


def knowing(folder, *, seed: int = 0, **arguments):
    """A trainer of these terms as a new session makes it; another ``seed`` is another student."""
    settings = {"steps": 6, "eval_every": 2, "terms": knowing_terms(), "data": small_data(batch_size=4)}
    return make_trainer(folder, student=dropout_student(seed), **(settings | arguments))


PARTS = {"projected", "feature", "router", "contrastive"}


@pytest.mark.parametrize("stops", [(1,), (2, 5)])
def test_with_parts_resumed_is_uninterrupted_bit_for_bit(tmp_path, stops):
    torch.manual_seed(5)
    whole = knowing(tmp_path / "whole")
    assert whole.fit() == "finished"
    assert set(whole.module.parts) == PARTS
    for record in whole.history.records:
        assert all(t["count"] > 0 for t in record.get("terms", {}).values() if "count" in t), "every term teaches"

    torch.manual_seed(5)
    trainer = knowing(tmp_path / "parts")
    for number, stop in enumerate(stops):
        trainer.fit(steps=stop - trainer.step)
        torch.manual_seed(1000 + number)
        trainer = knowing(tmp_path / "parts", seed=number + 1)
        trainer.resume()
        for part in trainer.module.parts.values():
            part.observe = lambda *_: pytest.fail("what has settled looks at nothing again")
    trainer.fit()
    assert_same_run(whole, trainer)
    assert_same_tensors(whole.module.parts.state_dict(), trainer.module.parts.state_dict())
    changed = [n for n, t in whole.module.parts.state_dict().items() if not torch.equal(t, whole._parts_start[n])]
    assert any("map" in name for name in changed)


def test_with_parts_a_run_goes_on_from_its_last_save_after_an_error(tmp_path):
    """In the same process, where parts and optimizer have a step behind them that the checkpoint has not."""
    whole = knowing(tmp_path / "whole", eval_every=1)
    torch.manual_seed(5)  # parts have drawn their start by now
    whole.fit()
    trainer = knowing(tmp_path / "broken", eval_every=1)

    def killed_at(step: int) -> list[str]:
        trainer.callbacks = [Kill(step)]
        with pytest.raises(Killed):
            trainer.fit()
        assert trainer.step == 0
        trainer.callbacks = []
        return [p.name for p in (tmp_path / "broken" / "ckpt").glob("step-*")]

    assert killed_at(1) == [], "nothing is saved: all starts again, the parts too"
    torch.manual_seed(5)
    trainer.fit(steps=3)
    assert max(killed_at(6)) < "step-00000006"
    trainer.fit()
    assert_same_run(whole, trainer)
    assert_same_tensors(whole.module.parts.state_dict(), trainer.module.parts.state_dict())


class AtStart(Callback):
    """Runs something after settling and before the first step."""

    def __init__(self, do):
        self.do = do

    def on_start(self, trainer):
        self.do(trainer)


def test_parts_are_ready_before_the_first_step_and_know_the_first_batches(tmp_path):
    seen = {}

    def look(trainer):
        seen["step"] = trainer.step
        seen["ready"] = {n: bool(p.ready) for n, p in trainer.module.parts.items() if hasattr(p, "ready")}
        seen["state"] = {n: t.clone() for n, t in trainer.module.parts.state_dict().items()}
        seen["training"] = trainer.module.training

    data = build_data(pages(6, 3000), pair(), held_out=[pages()[0]], window=32, batch_size=4)
    assert data.batches_per_epoch > 16
    trainer = knowing(tmp_path / "run", data=data, seed=0)
    assert not any(bool(p.ready) for p in trainer.module.parts.values() if hasattr(p, "ready"))
    trainer.callbacks = [AtStart(look)]
    trainer.fit(steps=2)
    assert seen["step"] == 0
    assert seen["training"]
    assert seen["ready"] == dict.fromkeys(PARTS - {"projected"}, True)

    student, ours, theirs = dropout_student(0).eval(), [], []
    for batch in data.batches(trainer.settings["seed"], range(16)):
        for model, ids, column, found in (
            (student, batch.student_ids, 0, ours),
            (teacher(), batch.teacher_ids, 1, theirs),
        ):
            with torch.no_grad():
                states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1].flatten(0, 1)
            found.append(states[batch.span_rows[:, column]])
    for name, states in (("student", torch.cat(ours)), ("teacher", torch.cat(theirs))):
        for prefix in ("feature.maps.0.shared", "contrastive.map"):
            mean, deviation = (seen["state"][f"{prefix}.{name}.{what}"] for what in ("mean", "deviation"))
            torch.testing.assert_close(mean, states.mean(0), atol=1e-4, rtol=1e-3)
            torch.testing.assert_close(deviation, states.std(0, correction=0), atol=1e-4, rtol=1e-3)

    # statistics are frozen from then on, and saved with the run
    saved = load_file(next((tmp_path / "run" / "ckpt").glob("step-00000002")) / "aux.safetensors")
    assert_same_tensors(saved, dict(trainer.module.parts.state_dict()))
    for name, tensor in seen["state"].items():
        if name.endswith(("mean", "deviation", "ready")):
            assert torch.equal(saved[name], tensor), name
    assert any(not torch.equal(saved[n], t) for n, t in seen["state"].items()), "the maps have learned"


def test_a_session_that_ended_while_parts_were_settling_settles_anew(tmp_path, monkeypatch):
    torch.manual_seed(5)
    whole = knowing(tmp_path / "whole")
    whole.fit()
    torch.manual_seed(5)
    trainer = knowing(tmp_path / "broken")
    calls, signal = itertools.count(), type(trainer.teacher).signal
    with monkeypatch.context() as patch:

        def broken(self, batch):
            if next(calls) == 3:
                raise Killed
            return signal(self, batch)

        patch.setattr(type(trainer.teacher), "signal", broken)
        with pytest.raises(Killed):
            trainer.fit()
    trainer.fit()
    assert_same_run(whole, trainer)


def test_the_export_has_none_of_the_parts(tmp_path):
    trainer = knowing(tmp_path / "run", steps=2)
    trainer.fit()
    folder = export(trainer.student, tmp_path / "export", pair())
    names = {name for path in folder.glob("*.safetensors") for name in load_file(path)}
    assert names
    assert names <= set(trainer.student.state_dict())
    assert not any(part in name for name in names for part in PARTS)
    assert_same_tensors(dict(build_student(folder).state_dict()), dict(trainer.student.state_dict()))
    kept = load_file(tmp_path / "run" / "ckpt" / "step-00000002" / "model.safetensors")
    assert not any(part in name for name in kept for part in PARTS)
    assert {
        name.split(".")[0] for name in load_file(tmp_path / "run" / "ckpt" / "step-00000002" / "aux.safetensors")
    } == PARTS


def test_a_new_run_with_the_same_terms_starts_with_parts_of_its_own(tmp_path):
    terms = knowing_terms()
    one = knowing(tmp_path / "one", terms=terms, steps=2)
    one.fit()
    other = knowing(tmp_path / "other", terms=terms, steps=2)
    for name, tensor in other.module.parts.state_dict().items():
        assert torch.equal(tensor, one._parts_start[name]), name
    ours, theirs = ({id(p) for p in t.module.parts.parameters()} for t in (one, other))
    assert not ours & theirs


def test_extras_are_in_the_record_as_means(tmp_path):
    trainer = knowing(
        tmp_path / "run", terms=knowing_terms(experts=4), steps=3, accumulation=2, data=small_data(batch_size=4)
    )
    trainer.fit()
    for record in (r for r in trainer.history.records if r["kind"] == "train"):
        assert "extras" not in record
        extras = {name: t.get("extras") for name, t in record["terms"].items()}
        assert extras["lm"] is extras["kd"] is extras["contrastive"] is None
        assert {name: set(extras[name]) for name in ("feature", "router")} == {
            "feature": {"by_layer", "balance", "load"},
            "router": {"by_layer", "teacher_load"},
        }
        for name in ("feature", "router"):
            layers = extras[name]["by_layer"]
            assert sum(layers) / len(layers) == pytest.approx(record["terms"][name]["value"], rel=1e-4)
        ((*load,),) = extras["feature"]["load"]
        assert len(load) == 4
        assert sum(load) == pytest.approx(1, abs=1e-5)
        assert 0.9 < extras["feature"]["balance"][0] < 2.1, "1 is even, X / k on the same"
        assert all(sum(layer) == pytest.approx(1, abs=1e-5) for layer in extras["router"]["teacher_load"])
        assert all(len(layer) == 8 for layer in extras["router"]["teacher_load"])
    assert History.load(tmp_path / "run" / "metrics.jsonl").records == trainer.history.records


def test_a_term_with_a_dot_in_its_name_may_measure_more(tmp_path):
    def value(output, signal, batch) -> LossValue:
        rows = torch.tensor(float(len(batch.rows)))
        return LossValue(output.hidden.sum() * 0, rows, {"size": rows * torch.tensor([2.0, 3.0])})

    own = LossTerm(name="my.own", weight=0.1, unit="", healthy=(0, 1), value=value)
    trainer = make_trainer(tmp_path / "run", terms=[lm_term(0.9), own], steps=2)
    trainer.fit()
    assert trainer.history.last("train")["terms"]["my.own"]["extras"] == {"size": [2.0, 3.0]}


def test_parts_learn_at_rates_of_their_own_kind(tmp_path):
    trainer = knowing(tmp_path / "run", terms=[*knowing_terms(), part_term(0.1)], steps=2)
    trainer.fit()
    record = trainer.history.last("train")
    assert list(record["lr"]) == ["student", "parts", "projectors", "routers"]
    assert all(record["lr"][name] == pytest.approx(5 * record["lr"]["student"]) for name in list(record["lr"])[1:])
    groups = {g["name"]: {id(p) for p in g["params"]} for g in trainer.optimizer.param_groups if g["name"] != "student"}
    kinds = {
        "part": "parts",
        "projected": "projectors",
        "feature": "projectors",
        "contrastive": "projectors",
        "router": "routers",
    }
    for name, kind in kinds.items():
        assert {id(p) for p in trainer.module.parts[name].parameters()} <= groups[kind], name
    assert sum(map(len, groups.values())) == len(list(trainer.module.parts.parameters()))
    assert all(g["weight_decay"] == 0 for g in trainer.optimizer.param_groups if g["name"] != "student")
    without = make_trainer(tmp_path / "plain", steps=1)
    assert {g["name"] for g in without.optimizer.param_groups} == {"student"}


def test_the_students_gradient_and_the_parts_are_clipped_each_on_its_own(tmp_path, monkeypatch):
    """A part that starts far off would otherwise stop the student, and the other way round."""
    found = {}
    for name, size in (("loud", 1e4), ("quiet", 1e-2)):
        loud = LossTerm(name="part", weight=0.1 * size, unit="", healthy=(0, 1), value=Part())
        # weights are shares: as much for the others
        terms = [lm_term(0.5), loud]
        trainer = make_trainer(tmp_path / name, terms=terms, max_grad_norm=0.01)
        gradients = gradients_of(trainer, monkeypatch)
        norms = {
            side: math.sqrt(sum(float((g.double() ** 2).sum()) for n, g in gradients.items() if n.startswith(side)))
            for side in ("student", "parts")
        }
        found[name] = norms, trainer.history.last("train")["grad_norm"]
    for norms, before in found.values():
        assert norms["student"] == pytest.approx(0.01, rel=1e-3)
        assert norms["parts"] <= 0.01 * (1 + 1e-3)
        assert before > 0.02
    assert found["loud"][0]["parts"] == pytest.approx(0.01, rel=1e-3)


def test_the_norm_in_the_record_is_the_students_alone(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path / "run", terms=all_terms(), max_grad_norm=1e9)
    gradients = gradients_of(trainer, monkeypatch)
    ours = math.sqrt(sum(float((g.double() ** 2).sum()) for n, g in gradients.items() if n.startswith("student")))
    theirs = math.sqrt(sum(float((g.double() ** 2).sum()) for n, g in gradients.items() if n.startswith("parts")))
    assert theirs > 0.01 * ours
    assert trainer.history.last("train")["grad_norm"] == pytest.approx(ours, rel=1e-5)


def test_a_part_whose_gradient_is_not_finite_is_skipped_with_the_student(tmp_path):
    class Wild(Part):
        def forward(self, output, signal, batch):
            found = super().forward(output, signal, batch)
            self.calls = getattr(self, "calls", 0) + 1
            spoilt = self.guess.weight.sum() * (math.inf if self.calls == 3 else 0.0)
            return LossValue(found.sum + spoilt, found.count)

    wild = LossTerm(name="part", weight=0.1, unit="", healthy=(0, 1), value=Wild())
    trainer = make_trainer(tmp_path / "run", terms=[lm_term(0.9), wild])
    trainer.fit(steps=2)
    before = weights_of(trainer)
    trainer.fit(steps=1)
    assert trainer.skipped_steps == 1
    assert_same_tensors(before, weights_of(trainer))
    assert not math.isfinite(trainer.history.last("train")["grad_norm"])
    trainer.fit()
    assert trainer.skipped_steps == 1
    assert all(t.isfinite().all() for t in weights_of(trainer).values())


@pytest.mark.parametrize("terms", [all_terms, lambda: [lm_term(0.2), kd_term(0.7, top_k=8)]])
def test_with_a_gradient_scaler_parts_and_student_learn_the_same(tmp_path, monkeypatch, terms):
    """A scaler may be asked to unscale once per step, however many gradients are clipped."""
    plain = make_trainer(tmp_path / "plain", terms=terms(), steps=4)
    plain.fit()
    with monkeypatch.context() as patch:
        scaled = with_scaler(make_trainer(tmp_path / "scaled", terms=terms(), steps=4), patch)
        assert scaled.fit() == "finished"
        assert scaled.accelerator.scaler.get_scale() == 2.0**12
    assert scaled.skipped_steps == 0
    for (name, ours), theirs in zip(weights_of(scaled).items(), weights_of(plain).values(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    norms = [[r["grad_norm"] for r in t.history.records if r["kind"] == "train"] for t in (scaled, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)


# --- alarms ----------------------------------------------------------------------------------------------------------


def alarms_of(trainer) -> list[str]:
    return [e["text"] for e in trainer.history.events if e["what"] == "alarm"]


def test_a_term_that_never_has_anything_to_look_at_is_an_alarm_once(tmp_path):
    """Contrast wants spans of other documents, and here there is one."""
    data = build_data(pages(1, 4000), pair(), held_out=[pages()[0]], window=32, batch_size=4)
    terms = [lm_term(0.5), contrastive_term(0.5), kd_term(0.0, top_k=8)]
    trainer = make_trainer(tmp_path / "run", data=data, terms=terms, steps=23, eval_every=23)
    trainer.fit()
    (text,) = alarms_of(trainer)
    assert text == (
        "contrastive had nothing to look at, since step 1. Likely: a batch needs 32 scored spans from at least two "
        "documents. Try: raise batch_size, or leave contrastive out"
    )
    records = [r for r in trainer.history.records if r["kind"] == "train"]
    assert all(r["terms"]["contrastive"]["value"] is None for r in records)
    assert all(r["terms"]["contrastive"]["count"] == 0 for r in records)
    assert all(r["total"] == pytest.approx(0.5 * r["terms"]["lm"]["value"]) for r in records)
    assert trainer.skipped_steps == 0
    assert alarms_of(knowing(tmp_path / "other", steps=2)) == []


def test_a_term_that_sometimes_has_something_to_look_at_is_no_alarm(tmp_path):
    calls = itertools.count()
    own = LossTerm(
        name="rare",
        weight=0.1,
        unit="",
        healthy=(0, 1),
        value=lambda output, signal, batch: LossValue(output.hidden.sum() * 0, torch.tensor(1.0)),
        over=lambda batch: int(next(calls) % 5 == 1),
    )
    trainer = make_trainer(tmp_path / "run", terms=[lm_term(0.9), own], steps=20, eval_every=20)
    trainer.fit()
    assert alarms_of(trainer) == []


@pytest.mark.parametrize("collapsed", [True, False])
def test_a_knowledge_router_that_collapsed_is_an_alarm_once(tmp_path, collapsed):
    """Two of four maps are always the second choice: they learn nothing."""

    def flatten(trainer):
        (gate,) = (m.gate.weight.data for m in trainer.module.parts["feature"].maps)
        if collapsed:
            gate[1:] = torch.tensor([-1.0, 0.5, -0.5]).unsqueeze(-1) * gate[0]

    terms = [lm_term(0.5), feature_term(0.5, experts=4, active=1)]
    data = small_data(batch_size=4)
    trainer = make_trainer(tmp_path / "run", data=data, terms=terms, steps=25, eval_every=25, learning_rate=1e-9)
    trainer.callbacks = [AtStart(flatten)]
    trainer.fit()
    found = alarms_of(trainer)
    loads = [r["terms"]["feature"]["extras"]["load"][0] for r in trainer.history.records if r["kind"] == "train"]
    if collapsed:
        (text,) = found
        said = r"feature: the knowledge router of its pair 1 has collapsed or lost an expert"
        assert re.match(
            said + r" \(shares \d+%, \d+%, 0%, 0%\), since step 1\. Likely: .* Try: raise balance= or lower experts=$",
            text,
        )
        assert all(load[2:] == [0, 0] and min(load[:2]) > 0.2 for load in loads)
    else:
        assert all(min(load) > 0.05 for load in loads)
        assert found == []


# --- more experts ----------------------------------------------------------------------------------------------------


def test_a_second_pass_with_more_experts_is_another_teacher(tmp_path):
    terms = [lm_term(0.3), kd_term(0.7, top_k=8)]
    plain = make_trainer(tmp_path / "plain", terms=terms, steps=2)
    more = make_trainer(tmp_path / "more", terms=terms, steps=2, more_experts=6)
    plain.fit()
    more.fit()
    first = [t.history.series("kd")[1][0] for t in (plain, more)]
    assert first[0] != pytest.approx(first[1], rel=1e-3)
    assert plain.history.references() == more.history.references(), "what is compared with is the teacher as it is"
    assert {m.top_k for m in teacher().modules() if hasattr(m, "top_k")} == {2}
    with pytest.raises(ValueError, match=r"got another one: the teacher changed"):
        make_trainer(tmp_path / "more", terms=terms, steps=2)
    again = make_trainer(tmp_path / "more", terms=terms, steps=2, more_experts=6)
    again.resume()
    assert again.step == 2


@pytest.mark.parametrize(("wanted", "said"), [(0, "an integer from 1 to 8"), (9, "an integer from 1 to 8")])
def test_more_experts_than_there_are_is_refused_before_training(tmp_path, wanted, said):
    with pytest.raises(ValueError, match=f"more_experts: expected {said}, got {wanted}"):
        make_trainer(tmp_path / "run", more_experts=wanted)
    assert not (tmp_path / "run").exists()


def test_best_weights_that_cannot_be_read_do_not_stop_a_run(tmp_path):
    make_trainer(tmp_path / "run").fit(steps=4)
    best = tmp_path / "run" / "best.safetensors"
    for content in (b"", best.read_bytes()[:100]):
        best.write_bytes(content)
        trainer = make_trainer(tmp_path / "run")
        assert trainer.resume() and trainer.step == 4
        assert any("best.safetensors cannot be read" in event["text"] for event in trainer.history.events)


def test_the_best_weights_of_a_run_that_has_not_begun_do_not_stand_in_its_way(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.evaluate_now()
    trainer.load_best()
    assert trainer.fit() == "finished"
    assert trainer.history.evaluations()[0] == [0, 2, 4, 6]


def test_a_pause_of_an_earlier_session_does_not_take_all_of_a_later_one(tmp_path):
    trainer = make_trainer(tmp_path / "run")
    trainer.fit(steps=2)
    trainer._longest_pause = 3600.0
    trainer.save()
    session = Session(tmp_path / "run", device="cpu", precision="no", budget=1200.0, clock=lambda: 0.0)
    session._started = 0.0
    again = make_trainer(tmp_path / "run", session=session)
    assert again.fit() == "finished"
