"""kd_kit/fault_replay.py: the batch of a fault once more, without touching the run."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from helpers import assert_same_tensors, make_trainer, part_term, small_data, weights_of

import kd_kit.fault_replay
from kd_kit import feature_term, kd_term, lm_term
from kd_kit.fault_replay import replay
from kd_kit.tensor_tree import capture_rng


def at_rest(folder, **arguments):
    trainer = make_trainer(folder, **({"terms": [lm_term(0.3), kd_term(0.6, top_k=8), part_term()]} | arguments))
    trainer.module.train()
    return trainer


def micro_batches(trainer, count: int = 2) -> list:
    return list(trainer.data.batches(0, range(count)))


def test_finite_batches_are_said_to_be_finite_with_the_means_of_the_step(tmp_path):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    guilty = [int(batches[1].sample[0])]
    before, rng = weights_of(trainer), capture_rng()
    seen = replay(trainer, batches, guilty)
    assert_same_tensors(before, weights_of(trainer))
    assert_same_tensors(rng[0], capture_rng()[0])
    assert all(p.grad is None for p in trainer.module.parameters())
    assert seen.finite
    assert [row.what for row in seen.rows[:3]] == ["micro-batch 0", "micro-batch 1", f"window {guilty[0]}"]
    assert [row.what for row in seen.rows if row.guilty] == [f"window {guilty[0]}"]
    assert len(seen.rows) == 2 + 4
    for row, batch in zip(seen.rows[:2], batches, strict=True):
        signal = trainer.teacher.signal(batch)
        _, sums, _ = trainer.module(batch, signal, [1.0] * 3)
        for term, total in zip(trainer.module.terms, sums.tolist(), strict=True):
            assert row.means[term.name] == pytest.approx(total / term.count(batch), rel=1e-6)
    text = " ".join(trainer.data.train.text(guilty[0]).split())
    assert text.startswith(seen.rows[2].text.removesuffix("…"))
    assert "all of it is finite now" in repr(seen)
    assert seen.table.columns == ("", "what", "lm", "kd", "part", "forward", "gradient", "text")


def test_what_is_not_finite_is_named_in_its_row(tmp_path):
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    bad = int(batches[0].sample[1])
    ids = trainer.data.train.collate([bad]).student_ids[0]

    def spoil(module, args, kwargs):
        here = kwargs["input_ids"]
        n = min(here.shape[1], len(ids))
        spoil.rows = (here[:, :n] == ids[:n]).all(-1)

    def give(module, args, output):
        output = output.clone()
        output[spoil.rows] = math.nan
        return output

    handles = [
        trainer.student.model.register_forward_pre_hook(spoil, with_kwargs=True),
        trainer.student.model.layers[1].mlp.register_forward_hook(give),
    ]
    seen = replay(trainer, batches, [bad])
    for handle in handles:
        handle.remove()
    rows = {row.what: row for row in seen.rows}
    assert not seen.finite
    assert "in student.model.layers.1.mlp" in rows["micro-batch 0"].forward
    assert rows["micro-batch 0"].gradient == "-"
    assert rows["micro-batch 0"].means == {"lm": None, "kd": None, "part": None}
    assert rows["micro-batch 1"].finite
    assert "in student.model.layers.1.mlp" in rows[f"window {bad}"].forward
    assert sum(not row.finite for row in seen.rows) == 2
    assert "2 of 6 are not finite" in repr(seen)


def test_every_term_with_a_bad_gradient_is_named(tmp_path):
    trainer = at_rest(tmp_path)
    weight = trainer.student.model.layers[0].mlp.up_proj.weight
    weight.register_hook(lambda gradient: gradient * math.nan)
    row = replay(trainer, micro_batches(trainer, 1)).rows[0]
    assert row.forward == "finite"
    assert [part.split(":")[0] for part in row.gradient.split("; ")] == ["lm", "kd", "part"]
    assert row.gradient.count("student.model.layers.0.mlp.up_proj.weight") == 3
    assert all(math.isfinite(mean) for mean in row.means.values())


def test_broken_weights_are_noted(tmp_path):
    trainer = at_rest(tmp_path)
    with torch.no_grad():
        trainer.student.model.norm.weight[0] = math.inf
    seen = replay(trainer, micro_batches(trainer, 1))
    assert "the weights themselves are not finite: student.model.norm.weight (float32), 1 +inf of 32" in seen.note
    assert seen.note in repr(seen)


def test_windows_beyond_the_most_are_counted_and_guilty_ones_come_first(tmp_path, monkeypatch):
    monkeypatch.setattr(kd_kit.fault_replay, "MOST_WINDOWS", 2)
    trainer = at_rest(tmp_path)
    batches = micro_batches(trainer)
    guilty = int(batches[1].sample[1])
    seen = replay(trainer, batches, [guilty])
    assert [row.what for row in seen.rows[2:]] == [f"window {guilty}", f"window {int(batches[0].sample[0])}"]
    assert seen.note == "2 more windows were not run on their own"


def test_refusals(tmp_path):
    trainer = at_rest(tmp_path / "run")
    batches = micro_batches(trainer, 1)
    other = at_rest(tmp_path / "other", data=small_data(window=16))
    with pytest.raises(ValueError, match="on the text that the batch is from"):
        replay(other, batches)
    beyond = dataclasses.replace(batches[0], sample=batches[0].sample + 10_000)
    with pytest.raises(ValueError, match="on the text that the batch is from"):
        replay(trainer, [beyond])
    unsettled = at_rest(tmp_path / "unsettled", terms=[lm_term(0.5), feature_term(0.5)])
    with pytest.raises(ValueError, match="parts of terms that have settled"):
        replay(unsettled, batches)
    unsettled.settle()
    assert replay(unsettled, batches).finite


def test_not_while_it_trains_in_the_background(tmp_path, monkeypatch):
    trainer = at_rest(tmp_path)
    monkeypatch.setattr(type(trainer), "running", True)
    with pytest.raises(ValueError, match=r"trainer\.stop\(\) and trainer\.wait\(\) first"):
        replay(trainer, micro_batches(trainer, 1))


def test_texts_are_escaped(tmp_path):
    trainer = at_rest(tmp_path)
    seen = replay(trainer, micro_batches(trainer, 1))
    row = dataclasses.replace(seen.rows[-1], text="<b>&", guilty=True)
    shown = dataclasses.replace(seen, rows=(row,))._repr_html_()
    assert "&lt;b&gt;&amp;" in shown
    assert "<b>" not in shown
