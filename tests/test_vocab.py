"""The bridge between two vocabularies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from made_tokenizers import (
    BUILDERS,
    read,
)

from kd_kit.vocab import Bridge, Vocabulary, build_bridge, special_map


@pytest.fixture(scope="module")
def readers():
    return read()


def words(*tokens: str | bytes, special=(), start=None, end=None, unused=()) -> Vocabulary:
    spelled = tuple(t.encode() if isinstance(t, str) else t for t in tokens)
    return Vocabulary("words", spelled, frozenset(special), start, end, 0, (), frozenset(unused))


def naive_table(teacher: Vocabulary, student: Vocabulary, specials: dict[int, int]) -> list[int]:
    """Every student token held against every teacher token; the longest that is a prefix wins."""
    out = []
    for t, spelled in enumerate(teacher.tokens):
        if t in teacher.special:
            out.append(specials.get(t, student.size))
            continue
        homes = [
            (len(s), -i)
            for i, s in enumerate(student.tokens)
            if s and i not in student.special and i not in student.unused and spelled.startswith(s)
        ]
        out.append(-max(homes)[1] if homes else student.size)
    return out


def test_the_longest_prefix_wins():
    student = words("t", "th", "the", "e", " ", " a", "<end>", special=[6], end=6)
    teacher = words("the", "there", "tha", "thx", "x", " and", "e", "<stop>", b"", special=[7], end=7)
    bridge = build_bridge(teacher, student)
    assert bridge.table.tolist() == [2, 2, 1, 1, 7, 5, 3, 6, 7]
    assert bridge.shared == 2
    assert (bridge.teacher_size, bridge.student_size) == (9, 7)
    assert "2 byte-identical, 2 without a home" in repr(bridge)


def test_text_never_goes_to_a_special_token_nor_to_an_unused_one():
    student = words("<s>", "a", "a", "b", special=[0], end=0, unused=[1])
    teacher = words("<s>", "<s>x", "a", "ab", "b")
    assert build_bridge(teacher, student).table.tolist() == [4, 4, 2, 2, 3]


tokens = st.lists(
    st.binary(min_size=0, max_size=4).map(lambda b: bytes(c % 3 + 97 for c in b)), min_size=1, max_size=25
)


@settings(max_examples=200)
@given(tokens, tokens, st.data())
def test_the_table_is_the_naive_one(teacher_tokens, student_tokens, data):
    ids = [st.sets(st.integers(0, len(side) - 1), max_size=3) for side in (teacher_tokens, student_tokens)]
    teacher = words(*teacher_tokens, special=data.draw(ids[0]))
    student = words(*student_tokens, special=data.draw(ids[1]))
    explicit = {t: data.draw(st.integers(0, student.size - 1)) for t in teacher.special if data.draw(st.booleans())}
    bridge = build_bridge(teacher, student, explicit)
    assert bridge.table.tolist() == naive_table(teacher, student, explicit)


def test_the_table_between_real_kinds_is_the_naive_one(readers):
    names = list(readers)
    for a, b in zip(names, names[1:] + names[:1], strict=True):
        teacher, student = readers[a][1], readers[b][1]
        if (teacher.tokens, teacher.special) != (student.tokens, student.special):
            bridge = build_bridge(teacher, student)
            assert bridge.table.tolist() == naive_table(teacher, student, special_map(teacher, student))


def test_letters_go_to_the_tokens_that_text_uses(readers):
    teacher = readers["byte level"][1]
    for kind in ("bpe, normalizer", "bpe, replace", "gemma"):
        tokenizer, student = readers[kind]
        bridge = build_bridge(teacher, student)
        letter = teacher.tokens.index(b"a")
        assert tokenizer.convert_ids_to_tokens(int(bridge.table[letter])) == "a"


def test_specials_are_mapped_by_meaning():
    student = words("a", "<end>", special=[1], end=1, start=1)
    teacher = words("a", "<stop>", "<begin>", "<tool>", special=[1, 2, 3], end=1, start=2)
    assert special_map(teacher, student) == {1: 1, 2: 1}
    assert build_bridge(teacher, student).table.tolist() == [0, 1, 1, 2]
    assert build_bridge(teacher, student, {3: 1}).table.tolist() == [0, 2, 2, 1], "an explicit map is the whole map"
    assert special_map(teacher, words("a")) == {}
    # an end token that is not marked special is text
    assert special_map(words("a", "<stop>", end=1), student) == {}


@pytest.mark.parametrize("kind", BUILDERS)
def test_identical_tokenizers_give_the_identity(readers, kind):
    vocabulary = readers[kind][1]
    bridge = build_bridge(vocabulary, vocabulary)
    assert torch.equal(bridge.table, torch.arange(vocabulary.size))
    assert bridge.shared == vocabulary.size
    probs = torch.rand(3, vocabulary.size).softmax(-1)
    assert torch.equal(bridge.project(probs), torch.cat([probs, torch.zeros(3, 1)], dim=-1))


def test_the_identity_leaves_ids_without_a_token_out():
    vocabulary = words("a", b"", "b")
    assert build_bridge(vocabulary, vocabulary).table.tolist() == [0, 3, 2]


@settings(max_examples=100)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=30), st.integers(0, 5), st.integers(0, 1000))
def test_project_is_the_naive_sum_and_keeps_all_mass(table, rows, seed):
    bridge = Bridge(torch.tensor(table), 6, 0)
    probs = torch.rand(rows, len(table), generator=torch.Generator().manual_seed(seed)).softmax(-1)
    ours = bridge.project(probs)
    assert ours.shape == (rows, 7)
    assert ours.dtype == torch.float32
    expected = [[0.0] * 7 for _ in range(rows)]
    for n in range(rows):
        for t, v in enumerate(table):
            expected[n][v] += float(probs[n, t])
    torch.testing.assert_close(ours, torch.tensor(expected).reshape(rows, 7))
    torch.testing.assert_close(ours.sum(-1), torch.ones(rows))


def test_project_sums_half_precision_in_float32():
    # a thousand equal shares of one cell: in float16 the sum would stop growing
    bridge = Bridge(torch.zeros(4096, dtype=torch.long), 2, 0)
    probs = torch.full((1, 4096), 1 / 4096, dtype=torch.float16)
    assert bridge.project(probs).tolist() == [[1.0, 0.0, 0.0]]


def test_padded_rows_are_an_error():
    with pytest.raises(ValueError, match=r"Bridge.project: .*over 3 teacher tokens, got 5; cut the padded rows"):
        Bridge(torch.tensor([0, 1, 2]), 2, 0).project(torch.zeros(1, 5))
