"""kd_kit/verification.py: green where all is well, and red for every single thing that it is there to find."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from conftest import build_tiny
from helpers import pair, teacher, tiny_student

import kd_kit as kd
from kd_kit.losses import forward_kl, jensen_shannon, reverse_kl, skew_kl
from kd_kit.readings import Needs
from kd_kit.terms import LossTerm
from kd_kit.types import DistillBatch, LossValue


def every_term() -> list[LossTerm]:
    """One of every kind and of every way across the vocabularies of the embedded pair."""
    return [
        kd.lm_term(),
        kd.kd_term(),
        kd.kd_term(inside=False, temperature=2.0, name="aligned"),
        kd.kd_term(top_k=None, name="full"),
        kd.kd_term(sampled=True, top_k=32, name="sampled"),
        *(kd.kd_term(divergence=d, name=d.__name__) for d in (reverse_kl, jensen_shannon, skew_kl)),
        kd.kd_term(method="strict", name="strict"),
        kd.kd_term(method="uld", name="uld"),
        kd.kd_term(method="projector", name="projector"),
        kd.span_term(),
        kd.feature_term(),
        kd.layerwise_term(experts=3),
        kd.relation_term(),
        kd.attention_term(),
        kd.contrastive_term(),
        kd.router_term(),
    ]


@pytest.fixture(scope="module")
def found():
    return kd.verify(pair(), teacher(), tiny_student(), every_term())


def test_every_term_holds_on_the_embedded_pair(found):
    assert found.ok, found
    checked = {(what, term) for what, term, *_ in found.rows}
    names = {t.name for t in every_term()}
    for what in ("one window at a time", "half-precision teacher", "tokens numbered differently"):
        expected = names - {"one window at a time": {"contrastive"}, "tokens numbered differently": {"sampled"}}.get(
            what, set()
        )
        assert {term for w, term in checked if w == what} == expected
    with_floor = {t.name for t in every_term() if t.floor is not None}
    floors = {term for w, term in checked if w == "perfect student: value at its floor"}
    assert floors == with_floor - {"span"}, "with one tokenizer no span has two tokens"
    assert "span" in {term for w, term in checked if w == "perfect student, spans merged: value at its floor"}
    gradients = {term for w, term in checked if w == "perfect student, spans merged: no gradient"}
    assert gradients == with_floor - {"uld"}
    assert any("sampled: no floor" in note for note in found.notes)


def test_it_prints(found):
    for said in (repr(found), found._repr_html_()):
        assert "half-precision teacher" in said
        assert f"all {len(found.rows)} checks hold" in said


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi", "qwen3_moe", "gemma2", "granite", "cohere"])
@pytest.mark.parametrize("as_what", ["teacher", "student"])
def test_families(family, as_what):
    """Every family as a teacher and as a student of the other, with tokenizers of different families."""
    sizes = {"teacher": pair().teacher_vocab.size, "student": pair().student_vocab.size}
    models = {
        who: build_tiny(family if who == as_what else "llama", seed=i, spread=4.0, vocab=sizes[who] + 5 * i)
        for i, who in enumerate(sizes)
    }
    terms = [kd.kd_term(method=m, name=m) for m in ("bridge", "strict", "uld", "projector")]
    terms += [kd.lm_term(), kd.kd_term(sampled=True, top_k=16, name="sampled"), kd.span_term(), kd.feature_term()]
    terms += [kd.relation_term(), kd.attention_term(), kd.contrastive_term()]
    if models["teacher"].config.model_type == "qwen3_moe":
        terms.append(kd.router_term())
    found = kd.verify(pair(), models["teacher"], models["student"], terms, window=48)
    assert found.ok, found


@pytest.mark.parametrize("method", ["same", "direct", "bridge", "strict", "uld"])
def test_one_tokenizer_with_heads_padded_differently(method):
    same = kd.build_tokenizers(pair().teacher, pair().teacher)
    size = same.teacher_vocab.size
    big, small = (
        build_tiny("llama", vocab=size + 64, spread=4.0),
        build_tiny("llama", seed=1, vocab=size + 7, spread=4.0),
    )
    found = kd.verify(same, big, small, [kd.lm_term(), kd.kd_term(method=method)])
    assert found.ok, found


def test_nothing_is_changed_by_it():
    student, one = tiny_student(), teacher()
    before = {n: p.clone() for n, p in student.named_parameters()}
    modes = student.training, one.training
    kd.verify(pair(), one, student, [kd.lm_term(), kd.kd_term(), kd.feature_term()])
    assert (student.training, one.training) == modes
    assert all(torch.equal(before[n], p) for n, p in student.named_parameters())
    assert all(p.grad is None and not p.requires_grad for p in one.parameters())
    assert all(p.grad is None and p.requires_grad for p in student.parameters())


# ---- what it is there to find


def row_term(name: str, rows, **more) -> LossTerm:
    """The KD term with another loss on the same cells."""
    return dataclasses.replace(
        kd.kd_term(name=name), build=lambda setup: kd.kd_term().build(setup) | {"rows": rows}, **more
    )


def broken(found) -> set[str]:
    return {what for what, _, _, _, held in found.rows if not held}


def key_of(rows) -> str:
    return next(iter(rows.given))


def test_a_shift_by_one_is_found():
    def late(rows):
        key = key_of(rows)
        return forward_kl(rows.student(key), rows.teacher(key).roll(1, 0))

    found = kd.verify(pair(), teacher(), tiny_student(), [row_term("kd", late)])
    assert {"perfect student: value at its floor", "perfect student: no gradient"} <= broken(found)


def test_a_loss_with_another_floor_is_found():
    """One popular library's forward KL returns the cross-entropy: 2.03 for identical models."""

    def entropy_left_in(rows):
        key = key_of(rows)
        student, known = rows.student(key), rows.teacher(key)
        used = known > -torch.inf
        return -(torch.where(used, known, 0.0).exp() * torch.where(used, student, 0.0) * used).sum(-1)

    found = kd.verify(pair(), teacher(), tiny_student(), [row_term("kd", entropy_left_in)])
    assert "perfect student: value at its floor" in broken(found)
    assert "perfect student: no gradient" not in broken(found)


def test_a_loss_that_knows_token_numbers_is_found():
    def by_number(rows):
        key = key_of(rows)
        return forward_kl(rows.student(key), rows.teacher(key)) * (1 + rows.targets.float() / 1000)

    found = kd.verify(pair(), teacher(), tiny_student(), [row_term("kd", by_number)])
    assert broken(found) == {"tokens numbered differently"}


def value_term(value, **more) -> LossTerm:
    return LossTerm(name="mine", weight=1.0, unit="-", healthy=(0, 1), value=value, **more)


def test_padding_that_leaks_into_a_value_is_found():
    def leaks(output, signal, batch: DistillBatch) -> LossValue:
        return LossValue(output.hidden.float().square().sum(), torch.tensor(float(len(batch.rows))))

    found = kd.verify(pair(), teacher(), tiny_student(), [value_term(leaks)])
    assert broken(found) == {"one window at a time"}


def test_a_mean_of_means_is_found():
    def mean_of_means(output, signal, batch: DistillBatch) -> LossValue:
        values = output.hidden.float()[..., 0].flatten()[batch.rows]
        return LossValue(values.mean(), torch.tensor(1.0))

    found = kd.verify(pair(), teacher(), tiny_student(), [value_term(mean_of_means)])
    assert broken(found) == {"one window at a time"}


def test_a_teacher_that_half_precision_breaks_is_found():
    """A residual stream of 1e7 is finite in float32 and infinite in half precision."""
    loud = copy.deepcopy(teacher())
    loud.get_input_embeddings().register_forward_hook(lambda module, ids, out: out * 1e7)
    found = kd.verify(pair(), loud, tiny_student(), [kd.lm_term(), kd.kd_term()])
    assert broken(found) == {"half-precision teacher"}


def test_a_gradient_to_the_teacher_is_found():
    """A distance without a detach pulls the teacher to the student as well."""

    def both_ways(output, signal, batch: DistillBatch) -> LossValue:
        ours = output.hidden.flatten(0, 1)[batch.span_rows[:, 0]].float()
        return LossValue((ours.mean(-1) - signal.states[4].mean(-1)).square().sum(), torch.tensor(float(len(ours))))

    term = value_term(both_ways, needs=Needs(teacher_states=frozenset({4})))
    found = kd.verify(pair(), teacher(), tiny_student(), [kd.lm_term(), kd.feature_term(), term])
    assert {(what, name) for what, name, *_, held in found.rows if not held} == {
        ("no gradient reaches the teacher", "mine")
    }


@pytest.mark.parametrize("layers", [{1: 4}, {2: 1}])
def test_layers_paired_by_hand_hold_too(layers):
    terms = [kd.feature_term(layers=layers), kd.relation_term(layers=layers), kd.attention_term(layers=layers)]
    found = kd.verify(pair(), teacher(), tiny_student(), [*terms, kd.router_term(layers=layers)])
    assert found.ok, found


def test_a_student_deeper_than_its_teacher_holds_too():
    deep = tiny_student(num_hidden_layers=6, layer_types=None)
    found = kd.verify(pair(), teacher(), deep, [kd.feature_term(layers={6: 4}), kd.layerwise_term()])
    assert found.ok, found


def test_a_teacher_in_bfloat16_is_checked_in_bfloat16():
    loud = copy.deepcopy(teacher()).to(torch.bfloat16)
    loud.get_input_embeddings().register_forward_hook(lambda module, ids, out: out * 1e7)
    found = kd.verify(pair(), loud, tiny_student(), [kd.lm_term()])
    assert found.ok, found


def test_models_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="expected a teacher with at least"):
        kd.verify(pair(), build_tiny("llama", vocab=100), tiny_student(), [kd.kd_term()])
    with pytest.raises(ValueError, match="find_routing: expected"):
        kd.verify(pair(), build_tiny("llama", vocab=5000), tiny_student(), [kd.lm_term(), kd.router_term()])
