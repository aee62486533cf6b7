"""Modes of modules come back one by one."""

from __future__ import annotations

import pytest
from torch import nn

import kd_kit as kd
from kd_kit.likelihood import evaluating
from kd_kit.modes import modes_kept


def test_a_module_that_a_user_put_to_rest_stays_at_rest():
    student = kd.build_student()
    resting = student.model.layers[0].eval()
    with evaluating(student):
        assert not any(m.training for m in student.modules())
    assert student.training and not resting.training


def test_modes_come_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    with pytest.raises(RuntimeError), modes_kept(model):
        model.train()
        raise RuntimeError
    assert [m.training for m in model] == [True, False]
