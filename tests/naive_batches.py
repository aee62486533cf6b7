"""A batch window by window and position by position, as slowly as it can be made: what ``collate`` must equal."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from kd_kit.align import align
from kd_kit.data import WindowSet
from kd_kit.types import IGNORE, DistillBatch
from kd_kit.vocab import Vocabulary


def span(vocab: Vocabulary, token: int, depth: int) -> tuple[int, int]:
    """The tokens that start with the first ``depth`` bytes of ``token``, as a range of ranks in byte order."""
    in_order, prefix = text_in_order(vocab.tokens, vocab.special), vocab.tokens[token][:depth]
    first = bisect_left(in_order, prefix)
    return first, first + sum(other.startswith(prefix) for other in in_order[first:])


@functools.cache
def text_in_order(tokens: tuple[bytes, ...], special: frozenset[int]) -> list[bytes]:
    return sorted(token for i, token in enumerate(tokens) if token and i not in special)


@functools.cache
def white_space_runs(tokens: tuple[bytes, ...]) -> np.ndarray:
    """[size] bool, tokens of two or more bytes that are all white space."""
    return np.array([len(token) > 1 and not token.strip(b" \t\r\n") for token in tokens])


def _tokens_between(ends: np.ndarray, first: int, last: int) -> slice:
    """The tokens that cover bytes ``first`` to ``last``; both are token ends (or the document's start)."""
    begin = np.searchsorted(ends, first, side="right") if first else 0
    return slice(int(begin), int(np.searchsorted(ends, last, side="right")))


def _side(self, index: int, ids: np.ndarray, ends: np.ndarray, start_id: int | None):
    """Ids and byte ends of one side of a window, the document-start token included."""
    _, first, _, last = self.table[index]
    part = _tokens_between(ends, first, last)
    ids, ends = ids[part].astype(np.int64), ends[part] - first
    if start_id is not None:
        ids, ends = np.concatenate([[start_id], ids]), np.concatenate([[0], ends])
    return ids, ends


def _prefixes(self, s_ids, s_ends, t_ids, t_ends, matched, predicts) -> np.ndarray:
    """For every position of a window but the last: depth and token range of ``DistillBatch.prefix``, [T - 1, 3].

    Depth -1 where the teacher has nothing to say: no target, or its next token is a mark and not text. Depth -2
    where the two tokenizers cut a run of white space differently, as they do all through indented code.
    """
    vocab = self.pair.teacher_vocab
    runs = [white_space_runs(v.tokens) for v in (self.pair.student_vocab, self.pair.teacher_vocab)]
    out = np.zeros((len(predicts), 3), np.int64)
    at = matched.teacher_index[:-1]
    known = predicts & (at >= 0) & (at < len(t_ids) - 1)
    # The first token of a text may have been written with a space that the text has not, and so have a byte more
    # than it covers. What the student must say next is then not what the teacher's table was made for.
    ours = self.pair.student_vocab.lengths[s_ids[1:]] - np.diff(s_ends)
    theirs = np.append(vocab.lengths[t_ids[1:]] - np.diff(t_ends), 0)[at]
    out[~known | (ours > theirs), 0] = -1
    extra = theirs - ours
    follows = np.append(t_ids[1:], 0)[at]
    run = runs[0][s_ids[1:]] | runs[1][follows]
    alike = matched.aligned[:-1] & (self.pair.identical[follows] == s_ids[1:])  # the same bytes at the same byte
    out[(out[:, 0] == 0) & run & ~alike, 0] = -2
    for i in np.flatnonzero((out[:, 0] == 0) & (~matched.aligned[:-1] | (extra > 0))):
        token = int(t_ids[at[i] + 1])
        depth = int(s_ends[i] - t_ends[at[i]] + extra[i])
        if token in vocab.special:
            out[i, 0] = -1
        else:
            out[i] = (depth, *span(self.pair.teacher_vocab, token, depth))
    return out


def naive_collate(self: WindowSet, indices: Sequence[int]) -> DistillBatch:
    """The batch of these windows, padded on the right to the longest."""
    items = []
    for index in indices:
        doc = self.documents[self.table[index, 0]]
        s_ids, s_ends = _side(self, index, doc.student_ids, doc.student_ends, self.pair.student_vocab.start_id)
        t_ids, t_ends = _side(self, index, doc.teacher_ids, doc.teacher_ends, self.pair.teacher_vocab.start_id)
        matched = align(s_ends, t_ends)
        # both sides are charged for the same bytes: from the first byte that both can predict, and not for
        # bytes that are there as context only
        boundary = s_ends[matched.student_boundaries[0]] if len(matched.student_boundaries) else np.inf
        scored = max(boundary, self.table[index, 2] - self.table[index, 1])
        items.append((s_ids, s_ends, t_ids, t_ends, matched, scored))
    b = len(items)
    t = max(len(i[0]) for i in items)
    s = max(len(i[2]) for i in items)
    c = max(max(i[4].spans for i in items), 1)
    student_ids = np.full((b, t), self.pair.student_vocab.pad_id)
    teacher_ids = np.full((b, s), self.pair.teacher_vocab.pad_id)
    targets, teacher_targets = np.full((b, t), IGNORE), np.full((b, s), IGNORE)
    target_bytes, teacher_index = np.zeros((b, t), np.int64), np.zeros((b, t), np.int64)
    aligned = np.zeros((b, t), bool)
    span_student, span_teacher = np.zeros((b, c + 1), np.int64), np.zeros((b, c + 1), np.int64)
    span_mask = np.zeros((b, c), bool)
    taught, same, prefix = np.zeros((b, t), bool), np.zeros((b, t), bool), []
    whitespace, span_rows = np.zeros(b, np.int64), []
    for n, (s_ids, s_ends, t_ids, t_ends, matched, scored) in enumerate(items):
        i, j = len(s_ids), len(t_ids)
        student_ids[n, :i], teacher_ids[n, :j] = s_ids, t_ids
        predicts = s_ends[:-1] >= scored
        targets[n, : i - 1] = np.where(predicts, s_ids[1:], IGNORE)
        target_bytes[n, : i - 1] = np.where(predicts, np.diff(s_ends), 0)
        teacher_targets[n, : j - 1] = np.where(t_ends[:-1] >= scored, t_ids[1:], IGNORE)
        teacher_index[n, :i] = np.maximum(matched.teacher_index, 0)
        found = _prefixes(self, s_ids, s_ends, t_ids, t_ends, matched, predicts)
        aligned[n, : i - 1] = found[:, 0] == 0
        taught[n, : i - 1] = found[:, 0] >= 0
        prefix.append(found[found[:, 0] >= 0])
        whitespace[n] = (found[:, 0] == -2).sum()
        follows = np.append(t_ids[1:], 0)[matched.teacher_index[:-1]]  # the teacher's next token
        same[n, : i - 1] = aligned[n, : i - 1] & (self.pair.identical[follows] == s_ids[1:])
        if matched.spans:
            k = matched.spans
            span_student[n], span_teacher[n] = matched.student_boundaries[-1], matched.teacher_boundaries[-1]
            span_student[n, : k + 1] = matched.student_boundaries
            span_teacher[n, : k + 1] = matched.teacher_boundaries
            span_mask[n, :k] = s_ends[matched.student_boundaries[:-1]] >= scored
        ends = np.stack([n * t + span_student[n, 1:], n * s + span_teacher[n, 1:]], axis=-1)
        span_rows.append(ends[span_mask[n]])
    arrays = (
        student_ids,
        targets,
        target_bytes,
        teacher_ids,
        teacher_targets,
        teacher_index,
        aligned,
        np.flatnonzero(targets.ravel() != IGNORE),
        np.flatnonzero(aligned.ravel()),
        taught,
        np.flatnonzero(taught.ravel()),
        np.concatenate(prefix),
        same,
        np.flatnonzero(same.ravel()),
        whitespace,
        span_student,
        span_teacher,
        span_mask,
        np.concatenate(span_rows),
        self.table[list(indices), 0],
        np.array(list(indices), dtype=np.int64),
    )
    return DistillBatch(*(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays))
