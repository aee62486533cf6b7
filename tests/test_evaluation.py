"""kd_kit/evaluate.py: bits per byte by a naive loop, over the same bytes for everyone."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers import make_trainer, naive_nats, pages, pair, teacher, tiny_student

from kd_kit import agreement, build_data, evaluate, lm_term, score
from kd_kit.calibration import Calibration
from kd_kit.data import WindowSet
from kd_kit.evaluation import _row
from kd_kit.likelihood import Score
from kd_kit.losses import student_cells
from kd_kit.readings import Needs, SortedReading
from kd_kit.report import Report
from kd_kit.teacher import LiveTeacher
from kd_kit.types import IGNORE
from kd_kit.words import Words


def naive_score(model, windows, side: str) -> tuple[float, int, int]:
    """(nats, bytes, tokens), one window and one position at a time."""
    vocab = pair().student_vocab if side == "student" else pair().teacher_vocab
    nats, size, tokens = 0.0, 0, 0
    for index in range(len(windows)):
        batch = windows.collate([index])
        ids, targets = (
            (batch.student_ids[0], batch.targets[0])
            if side == "student"
            else (batch.teacher_ids[0], batch.teacher_targets[0])
        )
        nats += naive_nats(model, ids, targets)
        for target in targets[targets != IGNORE].tolist():
            size += len(vocab.tokens[target])
            tokens += 1
    return nats, size, tokens


@pytest.fixture(scope="module")
def windows():
    texts = ["Anne hoped she had outlived the age of blushing; Captain Wentworth had not. ☕ " * 2, pages()[3][:150]]
    return build_data(pages(2), pair(), held_out=texts, window=32).held_out


def test_the_score_is_that_of_a_naive_loop_over_the_same_bytes(windows):
    student = tiny_student().eval()
    for model, side in ((student, "student"), (teacher(), "teacher")):
        nats, size, tokens = naive_score(model, windows, side)
        for batch_size in (1, 3, 8):
            found = score(model, windows, side=side, batch_size=batch_size)
            assert found.nats == pytest.approx(nats, rel=1e-5)
            assert (found.bytes, found.tokens) == (size, tokens)
        assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(nats / tokens), rel=1e-4)
        assert size == windows.scored_bytes


def test_a_stride_gives_context_and_charges_nothing_twice():
    texts = [pages()[3]]
    found = {}
    for stride in (4, 16, 32):
        held_out = build_data(pages(2), pair(), held_out=texts, window=32, stride=stride).held_out
        found[stride] = score(teacher(), held_out, side="teacher")
        assert found[stride].bytes == len(texts[0].encode())
    assert found[4].nats < found[32].nats, "more context, better guesses"
    assert found[16].nats < found[32].nats
    assert found[4].tokens == found[16].tokens == found[32].tokens


def test_nothing_is_capped(windows):
    """An earlier run reported a perplexity of exp(20), whatever the loss was."""
    bad = tiny_student().eval()
    with torch.no_grad():
        bad.model.norm.weight.mul_(40)
    nats, size, _ = naive_score(bad, windows, "student")
    found = score(bad, windows)
    assert found.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert found.bits_per_byte > 20
    assert found.perplexity > math.exp(20)
    with torch.no_grad():
        bad.model.norm.weight.mul_(1000)
    assert score(bad, windows).perplexity == math.inf
    assert math.isfinite(score(bad, windows).bits_per_byte)


def test_a_score_restores_the_mode_and_draws_nothing(windows):
    student = tiny_student(attention_dropout=0.5)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    for mode in (True, False):
        student.train(mode)
        first = score(student, windows)
        assert student.training is mode
        assert score(student, windows) == first, "dropout is off"
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in student.parameters())


def test_a_limit_takes_part_of_the_windows(windows):
    part = score(tiny_student(), windows, limit=2)
    whole = score(tiny_student(), windows)
    assert 0 < part.bytes < whole.bytes
    assert "bits per byte over" in repr(whole)


def test_there_are_two_sides(windows):
    with pytest.raises(ValueError, match=r"^score: expected side='student' or 'teacher', got 'both'"):
        score(tiny_student(), windows, side="both")


def test_bits_per_byte_and_perplexity_by_hand():
    found = Score(nats=8 * math.log(2), bytes=4, tokens=2)
    assert found.bits_per_byte == pytest.approx(2)
    assert found.perplexity == pytest.approx(16)


# --- agreement -------------------------------------------------------------------------------------------------------


def test_agreement_is_that_of_a_naive_loop(windows):
    student, k = tiny_student().eval(), 64
    live = LiveTeacher(teacher(), pair().bridge)  # whatever it is asked in training
    top1 = top5 = kl = count = 0.0
    for index in range(len(windows)):
        batch = windows.collate([index])
        with torch.no_grad():
            ours = student(input_ids=batch.student_ids).logits[0]
            theirs = torch.softmax(teacher()(input_ids=batch.teacher_ids).logits[0, :, : pair().teacher_vocab.size], -1)
        for position in batch.aligned_rows.tolist():
            bridged = pair().bridge.project(theirs[batch.teacher_index[0, position]].unsqueeze(0))[0]
            kept, ids = bridged[:-1].topk(k)
            log_q, _ = student_cells(ours[position : position + 1], ids.unsqueeze(0))
            p = torch.cat([kept, (1 - kept.sum()).clamp(min=1e-7).unsqueeze(0)])
            used = p > 0
            kl += float((p[used] * (p[used].log() - log_q[0][used])).sum())
            top1 += float(ours[position].argmax() == ids[0])
            top5 += len(set(ours[position].topk(5).indices.tolist()) & set(ids[:5].tolist())) / 5
            count += 1
    found = agreement({"it": student}, live, windows, batch_size=3)["it"]
    assert found.positions == count
    assert found.top1 == pytest.approx(top1 / count, abs=1e-6)
    assert found.top5 == pytest.approx(top5 / count, abs=1e-6)
    assert found.kl == pytest.approx(kl / count, rel=1e-4)


def test_agreement_does_not_depend_on_what_the_terms_ask(windows):
    student = tiny_student().eval()
    teachers = [
        LiveTeacher(teacher(), pair().bridge, needs)
        for needs in (None, Needs(row_states=True), Needs((SortedReading(100, 3),)))
    ]
    found = [agreement({"it": student}, live, windows, limit=3)["it"] for live in teachers]
    assert found[0] == found[1] == found[2]
    assert [live.needs.row_states for live in teachers] == [False, True, False], "they are asked as before"


def test_a_model_agrees_with_itself():
    same = build_tokenizers_twice()
    data = build_data(pages(3), same, held_out=[pages()[4]], window=32)
    model = teacher()
    found = agreement({"it": model}, LiveTeacher(model, same.bridge), data.held_out)["it"]
    assert found.top1 == 1
    assert found.top5 == 1
    assert abs(found.kl) < 1e-4


def build_tokenizers_twice():
    from kd_kit import build_tokenizers

    return build_tokenizers(pair().teacher, pair().teacher)


# --- report ----------------------------------------------------------------------------------------------------------


def text_of(held_out: WindowSet, number: int) -> str:
    return pair().student_vocab.bytes_of(held_out.documents[number].student_ids).decode()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    trainer = make_trainer(tmp_path_factory.mktemp("evaluate") / "run", steps=20, eval_every=20)
    trainer.fit()
    return trainer, evaluate(trainer, control=True)


def test_the_report_measures_everyone_on_the_same_text(run):
    trainer, report = run
    assert list(report.rows) == ["before", "LM-only control", "distilled", "teacher"]
    held_out = trainer.data.held_out
    assert report.bytes == held_out.scored_bytes
    assert report.words == sum(len(text_of(held_out, n).split()) for n in range(len(held_out.documents)))
    assert "CPU thread" in report.machine
    assert report.step == 20
    for name, model, side in (
        ("before", tiny_student(), "student"),
        ("LM-only control", trainer.train_control(), "student"),
        ("distilled", trainer.student, "student"),
        ("teacher", teacher(), "teacher"),
    ):
        expected = score(model, held_out, side=side)
        assert report.rows[name]["bits_per_byte"] == pytest.approx(expected.bits_per_byte, rel=1e-6), name
        assert report.rows[name]["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5), name
        assert report.rows[name]["parameters"] == sum(p.numel() for p in model.parameters())
        assert report.rows[name]["megabytes"] == pytest.approx(4 * report.rows[name]["parameters"] / 1e6), "float32"
        assert report.rows[name]["tokens_per_second"] > 0
        per_word = expected.nats / report.words
        assert report.rows[name]["perplexity_per_word"] == pytest.approx(math.exp(per_word), rel=1e-4), name
        assert 0 < report.rows[name]["ece"] < 1
        assert sum(n for *_, n in report.reliability[name]) == expected.tokens
    assert report.rows["teacher"]["kl"] is None
    assert report.rows["distilled"]["kl"] == pytest.approx(
        agreement({"it": trainer.student}, trainer.teacher, held_out)["it"].kl
    )
    assert report.rows["distilled"]["kl"] < report.rows["before"]["kl"]
    before, control, now, best = (r["bits_per_byte"] for r in report.rows.values())
    assert report.gain == pytest.approx(control - now)
    assert report.retention == pytest.approx((before - now) / (before - best))


def test_the_report_prints_as_text_and_html_and_comes_back_from_json(run):
    trainer, report = run
    said = repr(report)
    for part in ("bits per byte", "before", "LM-only control", "distilled", "teacher", "-", "After 20 steps"):
        assert part in said
    page = report._repr_html_()
    assert page.count("<table") == page.count("</table>") == 1
    for name in report.rows:
        assert name in page
    stored = json.loads((trainer.session.folder / "report.json").read_text())
    assert stored == json.loads(report.to_json())
    assert Report.from_json(report.to_json()) == report
    assert stored["gain"] == report.gain
    assert stored["retention"] == report.retention


def row(bits: float) -> dict:
    return {"bits_per_byte": bits, "perplexity": 2.0, "top1": None, "top5": None, "kl": None, "parameters": 1.0}


def test_the_report_says_when_there_is_nothing_to_learn_or_the_control_wins():
    rows = {"before": row(2.0), "LM-only control": row(1.7), "distilled": row(1.8), "teacher": row(2.1)}
    losing = Report(rows, 10, 5, 5)
    said = " ".join(losing.sentences())
    assert "0.100 bits per byte above" in said
    assert "nothing to teach" in said
    winning = Report(rows | {"LM-only control": row(1.9), "teacher": row(1.6)}, 10, 5, 5)
    assert "0.100 bits per byte below" in " ".join(winning.sentences())
    assert "closed 50%" in winning.sentences()[0]
    assert "nothing to teach" not in " ".join(winning.sentences())
    alone = Report({"before": row(2.0), "distilled": row(1.8), "teacher": row(2.0)}, 10, 5)
    assert alone.gain is None
    assert math.isnan(alone.retention)
    assert repr(alone)


def test_perplexity_per_word_is_of_the_bytes_that_were_scored():
    """Where no document-start token is, the first token of a text is read and not scored; its words are all there."""
    sure = Calibration((1,), (0.5,), (0.5,))
    found = _row(Score(nats=10.0, bytes=50, tokens=5), Words(words=10, bytes=100), sure, 7.0, tiny_student(), None)
    assert found["perplexity_per_word"] == pytest.approx(math.exp(10 / 50 * 100 / 10))
    assert found["perplexity"] == pytest.approx(math.exp(2))
    assert (found["ece"], found["tokens_per_second"], found["kl"]) == (0, 7.0, None)


def test_without_a_teacher_there_is_nothing_to_compare_with(tmp_path):
    trainer = make_trainer(tmp_path / "run", terms=[lm_term()], model=None, steps=1)
    with pytest.raises(ValueError, match=r"^evaluate: expected a trainer with a teacher, got one without"):
        evaluate(trainer)


def test_a_new_session_evaluates_the_run_and_not_a_new_student(run):
    """The cell with fit() need not run again for the report of a finished run."""
    trainer, report = run
    again = make_trainer(trainer.session.folder, steps=20, eval_every=20, student=tiny_student(5))
    found = evaluate(again, control=True)
    assert found.step == 20
    for name, row in report.rows.items():
        assert found.rows[name] | {"tokens_per_second": None} == row | {"tokens_per_second": None}


def test_the_report_says_when_the_control_had_other_tokens(tmp_path):
    """A run that was stopped early beside a control that was not: the figure is no fair comparison."""
    trainer = make_trainer(tmp_path / "run", steps=8)
    trainer.fit(steps=3)
    report = evaluate(trainer, control=True, limit=2)
    assert (report.step, report.control_step) == (3, 8)
    assert "for 8 steps: these are not the same tokens" in " ".join(report.sentences())
    trainer.fit()
    report = evaluate(trainer, control=True, limit=2)
    assert (report.step, report.control_step) == (8, 8)
    assert " ".join(report.sentences()).endswith("without a teacher on the same tokens.")
    assert evaluate(trainer, limit=2).control_step is None


def test_windows_are_a_data_set(windows):
    assert isinstance(windows, WindowSet)
    assert windows[3] == 3
