"""Two tokenizers side by side: what the data, the teacher and the student agree about."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass, field

import numpy as np

from kd_kit.inside import InsideBridge
from kd_kit.spelling import read_vocabulary, text_ids
from kd_kit.vocab import Vocabulary


@dataclass(frozen=True, repr=False)
class TokenizerPair:
    """The teacher's and the student's tokenizer, read as bytes, and the bridge between them.

    Made by :func:`kd_kit.build_tokenizers`. ``teacher`` and ``student`` are the tokenizers of transformers as the
    user knows them; the rest is what matching them takes.
    """

    teacher: object
    student: object
    teacher_vocab: Vocabulary
    student_vocab: Vocabulary
    bridge: InsideBridge
    fingerprint: str = field(default="")

    def normalise(self, text: str) -> str:
        """The text as both tokenizers read it, so that both stand on the same bytes."""
        return self.student_vocab.normalise(self.teacher_vocab.normalise(text))

    def encode(self, texts: list[str]) -> list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None]:
        """Tokenise texts on both sides.

        A string such as ``<|endoftext|>`` inside a text is text, not a command.

        Returns:
            for every text student ids, student byte lengths, teacher ids, teacher byte lengths, each [n] int64; None
            for a text that one of the tokenizers does not give back byte for byte, or in which it reads a special
            token whatever it is asked.
        """
        sides = []
        for tokenizer, vocab in ((self.student, self.student_vocab), (self.teacher, self.teacher_vocab)):
            ids = text_ids(tokenizer, texts)
            sides.append([(a, vocab.token_lengths(a, text.encode())) for a, text in zip(ids, texts, strict=True)])
        return [
            None if s_len is None or t_len is None else (s, s_len, t, t_len)
            for (s, s_len), (t, t_len) in zip(*sides, strict=True)
        ]

    @functools.cached_property
    def identical(self) -> np.ndarray:
        """[U] int64, for every teacher token the student token of the same bytes, -1 where there is none."""
        ours, theirs = self.student_vocab, self.teacher_vocab
        table = self.bridge.table.tolist()
        same = [home < ours.size and ours.tokens[home] == t for home, t in zip(table, theirs.tokens, strict=True)]
        return np.where(same, table, -1)

    @property
    def same_ids(self) -> int:
        """How many ids stand for the same bytes, or for the same special token, on both sides."""
        sides = self.teacher_vocab, self.student_vocab
        tokens = zip(*(vocab.tokens for vocab in sides), strict=False)
        return sum(
            a == b != b"" and (i in sides[0].special) == (i in sides[1].special) for i, (a, b) in enumerate(tokens)
        )

    @property
    def kinship(self) -> str:
        """``"same"``: every id means the same on both sides. ``"extends"``: so it does below the smaller size, where
        one side goes on. ``"different"``: anything else.

        It speaks of ids alone: two tokenizers of the same ids may still cut a text differently (SmolLM2's, read from
        GGUF, splits no digits).
        """
        teacher, student = self.teacher_vocab, self.student_vocab
        small = min(teacher.size, student.size)
        first_other = min(teacher.special ^ student.special, default=small)
        if teacher.tokens[:small] != student.tokens[:small] or first_other < small:
            return "different"
        return "same" if teacher.size == student.size else "extends"

    def __repr__(self) -> str:
        shared = self.bridge.shared / max(min(self.teacher_vocab.size, self.student_vocab.size), 1)
        return (
            f"teacher  {self.teacher_vocab}\nstudent  {self.student_vocab}\n"
            f"bridge   {self.bridge}\n"
            f"         {shared:.0%} of the smaller vocabulary exists, byte for byte, in the other"
        )


def pair_tokenizers(teacher, student, *, teacher_name: str, student_name: str) -> TokenizerPair:
    """Read two tokenizers of transformers as bytes and build the bridge between them.

    Raises:
        ValueError: one of them cannot be read as bytes.
    """
    teacher_vocab = read_vocabulary(teacher, teacher_name)
    student_vocab = read_vocabulary(student, student_name)
    print_of = hashlib.sha256()
    for vocab in (teacher_vocab, student_vocab):
        for token in vocab.tokens:
            print_of.update(len(token).to_bytes(4, "little") + token)
        marks = sorted(vocab.special), vocab.start_id, vocab.end_id, vocab.forms, sorted(vocab.unused)
        print_of.update(repr((*marks, sorted(vocab.added))).encode())
    bridge = InsideBridge(teacher_vocab, student_vocab)
    return TokenizerPair(teacher, student, teacher_vocab, student_vocab, bridge, print_of.hexdigest())
