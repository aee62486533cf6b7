"""The words of the kit: frozen objects that move together and average once."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import numpy as np
import pytest
import torch
from conftest import collate_by_hand, random_items
from torch import Tensor

from kd_kit.types import Alignment, Cells, LossValue, TeacherSignal


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


def whole_signal() -> TeacherSignal:
    """A signal with every field filled."""
    cells = {"a": Cells(torch.zeros(3, 2, dtype=torch.long), torch.zeros(3, 2), torch.zeros(3))}
    cells["ranks"] = Cells(None, torch.ones(3, 2), torch.ones(3))
    states = {2: torch.full((4, 5), 2.0), 7: torch.full((4, 5), 7.0)}
    attention = {1: {"q": torch.zeros(1, 3, 4), "k": torch.ones(1, 3, 2)}}
    return TeacherSignal(cells, torch.zeros(3, 5), torch.zeros(1, 4), states, {2: torch.zeros(4, 6)}, attention)


def tensors_of(value) -> list[Tensor]:
    """Every tensor in an object of the kit, found without its help."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for v in value.values() for t in tensors_of(v)]
    return [t for f in fields(value) for t in tensors_of(getattr(value, f.name))] if is_dataclass(value) else []


def test_a_signal_moves_whole():
    signal = whole_signal()
    moved = signal.to("meta")
    assert len(tensors_of(moved)) == len(tensors_of(signal)) == 12
    assert all(t.device.type == "meta" for t in tensors_of(moved))
    assert all(t.device.type == "cpu" for t in tensors_of(signal)), "it is another object"
    assert type(moved.cells["a"]) is Cells
    assert moved.cells["ranks"].ids is None
    assert [list(kept) for kept in (moved.cells, moved.states, moved.attention[1])] == [
        ["a", "ranks"],
        [2, 7],
        ["q", "k"],
    ]


def test_a_function_is_mapped_over_every_tensor_and_nothing_else():
    signal = whole_signal()
    more = signal.mapped(lambda tensor: tensor + 1)
    for one, other in zip(tensors_of(signal), tensors_of(more), strict=True):
        assert torch.equal(one + 1, other)
    assert (more.states[7] == 8).all()
    nothing = TeacherSignal()
    assert nothing.mapped(lambda tensor: tensor + 1) == nothing
    assert nothing.cells == {}
    assert nothing.row_states is nothing.span_log_probs is None


def test_every_span_row_knows_its_window_and_its_number():
    batch = collate_by_hand(random_items(0, 3))
    mask = batch.span_mask.clone()
    mask[1, 0] = mask[2, 1] = False  # spans that are context only
    batch = replace(batch, span_mask=mask)
    window, span = batch.spans_of()
    expected = [(b, c) for b in range(3) for c in range(mask.shape[1]) if mask[b, c]]
    assert list(zip(window.tolist(), span.tolist(), strict=True)) == expected
    assert {1, 2} <= set(window.tolist())


def test_what_crosses_a_border_is_frozen():
    with pytest.raises(FrozenInstanceError):
        LossValue(torch.tensor(1.0), torch.tensor(1.0)).sum = torch.tensor(2.0)


def test_mean_of_nothing_is_zero():
    assert LossValue(torch.tensor(6.0), torch.tensor(4.0)).mean == 1.5
    assert LossValue(torch.tensor(0.0), torch.tensor(0.0)).mean == 0
