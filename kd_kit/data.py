"""Texts to windows to batches, the same on every machine and after every restart.

A document is tokenised on both sides, proven to be the same bytes on both, and cut where both tokenizers have a
boundary. Which windows make up a batch is a pure function of (seed, position): a run that stopped needs to remember
nothing but a number.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from kd_kit import loading
from kd_kit.align import Ragged, cut_many, starts_of
from kd_kit.batching import Batching
from kd_kit.chats import Template, template_of
from kd_kit.collate import Collator, Side
from kd_kit.packing import LEAST_SAVED
from kd_kit.pair import TokenizerPair
from kd_kit.rows import (
    MAX_CHARACTERS,
    NO_BOUNDARIES,
    RowReport,
    read_texts,
    refuse_share,
    save_refused,
)
from kd_kit.text_files import could_be_named, named_texts, one_split
from kd_kit.tokenised import Document, tokenise
from kd_kit.types import DistillBatch

_DOCUMENTS_AT_ONCE = 4096  # whose tokens are looked through together


def _cuts(documents: Sequence[Document | str], *, length: int, stride: int | None) -> list[np.ndarray]:
    """The windows of every document, [W, 3] as of :func:`kd_kit.align.cut_windows`; none of what is no document."""
    out = [np.zeros((0, 3), dtype=np.int64)] * len(documents)
    there = [n for n, document in enumerate(documents) if isinstance(document, Document)]
    if there:
        student = Ragged.of([documents[n].student_ends for n in there])
        teacher = Ragged.of([documents[n].teacher_ends for n in there])
        table = cut_many(student, teacher, length=length, stride=stride)
        borders = np.searchsorted(table[:, 0], np.arange(1, len(there)))
        for n, windows in zip(there, np.split(table[:, 1:], borders), strict=True):
            out[n] = windows
    return out


def _tokens_between(ends: np.ndarray, first: int, last: int) -> slice:
    """The tokens that cover bytes ``first`` to ``last``; both are token ends (or the document's start)."""
    begin = np.searchsorted(ends, first, side="right") if first else 0
    return slice(int(begin), int(np.searchsorted(ends, last, side="right")))


def _side(documents: list[tuple[np.ndarray, np.ndarray]], rows: np.ndarray, start_id: int | None) -> Side:
    """One side of windows.

    Args:
        documents: of every window the tokens and byte ends of its document. rows: the windows' rows of the table.
    """
    ids, ends, counts = [], [], []
    start = [np.array([start_id])] if start_id is not None else []
    for (tokens, at), (_, first, _, last) in zip(documents, rows, strict=True):
        part = _tokens_between(at, first, last)
        ids += [*start, tokens[part]]
        ends += [*start, at[part]]
        counts.append(part.stop - part.start + len(start))
    both = Ragged(np.concatenate(ids, dtype=np.int64), starts_of(counts))
    at = np.concatenate(ends) - np.repeat(rows[:, 1], counts)
    if start:
        at[both.starts[:-1]] = 0
    return Side(both, at)


class WindowSet(torch.utils.data.Dataset):
    """Windows of documents in both tokenizations. Indexing gives a window's number; ``collate`` makes the batch."""

    def __init__(
        self,
        texts: list[str],
        pair: TokenizerPair,
        *,
        window: int,
        stride: int | None,
        report: RowReport,
        check: Callable[[], None] | None = None,
    ):
        """``check`` is called after every few documents; it may raise to stop."""
        self.pair = pair
        self.window = window
        self.report = report
        self._collator = Collator(pair)
        table = []
        # a document-start token takes one place of every window
        room = window - max(pair.student_vocab.start_id is not None, pair.teacher_vocab.start_id is not None)
        skip = None if stride is None else max(1, min(stride, room))

        def take(start: int, found: Sequence[Document | str]) -> list[bool]:
            """Which of these documents have windows, all of which go into the table; the others into the report."""
            used = []
            several = slice(start, start + len(found))
            cuts = _cuts(found, length=room, stride=skip)
            for row, text, both, windows in zip(report.kept[several], texts[several], found, cuts, strict=True):
                used.append(len(windows) > 0)
                if used[-1]:
                    table.append(np.column_stack([np.full(len(windows), len(table)), windows]))
                else:
                    report.refuse(both if isinstance(both, str) else NO_BOUNDARIES, row, text)
            report.used = len(table)
            if check is not None and several.stop < len(texts):
                check()
            return used

        self.documents = tokenise(texts, pair, take)
        if not table:
            raise ValueError(f"build_data: expected text that both tokenizers can read, got none: {report!r}")
        if check is not None:
            check()
        self.table = np.concatenate(table)  # [W, 4]: document, first byte, first scored byte, end byte

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> int:
        return int(index)

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """[W, 2] int64, tokens of every window, the student's and the teacher's, document-start tokens included."""
        out = np.zeros((len(self), 2), dtype=np.int64)
        for start in range(0, len(self.documents), _DOCUMENTS_AT_ONCE):
            some = self.documents[start : start + _DOCUMENTS_AT_ONCE]
            rows = slice(*np.searchsorted(self.table[:, 0], [start, start + len(some)]))
            document, first, _, last = self.table[rows].T
            for side, ends in enumerate(([d.student_ends for d in some], [d.teacher_ends for d in some])):
                tokens = Ragged.of(ends)
                before = starts_of([int(one[-1]) + 1 for one in ends])  # one document after the other
                keys = tokens.values + np.repeat(before[:-1], tokens.counts)
                at = before[document - start]
                begin = np.where(
                    first > 0, np.searchsorted(keys, at + first, side="right"), tokens.starts[document - start]
                )
                out[rows, side] = np.searchsorted(keys, at + last, side="right") - begin
        starts = self.pair.student_vocab.start_id, self.pair.teacher_vocab.start_id
        return out + np.array([start is not None for start in starts])

    @property
    def scored_bytes(self) -> int:
        return int((self.table[:, 3] - self.table[:, 2]).sum())

    @property
    def fingerprint(self) -> str:
        """Hash of the windows in both tokenizations, whatever batches they come in."""
        digest = hashlib.sha256(f"{self.window} {self.pair.fingerprint}".encode())
        digest.update(np.ascontiguousarray(self.table).tobytes())
        for document in self.documents:
            digest.update(document.student_ids.tobytes() + document.teacher_ids.tobytes())
        return digest.hexdigest()

    def text(self, index: int) -> str:
        """The text of a window."""
        document, first, _, last = self.table[index]
        doc = self.documents[document]
        ids = doc.student_ids[_tokens_between(doc.student_ends, first, last)]
        return self.pair.student_vocab.bytes_of(ids).decode(errors="replace")

    def _sides(self, indices: Sequence[int]) -> tuple[Side, Side]:
        """The student's and the teacher's side of these windows, the document-start token included."""
        rows = self.table[indices]
        documents = [self.documents[number] for number in rows[:, 0].tolist()]
        return (
            _side([(d.student_ids, d.student_ends) for d in documents], rows, self.pair.student_vocab.start_id),
            _side([(d.teacher_ids, d.teacher_ends) for d in documents], rows, self.pair.teacher_vocab.start_id),
        )

    def ids(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The student's and the teacher's tokens of a window, int64, the document-start token included."""
        student, teacher = self._sides([index])
        return student.ids, teacher.ids

    def collate(self, indices: Sequence[int]) -> DistillBatch:
        """The batch of these windows, padded on the right to the longest."""
        indices = np.array(list(indices), dtype=np.int64)
        document, first, scored, _ = self.table[indices].T
        return self._collator.batch(*self._sides(indices), scored - first, document.copy(), indices)

    def chosen(self, limit: int | None = None) -> np.ndarray:
        """The numbers of all windows, or of ``limit`` of them spread evenly over the set."""
        if limit is None or limit >= len(self):
            return np.arange(len(self))
        return np.unique(np.linspace(0, len(self) - 1, limit).round().astype(int))

    def in_order(self, batch_size: int, limit: int | None = None) -> Iterator[DistillBatch]:
        """Batches for evaluation: all windows, or ``limit`` of them spread evenly over the set.

        Sorted by length, so that little is padded; of short windows twice or more times as many, where they fit into
        the places of ``batch_size`` full ones.
        """
        chosen = self.chosen(limit)
        size = self.table[chosen, 3] - self.table[chosen, 1]
        chosen = chosen[np.argsort(size, kind="stable")]
        start = 0
        while start < len(chosen):
            count = self.fitting(chosen[start:], batch_size)
            yield self.collate(chosen[start : start + count])
            start += count

    def fitting(self, ranked: np.ndarray, batch_size: int) -> int:
        """How many of the first of these windows, ranked by length, fit into the places of ``batch_size`` full ones.

        A multiple of ``batch_size``, so that full windows come in the batches that they always came in.
        """
        times = 1
        while times * batch_size < len(ranked):
            longest = self.lengths[ranked[: (times + 1) * batch_size]].max()
            if (times + 1) * longest > self.window:
                break
            times += 1
        return times * batch_size


class DistillData:
    """Training and held-out windows of a pair of tokenizers. Made by :func:`build_data`.

    Attributes:
        pair: the tokenizers. window: tokens of a window on either side, at most. batch_size: windows, or rows of them,
            per batch. batching: which windows share a batch, and how much of it is padding.
        train, held_out: :class:`WindowSet`.
    """

    def __init__(self, train: WindowSet, held_out: WindowSet, *, batch_size: int, pack: bool | None = None):
        self.pair = train.pair
        self.window = train.window
        self.batch_size = batch_size
        self.train = train
        self.held_out = held_out
        self.batching = Batching(train.lengths, window=train.window, batch_size=batch_size, pack=pack)

    @property
    def unit(self) -> str:
        """What a batch has ``batch_size`` of: "windows", or "rows" of windows side by side."""
        return "rows" if self.batching.arrangement == "rows" else "windows"

    @property
    def batches_per_epoch(self) -> int:
        """Whole batches in one pass; a set smaller than a batch is one batch."""
        return self.batching.per_epoch

    def indices(self, seed: int, position: int) -> np.ndarray:
        """The windows of batch number ``position``: a pure function of (seed, epoch, place within the epoch)."""
        return self.batching.indices(seed, position)

    def batches(
        self,
        seed: int,
        positions: Iterable[int],
        *,
        workers: int = 0,
        timeout: float = 300.0,
        on_trouble: Callable[[str, Path | None], None] | None = None,
        dump_folder: Path | None = None,
        then: Callable[[DistillBatch], object] | None = None,
    ) -> Iterator[DistillBatch]:
        """The batches at these positions, in order, fetched ahead; see :func:`kd_kit.loading.batches`."""
        return loading.batches(
            self,
            seed,
            positions,
            workers=workers,
            timeout=timeout,
            on_trouble=on_trouble,
            dump_folder=dump_folder,
            then=then,
        )

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides which batch is which, but for ``batching.arrangement``: tokens, windows,
        sizes."""
        digest = hashlib.sha256(f"{self.window} {self.batch_size} {self.pair.fingerprint}".encode())
        for windows in (self.train, self.held_out):
            digest.update(np.ascontiguousarray(windows.table).tobytes())
            for document in windows.documents:
                digest.update(document.student_ids.tobytes() + document.teacher_ids.tobytes())
        return digest.hexdigest()

    def __repr__(self) -> str:
        lines = []
        for name, windows in (("train", self.train), ("held out", self.held_out)):
            tokens = sum(len(d.student_ids) for d in windows.documents)
            other = sum(len(d.teacher_ids) for d in windows.documents)
            size = sum(int(d.student_ends[-1]) for d in windows.documents)
            lines.append(
                f"{name:8}  {len(windows.documents):,} documents, {size / 1e6:.2f} MB, {len(windows):,} windows, "
                f"{tokens:,} student tokens ({size / tokens:.2f} bytes each), {other:,} teacher tokens "
                f"({size / other:.2f})"
            )
            if windows.report.refused:
                lines.append("          " + repr(windows.report).replace("\n", "\n          "))
        batching, rows = self.batching, ""
        if self.unit == "rows":
            rows = f", {len(self.train) / (len(batching.units.starts) - 1):.1f} windows side by side in each"
        lines.append(
            f"batches   {self.batch_size} {self.unit} of at most {self.window} tokens on either side{rows}, "
            f"{self.batches_per_epoch:,} per epoch"
        )
        how = {"shuffled": "", "rows": " in rows", "lengths": " with windows of like length together"}
        if batching.arrangement != "shuffled" or batching.padding > LEAST_SAVED:
            lines.append(
                f"padding   {batching.padding:.0%} of all places in shuffled batches, "
                f"{batching.measured_padding():.0%}{how[batching.arrangement]}"
            )
        return "\n".join(lines)


def build_data(
    texts,
    tokenizers: TokenizerPair,
    *,
    held_out=0.05,
    column: str = "text",
    config: str | None = None,
    split: str | None = None,
    template: str | Template | None = None,
    deduplicate: bool = False,
    window: int = 512,
    batch_size: int = 8,
    pack: bool | None = None,
    stride: int | None = None,
    maximum: int | None = None,
    seed: int = 0,
    max_characters: int = MAX_CHARACTERS,
    max_refused: float = 0.5,
    quarantine: str | Path | None = None,
) -> DistillData:
    """Texts to windows that both tokenizers can be compared on, with some documents held out.

    Rows that cannot be used are left out and counted, see :func:`kd_kit.rows.read_texts`; ``data.train.report`` and
    ``data.held_out.report`` show them. The tokens of 4,000,000 characters or more are kept in a file of ``datasets``'
    cache and read back by the next call, see :func:`kd_kit.tokenised.tokenise`.

    Args:
        texts: a list of strings, a ``datasets`` object, or the name of a file, a folder or a data set of the hub
            (:func:`kd_kit.text_files.named_texts`); one entry is one document.
        held_out: texts of the same kinds to evaluate on, or the share of documents to set apart for it.
        column: where rows of several fields keep their text, or their conversation: a list of messages.
        config: of a data set of the hub. split: of it, or of a ``DatasetDict``.
        template: how a conversation becomes text, which both models then read as plain text: "student" or "teacher",
            the chat template of that tokenizer; a function of the messages; ``role: content`` paragraphs if left out.
        deduplicate: leave out texts that an earlier row has, too; they are counted in any case.
        window: tokens of a window, at most, on either side, the document-start token included.
        batch_size: windows, or rows of them, per batch (of one device; see ``accumulation`` of the trainer for more).
        pack: put short windows side by side into rows of ``window`` tokens, and ``batch_size`` rows into a batch. Left
            out: where shuffled batches would be more than a tenth padding. False: windows of like length share a
            batch there, which then holds fewer tokens; for a model that does not keep windows in one row apart.
        stride: tokens that each held-out window scores; the rest of it is context. Half a window if left out.
        maximum: read no more than this many documents; needed for the hub and for streams.
        seed: of the choice of held-out documents.
        max_characters: a longer document is refused.
        max_refused: share of the rows, of ``texts`` and of held-out texts each, that may be refused; 1 for any.
        quarantine: a file to write all refused rows to, see :func:`kd_kit.rows.save_refused`; written before an error
            about them, too.

    Raises:
        ValueError: nothing readable, too much of it refused, a missing column, a window too small, or too few documents
            to hold any out.
    """
    if window < 8:
        raise ValueError(f"build_data: expected a window of at least 8 tokens, got {window}")
    if batch_size < 1:
        raise ValueError(f"build_data: expected a batch_size of at least 1, got {batch_size}")
    if not 0 <= max_refused <= 1:
        raise ValueError(f"build_data: expected max_refused as a share between 0 and 1, got {max_refused}")
    if max_characters < 1:
        raise ValueError(f"build_data: expected max_characters of at least 1, got {max_characters}")
    share = isinstance(held_out, (int, float))
    if share and not 0 < held_out < 1:
        raise ValueError(
            f"build_data: expected held_out between 0 and 1, or texts, got {held_out}; what is learned is measured "
            "on text that was not trained on"
        )
    report, held_report = RowReport(), RowReport(source="texts" if share else "held_out")
    limits = {
        "max_characters": max_characters,
        "max_refused": max_refused,
        "special": _special_tokens(tokenizers),
        "template": template_of(template, tokenizers),
        "deduplicate": deduplicate,
    }
    texts, of_texts = _opened(texts, maximum, column, config, split)
    held_out, of_held_out = (held_out, None) if share else _opened(held_out, maximum, column, config, split)
    try:
        documents, _ = read_texts(texts, column=of_texts, maximum=maximum, report=report, **limits)
        if share:
            documents, held_texts = _set_apart(documents, held_out, seed, report, held_report)
        else:
            limit = maximum if _is_stream(held_out) else None
            held_texts, _ = read_texts(held_out, column=of_held_out, maximum=limit, report=held_report, **limits)

        def check() -> None:
            for reports in [[report, held_report]] if share else [[report], [held_report]]:
                refuse_share(reports, max_refused)

        train = WindowSet(documents, tokenizers, window=window, stride=None, report=report, check=check)
        stride = stride or window // 2
        held = WindowSet(held_texts, tokenizers, window=window, stride=stride, report=held_report, check=check)
    finally:
        if quarantine is not None:
            save_refused(quarantine, [report, held_report])
    return DistillData(train, held, batch_size=batch_size, pack=pack)


def _opened(texts, maximum: int | None, column: str, config: str | None, split: str | None):
    """Texts by name as the values of their column, one split of a ``DatasetDict``, anything else as it is; and the
    column that is yet to be taken."""
    try:
        if not isinstance(texts, (str, Path)):
            return one_split(texts, split), column
        if isinstance(texts, str) and not could_be_named(texts):
            return texts, column  # a text, which is refused as one
        rows, where = named_texts(texts, column=column, config=config, split=split)
    except ValueError as error:
        raise ValueError(f"build_data: {error}") from error
    if maximum is None and where.startswith("the hub"):
        raise ValueError(
            f"build_data: expected maximum= with a data set of the hub, got none for {where}; pass how many documents "
            "to read of it, maximum=20_000"
        )
    return rows, None


def _is_stream(texts) -> bool:
    return hasattr(texts, "__iter__") and not hasattr(texts, "__len__")


def _special_tokens(tokenizers: TokenizerPair) -> set[str]:
    """How both tokenizers write their special tokens."""
    both = tokenizers.teacher, tokenizers.student
    return {token for tokenizer in both for token in getattr(tokenizer, "all_special_tokens", ())}


def _set_apart(
    documents: list[str], share: float, seed: int, report: RowReport, held_report: RowReport
) -> tuple[list[str], list[str]]:
    """Training and held-out documents; the reports are divided likewise, refused rows stay with the first."""
    if len(documents) < 2:
        raise ValueError(
            "build_data: expected at least two documents to hold some out, got one; "
            "split it, or pass held_out=[other texts]"
        )
    count = min(max(1, round(share * len(documents))), len(documents) - 1)
    apart = set(np.random.Generator(np.random.PCG64(seed)).permutation(len(documents))[:count].tolist())
    held_report.read, held_report.kept = count, [report.kept[i] for i in sorted(apart)]
    report.kept = [row for i, row in enumerate(report.kept) if i not in apart]
    report.read -= count
    return [d for i, d in enumerate(documents) if i not in apart], [documents[i] for i in sorted(apart)]
