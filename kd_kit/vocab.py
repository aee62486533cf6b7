"""Vocabularies as bytes, and the bridge between two of them.

Once tokens are byte strings (:mod:`kd_kit.spelling`) nothing depends on which library, pattern or merge table made
them: lengths add up to positions in the text, and one vocabulary maps onto another by prefixes.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


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
        added: ids that are cut out of a text before the rest of it is tokenised, specials left out.
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
    added: frozenset[int] = frozenset()
    lengths: np.ndarray = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "lengths", np.array([len(t) for t in self.tokens], dtype=np.int64))
        for name, ids in (("_is_special", self.special), ("_is_added", self.added)):
            chosen = np.zeros(len(self.tokens), dtype=bool)
            chosen[[*ids]] = True
            object.__setattr__(self, name, chosen)

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

        A special token is never text. A tokenizer may write a space of its own before the text, and before what
        follows an added token: the token there is then that one byte shorter.
        """
        if self._is_special[ids].any():
            return None
        if self.bytes_of(ids.tolist()) == text:
            return self.lengths[ids]
        lengths, at = self.lengths[ids], 0
        starts = [0, *(np.flatnonzero(self._is_added[ids]) + 1).tolist()]
        for first, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            spelled = self.bytes_of(ids[first:end].tolist())
            if spelled.startswith(b" ") and not text.startswith(spelled, at):
                spelled = spelled[1:]
                lengths[first] -= 1
            if not text.startswith(spelled, at):
                return None
            at += len(spelled)
        return lengths if at == len(text) else None

    def __repr__(self) -> str:
        return f"Vocabulary({self.name}: {self.size:,} tokens, {len(self.special)} special)"


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
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, compare=False)

    @property
    def teacher_size(self) -> int:
        return len(self.table)

    def project(self, probs: Tensor) -> Tensor:
        """Teacher probabilities in student terms: one sum by places, nothing learned.

        Shapes:
            probs: [n, U] float, rows over the teacher's tokenizer (padded rows of its head already cut off)
            returns: [n, V' + 1] float32, the last column is the tail
        """
        if probs.shape[-1] != self.teacher_size:
            raise ValueError(
                f"Bridge.project: expected probabilities over {self.teacher_size} teacher tokens, got "
                f"{probs.shape[-1]}; cut the padded rows of the teacher's head off first"
            )
        return added_up(probs.float(), self.table_on(probs.device).expand(probs.shape), self.student_size + 1)

    def table_on(self, device: torch.device) -> Tensor:
        """The table on a device; copied there once."""
        if device not in self._tables:
            self._tables[device] = self.table.to(device)
        return self._tables[device]

    def project_at(self, probs: Tensor, depth: int, first: Tensor, last: Tensor, widest: int | None = None) -> Tensor:
        """:meth:`project` at positions of a batch; this table alone knows the aligned ones, of depth 0.

        Shapes:
            probs: [n, U] float
            first, last: [n] int64, the other columns of ``DistillBatch.prefix``
            widest: the largest of their differences, where it is known
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


def added_up(values: Tensor, places: Tensor, size: int) -> Tensor:
    """[n, size]: the values of each row, added up by their places."""
    # along rows: adding whole columns would be many times slower for a few rows
    return values.new_zeros(len(values), size).scatter_add_(1, places, values)


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
