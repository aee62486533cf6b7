"""Conversations as text: a list of messages, each with a role and its content, in the form of a template.

What comes out is plain text. A template of a tokenizer writes marks like ``<|im_start|>``; as everywhere in this kit a
text is text, so both models read the letters of such a mark, the same bytes on both sides, and neither its own token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

Template = Callable[[list[dict[str, str]]], str]
"""Messages, each {"role", "content"}, to the text of the conversation."""

MALFORMED = "a conversation of another form than messages with a role and a content"


def plain(messages: list[dict[str, str]]) -> str:
    """Each message as a paragraph that begins with its role: ``user: ...``."""
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)


def template_of(template: str | Template | None, tokenizers) -> Template:
    """What ``build_data(template=)`` means.

    Args:
        template: None for :func:`plain`; "student" or "teacher" for the chat template of that tokenizer; or a function.
        tokenizers: a pair.

    Raises:
        ValueError: another word, or a tokenizer without a chat template.
    """
    if template is None:
        return plain
    if callable(template):
        return template
    if template not in ("student", "teacher"):
        raise ValueError(
            f"build_data: expected template= 'student', 'teacher', a function of the messages, or None, got "
            f"{template!r}"
        )
    tokenizer = getattr(tokenizers, template)
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"build_data: expected a {template} tokenizer with a chat template, got one without; leave template= out "
            "for 'role: content' paragraphs, or pass a function of the messages"
        )
    return lambda messages: tokenizer.apply_chat_template(messages, tokenize=False)


def as_chat(value: object) -> list[Mapping] | None:
    """A list of messages, of whatever form; None for a value that is none.

    pandas holds them in an array, older data sets as lists of roles and of contents.
    """
    if isinstance(value, np.ndarray) and value.ndim == 1:
        value = value.tolist()
    if isinstance(value, Mapping) and value and all(isinstance(part, (list, tuple)) for part in value.values()):
        lengths = {len(part) for part in value.values()}
        if len(lengths) != 1:
            return None
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    there = isinstance(value, list) and len(value) > 0 and all(isinstance(one, Mapping) for one in value)
    return value if there else None


def messages_of(chat: list[Mapping]) -> list[dict[str, str]] | None:
    """Messages with a role and a content; None where some message has another form.

    ``from`` and ``value`` (ShareGPT) are read as role and content; of a content in parts the text is taken, and a
    message without content (a call of a tool) is left out.
    """
    out = []
    for message in chat:
        role = message.get("role", message.get("from"))
        content = message.get("content", message.get("value"))
        if isinstance(content, list) and all(isinstance(part, Mapping) for part in content):
            content = "".join(part["text"] for part in content if isinstance(part.get("text"), str))
        if not isinstance(role, str) or not isinstance(content, str | None):
            return None
        if content:
            out.append({"role": role, "content": content})
    return out
