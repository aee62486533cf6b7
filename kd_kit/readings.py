"""Ways to read a teacher's next-token distribution for a student with another vocabulary.

A reading says at which positions of a batch it is about (``over``), and turns the teacher's probabilities there into
:class:`kd_kit.types.Cells`. The live teacher and the cache make cells with it; losses only see the cells. Two readings
with one ``key`` are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kd_kit.inside import InsideBridge
from kd_kit.losses import sampled_cells, sorted_cells, top_k_cells
from kd_kit.pair import TokenizerPair
from kd_kit.types import Cells
from kd_kit.vocab import Bridge


@dataclass(frozen=True)
class Where:
    """Rows of one depth that a reading is asked about.

    Attributes:
        depth: bytes read since the teacher's boundary, 0 at aligned positions.
        first, last: [n] int64, the range of teacher tokens that begin with these bytes, see ``DistillBatch.prefix``.
        place: [n] int64, a number that tells the position apart from all others of its data set, whatever batch it
            comes in.
        widest: the largest of these ranges, known on the host.
    """

    depth: int
    first: Tensor
    last: Tensor
    place: Tensor
    widest: int = 0


class BridgeReading:
    """The teacher's mass carried along a table to student tokens, the K largest cells and a tail.

    Args:
        name: of the way across: "bridge", "same" or "direct".
        bridge: the table, and what it knows about positions inside teacher tokens.
        top_k: K.
        sampled: draw K tokens instead of keeping the largest, see :func:`kd_kit.losses.sampled_cells`.
        over: "taught", or "aligned" to leave positions inside teacher tokens out.

    Raises:
        ValueError: K below 1 or above the student's vocabulary.
    """

    rows = None

    def __init__(self, name: str, bridge: Bridge, top_k: int | None, *, sampled: bool = False, over: str = "taught"):
        self.bridge = bridge
        self.over = over
        self.sampled = sampled
        self.plain = not sampled
        self.top_k = cells_within(top_k, bridge.student_size, "the student's vocabulary")
        self.key = f"{name} {over} {'sampled' if sampled else 'top'} {self.top_k}"

    def read(self, probs: Tensor, where: Where) -> Cells:
        """Cells of rows of one depth.

        Shapes:
            probs: [n, U] float32
        """
        carried = self.whole(probs, where)
        if self.sampled:
            return Cells(*sampled_cells(carried, self.top_k, where.place))
        return Cells(*top_k_cells(carried, self.top_k))

    def whole(self, probs: Tensor, where: Where) -> Tensor:
        """[n, V + 1] float32, what the cells are taken from: every token, and the mass that none of them has."""
        return self.bridge.project_at(probs, where.depth, where.first, where.last, where.widest)

    def among(self, size: int, device: torch.device) -> None:
        """All tokens."""


class SharedReading:
    """The teacher's distribution over the tokens that both vocabularies have, given that it says one of them.

    Only the rows of these tokens in the teacher's head are needed, a quarter of them for Qwen3 and SmolLM. What the
    teacher would give to all other tokens is not known, so what a student should say instead is not taught.

    Attributes:
        rows: [n] int64, the teacher's ids of these tokens. size: how many the student has.
    """

    over, plain = "aligned", True

    def __init__(self, pair: TokenizerPair, top_k: int | None):
        table = torch.from_numpy(pair.identical)
        self.rows = (table >= 0).nonzero().squeeze(-1)
        homes = table[self.rows]
        self._bridge = Bridge(homes, pair.student_vocab.size, len(self.rows))
        self._shared = torch.zeros(pair.student_vocab.size, dtype=torch.bool)
        self._shared[homes] = True
        self.size = int(self._shared.sum())
        self.top_k = cells_within(top_k, self.size, "the tokens that both vocabularies have")
        self.key = f"shared top {self.top_k}"

    def read(self, probs: Tensor, where: Where) -> Cells:
        """As :meth:`BridgeReading.read`; the tail holds what is shared and below the top K.

        Shapes:
            probs: [n, rows] float32, over ``rows``
        """
        return Cells(*top_k_cells(self.whole(probs, where), self.top_k))

    def whole(self, probs: Tensor, where: Where) -> Tensor:
        """As :meth:`BridgeReading.whole`, 0 for tokens that are not shared."""
        return self._bridge.project(probs)

    def among(self, size: int, device: torch.device) -> Tensor | None:
        """All tokens."""


class StrictReading(SharedReading):
    """Only positions where both sides' next tokens are the same bytes, and only tokens that both vocabularies have.

    Both sides are renormalised over those tokens.

    Source: the exact-match baseline of https://arxiv.org/abs/2610.08448
    """

    over = "same"

    def __init__(self, pair: TokenizerPair, top_k: int | None):
        super().__init__(pair, top_k)
        self._among: dict[tuple[int, torch.device], Tensor] = {}
        self.key = f"strict top {self.top_k}"

    def among(self, size: int, device: torch.device) -> Tensor:
        """[size] bool, the tokens of a student's head with ``size`` rows over which it is normalised, too."""
        if (size, device) not in self._among:
            mask = torch.zeros(size, dtype=torch.bool)  # rows behind the tokenizer's last entry are none of them
            mask[: len(self._shared)] = self._shared
            self._among[size, device] = mask.to(device)
        return self._among[size, device]


class SortedReading:
    """The K largest probabilities of the teacher, whatever tokens they belong to.

    Source: Boizard et al. 2024, "Towards cross-tokenizer distillation", https://arxiv.org/abs/2402.12030
    """

    over, plain, rows = "aligned", False, None

    def __init__(self, teacher_size: int, top_k: int | None):
        self.top_k = cells_within(top_k, teacher_size, "the teacher's vocabulary")
        self.key = f"sorted top {self.top_k}"

    def read(self, probs: Tensor, where: Where) -> Cells:
        """As :meth:`BridgeReading.read`; cells are ranks, so they have no ids."""
        log_probs, tail = sorted_cells(probs, self.top_k)
        return Cells(None, log_probs, tail)

    def whole(self, probs: Tensor, where: Where) -> Tensor:
        """As :meth:`BridgeReading.whole`, over the teacher's own tokens."""
        return torch.cat([probs, probs.new_zeros(len(probs), 1)], dim=-1)

    def among(self, size: int, device: torch.device) -> None:
        """All tokens."""


Reading = BridgeReading | SharedReading | SortedReading


@dataclass(frozen=True)
class Needs:
    """What the terms of a run ask of the teacher and of the student. ``a | b`` is what both need.

    Attributes:
        readings: of the teacher's distribution.
        row_states: its final hidden states at aligned rows. span_log_probs: of every span.
        teacher_states, student_states: layers whose hidden states are wanted.
        teacher_attention, student_attention: layers whose q, k and v are wanted.
        routing: layers of the teacher whose distribution over experts is wanted. routing_scores: what its routers make
            of their logits, where the family is not known.
    """

    readings: tuple[Reading, ...] = ()
    row_states: bool = False
    span_log_probs: bool = False
    teacher_states: frozenset[int] = frozenset()
    student_states: frozenset[int] = frozenset()
    teacher_attention: frozenset[int] = frozenset()
    student_attention: frozenset[int] = frozenset()
    routing: frozenset[int] = frozenset()
    routing_scores: str | None = None

    def __or__(self, other: Needs) -> Needs:
        if self.routing_scores and other.routing_scores and self.routing_scores != other.routing_scores:
            raise ValueError(
                f"router_term: expected one scores= for one teacher, got {self.routing_scores!r} and "
                f"{other.routing_scores!r}; read what its routers do and use that in every term"
            )
        known = {r.key: r for r in (*self.readings, *other.readings)}
        return Needs(
            tuple(known.values()),
            self.row_states or other.row_states,
            self.span_log_probs or other.span_log_probs,
            *(
                getattr(self, name) | getattr(other, name)
                for name in (
                    "teacher_states",
                    "student_states",
                    "teacher_attention",
                    "student_attention",
                    "routing",
                )
            ),
            routing_scores=self.routing_scores or other.routing_scores,
        )

    @property
    def teacher(self) -> bool:
        """Whether a teacher is needed at all."""
        return bool(
            self.readings
            or self.row_states
            or self.span_log_probs
            or self.teacher_states
            or self.teacher_attention
            or self.routing
        )


def cells_within(top_k: int | None, most: int, what: str) -> int:
    """``top_k``, or all cells for None.

    Raises:
        ValueError: fewer than 1 or more than there are.
    """
    if top_k is None:
        return most
    if not 1 <= top_k <= most:
        raise ValueError(f"kd_term: expected 1 <= top_k <= {most} ({what}), got {top_k}; lower top_k=")
    return top_k


def same_bridge(pair: TokenizerPair) -> InsideBridge:
    """The bridge between two vocabularies of one family: every id that means the same on both sides keeps its number.

    Special tokens included; what only the teacher has goes where its bytes send it.
    """
    teacher, student = pair.teacher_vocab, pair.student_vocab
    both = range(min(teacher.size, student.size))
    alike = [i for i in both if teacher.tokens[i] == student.tokens[i] != b""]
    bridge = InsideBridge(teacher, student, specials={i: i for i in alike if i in teacher.special})
    bridge.table[alike] = torch.tensor(alike)  # also an id whose bytes another id has too
    return bridge


def direct_bridge(teacher_size: int, student_size: int) -> Bridge:
    """Ids taken as they are, those beyond the student's vocabulary to the tail."""
    ids = torch.arange(teacher_size)
    return Bridge(torch.where(ids < student_size, ids, student_size), student_size, min(teacher_size, student_size))


def joined(parts: Sequence[Cells]) -> Cells:
    """Cells of several chunks of rows as one."""
    ids = None if parts[0].ids is None else torch.cat([p.ids for p in parts])
    return Cells(ids, torch.cat([p.log_probs for p in parts]), torch.cat([p.tail for p in parts]))


def empty_cells(reading: Reading, device: torch.device) -> Cells:
    """Cells of no rows."""
    log_probs = torch.zeros(0, reading.top_k, device=device)
    ids = None if isinstance(reading, SortedReading) else log_probs.long()
    return Cells(ids, log_probs, log_probs.new_zeros(0))
