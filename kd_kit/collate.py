"""Windows in both tokenizations to one padded batch, with all that the losses ask about every position.

All windows of a batch are worked on at once, as rows that stand one behind the other without padding: a batch of many
short windows costs no more per token than one of a few long ones.
"""

from __future__ import annotations

import numpy as np
import torch

from kd_kit.align import Ragged, align_many, starts_of
from kd_kit.packing import side_by_side
from kd_kit.pair import TokenizerPair
from kd_kit.types import IGNORE, DistillBatch
from kd_kit.vocab import Vocabulary

_NOWHERE = np.iinfo(np.int64).max  # a byte that no window reaches


def _white_space_runs(vocab: Vocabulary) -> np.ndarray:
    """[size] bool, tokens of two or more bytes that are all white space."""
    return np.array([len(token) > 1 and not token.strip(b" \t\r\n") for token in vocab.tokens])


class Side:
    """One side of the windows of a batch, a window a row.

    Attributes:
        ids, ends: [n] int64, tokens and the byte of its window at which each ends, the document-start token included.
        row, place: [n] int64, the window of every token, and where in it the token stands.
        last: [n] bool, the last token of its window, which predicts nothing.
        following, bytes: [n] int64, the next token and how many bytes of the text it covers; 0 where ``last``.
        counts: [B] int64, tokens of every window.
    """

    def __init__(self, ids: Ragged, ends: np.ndarray):
        self.ids, self.ends, self.starts, self.counts = ids.values, ends, ids.starts, ids.counts
        self.row = ids.row_of()
        self.place = np.arange(len(ends)) - self.starts[self.row]
        self.last = np.zeros(len(ends), dtype=bool)
        self.last[self.starts[1:] - 1] = True
        self.following, self.bytes = np.zeros_like(self.ids), np.zeros_like(ends)
        self.following[:-1], self.bytes[:-1] = self.ids[1:], np.diff(ends)
        self.following[self.last] = self.bytes[self.last] = 0
        self.width = int(self.counts.max())
        self._at = self.row * self.width + self.place

    def padded(self, values: np.ndarray, fill: int | bool) -> np.ndarray:
        """[B, width] of values [n], with ``fill`` behind the end of each window."""
        out = np.full(len(self.counts) * self.width, fill, dtype=values.dtype)
        out[self._at] = values
        return out.reshape(-1, self.width)


class Collator:
    """Makes batches of windows for one pair of tokenizers."""

    def __init__(self, pair: TokenizerPair):
        self.pair = pair
        self._runs = [_white_space_runs(v) for v in (pair.student_vocab, pair.teacher_vocab)]
        self._marks = np.zeros(pair.teacher_vocab.size, dtype=bool)
        self._marks[[*pair.teacher_vocab.special]] = True

    def prefixes(
        self, student: Side, teacher: Side, index: np.ndarray, aligned: np.ndarray, predicts: np.ndarray
    ) -> np.ndarray:
        """For every student position: depth and token range of ``DistillBatch.prefix``, [n, 3].

        Depth -1 where the teacher has nothing to say: no target, or its next token is a mark and not text. Depth -2
        where the two tokenizers cut a run of white space differently, as they do all through indented code.

        Args:
            index: [n] the teacher's position over all windows, -1 where there is none. predicts: [n] has a target.
        """
        out = np.zeros((len(predicts), 3), np.int64)
        known = predicts & (index >= 0) & ~teacher.last[index]
        follows = np.where(index >= 0, teacher.following[index], 0)
        # The first token of a text may have been written with a space that the text has not, and so have a byte more
        # than it covers. What the student must say next is then not what the teacher's table was made for.
        ours = self.pair.student_vocab.lengths[student.following] - student.bytes
        extra = self.pair.teacher_vocab.lengths[follows] - teacher.bytes[index] - ours
        out[~known | (known & (extra < 0)), 0] = -1
        run = self._runs[0][student.following] | self._runs[1][follows]
        alike = aligned & (self.pair.identical[follows] == student.following)  # the same bytes at the same byte
        out[(out[:, 0] == 0) & run & ~alike, 0] = -2
        inside = np.flatnonzero((out[:, 0] == 0) & (~aligned | (extra > 0)))
        marks = self._marks[follows[inside]]
        out[inside[marks], 0] = -1
        inside = inside[~marks]
        depth = student.ends[inside] - teacher.ends[index[inside]] + extra[inside]
        out[inside] = np.column_stack([depth, self.pair.bridge.spans(follows[inside], depth)])
        return out

    def batch(
        self, student: Side, teacher: Side, context: np.ndarray, document: np.ndarray, sample: np.ndarray
    ) -> DistillBatch:
        """The batch of these windows, padded on the right to the longest.

        Args:
            context: [B] int64, first bytes of every window that are there as context only.
            document, sample: as in :class:`kd_kit.types.DistillBatch`.
        """
        windows = np.arange(len(sample))
        within, aligned = align_many(Ragged(student.ends, student.starts), Ragged(teacher.ends, teacher.starts))
        index = np.where(within >= 0, within + teacher.starts[student.row], -1)
        boundaries = np.flatnonzero(aligned)
        window = student.row[boundaries]
        counts = np.bincount(window, minlength=len(sample))
        begins = starts_of(counts)
        # both sides are charged for the same bytes: from the first byte that both can predict, and not for bytes that
        # are there as context only
        first = np.full(len(sample), _NOWHERE)
        first[counts > 0] = student.ends[boundaries[begins[:-1][counts > 0]]]
        scored = np.maximum(first, context)
        predicts = ~student.last & (student.ends >= scored[student.row])
        teacher_predicts = ~teacher.last & (teacher.ends >= scored[teacher.row])
        found = self.prefixes(student, teacher, index, aligned, predicts)
        exact, taught = found[:, 0] == 0, found[:, 0] >= 0
        follows = np.where(index >= 0, teacher.following[index], 0)
        same = exact & (self.pair.identical[follows] == student.following)
        # spans lie between two boundaries of one window
        number = np.arange(len(boundaries)) - begins[window]
        spans = np.maximum(counts - 1, 0)
        width = max(int(spans.max()), 1)
        span_student, span_teacher = (np.zeros((len(sample), width + 1), np.int64) for _ in range(2))
        span_mask = np.zeros((len(sample), width), bool)
        some = spans > 0
        inside = some[window]
        for grid, places in ((span_student, student.place[boundaries]), (span_teacher, within[boundaries])):
            grid[some] = places[begins[1:][some] - 1][:, None]
            grid[window[inside], number[inside]] = places[inside]
        begin = inside & (number < spans[window])
        span_mask[window[begin], number[begin]] = student.ends[boundaries[begin]] >= scored[window[begin]]
        row, place = span_mask.nonzero()
        sides = (span_student, student.width), (span_teacher, teacher.width)
        span_rows = np.stack([row * wide + grid[row, place + 1] for grid, wide in sides], axis=-1)
        targets = student.padded(np.where(predicts, student.following, IGNORE), IGNORE)
        aligned_grid, taught_grid, same_grid = (student.padded(mask, False) for mask in (exact, taught, same))
        arrays = {
            "student_ids": student.padded(student.ids, self.pair.student_vocab.pad_id),
            "targets": targets,
            "target_bytes": student.padded(np.where(predicts, student.bytes, 0), 0),
            "teacher_ids": teacher.padded(teacher.ids, self.pair.teacher_vocab.pad_id),
            "teacher_targets": teacher.padded(np.where(teacher_predicts, teacher.following, IGNORE), IGNORE),
            "teacher_index": student.padded(np.maximum(within, 0), 0),
            "aligned": aligned_grid,
            "rows": np.flatnonzero(targets != IGNORE),
            "aligned_rows": np.flatnonzero(aligned_grid),
            "taught": taught_grid,
            "taught_rows": np.flatnonzero(taught_grid),
            "prefix": found[taught],
            "same": same_grid,
            "same_rows": np.flatnonzero(same_grid),
            "whitespace": np.bincount(student.row[found[:, 0] == -2], minlength=len(windows)),
            "span_student": span_student,
            "span_teacher": span_teacher,
            "span_mask": span_mask,
            "span_rows": span_rows,
            "document": document,
            "sample": sample,
            "student_packed": side_by_side(student.counts),
            "teacher_packed": side_by_side(teacher.counts),
        }
        return DistillBatch(**{name: torch.from_numpy(value) for name, value in arrays.items()})
