"""kd_kit/collate.py: a batch is what a loop over its windows and positions makes."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest
import torch
from helpers import pages, pair, toy_pair, toy_texts
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_batches import naive_collate, span

from kd_kit import build_data
from kd_kit.inside import InsideBridge
from kd_kit.packing import side_by_side
from kd_kit.types import DistillBatch
from kd_kit.vocab import Vocabulary


def assert_same_batch(one: DistillBatch, other: DistillBatch) -> None:
    for field in fields(DistillBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), field.name
        assert torch.equal(a, b), field.name


CODE = "def f(a):\n\n    if a:\n\t\treturn  [a,   0]\n" * 6


@pytest.mark.parametrize("stride", [3, 16])
@pytest.mark.parametrize("kind", ["embedded", "toy", "no start token"])
def test_a_batch_is_that_of_a_loop_over_windows_and_positions(kind, stride):
    if kind == "embedded":
        texts, tokenizers = [*pages(), CODE, "a", "\u00e9\u4e2d\U0001f600 x"], pair()
    else:
        texts, tokenizers = toy_texts(20, 80), toy_pair()
    if kind == "no start token":
        for vocab in (tokenizers.student_vocab, tokenizers.teacher_vocab):
            object.__setattr__(vocab, "start_id", None)
    data = build_data(texts, tokenizers, held_out=0.3, window=32, stride=stride)
    draw = np.random.default_rng(0)
    for windows in (data.train, data.held_out):
        for count in (1, 2, 5, 9):
            chosen = draw.choice(len(windows), min(count, len(windows)), replace=False).tolist()
            found = windows.collate(chosen)
            assert_same_batch(found.unpacked(), naive_collate(windows, chosen))
            lengths = [[len(ids) for ids in windows.ids(index)] for index in chosen]
            for packed, side in zip((found.student_packed, found.teacher_packed), np.array(lengths).T, strict=True):
                assert packed.tolist() == side_by_side(side).tolist()


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=4), min_size=1, max_size=20), st.integers(0, 19))
def test_spans_of_any_vocabulary(tokens, special):
    """Also with the same bytes twice, with 0xff and with ids that no token has."""
    tokens.append(b"a")
    marks = frozenset({special} if special < len(tokens) - 1 else ())
    vocab = Vocabulary("any", tuple(tokens), marks, None, None, 0)
    asked = [(t, d) for t in range(len(tokens)) for d in range(6) if t not in marks]
    found = InsideBridge(vocab, vocab).spans(*(np.array(side) for side in zip(*asked, strict=True)))
    assert found.tolist() == [list(span(vocab, token, depth)) for token, depth in asked]
