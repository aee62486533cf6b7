"""kd_kit/words.py: every word counts once, whatever windows cut through it."""

from __future__ import annotations

import numpy as np
import pytest
from helpers import ToyPair, pages, pair, toy_pair, toy_texts

from kd_kit import build_data
from kd_kit.words import byte_starts, count_words

TEXT = "Anne\u00a0hoped — she\u3000had 𝄞outlived\nthe  age ☕ of blushing; naïve"


@pytest.mark.parametrize("text", ["", " ", "a", " a b\n\nc ", TEXT, "\udc80 a\udcff b"])
def test_words_begin_where_a_loop_says(text):
    data = text.encode(errors="surrogateescape")
    expected = [
        len(text[:i].encode(errors="surrogateescape"))
        for i in range(len(text))
        if not text[i].isspace() and (i == 0 or text[i - 1].isspace())
    ]
    assert byte_starts(text).tolist() == expected
    assert len(expected) == len(text.split())
    assert all(start < len(data) for start in expected)


@pytest.mark.parametrize("stride", [3, 16, 32])
def test_all_windows_have_the_words_of_the_text(stride):
    texts = [TEXT * 3, pages()[3]]
    windows = build_data(pages(2), pair(), held_out=texts, window=32, stride=stride).held_out
    found = count_words(windows)
    assert found.words == sum(len(text.split()) for text in texts)
    assert found.bytes == sum(len(text.encode()) for text in texts)


def test_some_windows_have_theirs():
    windows = build_data(pages(2), pair(), held_out=[pages()[3]], window=32).held_out
    few, every = count_words(windows, 3), count_words(windows)
    assert 0 < few.words < every.words
    assert few.bytes == int((windows.table[:, 3] - windows.table[:, 2])[windows.chosen(3)].sum())
    parts = [count_words_of(windows, number) for number in windows.chosen(3)]
    assert few.words == sum(parts)


def count_words_of(windows, number: int) -> int:
    """Words that begin in the scored bytes of one window, from the text."""
    document, _, scored, end = windows.table[number].tolist()
    data = pair().student_vocab.bytes_of(windows.documents[document].student_ids)
    return sum(1 for i in range(scored, end) if not data[i : i + 1].isspace() and (i == 0 or data[i - 1 : i].isspace()))


def test_a_first_token_with_a_space_that_the_text_has_not_moves_nothing():
    toys = toy_pair()
    windows = build_data(toy_texts(), toys, held_out=toy_texts(2, size=800, seed=5), window=24).held_out
    assert isinstance(toys, ToyPair)
    limits = range(1, len(windows) + 1)
    before = [count_words(windows, limit) for limit in limits]
    document = windows.documents[0]
    space = toys.student_vocab.tokens.index(b" ")
    ids, ends = np.insert(document.student_ids, 0, space), np.insert(document.student_ends, 0, 0)
    changed = type(document)(ids, ends, document.teacher_ids, document.teacher_ends)
    windows.documents = [changed, *[windows.documents[n] for n in range(1, len(windows.documents))]]
    assert [count_words(windows, limit) for limit in limits] == before
