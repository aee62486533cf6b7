"""What a teacher's head says at the positions that a batch asks about: every row passes the head once.

Which rows are asked, and in which order, is worked out on the host before anything is computed, so that no step waits
for the device to count. Between two products with the head, rows are worked on in blocks that fit a processor's cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from kd_kit.head import Head
from kd_kit.one_softmax import rows_at_once
from kd_kit.readings import Reading, Where, empty_cells, joined
from kd_kit.types import Cells, DistillBatch


def read_rows(
    head: Head,
    passes: Sequence[Tensor],
    batch: DistillBatch,
    here: DistillBatch,
    readings: Sequence[Reading],
    *,
    spans: bool = False,
) -> tuple[dict[str, Cells], Tensor | None]:
    """Every reading of the teacher's distribution, and the log-likelihood of every scored span.

    Args:
        head: the teacher's, without its padded rows; of the tokens that all readings look at, where these are fewer.
        passes: final hidden states; what is said is the mean over the passes, in probability space.
        batch, here: the batch on the teacher's device, and on the host.
        spans: sum the log-probabilities of the teacher's own tokens over each span.

    Shapes:
        passes: [B, S, E] each
        returns: {key: cells of the reading's rows}; [B, C] float32 where ``spans``, 0 where a span is not scored
    """
    passes = [hidden.flatten(0, 1) for hidden in passes]
    device = passes[0].device
    taught = _TaughtRows(here)
    masks = [taught.mask(reading.over) for reading in readings]
    own, targets, span_of = _span_rows(here) if spans else (np.zeros(0, np.int64),) * 3
    asked = np.logical_or.reduce(masks) if masks else np.zeros(len(taught.row), bool)
    wanted = np.unique(np.concatenate([taught.row[asked], own]))
    chunk = head.chunk_rows()
    block = min(rows_at_once(device, len(head.weight)), chunk)
    starts = _starts(len(wanted), chunk, block)
    plans = [_Groups.of(taught, mask, wanted, starts, device) for mask in masks]
    rows = torch.from_numpy(wanted).to(device)
    where = np.searchsorted(wanted, own)
    edges = np.searchsorted(where, [*starts, len(wanted)])
    where, targets = torch.from_numpy(where).to(device), torch.from_numpy(targets).to(device)
    parts: list[list[Cells]] = [[] for _ in readings]
    likely: list[Tensor] = []
    for number, (start, probs) in enumerate(_probabilities(head, passes, rows, starts, chunk)):
        for reading, plan, found in zip(readings, plans, parts, strict=True):
            for local, group in plan.in_block(number):
                some = probs if len(local) == len(probs) else probs[local]
                found.append(reading.read(_seen_by(reading, some), group))
        at = slice(edges[number], edges[number + 1])
        likely.append(probs[where[at] - start, targets[at]])
    cells = {
        reading.key: joined(found).mapped(plan.in_order) if found else empty_cells(reading, device)
        for reading, plan, found in zip(readings, plans, parts, strict=True)
    }
    if not spans:
        return cells, None
    out = torch.zeros(here.span_mask.numel(), device=device)
    if likely:
        # a token that float32 gives no probability at all makes its span unlikely, not impossible
        each = torch.cat(likely).clamp(min=torch.finfo(torch.float32).tiny).log()
        out.index_add_(0, torch.from_numpy(span_of).to(device), each)
    return cells, out.view(here.span_mask.shape)


def _seen_by(reading: Reading, probs: Tensor) -> Tensor:
    """The probabilities of the tokens that a reading looks at, given that it is one of them."""
    if reading.rows is None or probs.shape[1] == len(reading.rows):
        return probs
    some = probs[:, reading.rows.to(probs.device)]
    return some / some.sum(-1, keepdim=True).clamp(min=1e-30)


def _starts(count: int, chunk: int, block: int) -> np.ndarray:
    """Where the blocks begin: none reaches over the end of a chunk."""
    starts = [n for first in range(0, count, chunk) for n in range(first, min(first + chunk, count), block)]
    return np.array(starts, dtype=np.int64)


def _probabilities(
    head: Head, passes: Sequence[Tensor], rows: Tensor, starts: np.ndarray, chunk: int
) -> Iterator[tuple[int, Tensor]]:
    """(start, [n, U] float32) of every block of rows, the mean over the passes."""
    logits: list[Tensor] = []
    for start, end in pairwise([*starts.tolist(), len(rows)]):
        place = start % chunk
        if place == 0:
            logits.clear()  # before the next ones are made
            logits.extend(head.logits(hidden[rows[start : start + chunk]]) for hidden in passes)
        some = [torch.softmax(one[place : place + end - start], dim=-1) for one in logits]
        yield start, some[0] if len(some) == 1 else torch.stack(some).mean(0)


class _TaughtRows:
    """The taught positions of a batch, in order; on the host."""

    def __init__(self, here: DistillBatch):
        places, width = here.taught_rows.numpy(), here.student_ids.shape[1]
        window = places // width
        self._here, self._places = here, places
        self.row = window * here.teacher_ids.shape[1] + here.teacher_index.flatten().numpy()[places]
        self.depth, self.first, self.last = here.prefix.numpy().T
        # the window's number in its data set and the place within it, whatever the batch was padded to
        self.place = here.sample.numpy()[window] * 2**24 + places % width

    def mask(self, over: str) -> np.ndarray:
        """[M] bool, those that a reading over these positions is about."""
        return getattr(self._here, over).flatten().numpy()[self._places]


@dataclass(frozen=True)
class _Groups:
    """The rows of one reading, those of one block and one depth together.

    Attributes:
        local: [n] int64, the row within its block. where: of each row. back: [n] int64, undoes the order.
        groups: {block: (depth, first row, end, widest range of tokens)}.
    """

    local: Tensor
    first: Tensor
    last: Tensor
    place: Tensor
    back: Tensor
    groups: dict[int, list[tuple[int, int, int, int]]]

    @classmethod
    def of(cls, taught: _TaughtRows, mask: np.ndarray, wanted, starts, device) -> _Groups:
        chosen = np.flatnonzero(mask)
        spot = np.searchsorted(wanted, taught.row[chosen])
        block = np.searchsorted(starts, spot, side="right") - 1
        depth = taught.depth[chosen]
        order = np.lexsort((depth, block))  # stable: within a group they stay in order
        chosen, spot, block, depth = chosen[order], spot[order], block[order], depth[order]
        groups: dict[int, list[tuple[int, int, int, int]]] = {}
        edges = np.flatnonzero((np.diff(block) != 0) | (np.diff(depth) != 0)) + 1
        width = taught.last[chosen] - taught.first[chosen]
        for begin, end in zip([0, *edges], [*edges, len(chosen)], strict=True):
            if begin < end:
                one = int(depth[begin]), int(begin), int(end), int(width[begin:end].max())
                groups.setdefault(int(block[begin]), []).append(one)
        arrays = spot - starts[block], taught.first[chosen], taught.last[chosen], taught.place[chosen]
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        moved = (torch.from_numpy(np.ascontiguousarray(a)).to(device) for a in (*arrays, back))
        return cls(*moved, groups)

    def in_block(self, number: int) -> Iterator[tuple[Tensor, Where]]:
        for depth, begin, end, widest in self.groups.get(number, ()):
            some = slice(begin, end)
            yield self.local[some], Where(depth, self.first[some], self.last[some], self.place[some], widest)

    def in_order(self, tensor: Tensor) -> Tensor:
        return tensor[self.back]


def _span_rows(here: DistillBatch) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Flat teacher rows that predict the tokens of scored spans; those tokens; and the flat spans, all [n] int64."""
    b, c = here.span_mask.shape
    s = here.teacher_ids.shape[1]
    # teacher position i predicts token i + 1: it belongs to span c if span_teacher[c] <= i < span_teacher[c + 1]
    at = torch.arange(s).expand(b, s).contiguous()
    span = torch.searchsorted(here.span_teacher.contiguous(), at, right=True) - 1
    inside = (span >= 0) & (span < c)
    inside &= here.span_mask.gather(1, span.clamp(0, c - 1))
    rows = inside.flatten().nonzero().squeeze(-1)
    targets = here.teacher_ids.roll(-1, dims=1).flatten()[rows]
    spans = (torch.arange(b).unsqueeze(-1) * c + span).flatten()[rows]
    return rows.numpy(), targets.numpy(), spans.numpy()
