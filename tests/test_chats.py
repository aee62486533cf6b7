"""kd_kit/chats.py: conversations become text that both models read as the same bytes."""

from __future__ import annotations

import copy

import datasets
import numpy as np
import pytest
from helpers import pages, pair

from kd_kit import build_data
from kd_kit.chats import MALFORMED, as_chat, messages_of, plain, template_of
from kd_kit.pair import pair_tokenizers
from kd_kit.rows import EMPTY, read_texts

CHAT = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A text."}]
SHARED = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "A text."}]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def build(rows, tokenizers=None, **arguments):
    given = {"held_out": [pages()[0]], "window": 64, "batch_size": 2, "max_refused": 1, "column": "messages"}
    return build_data(rows, tokenizers or pair(), **(given | arguments))


@pytest.fixture(scope="module")
def templated():
    """The embedded pair with a chat template on the student's side."""
    student = copy.deepcopy(pair().student)
    student.chat_template = TEMPLATE
    return pair_tokenizers(copy.deepcopy(pair().teacher), student, teacher_name="teacher", student_name="student")


def test_a_column_of_messages_is_read():
    rows = datasets.Dataset.from_dict({"messages": [CHAT, CHAT[:1]], "id": [1, 2]})
    data = build(rows)
    assert data.train.text(0) == "user: What is it?\n\nassistant: A text."
    assert data.train.report.chats == data.train.report.used == 2
    assert "2 of the rows are conversations, made text" in repr(data.train.report)
    stream = build(rows.to_iterable_dataset(), maximum=5)
    assert stream.fingerprint == data.fingerprint


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        np.array(CHAT, dtype=object),
        {"role": ["user", "assistant"], "content": ["What is it?", "A text."]},
        [CHAT[0], {"role": "assistant", "content": None, "tool_calls": [1]}, CHAT[1]],
        [{"role": "user", "content": [{"type": "text", "text": "What "}, {"type": "text", "text": "is it?"}]}, CHAT[1]],
    ],
)
def test_the_same_conversation_in_other_forms(value):
    texts, report = read_texts([{"messages": value}], column="messages")
    assert texts == [plain(CHAT)]
    assert report.chats == 1


def test_share_gpt_has_other_words():
    assert read_texts([SHARED])[0] == ["human: What is it?\n\ngpt: A text."]


def test_a_template_writes_marks_that_both_models_read_as_letters(templated):
    """The same bytes on both sides, and no special token on either."""
    data = build([{"messages": CHAT}], templated, template="student")
    text = TEMPLATE and "".join(data.train.text(i) for i in range(len(data.train)))
    assert text == "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA text.<|im_end|>\n"
    document = data.train.documents[0]
    sides = [
        (templated.student_vocab, document.student_ids, document.student_ends),
        (templated.teacher_vocab, document.teacher_ids, document.teacher_ends),
    ]
    for vocab, ids, ends in sides:
        assert vocab.bytes_of(ids.tolist()) == text.encode()
        assert ends[-1] == len(text.encode())
        assert not set(ids.tolist()) & set(vocab.special)


def test_a_function_is_a_template_too():
    texts, _ = read_texts([CHAT], template=lambda messages: " / ".join(m["content"] for m in messages))
    assert texts == ["What is it? / A text."]
    assert template_of(plain, pair()) is plain


def test_a_template_that_is_not_there_is_refused():
    for who in ("student", "teacher"):
        with pytest.raises(ValueError, match=rf"expected a {who} tokenizer with a chat template, got one without"):
            build([{"messages": CHAT}], template=who)
    with pytest.raises(ValueError, match=r"template= 'student', 'teacher', a function .*got 'chatml'"):
        build([{"messages": CHAT}], template="chatml")


def test_conversations_that_are_none_are_counted():
    def strict(messages):
        if messages[0]["role"] != "user":
            raise KeyError("Conversation roles must alternate")
        return plain(messages)

    rows = [
        CHAT,
        [{"speaker": "user", "said": "hi"}],
        [{"role": "user", "content": 7}],
        CHAT[1:],
        [{"role": "user", "content": ""}],
        [],
        ["user", "hi"],
        {"role": ["user"], "content": ["a", "b"]},
        "a text among conversations",
        None,
    ]
    texts, report = read_texts([{"messages": row} for row in rows], column="messages", template=strict)
    assert texts == [plain(CHAT), "a text among conversations"]
    assert report.chats == 1
    assert report.refused == {
        MALFORMED: [1, 2],
        "a conversation on which the template raised KeyError": [3],
        EMPTY: [4],
        "not text but list": [5, 6],
        "not text but dict": [7],
        "missing": [9],
    }
    assert "roles must alternate" in repr(report)


def test_a_template_that_gives_no_text_is_counted():
    _, report = read_texts([CHAT, "good"], template=lambda messages: 7)
    assert report.refused == {"not text but int": [0]}


def test_forms():
    assert as_chat("user: hi") is None
    assert as_chat([]) is None
    assert as_chat({"a": 1}) is None
    assert messages_of([{"role": "user", "content": "hi", "name": "me"}]) == [{"role": "user", "content": "hi"}]
