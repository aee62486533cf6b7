"""The words of the kit: frozen objects that move together and average once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import torch
from conftest import collate_by_hand, random_items
from torch import Tensor

from kd_kit.types import Alignment, LossValue, TeacherSignal


def test_spans_of_an_alignment():
    nothing = np.zeros(0, dtype=np.int64)
    assert Alignment(nothing, nothing.astype(bool), nothing, nothing).spans == 0
    assert Alignment(nothing, nothing.astype(bool), np.array([0, 2, 3]), np.array([0, 1, 2])).spans == 2


def test_a_batch_moves_whole_and_keeps_its_values():
    batch = collate_by_hand(random_items(0, 2))
    moved = batch.to("meta")
    assert type(moved) is type(batch)
    assert all(getattr(moved, f.name).device.type == "meta" for f in fields(batch))
    again = batch.to("cpu", non_blocking=True)
    assert all(torch.equal(getattr(again, f.name), getattr(batch, f.name)) for f in fields(batch))
    assert "2 windows" in repr(batch)
    assert f"{len(batch.aligned_rows)} aligned" in repr(batch)


def test_a_signal_moves_whole():
    signal = TeacherSignal(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2), torch.zeros(3))
    moved = signal.to("meta")
    assert all(isinstance(getattr(moved, f.name), Tensor) for f in fields(signal))
    assert all(getattr(moved, f.name).device.type == "meta" for f in fields(signal))


def test_what_crosses_a_border_is_frozen():
    with pytest.raises(FrozenInstanceError):
        LossValue(torch.tensor(1.0), torch.tensor(1.0)).sum = torch.tensor(2.0)


def test_mean_of_nothing_is_zero():
    assert LossValue(torch.tensor(6.0), torch.tensor(4.0)).mean == 1.5
    assert LossValue(torch.tensor(0.0), torch.tensor(0.0)).mean == 0
