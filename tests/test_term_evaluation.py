"""kd_kit/term_evaluation.py: held-out values of every term, with the very weights of the training step."""

from __future__ import annotations

import pytest
import torch
from helpers import make_trainer, small_data, weights_of

from kd_kit import curriculum, evaluate_terms, feature_term, kd_term, lm_term, score


def built(folder, **arguments):
    terms = [lm_term(0.2), kd_term(0.5, top_k=8), feature_term(0.3)]
    return make_trainer(folder, **({"terms": terms, "data": small_data(batch_size=4), "steps": 6} | arguments))


def test_values_are_sums_over_all_windows_divided_once(tmp_path):
    trainer = built(tmp_path / "run")
    trainer.fit(steps=2)
    found = evaluate_terms(trainer, limit=None)
    held_out = trainer.data.held_out
    assert found.windows == len(held_out)
    whole = score(trainer.student, held_out)
    assert found.values["lm"] == pytest.approx(whole.nats / whole.tokens, rel=1e-5)
    batch = held_out.collate(range(len(held_out)))
    trainer.module.eval()
    with torch.no_grad():
        signal = trainer.teacher.signal(batch)
        values = trainer.module.values(trainer.module.output(batch), signal, batch)
    for name, value in values.items():
        count = next(t for t in trainer.terms if t.name == name).count(batch)
        assert found.values[name] == pytest.approx(float(value.sum) / count, rel=1e-4), name


def test_the_weights_are_those_of_the_next_step(tmp_path):
    """An earlier run evaluated with other weights than it trained with, and its two totals had nothing in common."""
    trainer = built(tmp_path / "run", schedule=curriculum("kd", "feature", start=0.1))
    trainer.fit(steps=1)
    found = evaluate_terms(trainer, limit=2)
    trainer.fit(steps=1)
    record = trainer.history.last("train")
    assert found.shares == pytest.approx({name: term["weight"] for name, term in record["terms"].items()})
    assert found.total == pytest.approx(sum(found.shares[n] * v for n, v in found.values.items()))
    assert found.shares["kd"] < 0.45, "on its way to 0.5"


def test_nothing_is_trained_by_looking(tmp_path):
    trainer = built(tmp_path / "run")
    trainer.fit(steps=2)
    before, mode = weights_of(trainer), trainer.module.training
    lines = len(trainer.history)
    evaluate_terms(trainer, limit=2)
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(trainer).items())
    assert (trainer.module.training, len(trainer.history)) == (mode, lines)


def test_a_run_that_has_not_begun_can_be_looked_at(tmp_path):
    found = evaluate_terms(built(tmp_path / "run"), limit=2)
    assert found.trained == {"lm": None, "kd": None, "feature": None}
    assert 0 < found.values["feature"] < 2


def test_the_table_names_what_is_out_of_range(tmp_path):
    trainer = built(tmp_path / "run")
    trainer.fit()
    text = str(evaluate_terms(trainer, limit=2))
    assert "held-out windows, weighted as the next step is" in text
    line = next(line for line in text.splitlines() if line.startswith("lm"))
    assert "nats/token" in line
    assert "1 - 6" in line
    assert text.splitlines()[-1].split()[0] == "total"
    assert "<table>" in evaluate_terms(trainer, limit=2)._repr_html_()


def test_a_limit_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="expected a limit of at least 1 window, got 0"):
        evaluate_terms(built(tmp_path / "run"), limit=0)
