"""kd_kit/calibration.py: the expected calibration error by hand, and by a naive loop over a model's own logits."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import pages, pair, teacher, tiny_student

from kd_kit import build_data, score
from kd_kit.calibration import BINS, Calibration, in_bins, score_and_calibration
from kd_kit.types import IGNORE


@pytest.fixture(scope="module")
def windows():
    return build_data(pages(2), pair(), held_out=[pages()[3]], window=32).held_out


def test_bins_hold_their_upper_edge():
    sure = torch.tensor([1e-9, 1 / 15, 1 / 15 + 1e-6, 1.0, 1.0000001], dtype=torch.float64)
    sums = in_bins(sure, torch.tensor([0.0, 1, 1, 1, 1]))
    assert sums[0].tolist() == [2, 1, *[0] * 12, 2]
    assert sums[2].tolist() == [1, 1, *[0] * 12, 2]
    assert sums.dtype == torch.float64


def test_the_error_by_hand():
    nothing = [0] * (BINS - 2)
    found = Calibration((30, 10, *nothing), (0.05, 0.1, *nothing), (0.25, 0.0, *nothing))
    assert found.ece == pytest.approx(30 / 40 * 0.2 + 10 / 40 * 0.1)
    assert found.points == [[0.05, 0.25, 30], [0.1, 0.0, 10]]
    assert math.isnan(Calibration((0,) * BINS, (0.0,) * BINS, (0.0,) * BINS).ece)


def test_a_model_that_is_as_sure_as_it_is_right_has_no_error():
    sure = torch.full((1000,), 0.7)
    right = (torch.arange(1000) < 700).float()
    count, confidence, hits = in_bins(sure, right)
    means = [(sums / count.clamp(min=1)).tolist() for sums in (confidence, hits)]
    assert Calibration(tuple(map(int, count)), *map(tuple, means)).ece == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_it_is_that_of_a_naive_loop_in_the_models_own_tokens(windows, side):
    model = tiny_student().eval() if side == "student" else teacher()
    bins = [[0, 0.0, 0] for _ in range(15)]
    for index in range(len(windows)):
        batch = windows.collate([index])
        ids, targets = (
            (batch.student_ids, batch.targets) if side == "student" else (batch.teacher_ids, batch.teacher_targets)
        )
        with torch.no_grad():
            rows = model(input_ids=ids).logits[0].softmax(-1)
        for row, target in zip(rows, targets[0].tolist(), strict=True):
            if target != IGNORE:
                sure, choice = row.max(-1)
                place = bins[min(14, math.ceil(float(sure) * 15) - 1)]
                place[0] += 1
                place[1] += float(sure)
                place[2] += int(choice) == target
    total = sum(n for n, *_ in bins)
    expected = sum(abs(sure - hits) for _, sure, hits in bins) / total
    likelihood, found = score_and_calibration(model, windows, side=side, batch_size=3)
    assert found.positions == tuple(n for n, *_ in bins)
    assert found.ece == pytest.approx(expected, abs=1e-5)
    plain = score(model, windows, side=side)
    assert likelihood.nats == pytest.approx(plain.nats, rel=1e-6)
    assert (likelihood.bytes, likelihood.tokens) == (plain.bytes, plain.tokens)


def test_a_model_without_knowledge_that_is_sure_is_far_off(windows):
    student = tiny_student().eval()
    timid = score_and_calibration(student, windows)[1].ece
    with torch.no_grad():
        student.model.norm.weight.mul_(1000)
    bold = score_and_calibration(student, windows)[1]
    assert bold.ece > 0.9 > timid
