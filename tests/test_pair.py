"""Two tokenizers side by side: the embedded pair, and pairs with something unusual about them."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kd_kit import offline
from kd_kit.align import align, byte_ends
from kd_kit.pair import pair_tokenizers


def test_facts_of_the_embedded_pair(embedded_pair):
    teacher, student, bridge = embedded_pair.teacher_vocab, embedded_pair.student_vocab, embedded_pair.bridge
    assert (teacher.size, student.size) == (4067, 2048)
    assert (bridge.teacher_size, bridge.student_size) == (4067, 2048)
    assert teacher.tokens[4064:] == (b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>")
    assert teacher.special == {4064, 4065, 4066}
    assert (teacher.start_id, teacher.end_id, teacher.pad_id) == (4064, 4064, 4064)
    assert teacher.forms == ("NFC",)
    assert student.special == set(range(17))
    assert (student.start_id, student.end_id, student.pad_id) == (0, 0, 0)
    assert bridge.table[4064] == 0, "end of document means end of document"
    assert bridge.table[4065] == bridge.table[4066] == 2048
    shared = set(teacher.tokens[:4064]) & set(student.tokens[17:])
    assert bridge.shared == len(shared)
    assert "2,048 tokens, 17 special" in repr(embedded_pair)


def test_the_embedded_pair_meets_on_most_of_the_text(embedded_pair):
    chapter = offline.corpus("held_out")[0]
    s, s_len, t, t_len = embedded_pair.encode([chapter])[0]
    assert s_len.sum() == t_len.sum() == len(chapter.encode())
    assert embedded_pair.student_vocab.bytes_of(s) == embedded_pair.teacher_vocab.bytes_of(t) == chapter.encode()
    assert align(byte_ends(s_len), byte_ends(t_len)).aligned.mean() > 0.75


def test_the_bridge_names_the_next_student_token(embedded_pair):
    chapter = offline.corpus("held_out")[1]
    s, s_len, t, t_len = embedded_pair.encode([chapter])[0]
    matched = align(byte_ends(s_len), byte_ends(t_len))
    here = matched.student_boundaries[:-1]
    there = matched.teacher_boundaries[:-1]
    agrees = embedded_pair.bridge.table.numpy()[t[there + 1]] == s[here + 1]
    assert agrees.mean() > 0.9


@settings(max_examples=100)
@given(st.text(max_size=60))
def test_both_sides_spell_the_text_or_it_is_refused(embedded_pair, text):
    text = embedded_pair.normalise(text)
    for both in embedded_pair.encode([text]):
        if both is None:  # SmolLM2 has no token for some control characters
            assert not text.isprintable()
            continue
        s, s_len, t, t_len = both
        assert s_len.sum() == t_len.sum() == len(text.encode())
        assert len(s) == len(s_len)
        assert len(t) == len(t_len)


def test_a_special_string_in_a_text_is_text(embedded_pair):
    text = "He wrote <|endoftext|> and <|im_start|>user on the wall."
    s, s_len, t, t_len = embedded_pair.encode([text])[0]
    assert not set(s.tolist()) & embedded_pair.student_vocab.special
    assert not set(t.tolist()) & embedded_pair.teacher_vocab.special
    assert s_len.sum() == t_len.sum() == len(text)


def test_texts_are_encoded_each_for_itself(embedded_pair):
    texts = ["", "one", "two words", "one"]
    together = embedded_pair.encode(texts)
    for both, text in zip(together, texts, strict=True):
        for a, b in zip(both, embedded_pair.encode([text])[0], strict=True):
            assert a.dtype == np.int64
            assert (a == b).all()
    assert len(together[0][0]) == 0


def test_a_text_that_one_side_changes_is_none(embedded_pair):
    decomposed = "cafe\u0301"
    assert embedded_pair.encode([decomposed, "cafe"])[0] is None, "the teacher reads another text"
    assert embedded_pair.encode([decomposed, "cafe"])[1] is not None
    assert embedded_pair.encode([embedded_pair.normalise(decomposed)])[0] is not None


def test_the_fingerprint_knows_the_pair(embedded_pair):
    teacher, student = embedded_pair.teacher, embedded_pair.student
    again = pair_tokenizers(teacher, student, teacher_name="x", student_name="y")
    assert again.fingerprint == embedded_pair.fingerprint, "names do not matter"
    swapped = pair_tokenizers(student, teacher, teacher_name="x", student_name="y")
    same = pair_tokenizers(student, student, teacher_name="x", student_name="y")
    assert len({embedded_pair.fingerprint, swapped.fingerprint, same.fingerprint}) == 3


def test_a_tokenizer_paired_with_itself(embedded_pair):
    student = embedded_pair.student
    same = pair_tokenizers(student, student, teacher_name="x", student_name="y")
    real = same.student_vocab.lengths > 0
    assert (same.bridge.table.numpy()[real] == np.arange(same.student_vocab.size)[real]).all()
    s, s_len, t, t_len = same.encode(["the same on both sides"])[0]
    assert (s == t).all()
    assert align(byte_ends(s_len), byte_ends(t_len)).aligned.all()


def test_an_unreadable_tokenizer_is_named(embedded_pair):
    with pytest.raises(ValueError, match="'mine'"):
        pair_tokenizers(embedded_pair.teacher, object(), teacher_name="theirs", student_name="mine")


def test_python_tokenizers_pair_like_others(embedded_pair):
    from transformers import ByT5Tokenizer

    single = ByT5Tokenizer()
    pair = pair_tokenizers(embedded_pair.teacher, single, teacher_name="x", student_name="bytes")
    text = "One café, <|endoftext|></s><pad> and <extra_id_0>."
    s, s_len, t, t_len = pair.encode([text])[0]
    assert (s - 3).tolist() == list(text.encode())
    assert (s_len == 1).all()
    assert t_len.sum() == len(text.encode())
    assert not set(t.tolist()) & pair.teacher_vocab.special
    assert align(byte_ends(s_len), byte_ends(t_len)).teacher_boundaries.tolist() == list(range(len(t)))
    assert pair.encode(["", "é"])[0][0].shape == (0,)


def grown(tokenizer, *specials: str, plain: tuple[str, ...] = ()):
    """A copy with tokens added at the end."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens(list(plain))
    copied.add_special_tokens({"additional_special_tokens": list(specials)} if specials else {})
    return copied


def test_kinship(embedded_pair):
    teacher, student = embedded_pair.teacher, embedded_pair.student

    def kin(one, other):
        pair = pair_tokenizers(one, other, teacher_name="x", student_name="y")
        swapped = pair_tokenizers(other, one, teacher_name="x", student_name="y")
        assert (pair.kinship, pair.same_ids) == (swapped.kinship, swapped.same_ids)
        return pair.kinship, pair.same_ids

    assert kin(teacher, teacher) == ("same", 4067)
    assert kin(teacher, copy.deepcopy(teacher)) == ("same", 4067)
    larger = grown(teacher, plain=("<new>", "<newer>"))
    assert kin(teacher, larger) == ("extends", 4067)
    assert kin(larger, grown(teacher, plain=("<new>", "<other>"))) == ("different", 4068)
    kinship, same = kin(teacher, student)
    assert kinship == "different"
    vocabs = embedded_pair.teacher_vocab.tokens, embedded_pair.student_vocab.tokens
    assert same == sum(a == b for a, b in zip(*vocabs, strict=False))


def test_kinship_looks_at_what_is_special(embedded_pair):
    vocab = embedded_pair.teacher_vocab

    def kin(special, tokens=vocab.tokens):
        other = dataclasses.replace(vocab, special=frozenset(special), tokens=tuple(tokens))
        pair = dataclasses.replace(embedded_pair, student_vocab=other)
        return pair.kinship, pair.same_ids

    assert kin(vocab.special) == ("same", 4067)
    assert kin(vocab.special | {7}) == ("different", 4066), "a piece of text on one side marks something on the other"
    assert kin(vocab.special, (*vocab.tokens[:4067], b"", b"more")) == ("extends", 4067)
    assert kin(vocab.special | {4068}, (*vocab.tokens, b"<x>", b"<y>")) == ("extends", 4067)
    assert kin(vocab.special, (b"", *vocab.tokens[1:])) == ("different", 4066)
    assert kin((), vocab.tokens[:100]) == ("extends", 100)


def test_ids_that_stand_for_nothing_are_not_the_same(embedded_pair):
    hollow = dataclasses.replace(embedded_pair.teacher_vocab, tokens=(b"", *embedded_pair.teacher_vocab.tokens[1:]))
    pair = dataclasses.replace(embedded_pair, teacher_vocab=hollow, student_vocab=hollow)
    assert (pair.kinship, pair.same_ids) == ("same", 4066)
