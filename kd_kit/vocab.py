"""Vocabularies as bytes, and the bridge between two of them.

A tokenizer's tokens are read as byte strings. From there on nothing depends on which library, pattern or merge
table made them: lengths add up to positions in the text, and one vocabulary maps onto another by prefixes.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

# What a tokenizer must give back byte for byte before it is used: words, contractions, digits, runs of white space,
# line ends, accents, emoji, other scripts.
PROBE = "The café's 1,234 words, we'll\tsee:\n\n  if x==1:\r\n    y = 'naïve' # 東京 ☕ 👩‍🚀 end"

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-Fa-f]{2})>$")
_UNICODE_FORMS = {"NFC", "NFD", "NFKC", "NFKD"}
_META_SPACE = "\u2581"


def byte_alphabet() -> dict[str, int]:
    """The 256 printable characters that byte-level BPE writes bytes with, each with its byte.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.2, and its code.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    rest = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(rest)}


@dataclass(frozen=True, repr=False)
class Vocabulary:
    """The tokens of one tokenizer as bytes.

    Attributes:
        name: what to call the tokenizer in messages.
        tokens: bytes of every id, ``b""`` for an id that no token has.
        special: ids that mark something instead of standing for text.
        start_id: the token put before every window (bos, or else the end-of-document token), None if there is none.
        end_id: end of document. pad_id: any id to fill rows with; it is never read.
        forms: Unicode normal forms that the tokenizer applies to its input, in order.
        unused: ids whose bytes another id has too, and that text therefore never uses: the ``<0x41>`` of a
            vocabulary that also has ``A``.
        lengths: [size] int64, bytes of every id.
    """

    name: str
    tokens: tuple[bytes, ...]
    special: frozenset[int]
    start_id: int | None
    end_id: int | None
    pad_id: int
    forms: tuple[str, ...] = ()
    unused: frozenset[int] = frozenset()
    lengths: np.ndarray = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "lengths", np.array([len(t) for t in self.tokens], dtype=np.int64))

    @property
    def size(self) -> int:
        return len(self.tokens)

    def normalise(self, text: str) -> str:
        """The text as this tokenizer reads it."""
        for form in self.forms:
            text = unicodedata.normalize(form, text)
        return text

    def bytes_of(self, ids) -> bytes:
        """The bytes that a sequence of ids stands for."""
        return b"".join([self.tokens[i] for i in ids])

    def token_lengths(self, ids: np.ndarray, text: bytes) -> np.ndarray | None:
        """Byte lengths of the tokens of ``text``, [n] int64; None if they are not that text, byte for byte.

        SentencePiece tokenizers may put a space before the text: the first token is then that one byte shorter.
        """
        spelled = self.bytes_of(ids)
        if spelled == text:
            return self.lengths[ids]
        if spelled == b" " + text and len(ids):
            lengths = self.lengths[ids].copy()
            lengths[0] -= 1
            return lengths
        return None

    def __repr__(self) -> str:
        return f"Vocabulary({self.name}: {self.size:,} tokens, {len(self.special)} special)"


def read_vocabulary(tokenizer, name: str) -> Vocabulary:
    """The vocabulary of a tokenizer as bytes, proven on a probe text.

    Byte-level BPE (Qwen, SmolLM, GPT-2, Llama-3) and SentencePiece with byte fallback (Llama-2, Gemma, Mistral) are
    read exactly.

    Args:
        tokenizer: a tokenizer of transformers.
        name: what to call it in messages.

    Raises:
        ValueError: a tokenizer that cannot be read as bytes (one that lower-cases, strips or drops text).
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"read_vocabulary: expected a tokenizer with a `backend_tokenizer` (a 'fast' one), got "
            f"{type(tokenizer).__name__} for {name!r}; load it with AutoTokenizer.from_pretrained(..., use_fast=True)"
        )
    spec = json.loads(backend.to_str())
    forms, other = _normalizers(spec.get("normalizer"))
    if other:
        raise ValueError(
            f"read_vocabulary: expected a tokenizer that keeps the text, got {name!r}, which changes it by "
            f"{', '.join(other)}; its tokens cannot be matched with the other model's by bytes, so choose a model "
            "whose tokenizer is byte-level BPE or SentencePiece with byte fallback"
        )
    kinds = _types_in(spec.get("decoder")) | _types_in(spec.get("pre_tokenizer"))
    added = {int(t["id"]): t for t in spec.get("added_tokens", [])}
    spellings = backend.get_vocab(with_added_tokens=True)
    size = max(spellings.values()) + 1
    alphabet = byte_alphabet()
    byte_level = "ByteLevel" in kinds
    tokens = [b""] * size
    fallback = set()
    for token, i in spellings.items():
        if i in added:
            tokens[i] = added[i]["content"].encode()
        elif byte_level:
            tokens[i] = bytes(alphabet[c] for c in token) if all(c in alphabet for c in token) else token.encode()
        else:
            match = _BYTE_TOKEN.match(token)
            tokens[i] = bytes([int(match[1], 16)]) if match else token.replace(_META_SPACE, " ").encode()
            if match:
                fallback.add(i)
    special = {i for i, t in added.items() if t.get("special")} | set(tokenizer.all_special_ids)
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id
    if start is None:
        # Models without a bos (Qwen) saw their pad / end-of-document token between documents.
        start = tokenizer.pad_token_id if tokenizer.pad_token_id in special else end
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (end if end is not None else 0)
    # added tokens are cut out of a text before anything else, byte tokens are the last resort
    first: dict[bytes, int] = {}
    for i in sorted(range(size), key=lambda i: (i not in added, i in fallback, i)):
        if i not in special:
            first.setdefault(tokens[i], i)
    unused = {i for i in range(size) if tokens[i] and i not in special and first[tokens[i]] != i}
    vocabulary = Vocabulary(
        name, tuple(tokens), frozenset(special), start, end, int(pad), tuple(forms), frozenset(unused)
    )
    _prove(vocabulary, tokenizer)
    return vocabulary


def _prove(vocabulary: Vocabulary, tokenizer) -> None:
    """Raise unless the tokens of the probe text are the probe text, byte for byte."""
    text = vocabulary.normalise(PROBE)
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if vocabulary.token_lengths(np.array(ids, dtype=np.int64), text.encode()) is None:
        spelled = vocabulary.bytes_of(ids)
        at = next((i for i, (a, b) in enumerate(zip(spelled, text.encode(), strict=False)) if a != b), 0)
        raise ValueError(
            f"read_vocabulary: expected tokens that spell the text byte for byte, got from {vocabulary.name!r} "
            f"{spelled[max(at - 10, 0) : at + 20]!r} where the text has {text.encode()[max(at - 10, 0) : at + 20]!r}; "
            "it drops, adds or replaces characters, so its positions cannot be matched by bytes"
        )


def _types_in(node) -> set[str]:
    """Every ``type`` named anywhere in a part of a tokenizer.json."""
    if isinstance(node, dict):
        return ({node["type"]} if isinstance(node.get("type"), str) else set()) | _types_in(list(node.values()))
    if isinstance(node, list):
        return set().union(*map(_types_in, node)) if node else set()
    return set()


def _normalizers(node) -> tuple[list[str], list[str]]:
    """Unicode forms in order, and the names of normalizers that change text in another way."""
    if node is None:
        return [], []
    if node["type"] == "Sequence":
        pairs = [_normalizers(child) for child in node["normalizers"]]
        return [f for forms, _ in pairs for f in forms], [o for _, other in pairs for o in other]
    if node["type"] in _UNICODE_FORMS:
        return [node["type"]], []
    # SentencePiece writes spaces as U+2581, and may put one in front: both are undone when tokens are read as bytes.
    if node["type"] == "Prepend" and node.get("prepend") == _META_SPACE:
        return [], []
    if node["type"] == "Replace" and node.get("content") == _META_SPACE and node.get("pattern") == {"String": " "}:
        return [], []
    return [], [node["type"]]


@dataclass(frozen=True, repr=False)
class Bridge:
    """Where the mass of every teacher token goes in the student's vocabulary.

    ``table[t]`` is the longest student token whose bytes are a prefix of the bytes of teacher token ``t``: what the
    student would have to say first in order to say what the teacher says. Special tokens go where an explicit map
    sends them, and nowhere otherwise. Whatever has no home goes to one tail cell and is never renormalised away.

    Attributes:
        table: [U] int64, student id or ``student_size`` (the tail).
        student_size: V', entries of the student's tokenizer.
        shared: how many teacher tokens are, byte for byte, student tokens too.
    """

    table: Tensor
    student_size: int
    shared: int

    @property
    def teacher_size(self) -> int:
        return len(self.table)

    def project(self, probs: Tensor) -> Tensor:
        """Teacher probabilities in student terms: one ``index_add``, nothing learned.

        Shapes:
            probs: [n, U] float, rows over the teacher's tokenizer (padded rows of its head already cut off)
            returns: [n, V' + 1] float32, the last column is the tail
        """
        if probs.shape[-1] != self.teacher_size:
            raise ValueError(
                f"Bridge.project: expected probabilities over {self.teacher_size} teacher tokens, got "
                f"{probs.shape[-1]}; cut the padded rows of the teacher's head off first"
            )
        out = probs.new_zeros(probs.shape[0], self.student_size + 1, dtype=torch.float32)
        return out.index_add_(1, self.table.to(probs.device), probs.float())

    def project_at(self, probs: Tensor, depth: int, first: Tensor, last: Tensor) -> Tensor:
        """:meth:`project` at positions of a batch; this table alone knows the aligned ones, of depth 0.

        Shapes:
            probs: [n, U] float
            first, last: [n] int64, the other columns of ``DistillBatch.prefix``
            returns: [n, V' + 1] float32

        Raises:
            ValueError: positions inside a teacher token.
        """
        if depth:
            raise ValueError(
                "Bridge.project_at: expected aligned positions, got some inside teacher tokens; use the bridge of "
                "build_tokenizers, which knows the tokens' bytes"
            )
        return self.project(probs)

    def __repr__(self) -> str:
        homeless = int((self.table == self.student_size).sum())
        return (
            f"Bridge({self.teacher_size:,} teacher tokens -> {self.student_size:,} student tokens: "
            f"{self.shared:,} byte-identical, {homeless:,} without a home)"
        )


def special_map(teacher: Vocabulary, student: Vocabulary) -> dict[int, int]:
    """Which special token of the teacher means the same as which one of the student.

    End of document maps to end of document. The teacher's start token maps there too where it has no other meaning
    (Qwen ends documents with the token that also starts them).
    """
    if student.end_id is None:
        return {}
    ends = {i for i in (teacher.end_id, teacher.start_id) if i is not None and i in teacher.special}
    return dict.fromkeys(ends, student.end_id)


def build_bridge(teacher: Vocabulary, student: Vocabulary, specials: dict[int, int] | None = None) -> Bridge:
    """The byte-prefix table between two vocabularies; between two equal ones the identity.

    Args:
        specials: teacher id -> student id for special tokens; :func:`special_map` when not given.

    Source: the aligned-position case of byte-prefix marginalisation, https://arxiv.org/abs/2607.22334
    """
    if specials is None and (teacher.tokens, teacher.special) == (student.tokens, student.special):
        real = torch.from_numpy(teacher.lengths > 0)
        ids = torch.arange(student.size)
        return Bridge(torch.where(real, ids, student.size), student.size, int(real.sum()))
    specials = special_map(teacher, student) if specials is None else specials
    table = homes_of(teacher.tokens, student)
    for t in teacher.special:
        table[t] = specials.get(t, student.size)
    shared = sum(
        int(home) < student.size and student.tokens[home] == token
        for t, (token, home) in enumerate(zip(teacher.tokens, table.tolist(), strict=True))
        if t not in teacher.special
    )
    return Bridge(table, student.size, shared)


def homes_of(tokens: Sequence[bytes], student: Vocabulary) -> Tensor:
    """The longest student token that each byte string begins with, ``student.size`` where there is none.

    Shapes:
        tokens: n byte strings
        returns: [n] int64
    """
    home: dict[bytes, int] = {}
    for i, token in enumerate(student.tokens):
        if i not in student.special and i not in student.unused:
            home.setdefault(token, i)
    longest = max(map(len, home), default=0)
    out = torch.full((len(tokens),), student.size, dtype=torch.int64)
    for t, token in enumerate(tokens):
        for n in range(min(len(token), longest), 0, -1):
            found = home.get(token[:n])
            if found is not None:
                out[t] = found
                break
    return out
