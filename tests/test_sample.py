"""kd_kit/sample.py: continuations of one prompt."""

from __future__ import annotations

import pytest
import torch
from helpers import pair, teacher, tiny_student

from kd_kit import compare_text
from kd_kit.sample import Continuations


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


def test_a_models_own_habits_of_generation_do_not_count():
    """A penalty for repetition or a small top-k of one model would make it another comparison."""
    plain, habits = tiny_student(), tiny_student()
    config = habits.generation_config
    config.do_sample, config.temperature, config.top_k, config.top_p = True, 0.1, 1, 0.2
    config.repetition_penalty, config.no_repeat_ngram_size = 5.0, 1
    for temperature in (0, 1.0):
        pairs = {"plain": (plain, pair().student), "habits": (habits, pair().student)}
        found = compare_text(pairs, "It was", tokens=12, temperature=temperature).texts
        assert found["plain"] == found["habits"], temperature


@pytest.mark.parametrize(
    ("wrong", "arguments"),
    [
        (r"expected models as \{name: \(model, tokenizer\)\}, got Llama", {"models": tiny_student()}),
        (r"expected models as .* got dict", {"models": {}}),
        (r"expected models as .* got dict", {"models": {"it": tiny_student()}}),
        (r"expected tokens of at least 1 .* got 0 and", {"tokens": 0}),
        (r"at least 0, got 60 and -1", {"temperature": -1}),
        (r"within student <b>'s context of \d+ tokens, got \d+ and 100000", {"tokens": 100_000}),
    ],
)
def test_what_cannot_be_continued_is_refused(wrong, arguments):
    with pytest.raises(ValueError, match=f"^compare_text: .*{wrong}"):
        compare_text(**{"models": models(), "prompt": "It was"} | arguments)


def test_it_is_printed_in_columns():
    found = Continuations("A prompt", {"one": "first line\nsecond line", "two": "word " * 40})
    lines = repr(found).splitlines()
    assert lines[0] == "prompt: A prompt"
    assert [part.strip() for part in lines[2].split("|")] == ["one", "two"]
    assert [line.split("|")[0].strip() for line in lines[4:6]] == ["…first line", "second line"]
    assert " ".join(line.split("|")[1].strip() for line in lines[4:]).split() == ["…word", *["word"] * 39]
    assert max(map(len, lines)) <= 120
    many = repr(Continuations("A prompt", {f"model {i}": "text" for i in range(6)}))
    assert [line.count("model") for line in many.splitlines() if "model" in line] == [4, 2], "in bands"


def test_it_prints_and_escapes():
    found = compare_text(models(), "A <i>prompt</i>", tokens=3)
    assert "prompt: A <i>prompt</i>" in repr(found)
    page = found._repr_html_()
    assert "student &lt;b&gt;" in page
    assert "A &lt;i&gt;prompt&lt;/i&gt;" in page
    assert "<i>" not in page
    assert page.count("<tr>") == 2, "the names, and the texts beside each other"
