"""kd_kit/terms.py: what a term may be, and that its values lie where it says they lie."""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from conftest import bound
from helpers import make_trainer, small_data, teacher, tiny_student
from torch import nn

from kd_kit import kd_term, lm_term
from kd_kit.head import Given, LogitRows, body_of, head_of
from kd_kit.history import verdict
from kd_kit.losses import forward_kl, jensen_shannon, reverse_kl, skew_kl, student_cells
from kd_kit.module import DistillModule
from kd_kit.readings import Needs
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm, Setup, StudentOutput, name_of
from kd_kit.types import IGNORE, LossValue
from kd_kit.vocab import Bridge


def nothing(output: StudentOutput, signal, batch) -> LossValue:
    return LossValue(output.hidden.sum() * 0, torch.tensor(1.0))


def own_term(**arguments) -> LossTerm:
    return LossTerm(
        **({"name": "mine", "weight": 1.0, "unit": "nats", "healthy": (0, 1), "value": nothing} | arguments)
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "one of rows=, value= and build=, got none"),
        ({"rows": lambda rows: rows.log_z, "value": nothing}, "one of rows=, value= and build=, got rows and value"),
        ({"value": nothing, "build": dict}, "one of rows=, value= and build=, got value and build"),
        ({"value": nothing, "weight": -0.1}, "weight of at least 0, got -0.1"),
        ({"value": nothing, "weight": math.nan}, "weight of at least 0, got nan"),
        ({"value": nothing, "weight": math.inf}, "weight of at least 0, got inf"),
        (
            {"value": nothing, "over": "words"},
            "over= one of 'targets', 'taught', 'aligned', 'same', 'spans' or a function of the batch, got 'words'",
        ),
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


@pytest.mark.parametrize("over", ["spans", len])
def test_rows_that_nobody_gathers_run_over_rows(over):
    """A sum over rows can be taken where there are rows; anything else wants to be told how."""

    def rows(rows):
        return rows.log_z

    with pytest.raises(ValueError, match=r"^LossTerm 'mine': expected gather= beside rows= .*over="):
        own_term(value=None, rows=rows, over=over)
    own_term(
        value=None, rows=rows, over=over, gather=lambda values, signal, batch: LossValue(values.sum(), torch.ones(()))
    )


def test_a_term_is_bound_once_and_then_complete():
    made = []

    def build(setup):
        made.append(setup)
        return {"value": nn.Linear(2, 2), "needs": Needs(row_states=True), "over": "aligned"}

    open_term = own_term(value=None, build=build, settings={"a": 1})
    assert open_term.taught, "a term that wants to see the models wants a teacher"
    assert open_term.part is None
    setup = Setup(nn.Linear(1, 1), nn.Linear(1, 1), None)
    term = open_term.bound(setup)
    assert made == [setup]
    assert (term.build, term.over, term.settings, term.name) == (None, "aligned", {"a": 1}, "mine")
    assert isinstance(term.part, nn.Linear)
    assert term.taught
    assert term.bound(setup) is term
    assert made == [setup]
    other = open_term.bound(setup)
    assert other.part is not term.part, "two runs with one term do not share its parts"
    assert not own_term().taught
    assert own_term().part is None
    assert own_term(value=None, rows=nn.Linear(2, 2)).part is not None


def test_functions_are_named_with_their_arguments():
    assert name_of(skew_kl) == "skew_kl"
    assert name_of(functools.partial(skew_kl, alpha=0.2)) == "skew_kl(alpha=0.2)"
    assert name_of(functools.partial(functools.partial(skew_kl, 1), alpha=0.2)) == "skew_kl(1, alpha=0.2)"
    assert name_of(nn.Linear(1, 1)) == "Linear"
    settings = kd_term(divergence=functools.partial(skew_kl, alpha=0.2)).settings
    assert settings["divergence"] == "skew_kl(alpha=0.2)"
    json.dumps(settings)


def test_a_term_counts_its_positions_from_the_batch_alone():
    batch, bridge = small_data().train.collate([0, 1]), small_data().pair.bridge
    assert lm_term().count(batch) == len(batch.rows)
    assert bound(kd_term(), bridge).count(batch) == len(batch.taught_rows)
    assert bound(kd_term(inside=False), bridge).count(batch) == len(batch.aligned_rows)
    kinds = {"targets": batch.targets != IGNORE, "taught": batch.taught, "aligned": batch.aligned, "same": batch.same}
    for over, mask in (kinds | {"spans": batch.span_mask}).items():
        assert own_term(over=over).count(batch) == int(mask.sum()) > 0
    assert own_term(over=lambda batch: len(batch.sample)).count(batch) == 2
    assert len(batch.rows) >= len(batch.taught_rows) > len(batch.aligned_rows) > 0


def sums_of(terms, student=None, batch=None) -> tuple[dict[str, float], list[int]]:
    """Every term's mean over a batch, without a step."""
    batch, student, pair = batch or small_data().train.collate(range(4)), student or tiny_student(), small_data().pair
    terms = [t.bound(Setup(student, teacher(), pair)) for t in terms]
    module = DistillModule(student, terms)
    signal = LiveTeacher(teacher(), pair.bridge, module.needs).signal(batch)
    _, sums, _ = module(batch, signal, torch.ones(len(terms)))
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


def kd_rows(logits: torch.Tensor, ids: torch.Tensor, known: torch.Tensor, there: torch.Tensor, **arguments):
    """The values of a KD term on these rows, cells that a teacher gave, and where it is."""
    size = logits.shape[1]
    term = bound(kd_term(top_k=ids.shape[1], **arguments), Bridge(torch.arange(size), size, size))
    (reading,) = term.needs.readings
    given = {reading.key: Given(there, ids, known)}
    return term.rows(LogitRows(logits, torch.zeros(len(logits), dtype=torch.long), given, None))


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
    value = kd_rows(logits, ids, known, there, divergence=divergence, temperature=temperature)
    plain = kd_rows(logits, ids, known, there, divergence=divergence)
    assert torch.allclose(value, plain, atol=1e-6)
    assert value[~there].abs().max() < 1e-6, "where no teacher is, the student stands in for it"
    (gradient,) = torch.autograd.grad(value.sum(), logits)
    # by hand, from the student's cells: p ** (1 / T) normalised, on both sides
    cells, _ = student_cells(logits, ids)
    soft = divergence(torch.log_softmax(cells / temperature, -1), torch.log_softmax(known / temperature, -1))
    (expected,) = torch.autograd.grad(temperature**2 * soft[there].sum(), logits)
    assert torch.allclose(gradient, expected, atol=1e-5)
    assert gradient[~there].abs().max() < 1e-6


def test_rows_without_a_teacher_cost_nothing_whatever_stands_there():
    logits = torch.randn(3, 20, requires_grad=True)
    ids = torch.arange(4).expand(3, 4)
    known = torch.full((3, 5), -math.inf)
    known[:, -1] = 0
    there = torch.zeros(3, dtype=torch.bool)
    for temperature in (1.0, 3.0):
        value = kd_rows(logits, ids, known, there, temperature=temperature)
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
        "impossible_above": 13.5,
    }
