"""How far a cache's targets are from what the live teacher says, and what fewer cells would leave unsaid.

On a few windows, with two kinds of figures. *As read back*: what the cache gives out beside what the teacher says now,
over the same cells. *By K*: the teacher is asked for several times as many cells, and what a cache of K cells would hold
is compared with that. There KL(teacher || cache) is taken with the cache's tail spread evenly over all outcomes that
have no cell, and is by the chain rule the sum of two parts: what the tail leaves open (its mass times the KL between
the teacher within the tail and an even spread), and what rounding K cells and tail to the precision changes.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kd_kit.readings import BridgeReading, Reading, StrictReading
from kd_kit.table import Table, short
from kd_kit.teacher import LiveTeacher
from kd_kit.types import Cells, DistillBatch, TeacherSignal

FEWEST = 8
"""Cells of the first line of a table by K; every further line has twice as many."""

_FINE = 1024
"""Cells that the teacher is asked for to judge fewer, at least; also at least four times those that are stored."""

_MOST = 2**22
"""Numbers of a batch that are looked at for every K."""


class Fidelity:
    """Collects the figures batch by batch; see the head of this file for what they are.

    Args:
        live: the teacher that the cache was built with.
    """

    def __init__(self, live: LiveTeacher):
        self._live = live
        self._sums: dict[str, list[Tensor]] = {}
        self._by_k: dict[str, dict[int, list[Tensor]]] = {}
        self._fine = {r.key: fine for r in live.needs.readings if (fine := _finer(r, live)) is not None}

    @property
    def teacher(self) -> LiveTeacher:
        """To be asked about the windows: for what is stored, and for the finer cells."""
        live = self._live
        readings = {r.key: r for r in (*live.needs.readings, *self._fine.values())}
        needs = replace(live.needs, readings=tuple(readings.values()))
        return LiveTeacher(live.model, live.bridge, needs, more_experts=live.more_experts)

    def add(self, batch: DistillBatch, truth: TeacherSignal, told: TeacherSignal) -> None:
        """A batch: what :attr:`teacher` says of it, and what the cache does."""
        for reading in self._live.needs.readings:
            key = reading.key
            self._note(f"KL in nats, {key}", rounding(truth.cells[key], told.cells[key]))
            if (fine := self._fine.get(key)) is not None:
                lines = self._by_k.setdefault(key, {})
                cells, outcomes = _some_rows(truth.cells[fine.key]), _outcomes(reading, self._live)
                for k in _powers(reading.top_k):
                    lines.setdefault(k, []).append(_by_k(cells, k, outcomes))
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
        lines = {
            key: [
                dict(zip(("k", "tail", "open", "half", "full"), (k, *torch.cat(each).mean(0).tolist()), strict=True))
                for k, each in of_k.items()
                if sum(map(len, each))
            ]
            for key, of_k in self._by_k.items()
        }
        means = {what: _mean(torch.cat(each)) for what, each in self._sums.items()}
        return {"read_back": means, "by_k": {key: each for key, each in lines.items() if each}}


def fidelity_tables(found: dict[str, Any]) -> Iterable[Table]:
    """What :attr:`Fidelity.found` says by K, a table per reading."""
    for key, lines in found["by_k"].items():
        rows = tuple(
            (f"{line['k']:,}", f"{line['tail']:.3f}", *(short(line[name]) for name in ("open", "half", "full")))
            for line in lines
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


def left_open(fine: Cells, k: int, outcomes: int) -> Tensor:
    """[n] KL in nats between the teacher and its K largest cells with their tail spread evenly over the other outcomes.

    Zero where the tail is even, or empty. What ``fine`` itself has in its tail counts as one lump, so this is the least
    that it can be; exact where every token has a cell.

    Args:
        fine: more than ``k`` cells, the largest first.
        outcomes: tokens that may have a cell, and one more for mass that none of them has.
    """
    beyond = _with_tail(fine)[:, k:]  # cells k.. and the lump
    size = torch.ones(beyond.shape[-1], dtype=torch.double, device=beyond.device)
    size[-1] = max(outcomes - fine.log_probs.shape[-1], 1)
    mass = beyond.logsumexp(-1, keepdim=True)
    terms = beyond.exp() * (beyond - mass - (size / size.sum()).log())
    return torch.where(beyond.exp() > 0, terms, 0.0).sum(-1).clamp(min=0)


def _by_k(fine: Cells, k: int, outcomes: int) -> Tensor:
    """[n, 4]: mass in the tail of K cells, KL that it leaves open, KL by rounding to half and to full precision."""
    whole = _with_tail(fine)
    tail = whole[:, k:].logsumexp(-1)
    kept = Cells(None, whole[:, :k], tail)
    stored = [rounding(kept, kept.mapped(lambda tensor, to=to: tensor.to(to))) for to in (torch.half, torch.float)]
    return torch.stack([tail.exp(), left_open(fine, k, outcomes), *stored], dim=-1).cpu()


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


def _some_rows(cells: Cells) -> Cells:
    """Every n-th row, so that a table over many cells does not take long."""
    step = -(-cells.log_probs.numel() // _MOST) or 1
    return cells.mapped(lambda tensor: tensor[::step])


def _turned(truth: Tensor, told: Tensor) -> Tensor:
    return (1 - torch.cosine_similarity(truth.double(), told.to(truth.device).double(), dim=-1)).clamp(min=0)


def _mean(each: Tensor) -> float:
    return float(each.mean()) if len(each) else 0.0  # no window has such a position


def _powers(top_k: int) -> list[int]:
    """8, 16, 32 up to the K that is stored, which is always the last."""
    return [k for n in range(20) if (k := FEWEST << n) < top_k] + [top_k]


def _outcomes(reading: Reading, live: LiveTeacher) -> int:
    """Everything that the teacher may say in a reading: tokens, and none of them."""
    if isinstance(reading, BridgeReading):
        return reading.bridge.student_size + 1
    return 1 + (int(reading.shared.sum()) if isinstance(reading, StrictReading) else live.bridge.teacher_size)


def _finer(reading: Reading, live: LiveTeacher) -> Reading | None:
    """The same reading with several times as many cells, itself where it has all; None of draws, without order."""
    if getattr(reading, "sampled", False):
        return None
    most = min(_outcomes(reading, live) - 1, max(4 * reading.top_k, _FINE))
    if most == reading.top_k:
        return reading
    fine = copy.copy(reading)
    fine.top_k = most
    fine.key = f"{reading.key}, in {fine.top_k} cells"
    return fine
