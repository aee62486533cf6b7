"""kd_kit/terms.py: what a term may be, and that its values lie where it says they lie."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import make_trainer, small_data, teacher, tiny_student
from torch import nn

from kd_kit import kd_term, lm_term
from kd_kit.head import LogitRows, body_of, head_of
from kd_kit.history import verdict
from kd_kit.losses import forward_kl, jensen_shannon, reverse_kl, skew_kl, student_cells
from kd_kit.module import DistillModule
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm, StudentOutput
from kd_kit.types import LossValue


def nothing(output: StudentOutput, signal, batch) -> LossValue:
    return LossValue(output.hidden.sum() * 0, torch.tensor(1.0))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "either rows= or value=, got both or none"),
        ({"rows": lambda rows: rows.log_z, "value": nothing}, "either rows= or value=, got both or none"),
        ({"value": nothing, "weight": -0.1}, "weight of at least 0, got -0.1"),
        ({"value": nothing, "weight": math.nan}, "weight of at least 0, got nan"),
        ({"value": nothing, "weight": math.inf}, "weight of at least 0, got inf"),
        ({"value": nothing, "over": "spans"}, "over='targets', 'taught' or 'aligned', got 'spans'"),
    ],
)
def test_terms_that_cannot_work_are_refused(arguments, said):
    with pytest.raises(ValueError, match=rf"^LossTerm 'mine': expected .*{said}"):
        LossTerm(**({"name": "mine", "weight": 1.0, "unit": "nats", "healthy": (0, 1)} | arguments))


@pytest.mark.parametrize(
    "arguments", [{"top_k": 0}, {"temperature": 0.0}, {"temperature": -1.0}, {"temperature": math.nan}]
)
def test_kd_terms_that_cannot_work_are_refused(arguments):
    with pytest.raises(ValueError, match=r"^kd_term: expected"):
        kd_term(**arguments)


def test_a_term_counts_its_positions_from_the_batch_alone():
    batch = small_data().train.collate([0, 1])
    assert lm_term().count(batch) == len(batch.rows)
    assert kd_term().count(batch) == len(batch.taught_rows)
    assert kd_term(inside=False).count(batch) == len(batch.aligned_rows)
    assert len(batch.rows) >= len(batch.taught_rows) > len(batch.aligned_rows) > 0


def sums_of(terms, student=None, batch=None) -> tuple[dict[str, float], list[int]]:
    """Every term's mean over a batch, without a step."""
    batch = batch or small_data().train.collate(range(4))
    signal = LiveTeacher(teacher(), small_data().pair.bridge, top_k=max(t.top_k for t in terms)).signal(batch)
    module = DistillModule(student or tiny_student(), terms)
    _, sums = module(batch, signal, torch.ones(len(terms)))
    counts = [t.count(batch) for t in terms]
    return {t.name: float(s) / c for t, s, c in zip(terms, sums, counts, strict=True)}, counts


def test_on_the_embedded_pair_nothing_is_impossible_at_the_start():
    """An earlier run had a KD loss of 30 to 40 where 2 to 8 is usual, and nothing said that this cannot be."""
    for seed in range(2):
        terms = [lm_term(), kd_term()]
        values, _ = sums_of(terms, tiny_student(seed, initializer_range=0.02))
        for term in terms:
            assert verdict(term.meta, values[term.name]) in ("healthy", "low", "high"), term.name
        assert values["lm"] == pytest.approx(math.log(2048), abs=1), "an untrained student guesses evenly"
        assert 0 < values["kd"] < math.log(2048) + 1
    assert verdict(kd_term().meta, 34.0) == "impossible"
    assert verdict(lm_term().meta, 20.0) == "impossible"


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon, skew_kl])
def test_every_divergence_is_possible_at_the_start(divergence):
    term = kd_term(divergence=divergence)
    values, _ = sums_of([term])
    assert values["kd"] > 0
    assert verdict(term.meta, values["kd"]) != "impossible"


def logit_rows(logits: torch.Tensor, ids: torch.Tensor, known: torch.Tensor, there: torch.Tensor) -> LogitRows:
    student, log_z = student_cells(logits, ids)
    return LogitRows(logits, torch.zeros(len(logits), dtype=torch.long), log_z, ids, student, known, there)


@pytest.mark.parametrize("divergence", [forward_kl, reverse_kl, jensen_shannon])
@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
def test_at_a_temperature_the_value_is_that_at_one_and_the_gradient_t_squared_times_the_tempered(
    divergence, temperature
):
    torch.manual_seed(0)
    logits = torch.randn(6, 20, requires_grad=True)
    ids = torch.stack([torch.randperm(20)[:4] for _ in range(6)])
    known = torch.log_softmax(torch.randn(6, 5), -1)
    there = torch.tensor([True, True, False, True, True, False])
    term = kd_term(divergence=divergence, temperature=temperature)
    value = term.rows(logit_rows(logits, ids, known, there))
    plain = kd_term(divergence=divergence).rows(logit_rows(logits, ids, known, there))
    assert torch.allclose(value, plain, atol=1e-6)
    assert (value[~there] == 0).all()
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    # by hand, from the student's cells: p ** (1 / T) normalised, on both sides
    cells, _ = student_cells(logits, ids)
    soft = divergence(torch.log_softmax(cells / temperature, -1), torch.log_softmax(known / temperature, -1))
    (expected,) = torch.autograd.grad(temperature**2 * soft[there].sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert (gradient[~there] == 0).all()


def test_rows_without_a_teacher_cost_nothing_whatever_stands_there():
    logits = torch.randn(3, 20, requires_grad=True)
    ids = torch.arange(4).expand(3, 4)
    known = torch.full((3, 5), -math.inf)
    known[:, -1] = 0
    there = torch.zeros(3, dtype=torch.bool)
    for temperature in (1.0, 3.0):
        value = kd_term(temperature=temperature).rows(logit_rows(logits, ids, known, there))
        (gradient,) = torch.autograd.grad(value.sum(), logits)
        assert (value == 0).all()
        assert (gradient == 0).all()


def test_the_lm_value_is_the_mean_nll_of_the_targets():
    batch, student = small_data().train.collate([0, 2]), tiny_student()
    values, _ = sums_of([lm_term(), kd_term()], student, batch)
    with torch.no_grad():
        logits = student(input_ids=batch.student_ids).logits.flatten(0, 1)[batch.rows]
    nll = nn.functional.cross_entropy(logits, batch.targets.flatten()[batch.rows])
    assert values["lm"] == pytest.approx(float(nll), rel=1e-5)


def test_the_lm_term_cannot_vanish(tmp_path):
    """In an earlier run it was reported at step 0 and never again."""
    trainer = make_trainer(tmp_path / "run", terms=None, steps=12)
    trainer.fit()
    records = [r for r in trainer.history.records if r["kind"] == "train"]
    assert len(records) == 12
    for record in records:
        assert record["terms"]["lm"]["value"] > 0
        assert record["terms"]["lm"]["weight"] == pytest.approx(0.3)
        assert record["terms"]["lm"]["count"] > 0
    assert body_of(trainer.student) is not None
    assert head_of(trainer.student).weight is trainer.student.get_output_embeddings().weight


def test_repr_and_meta_name_the_range():
    assert repr(kd_term()) == "kd: weight 0.7, healthy 0.05 to 3 nats/token"
    assert kd_term().meta == {
        "unit": "nats/token",
        "healthy": [0.05, 3.0],
        "impossible_below": 0.0,
        "impossible_above": 10.0,
    }
