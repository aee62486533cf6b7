"""kd_kit/students.py: students that begin with what another model knows, and what is said of their start."""

from __future__ import annotations

import re

import pytest
import torch
from helpers import make_trainer, pair, teacher

from kd_kit import build_data, build_student, build_tokenizers, dense_student, export, kd_term, lm_term, score
from kd_kit.offline import corpus
from kd_kit.students import START_WINDOWS
from kd_kit.taps import layers_of


@pytest.fixture(scope="module")
def data():
    """Text in the teacher's tokens on both sides."""
    both = build_tokenizers(pair().teacher, pair().teacher)
    return build_data(corpus("student")[:3], both, held_out=[corpus("held_out")[10][:3000]], window=128)


@pytest.fixture
def folder(tmp_path):
    teacher().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def figures(said: str) -> tuple[float, float, float]:
    """Bits per byte as it starts, whole, and from scratch."""
    found = re.search(r"([\d.]+) as it starts, ([\d.]+) whole, ([\d.]+) the same shape from scratch", said)
    return tuple(map(float, found.groups()))


def test_fewer_layers_of_a_folder_and_of_a_model_are_the_same_student(folder, data, capsys):
    one = build_student(folder, layers=3, data=data)
    said = capsys.readouterr().out
    other = build_student(teacher(), layers=3)
    assert not capsys.readouterr().out, "nothing can be said without text"
    assert said.startswith("student: 3 of 4 layers (1, 3-4), 1,855,552 parameters\nbits per byte on ")
    start, whole, scratch = figures(said)
    few = {"limit": START_WINDOWS}
    assert start == pytest.approx(score(one, data.held_out, **few).bits_per_byte, abs=1e-3)
    assert whole == pytest.approx(score(teacher(), data.held_out, **few).bits_per_byte, abs=1e-3)
    assert whole < start < 2.3 < 3.5 < scratch
    assert "no better" not in said
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    for student in (one, other):
        assert student.training
        assert all(p.requires_grad and p.dtype == torch.float32 for p in student.parameters())
    assert not any(p.requires_grad for p in teacher().parameters())
    assert len(layers_of(teacher())) == 4


def test_a_start_that_is_no_better_than_new_weights_is_said(data, capsys):
    model = build_student(teacher(), layers=(1, 2))
    with torch.no_grad():
        model.model.norm.weight.mul_(30)  # sure of nonsense
    build_student(model, layers=1, data=data)
    said = capsys.readouterr().out
    assert figures(said)[0] > figures(said)[2]
    assert "no better than from scratch" in said


def test_layers_from_scratch_and_of_the_embedded_student():
    assert build_student(layers=2).config.num_hidden_layers == 2
    assert build_student(layers=(1, 2, 3), from_scratch=True).config.num_hidden_layers == 3
    with pytest.raises(ValueError, match=r"^pruned: expected layers= from 1 to"):
        build_student(layers=99)
    with pytest.raises(ValueError, match=r"^build_student: expected a source with weights with data=, got new weights"):
        build_student(layers=2, data=object())


def test_the_other_layers_are_a_word_away():
    ends, spaced = (build_student(teacher(), layers=3, keep=keep) for keep in ("ends", "spaced"))
    assert torch.equal(ends.model.layers[1].self_attn.q_proj.weight, teacher().model.layers[2].self_attn.q_proj.weight)
    assert torch.equal(
        spaced.model.layers[1].self_attn.q_proj.weight, teacher().model.layers[1].self_attn.q_proj.weight
    )


def test_a_dense_student_of_the_mixture(data, capsys):
    student = dense_student(teacher(), data, layers=3, tokens=6000)
    said = capsys.readouterr().out
    assert said.startswith("student: 3 of 4 layers (1, 3-4), experts chosen into MLPs of 256 neurons, ")
    start, whole, scratch = figures(said)
    assert start == pytest.approx(score(student, data.held_out, limit=START_WINDOWS).bits_per_byte, abs=1e-3)
    assert whole < start < 2.3
    assert start < scratch - 1
    assert type(student).__name__ == "Qwen3ForCausalLM"


def test_a_dense_student_is_heard_on_the_teachers_side_of_the_text(data, capsys):
    """Whatever tokenizer the data's student has."""
    other = build_data(
        corpus("student")[:3],
        pair(),
        held_out=[corpus("held_out")[10][:3000]],
        window=128,
    )
    dense_student(teacher(), other, layers=3, tokens=6000)
    start, whole, _ = figures(capsys.readouterr().out)
    assert whole == pytest.approx(
        score(teacher(), other.held_out, side="teacher", limit=START_WINDOWS).bits_per_byte, abs=1e-3
    )
    assert whole < start < 2.3


def test_a_dense_student_trains_beside_its_teacher(tmp_path, data):
    student = dense_student(teacher(), data, layers=2, tokens=6000, width=64)
    trainer = make_trainer(tmp_path, student=student, data=data, terms=[lm_term(), kd_term(top_k=8)], steps=2)
    trainer.fit()
    assert trainer.step == 2
    export(student, tmp_path / "out", data.pair)
    again = build_student(tmp_path / "out")
    assert again.config.num_hidden_layers == 2


def test_what_makes_no_sense_is_refused(data):
    with pytest.raises(ValueError, match=r"layers= with data=, got data= alone"):
        build_student(data=data)
    with pytest.raises(ValueError, match=r"or with layers= the source of a shorter one"):
        build_student(teacher())
    with pytest.raises(ValueError, match=r"build it: kd.build_teacher\('me/moe'\)"):
        dense_student("me/moe", data)
    with pytest.raises(ValueError, match=r"one of the families .*, got qwen3"):
        dense_student(dense_student(teacher(), data, layers=1, tokens=6000), data)
