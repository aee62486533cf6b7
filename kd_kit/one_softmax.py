"""The student's log-probabilities of a few tokens a row, from one pass over its head and one softmax.

What a distillation loss looks at is small: the target's log-probability, those of the teacher's cells, and of all the
rest together. So the pass hands out these and keeps the logits of one chunk at most; whatever a loss does with them is
ordinary autograd on small tensors. Its backward pass makes the other chunks' logits again and turns the gradients that
arrive into the logits' gradient in one softmax, in float32. A loss scaler's factor is in what arrives, so nothing is
lost in float16.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kd_kit.losses.support import EMPTY_TAIL, OUT
from kd_kit.reduce import chunks

_CACHE = 2 * 2**20  # bytes of logits worked on at once: what a processor's cache holds
_CACHE_OF_A_CARD = 32 * 2**20  # large enough that starting an operation costs nothing


@dataclass(frozen=True)
class Read:
    """Which tokens of each row are asked for.

    Attributes:
        ids: [N, K] int64. With a tail, no id twice among the used ones of a row.
        used: [N, K] bool, None for all.
        tail: give also the log-probability of all tokens but the used ones, as column K.
        among: [V] bool, tokens over which the student is normalised; None for all. Only with a tail.
    """

    ids: Tensor
    used: Tensor | None = None
    tail: bool = True
    among: Tensor | None = None


def log_probs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    reads: Sequence[Read],
    *,
    chunk: int,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The target's log-probability of every row, and those that are read; gradient to hidden states and head.

    At most ``chunk`` rows of logits are in memory at a time. Those of the last chunk are kept for the backward pass,
    which begins with them and would need that memory anyway.

    Shapes:
        hidden: [N, D]
        weight: [V, D], bias: [V] or None
        targets: [N] int64
        returns: [N] float32, and for every read [N, K + 1] float32 (-inf where unused), or [N, K] without a tail

    Source: the gradient of a softmax from its own output, as in Liger Kernel, Hsu et al. 2024, section 3.2,
        https://arxiv.org/abs/2410.10989; recomputed here, which that leaves out
    """
    plan = _Plan(tuple(reads), chunk, scale, softcap)
    target, *found = _LogProbs.apply(hidden, weight, bias, targets, plan)
    return target, found


@dataclass(frozen=True)
class _Plan:
    reads: tuple[Read, ...]
    chunk: int
    scale: float
    softcap: float | None

    @property
    def base(self) -> int | None:
        """The read whose softmax over the whole vocabulary serves the targets, too."""
        return next((n for n, read in enumerate(self.reads) if read.tail and read.among is None), None)

    def parts(self, rows: int) -> list[slice]:
        """Chunks of rows; the first one is what is left over, so that the last, which is kept, is a whole one."""
        first = rows % self.chunk
        whole = [slice(first + part.start, first + part.stop) for part in chunks(rows - first, self.chunk)]
        return ([slice(0, first)] if first else []) + whole

    def logits(self, raw: Tensor) -> Tensor:
        """Float32; the same memory where nothing has to be done."""
        logits = raw.float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class _LogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, plan: _Plan):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        n = len(hidden)

        def empty(*shape):
            return torch.empty(*shape, device=hidden.device, dtype=torch.float32)

        target, log_z = empty(n), empty(n)
        outs = [empty(n, read.ids.shape[1] + read.tail) for read in plan.reads]
        tails = [empty(n if read.tail else 0) for read in plan.reads]
        kept, parts = None, plan.parts(n)
        with torch.autocast(device, enabled=False):
            cast, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in parts:
                raw = nn.functional.linear(hidden[rows].to(dtype), cast, shift)
                for some, at in _blocks(raw, rows):
                    _read(plan, plan.logits(raw[some]), at, targets, target, log_z, outs, tails)
                if rows is parts[-1] and any(ctx.needs_input_grad):
                    kept = raw
        ctx.plan, ctx.dtype, ctx.kept = plan, dtype, kept
        ctx.save_for_backward(hidden, weight, bias, targets, log_z, *tails, *outs)
        return target, *outs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, to_target, *to_outs):
        plan, dtype = ctx.plan, ctx.dtype
        hidden, weight, bias, targets, log_z, *rest = ctx.saved_tensors
        tails, outs = rest[: len(plan.reads)], rest[len(plan.reads) :]
        kept, ctx.kept = ctx.kept, None  # a second backward pass makes it anew
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if wants_hidden else None
        of_weight = of_bias = None
        arriving = _Arriving(plan, to_target, to_outs, outs, tails)
        with torch.autocast(hidden.device.type, enabled=False):
            cast, shift = weight.to(dtype), None if bias is None else bias.to(dtype)
            for rows in reversed(plan.parts(len(hidden))):
                some_hidden = hidden[rows].to(dtype)
                raw = kept if kept is not None else nn.functional.linear(some_hidden, cast, shift)
                kept = None
                for some, at in _blocks(raw, rows):
                    block = raw[some]
                    found = arriving.at_logits(plan.logits(block), at, targets, log_z)
                    if found is not block:
                        block.copy_(found)
                if wants_hidden:
                    of_hidden[rows] = (raw @ cast).to(hidden.dtype)
                if wants_weight and of_weight is not None and dtype == torch.float32:
                    of_weight.addmm_(raw.T, some_hidden)
                elif wants_weight:
                    product = (raw.T @ some_hidden).float()
                    of_weight = product if of_weight is None else of_weight.add_(product)
                if wants_bias:
                    added = raw.sum(0, dtype=torch.float32)
                    of_bias = added if of_bias is None else of_bias.add_(added)
                del raw
        return (
            of_hidden,
            None if of_weight is None else of_weight.to(weight.dtype),
            None if of_bias is None else of_bias.to(bias.dtype),
            None,
            None,
        )


def _blocks(raw: Tensor, rows: slice) -> Iterator[tuple[slice, slice]]:
    """Blocks of a chunk's rows: where they are in the chunk, and where among all rows."""
    for part in chunks(len(raw), rows_at_once(raw.device, raw.shape[1])):
        yield part, slice(rows.start + part.start, rows.start + part.stop)


def rows_at_once(device: torch.device, width: int) -> int:
    """Rows of float32 numbers that are worked on at once, so that they stay in a processor's cache meanwhile."""
    return max(1, (_CACHE if device.type == "cpu" else _CACHE_OF_A_CARD) // (4 * width))


def _read(plan: _Plan, logits: Tensor, at: slice, targets, target, log_z, outs, tails) -> None:
    """Fill in what is asked of one block of rows. ``logits`` is left as it is."""
    for number, read in enumerate(plan.reads):
        if not read.tail:
            continue
        ids, used = read.ids[at], None if read.used is None else read.used[at]
        over = logits if read.among is None else logits.masked_fill(~read.among, OUT)
        cells = over.gather(-1, ids)
        if used is None:
            outside = over.scatter(-1, ids, OUT)
        else:  # an unused cell's logit stays outside, with the tail
            outside = over.scatter(-1, ids, torch.where(used, OUT, cells))
            cells = cells.masked_fill(~used, OUT)
        tail = _log_sum_exp(outside)
        # nothing may be left for the tail: K = V with every cell used, or all other logits masked
        empty = tail <= OUT / 2  # NaN is not
        tail = torch.where(empty, cells.logsumexp(-1, keepdim=True) + math.log(EMPTY_TAIL), tail)
        every = torch.cat([cells, tail], dim=-1)
        whole = every.logsumexp(-1, keepdim=True)
        every -= whole
        if used is not None:
            every[:, :-1].masked_fill_(~used, -math.inf)
        outs[number][at], tails[number][at] = every, tail.masked_fill(empty, math.inf).squeeze(-1)
        if number == plan.base:
            log_z[at] = whole.squeeze(-1)
    if plan.base is None:
        log_z[at] = _log_sum_exp(logits.clone()).squeeze(-1)
    target[at] = logits.gather(-1, targets[at].unsqueeze(-1)).squeeze(-1) - log_z[at]
    for number, read in enumerate(plan.reads):
        if not read.tail:
            outs[number][at] = logits.gather(-1, read.ids[at]) - log_z[at].unsqueeze(-1)


def _log_sum_exp(logits: Tensor) -> Tensor:
    """[n, 1]; ``logits`` is used up."""
    most = logits.amax(-1, keepdim=True)
    # a row of nothing but OUT, or one with an infinite logit, must not become NaN by the subtraction
    safe = torch.where(most.isfinite(), most, 0.0)
    return logits.sub_(safe).exp_().sum(-1, keepdim=True).log_().add_(safe)


class _Arriving:
    """The gradients that arrive at what was read, ready to be turned into that of the logits.

    With g the gradients of a read's log-probabilities, G their sum, and tail the log-sum-exp outside its cells:

        outside the cells   exp(z - tail) * (g_tail - G * exp(log-probability of the tail))
        at a cell j         g_j - G * exp(log-probability of j)

    so that nothing is divided by a tail that may be as good as empty.
    """

    def __init__(self, plan: _Plan, to_target, to_outs, outs, tails):
        self.plan = plan
        self.tails = tails
        self.to_target = self.whole = to_target.float()
        self.given: list[Tensor] = []  # what arrives at the tokens themselves
        for read, g in zip(plan.reads, to_outs, strict=True):
            self.given.append(g.float())
            if not read.tail:  # shares the targets' softmax over the whole vocabulary
                self.whole = self.whole + self.given[-1].sum(-1)
        self.cells: list[Tensor | None] = []  # the gradient of the logits at the cells, and its factor outside them
        self.outside: list[Tensor | None] = []
        for number, (read, g, out) in enumerate(zip(plan.reads, self.given, outs, strict=True)):
            if not read.tail:
                self.cells.append(None)
                self.outside.append(None)
                continue
            # a tail that holds nothing is a constant, whatever the logits are
            to_cells, to_tail = g[:, :-1], g[:, -1:].masked_fill(tails[number].isinf().unsqueeze(-1), 0.0)
            if read.used is not None:
                to_cells = torch.where(read.used, to_cells, 0.0)
            total = to_cells.sum(-1, keepdim=True) + to_tail
            if number == plan.base:
                total = total + self.whole.unsqueeze(-1)
            self.cells.append(to_cells - total * out[:, :-1].exp())
            self.outside.append(to_tail - total * out[:, -1:].exp())

    def at_logits(self, logits: Tensor, at: slice, targets: Tensor, log_z: Tensor) -> Tensor:
        """The gradient of a block of raw logits, float32. ``logits`` is used up."""
        plan = self.plan
        slope = None if plan.softcap is None else 1 - (logits / plan.softcap).square()
        others = [
            self._of_read(number, logits.clone(), at)
            for number, read in enumerate(plan.reads)
            if read.tail and number != plan.base
        ]
        if plan.base is None:
            found = logits.sub_(log_z[at].unsqueeze(-1)).exp_().mul_(-self.whole[at].unsqueeze(-1))
        else:
            found = self._of_read(plan.base, logits, at)
        for other in others:
            found += other
        found.scatter_add_(-1, targets[at].unsqueeze(-1), self.to_target[at].unsqueeze(-1))
        for read, g in zip(plan.reads, self.given, strict=True):
            if not read.tail:
                found.scatter_add_(-1, read.ids[at], g[at])
        if slope is not None:
            found *= slope
        return found if plan.scale == 1.0 else found.mul_(plan.scale)

    def _of_read(self, number: int, logits: Tensor, at: slice) -> Tensor:
        read = self.plan.reads[number]
        if read.among is not None:
            logits.masked_fill_(~read.among, OUT)
        ids, cells = read.ids[at], self.cells[number][at]
        found = logits.sub_(self.tails[number][at].unsqueeze(-1)).exp_().mul_(self.outside[number][at])
        if read.used is not None:
            cells = torch.where(read.used[at], cells, found.gather(-1, ids))
        return found.scatter_(-1, ids, cells)
