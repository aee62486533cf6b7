"""kd_kit/exporting.py and model_card.py: a student to give away, and the card that goes with it."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_same_tensors, make_trainer, pair, small_data, tiny_student
from PIL import Image

from kd_kit import evaluate, export, lm_term
from kd_kit.model_card import model_card

NAMES = {"teacher": "them/Teacher", "student": "them/Student", "text": "three novels"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("export") / "run", steps=4)
    trainer.fit()
    return trainer


def loaded(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_model_alone_is_written_without_a_card(tmp_path):
    student = tiny_student()
    assert export(student, tmp_path / "bare") == tmp_path / "bare"
    assert not (tmp_path / "bare" / "tokenizer_config.json").exists()
    folder = export(student, tmp_path / "student", pair())
    assert not (folder / "README.md").exists()
    model, tokenizer = loaded(folder)
    assert_same_tensors(dict(model.named_parameters()), dict(student.named_parameters()))
    assert tokenizer("Anne had been")["input_ids"] == pair().student("Anne had been")["input_ids"]
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in folder.glob("*.safetensors"))
    export(student, folder, card="# mine")
    assert (folder / "README.md").read_text() == "# mine"


def test_a_trainer_is_written_with_its_tokenizer_and_its_card(run, tmp_path):
    folder = export(run, tmp_path / "student")
    model, tokenizer = loaded(folder)
    assert torch.equal(model.get_input_embeddings().weight, run.student.get_input_embeddings().weight)
    assert tokenizer("Anne")["input_ids"] == pair().student("Anne")["input_ids"]
    card = (folder / "README.md").read_text()
    for part in (
        "distilled from the embedded teacher of kd_kit",
        "## Data",
        f"Trained on {len(run.data.train.documents)} documents, ",
        "Held out, and never trained on: 2 documents",
        "- Steps: 4 of 4, ",
        "AdamW, weight decay 0.1, gradients clipped at 1",
        "precision 'no'; seed 0",
        "lm 10%, kd 90%",
        "  - `kd`: ",
        "- Versions: Python 3.",
        f"torch {torch.__version__.split('+')[0]}",
        "kd_kit ",
        f"bits per byte {run.best:.4f} at step {run.best_step}",
        "## Limits",
    ):
        assert part in card, part
    assert str(run.session.folder) not in card, "a path of this machine is nobody's business"
    assert not (folder / "evaluation.png").exists()


def test_the_report_of_the_run_is_taken_if_it_is_about_this_step(run, tmp_path):
    report = evaluate(run)
    card = (export(run, tmp_path / "student", names=NAMES) / "README.md").read_text()
    for name, row in report.rows.items():
        assert f"| {name} | {row['bits_per_byte']:.4f} |" in card
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "base_model: them/Student" in card
    assert "learnt from three novels" in card
    assert "](evaluation.png)" in card
    with Image.open(tmp_path / "student" / "evaluation.png") as image:
        assert image.size == (1000, 300)
    other = report.to_json().replace('"step": 4', '"step": 3')
    (run.session.folder / "report.json").write_text(other)
    assert "](evaluation.png)" not in (export(run, tmp_path / "later") / "README.md").read_text()
    few = evaluate(run, limit=2)
    card = (export(run, tmp_path / "few", report=few) / "README.md").read_text()
    assert f"Held-out text of {few.bytes:,} bytes" in card


def test_a_new_session_exports_the_run_and_not_a_new_student(run, tmp_path):
    again = make_trainer(run.session.folder, steps=4, student=tiny_student(5))
    model, _ = loaded(export(again, tmp_path / "student"))
    assert_same_tensors(dict(model.named_parameters()), dict(run.student.named_parameters()))


def test_what_cannot_go_into_a_card_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"^export: expected a trainer beside report= or names=, got Llama"):
        export(tiny_student(), tmp_path / "student", names=NAMES)
    with pytest.raises(ValueError, match=r"^export: expected names of teacher, student and text, got licence"):
        export(run, tmp_path / "student", names={"licence": "mine"})
    assert not (tmp_path / "student").exists()


def test_a_card_without_an_evaluation_or_a_teacher_says_so(tmp_path):
    card = model_card(make_trainer(tmp_path / "run"), **NAMES | {"student": "embedded-student"})
    assert "Not evaluated." in card
    assert "base_model" not in card
    alone = make_trainer(tmp_path / "alone", terms=[lm_term()], model=None, data=small_data())
    card = (export(alone, tmp_path / "student", names=NAMES) / "README.md").read_text()
    assert "without a teacher" in card
    assert "them/Teacher" not in card
