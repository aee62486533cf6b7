"""kd_kit/batching.py: every window once an epoch, whatever batches they come in."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import make_trainer, pages, pair, small_data, tiny_student

from kd_kit import build_data
from kd_kit.batching import Batching, shuffled_padding

WINDOW, SIZE = 32, 4


def drawn(count: int = 203, low: int = 3, high: int = WINDOW) -> np.ndarray:
    draw = np.random.default_rng(0)
    student = draw.integers(low, high + 1, count)
    return np.stack([student, np.maximum(student - draw.integers(0, 3, count), 2)], axis=-1)


def batching(lengths: np.ndarray, pack: bool | None = None, batch_size: int = SIZE) -> Batching:
    return Batching(lengths, window=WINDOW, batch_size=batch_size, pack=pack)


def test_the_expected_padding_is_what_shuffled_batches_have():
    lengths, draw = drawn(), np.random.default_rng(1)
    tokens = places = 0
    for _ in range(4000):
        chosen = lengths[draw.choice(len(lengths), SIZE)]
        tokens, places = tokens + chosen.sum(), places + (chosen.max(axis=0) * SIZE).sum()
    assert shuffled_padding(lengths, SIZE) == pytest.approx(1 - tokens / places, abs=0.005)
    assert shuffled_padding(np.full((9, 2), 30), SIZE) == pytest.approx(0)


@pytest.mark.parametrize("pack", [None, False])
def test_full_windows_come_in_the_batches_of_a_plain_permutation(pack):
    lengths = drawn(low=WINDOW - 1)
    found = batching(lengths, pack)
    assert found.arrangement == "shuffled"
    for epoch in (0, 1):
        order = np.random.Generator(np.random.PCG64([7, epoch])).permutation(len(lengths))
        for place in range(found.per_epoch):
            expected = order[place * SIZE : (place + 1) * SIZE]
            assert found.indices(7, epoch * found.per_epoch + place).tolist() == expected.tolist()


@pytest.mark.parametrize(("pack", "arrangement"), [(None, "rows"), (True, "rows"), (False, "lengths")])
def test_an_epoch_has_every_window_at_most_once_and_leaves_out_less_than_a_batch(pack, arrangement):
    lengths = drawn()
    found = batching(lengths, pack)
    assert found.arrangement == arrangement
    epochs = []
    for epoch in (0, 1):
        each = [found.indices(3, epoch * found.per_epoch + n).tolist() for n in range(found.per_epoch)]
        seen = [window for batch in each for window in batch]
        assert len(set(seen)) == len(seen)
        missing = sorted(set(range(len(lengths))) - set(seen))
        assert len(np.unique(found.row_of[missing])) < SIZE
        epochs.append(each)
    assert epochs[0] != epochs[1]
    again = batching(lengths, pack)
    assert again.indices(3, found.per_epoch + 1).tolist() == epochs[1][1]
    assert again.indices(4, 0).tolist() != epochs[0][0]


def test_rows_hold_no_more_than_a_window_on_either_side():
    lengths = drawn()
    found = batching(lengths)
    rows = [found.units.values[a:b] for a, b in zip(found.units.starts, found.units.starts[1:], strict=False)]
    assert sorted(np.concatenate(rows).tolist()) == list(range(len(lengths)))
    assert all((lengths[row].sum(axis=0) <= WINDOW).all() for row in rows)
    assert all((found.row_of[row] == number).all() for number, row in enumerate(rows))
    first = found.indices(0, 0)
    assert len(np.unique(found.row_of[first])) == SIZE
    assert len(first) > SIZE


@pytest.mark.parametrize("pack", [None, False])
def test_less_is_padded(pack):
    found = Batching(drawn(2000, high=80), window=128, batch_size=8, pack=pack)
    assert found.padding > 0.25
    assert found.measured_padding() < 0.1
    padded = found.measured_padding(packed=False)
    assert padded > 0.3 if pack is None else padded < 0.1, "windows of like length need no rows"


def test_batches_of_like_length_are_not_in_the_order_of_length():
    lengths = drawn(4000)
    found = batching(lengths, False)
    longest = [lengths[found.indices(0, n)].max() for n in range(found.per_epoch)]
    assert abs(np.corrcoef(longest[:-1], longest[1:])[0, 1]) < 0.2


def test_fewer_rows_than_a_batch_are_one_batch():
    for pack in (None, True, False):
        assert sorted(batching(drawn(5), pack, batch_size=16).indices(0, 3).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("pack", [None, False])
def test_a_batch_is_split_by_rows(pack):
    found = batching(drawn(), pack)
    windows = found.indices(0, 0).tolist()
    for at_once in (1, 2, 3, 4):
        parts = found.split(windows, at_once)
        assert [w for part in parts for w in part] == windows
        assert len(parts) == -(-SIZE // at_once)
        assert all(len(np.unique(found.row_of[part])) <= at_once for part in parts)


# --- in a run ---------------------------------------------------------------------------------------------------------


def short_data(**arguments):
    """Windows of between a dozen and 32 tokens."""
    texts = [page[start : start + 20 + 13 * n % 50] for n, page in enumerate(pages(8)) for start in range(0, 400, 60)]
    return build_data(texts, pair(), **({"held_out": 0.2, "window": 32, "batch_size": 2} | arguments))


def test_data_says_what_is_padded():
    said = repr(short_data())
    assert "2 rows of at most 32 tokens" in said
    assert "of all places in shuffled batches" in said
    assert "padding" not in repr(small_data())
    assert "with windows of like length together" in repr(short_data(pack=False))


def test_another_packing_is_another_order_and_says_so(tmp_path):
    one, other = short_data(), short_data(pack=False)
    assert one.fingerprint == other.fingerprint, "the same text"
    trainer = make_trainer(tmp_path, data=one, steps=2)
    trainer.fit()
    with pytest.raises(ValueError, match=r"the way in which windows share a batch, build_data\(pack=...\), changed"):
        make_trainer(tmp_path, data=other, steps=2)


def test_a_step_in_fewer_rows_at_once_is_the_same_step(tmp_path):
    """After memory ran out: the same windows in halves."""
    found = []
    for name, at_once in (("whole", 2), ("halves", 1)):
        trainer = make_trainer(tmp_path / name, data=short_data(), steps=2, eval_every=2)
        trainer.micro_batch = at_once
        trainer.fit()
        found.append([record["terms"] for record in trainer.history.records if record["kind"] == "train"])
    assert len(found[0]) == len(found[1]) > 0
    for one, other in zip(*found, strict=True):
        for term in one:
            assert one[term]["count"] == other[term]["count"]
            assert one[term]["value"] == pytest.approx(other[term]["value"], rel=1e-4)


def test_a_model_that_cannot_be_packed_says_so(tmp_path, capsys):
    data = short_data()
    make_trainer(tmp_path / "one", data=data)
    assert "runs every window padded" not in capsys.readouterr().out
    student = tiny_student()
    student.model.forward = without_positions(student.model.forward)
    make_trainer(tmp_path / "two", data=data, student=student)
    said = capsys.readouterr().out
    assert "the student runs every window padded in a row of its own, because it takes no positions (TypeError)" in said
    assert "build_data(pack=False)" in said


def without_positions(forward):
    def run(input_ids=None, position_ids=None, **others):
        if position_ids is not None:
            raise TypeError("got an unexpected keyword argument 'position_ids'")
        return forward(input_ids=input_ids, **others)

    return run


def test_evaluation_takes_as_many_short_windows_as_fit():
    data = short_data()
    batches = list(data.held_out.in_order(2))
    assert sorted(i for batch in batches for i in batch.sample.tolist()) == list(range(len(data.held_out)))
    assert len(batches[0].sample) > 2
    assert all(batch.student_ids.numel() <= 2 * 32 and batch.teacher_ids.numel() <= 2 * 32 for batch in batches)
    full = small_data()
    assert {len(batch.sample) for batch in list(full.train.in_order(2))[-3:]} == {2}


def test_lengths_are_those_of_the_windows():
    for data in (short_data(), small_data()):
        for windows in (data.train, data.held_out):
            lengths = [[len(ids) for ids in windows.ids(index)] for index in range(len(windows))]
            assert windows.lengths.tolist() == lengths
