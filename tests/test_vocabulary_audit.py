"""kd_kit/audit.py: shares by a naive loop, and a recommendation with its reason."""

from __future__ import annotations

import copy
import dataclasses
import math

import pytest
import torch
from conftest import build_tiny
from helpers import pages, pair, small_data, teacher

from kd_kit import audit, build_data, build_tokenizers
from kd_kit.types import IGNORE
from kd_kit.vocabulary_audit import Audit


@pytest.fixture(scope="module")
def one_window():
    data = build_data([pages()[1][:90]], pair(), held_out=[pages()[0]], window=40, batch_size=1)
    assert len(data.train) == 1
    return data


def naive(data):
    """Counts over the only window, by bytes alone, and the teacher's probabilities at the aligned positions.

    The counts: positions, aligned, same next token, bridge right there, inside a teacher token, bridge right there.
    """
    batch = data.train.collate([0])
    student, other = pair().student_vocab, pair().teacher_vocab
    ours, theirs = batch.student_ids[0].tolist(), batch.teacher_ids[0].tolist()
    with torch.no_grad():
        logits = teacher()(input_ids=batch.teacher_ids).logits[0, :, : other.size].float()
    positions = aligned = same = bridged = inside = continued = 0
    rows = []

    def home(said: bytes) -> bytes | None:
        """The longest student token that ``said`` begins with."""
        return max((t for t in student.tokens if t and said.startswith(t)), key=len, default=None)

    for i in range(len(ours) - 1):
        positions += 1
        read = student.bytes_of(ours[1 : i + 1])
        ours_next = student.tokens[ours[i + 1]]
        for j in range(len(theirs) - 1):
            known, theirs_next = other.bytes_of(theirs[1 : j + 1]), other.tokens[theirs[j + 1]]
            if known == read:
                aligned += 1
                rows.append(torch.softmax(logits[j], -1))
                same += ours_next == theirs_next
                bridged += home(theirs_next) == ours_next
            elif len(known) < len(read) < len(known + theirs_next):
                inside += 1
                continued += home(theirs_next[len(read) - len(known) :]) == ours_next
    return positions, aligned, same, bridged, inside, continued, torch.stack(rows)


def test_shares_are_those_of_a_naive_loop(one_window):
    positions, aligned, same, bridged, inside, continued, probs = naive(one_window)
    assert 0 < same < bridged <= aligned < positions
    assert 0 < continued <= inside
    found = audit(pair(), one_window, teacher())
    assert found.positions == positions
    assert found.aligned == pytest.approx(aligned / positions)
    assert found.same_next == pytest.approx(same / aligned)
    assert found.bridged_next == pytest.approx(bridged / aligned)
    assert found.taught == pytest.approx((aligned + inside) / positions)
    assert found.inside_next == pytest.approx(continued / inside)
    projected = pair().bridge.project(probs)
    assert found.homed_mass == pytest.approx(float(projected[:, :-1].sum(-1).mean()), abs=1e-5)
    assert list(found.kept_mass) == [8, 16, 32, 64, 128]
    for k, mass in found.kept_mass.items():
        assert mass == pytest.approx(float(projected[:, :-1].topk(k, -1).values.sum(-1).mean()), abs=1e-5)
    assert list(found.kept_mass.values()) == sorted(found.kept_mass.values())
    assert found.padded_rows == teacher().config.vocab_size - pair().teacher_vocab.size == 29
    assert found.shared_tokens == pair().bridge.shared
    identical = [home == token for home, token in zip(_homes(), pair().teacher_vocab.tokens, strict=True)]
    assert found.shared_mass == pytest.approx(float(probs[:, identical].sum(-1).mean()), abs=1e-5)
    assert 0.5 < found.shared_mass < found.homed_mass
    assert found.homeless_tokens == int((pair().bridge.table == pair().bridge.student_size).sum())


def _homes() -> list[bytes]:
    student = pair().student_vocab
    return [student.tokens[v] if v < student.size else b"" for v in pair().bridge.table.tolist()]


def test_specials_without_a_home_are_counted():
    found = audit(pair(), small_data())
    vocab, bridge = pair().teacher_vocab, pair().bridge
    homeless = [t for t in vocab.special if int(bridge.table[t]) == bridge.student_size]
    assert 0 < found.homeless_specials == len(homeless) < found.homeless_tokens
    assert found.kinship == "different"


def test_white_space_that_both_cut_differently_is_counted():
    code = "def f(x):\n" + "".join(
        f"{' ' * n}if x > {n}:\n{' ' * (n + 3)}return {n}\n\n\n" for n in (3, 5, 7, 9, 12, 17)
    )
    data = build_data([code], pair(), held_out=[pages()[0]], window=256, batch_size=1)
    found = audit(pair(), data)
    assert found.whitespace > 0
    assert found.whitespace * found.positions == pytest.approx(int(data.train.collate([0]).whitespace.sum()))
    assert found.whitespace + found.taught <= 1


def test_without_a_teacher_there_are_no_masses():
    found = audit(pair(), small_data())
    assert found.padded_rows is found.shared_mass is found.homed_mass is found.kept_mass is None
    assert 0.5 < found.aligned < found.taught <= 1
    assert 0 < found.same_next <= found.bridged_next <= 1


def test_the_same_tokenizer_twice_is_the_identity():
    same = build_tokenizers(pair().teacher, pair().teacher)
    found = audit(same, build_data(pages(3), same, held_out=0.4, window=32))
    assert (found.aligned, found.same_next, found.bridged_next) == (1, 1, 1)
    assert (found.kinship, found.method, found.whitespace) == ("same", "same", 0)
    assert found.recommendation.startswith('kd_term(method="same"): the ids of both tokenizers mean the same')


def test_the_recommendation_gives_its_reason():
    found = audit(pair(), small_data())
    assert found.recommendation.startswith("kd_term(): ")
    reach = found.aligned * found.bridged_next + (found.taught - found.aligned) * found.inside_next
    for figure in (f"{found.aligned:.0%}", f"{found.taught:.0%}", f"{reach:.0%}"):
        assert figure in found.recommendation
    assert found.method == "bridge"
    assert f'"strict") would be heard at {found.aligned * found.same_next:.0%}' in found.recommendation
    poor = dataclasses.replace(found, aligned=0.4, bridged_next=0.9, taught=0.5, inside_next=0.5)
    assert poor.method == "projector"
    for figure in ("40% of the positions", "at only 41%", "learned map"):
        assert figure in poor.recommendation
    strange = dataclasses.replace(found, aligned=0.1, bridged_next=0.9, taught=0.5, inside_next=0.5)
    assert strange.method == "bridge"
    assert "doubtful outlook" in strange.recommendation
    for figure in ("10%", "50%", "29% of all positions"):
        assert figure in strange.recommendation


def test_data_of_another_pair_are_refused():
    other = build_tokenizers(pair().student, pair().teacher)
    with pytest.raises(ValueError, match=r"^audit: expected data made with these tokenizers, got data of another pair"):
        audit(other, small_data())
    assert audit(build_tokenizers(), small_data()).positions > 0, "the same pair, loaded again, is the same"


def test_it_prints_and_becomes_a_dict():
    found = audit(pair(), small_data(), teacher())
    for said in (repr(found), found._repr_html_()):
        assert "aligned: both stand at one byte" in said
        assert f"{found.aligned:.1%}" in said
        assert "kd_term()" in said
    assert found.to_dict()["recommendation"] == found.recommendation
    assert found.to_dict()["method"] == "bridge"
    words = ("recommendation", "method")
    assert Audit(**{k: v for k, v in found.to_dict().items() if k not in words}) == found


def test_a_half_precision_teacher_weighs_nearly_the_same():
    half, full = audit(pair(), small_data(), teacher(torch.float16)), audit(pair(), small_data(), teacher())
    assert half.homed_mass == pytest.approx(full.homed_mass, abs=1e-2)
    assert half.aligned == full.aligned
    assert small_data().train.collate([0]).targets[0, -1] == IGNORE


def test_the_load_of_the_teachers_experts_is_counted_layer_by_layer(one_window):
    found = audit(pair(), one_window, teacher())
    batch = one_window.train.collate([0])
    with torch.no_grad():
        logits = teacher()(input_ids=batch.teacher_ids, output_router_logits=True).router_logits
    kept = (batch.teacher_targets != IGNORE).flatten()
    assert list(found.experts) == [1, 2, 3, 4]
    for layer, rows in enumerate(logits, start=1):
        chosen = rows.float()[kept].topk(2, -1).indices.flatten().bincount(minlength=8).double()
        share = chosen / chosen.sum()
        entropy, unused, largest = found.experts[layer]
        assert entropy == pytest.approx(float(torch.special.entr(share).sum()) / math.log(8), abs=1e-5)
        assert unused == int((chosen == 0).sum())
        assert largest == pytest.approx(float(share.max()), abs=1e-6)
    assert "load of the teacher's experts, layer 4" in repr(found)
    assert not found.experts_note


def test_a_dense_teacher_has_no_experts_to_count():
    found = audit(pair(), small_data(), build_tiny("llama", vocab=5000))
    assert found.experts == {}
    assert "experts" not in repr(found)


def test_routers_that_cannot_be_read_are_said_and_do_not_stop_the_audit():
    strange = copy.deepcopy(teacher())
    strange.config.model_type = "never_heard_of"
    found = audit(pair(), small_data(), strange)
    assert found.experts == {}
    assert "expected a family whose scores are known, got 'never_heard_of'" in repr(found)
    assert found.homed_mass == pytest.approx(audit(pair(), small_data(), teacher()).homed_mass)
