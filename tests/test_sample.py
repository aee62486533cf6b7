"""kd_kit/sample.py: continuations of one prompt."""

from __future__ import annotations

import pytest
import torch
from helpers import pair, teacher, tiny_student

from kd_kit import compare_text


def models():
    return {"student <b>": (tiny_student(), pair().student), "teacher": (teacher(), pair().teacher)}


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match=r"^compare_text: expected a prompt, got an empty one"):
        compare_text(models(), "")


def test_the_same_seed_writes_the_same_and_another_seed_another():
    first = compare_text(models(), "It was", tokens=12, seed=1)
    torch.manual_seed(77)
    assert compare_text(models(), "It was", tokens=12, seed=1) == first
    other = compare_text(models(), "It was", tokens=12, seed=2)
    assert other.texts["student <b>"] != first.texts["student <b>"]


def test_the_random_state_and_the_mode_stay():
    student = tiny_student()
    torch.manual_seed(4)
    before = torch.get_rng_state()
    compare_text({"student": (student, pair().student)}, "It was", tokens=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert student.training


def test_temperature_zero_takes_the_most_likely_token():
    found = compare_text({"teacher": (teacher(), pair().teacher)}, "It is a", tokens=5, temperature=0)
    vocab = pair().teacher_vocab
    ids = [vocab.start_id, *pair().teacher("It is a", add_special_tokens=False)["input_ids"]]
    expected = []
    for _ in range(5):
        with torch.no_grad():
            token = int(teacher()(input_ids=torch.tensor([ids + expected])).logits[0, -1].argmax())
        expected.append(token)
        if token == vocab.end_id:
            break
    assert found.texts["teacher"] == vocab.bytes_of(expected).decode(errors="replace")


def test_one_model_does_not_change_what_another_writes():
    both = compare_text(models(), "She", tokens=8)
    alone = compare_text({"teacher": models()["teacher"]}, "She", tokens=8)
    assert both.texts["teacher"] == alone.texts["teacher"]
    assert both.prompt == "She"


def test_it_prints_and_escapes():
    found = compare_text(models(), "A <i>prompt</i>", tokens=3)
    assert "prompt: A <i>prompt</i>" in repr(found)
    page = found._repr_html_()
    assert "student &lt;b&gt;" in page
    assert "A &lt;i&gt;prompt&lt;/i&gt;" in page
    assert "<i>" not in page
