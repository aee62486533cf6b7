"""How far a cache's targets are from what the live teacher says, and what fewer cells would leave unsaid.

On a few windows, with two kinds of figures. *As read back*: what the cache gives out beside what the teacher says now,
over the same cells; this is how far the targets are from those of a live run. *By K*: KL(teacher over all tokens ||
cache of K cells) where the cache's tail is spread evenly over the tokens without a cell. By the chain rule that is the
sum of what the tail leaves open and of what rounding the cells and the tail changes; mass without a home in the
student's vocabulary, to which no K gives a cell, stays out of the spread.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kd_kit.readings import Reading, Where
from kd_kit.table import Table, short
from kd_kit.teacher import LiveTeacher
from kd_kit.types import Cells, DistillBatch, TeacherSignal

FEWEST = 8
"""Cells of the first line of a table by K; every further line has twice as many."""

_FIGURES = ("tail", "open", "half", "full")
"""Of a line: mass in the tail, KL that it leaves open, KL by rounding to half and to full precision."""


class Fidelity:
    """Collects the figures batch by batch; see the head of this file for what they are.

    Args:
        live: the teacher that the cache was built with.
    """

    def __init__(self, live: LiveTeacher):
        self._live = live
        self._sums: dict[str, list[Tensor]] = {}
        self._by_k: dict[str, list[Tensor]] = {}
        self._lines = {r.key: _Lines(r) for r in live.needs.readings if not getattr(r, "sampled", False)}

    @property
    def teacher(self) -> LiveTeacher:
        """To be asked about the windows: for what is stored, and for the figures by K."""
        live = self._live
        needs = replace(live.needs, readings=(*live.needs.readings, *self._lines.values()))
        return LiveTeacher(live.model, live.bridge, needs, more_experts=live.more_experts)

    def add(self, batch: DistillBatch, truth: TeacherSignal, told: TeacherSignal) -> None:
        """A batch: what :attr:`teacher` says of it, and what the cache does."""
        for reading in self._live.needs.readings:
            key = reading.key
            self._note(f"KL in nats, {key}", rounding(truth.cells[key], told.cells[key]))
            if (lines := self._lines.get(key)) is not None:
                self._by_k.setdefault(key, []).append(lines.figures(truth.cells[lines.key]).cpu())
        if truth.row_states is not None:
            self._note("1 - cos, final states", _turned(truth.row_states, told.row_states))
        if truth.span_log_probs is not None:
            gap = (truth.span_log_probs - told.span_log_probs).abs()[batch.span_mask.to(told.span_log_probs.device)]
            self._note("mean |difference| in nats, span log-probabilities", gap)
        for layer, states in truth.states.items():
            self._note(f"1 - cos, states of layer {layer}", _turned(states, told.states[layer]))
        for layer, routing in truth.routing.items():
            self._note(f"KL in nats, routing of layer {layer}", _kl(_logs(routing), _logs(told.routing[layer])))

    def _note(self, what: str, each: Tensor) -> None:
        self._sums.setdefault(what, []).append(each.double().cpu())

    @property
    def found(self) -> dict[str, Any]:
        """Means over positions, as plain JSON: ``read_back`` {what: value}, and ``by_k`` {reading: [a line per K]}."""
        by_k = {}
        for key, each in self._by_k.items():
            if len(figures := torch.cat(each)):
                ks = self._lines[key].ks
                by_k[key] = [
                    {"k": k} | dict(zip(_FIGURES, line, strict=True))
                    for k, line in zip(ks, figures.mean(0).tolist(), strict=True)
                ]
        means = {what: _mean(torch.cat(each)) for what, each in self._sums.items()}
        return {"read_back": means, "by_k": by_k}


def fidelity_tables(found: dict[str, Any]) -> Iterable[Table]:
    """What :attr:`Fidelity.found` says by K, a table per reading."""
    for key, lines in found["by_k"].items():
        rows = tuple(
            (f"{line['k']:,}", f"{line['tail']:.3f}", *(short(line[name]) for name in _FIGURES[1:])) for line in lines
        )
        yield Table(
            f"{key}: KL in nats between the teacher and a cache of K cells, the two parts of it",
            ("K", "mass in the tail", "left open by the tail", "rounding, half", "rounding, full"),
            rows,
        )


def rounding(truth: Cells, told: Cells) -> Tensor:
    """[n] KL(truth || told) over the same cells and the tail, in nats; what is told is renormalised.

    Shapes:
        truth, told: K cells in the same order, n rows
    """
    return _kl(_with_tail(truth), _with_tail(told))


class _Lines:
    """A reading for figures: its "cells" are those of :data:`_FIGURES` for every K, at every position.

    Made where the teacher's whole distribution is, which is too large to be kept.
    """

    def __init__(self, reading: Reading):
        self._reading = reading
        self.over, self.rows = reading.over, reading.rows
        self.key = f"{reading.key}, figures by K"
        self.ks = [k for n in range(20) if (k := FEWEST << n) < reading.top_k] + [reading.top_k]
        self.top_k = len(self.ks) * len(_FIGURES)

    def read(self, probs: Tensor, where: Where) -> Cells:
        found = by_k(self._reading.whole(probs, where), self.ks)
        return Cells(None, found.flatten(1).float(), found.new_zeros(len(found)))

    def figures(self, cells: Cells) -> Tensor:
        """[n, lines, figures] double"""
        return cells.log_probs.view(-1, len(self.ks), len(_FIGURES)).double()


def by_k(whole: Tensor, ks: Sequence[int]) -> Tensor:
    """What caches of the K largest cells would hold of distributions; see the head of this file.

    Shapes:
        whole: [n, V + 1], probabilities of every token, the last column mass that no token has
        returns: [n, len(ks), 4] double: mass in the tail, KL in nats that it leaves open (0 where the tail is even),
            and KL in nats by rounding cells and tail to float16 and to float32
    """
    size = whole.shape[-1] - 1
    probs = whole[:, :-1]
    kept = probs.topk(max(ks), dim=-1).values.double()
    probs = probs.double()
    mass, sums = probs.sum(-1), torch.xlogy(probs, probs).sum(-1)
    homeless = whole[:, -1].double()
    lines = []
    for k in ks:
        cells = kept[:, :k]
        rest = (mass - cells.sum(-1)).clamp(min=0)
        spread = sums - torch.xlogy(cells, cells).sum(-1) + rest * math.log(max(size - k, 1)) - torch.xlogy(rest, rest)
        left_open = spread.clamp(min=0) if k < size else torch.zeros_like(rest)
        tail = rest + homeless
        exact = Cells(None, cells.log(), tail.clamp(min=1e-7).log())
        rounded = [rounding(exact, exact.mapped(lambda t, to=to: t.to(to))) for to in (torch.half, torch.float)]
        lines.append(torch.stack([tail, left_open, *rounded], dim=-1))
    return torch.stack(lines, dim=1)


def _with_tail(cells: Cells) -> Tensor:
    """[n, K + 1] double, normalised."""
    log_probs = torch.cat([cells.log_probs, cells.tail[:, None]], dim=-1).double()
    return log_probs - log_probs.logsumexp(-1, keepdim=True)


def _kl(truth: Tensor, told: Tensor) -> Tensor:
    """[n] KL along the last axis of log-probabilities, both renormalised."""
    truth, told = (t.double() - t.double().logsumexp(-1, keepdim=True) for t in (truth, told.to(truth.device)))
    terms = truth.exp() * (truth - told)
    return torch.where(truth.exp() > 0, terms, 0.0).sum(-1).clamp(min=0)


def _logs(probabilities: Tensor) -> Tensor:
    """What half precision rounds to nothing counts as the least that it knows."""
    return probabilities.float().clamp(min=2.0**-24).log()


def _turned(truth: Tensor, told: Tensor) -> Tensor:
    return (1 - torch.cosine_similarity(truth.double(), told.to(truth.device).double(), dim=-1)).clamp(min=0)


def _mean(each: Tensor) -> float:
    return float(each.mean()) if len(each) else 0.0  # no window has such a position
