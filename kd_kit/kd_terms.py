"""Logit knowledge: the teacher's next-token distribution, by one of several ways across two vocabularies.

All ways are one term with one interface: a *reading* makes cells of the teacher's distribution, and a row loss
compares the student with them in the shared pass over the student's head.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from kd_kit.head import Head, LogitRows, Rows, head_of
from kd_kit.losses import (
    cross_entropy,
    forward_kl,
    jensen_shannon,
    reverse_kl,
    sampled_kl,
    skew_kl,
    sorted_distance_cells,
    span_divergence,
    tempered,
)
from kd_kit.ranges import RANGES
from kd_kit.readings import (
    BridgeReading,
    Needs,
    SharedReading,
    SortedReading,
    StrictReading,
    direct_bridge,
    same_bridge,
)
from kd_kit.reduce import masked_sum
from kd_kit.terms import LossTerm, Setup, name_of, nll_rows
from kd_kit.types import DistillBatch, LossValue, TeacherSignal

METHODS = ("bridge", "strict", "uld", "projector", "same", "direct")
"""Ways across two vocabularies, see :func:`kd_term`."""

Divergence = Callable[[Tensor, Tensor], Tensor]

DIVERGENCES = {f.__name__: f for f in (forward_kl, reverse_kl, jensen_shannon, skew_kl)}
"""Of :mod:`kd_kit.losses`, by name."""


def kd_term(
    weight: float = 0.7,
    *,
    method: str = "bridge",
    top_k: int | None = 64,
    divergence: Divergence | str = forward_kl,
    temperature: float = 1.0,
    inside: bool = True,
    sampled: bool = False,
    teacher_rows: str = "all",
    name: str = "kd",
) -> LossTerm:
    """Divergence from the teacher's next-token distribution, over its top K cells and the tail.

    Args:
        weight: share of the total relative to the other terms.
        method: how the teacher's distribution comes to the student's vocabulary.

            - "bridge": each teacher token's mass goes to the longest student token that its bytes begin with; inside
              teacher tokens, what is left of them. For any two tokenizers.
            - "strict": only where both sides' next tokens are the same bytes, over the tokens that both have.
            - "uld": L1 between the two sorted distributions, in [0, 2]. It ignores which token is which: a baseline.
            - "projector": a learned map from the teacher's hidden states into the student's, read by the student's own
              head. For vocabularies that share few tokens.
            - "same": for one tokenizer on both sides, or one that extends the other; padded heads may differ.
            - "direct": ids taken as they are; refused where they do not mean the same tokens.
        top_k: K, cells that are kept apart; all other mass goes to one tail cell. None keeps every cell.
        divergence: a function of :mod:`kd_kit.losses`, or its name: ``forward_kl``, ``reverse_kl``, ``jensen_shannon``,
            ``skew_kl``.
        temperature: T. The gradient is that of T^2 times the divergence at T; the reported value is always the one
            at T = 1, in nats, so that runs at different temperatures can be compared.
        inside: teach inside teacher tokens too; otherwise only where both stand at the same byte ("bridge", "same").
        sampled: K draws from the teacher instead of its K largest cells, an unbiased estimate of the forward KL over
            the whole vocabulary ("bridge", "same", "direct").
        teacher_rows: "shared" reads only those rows of the teacher's head whose tokens the student has, too: a step is
            faster, but the teacher is then heard only at aligned positions, and only given that it says one of these
            tokens ("bridge"; "strict" always does so).
        name: of the term, where a run has several of this kind.

    Raises:
        ValueError: an unknown method, ``top_k`` below 1, ``temperature`` not positive, or a divergence, temperature,
            ``sampled`` or ``teacher_rows`` that does not go with the method. When the trainer is built: K above the
            vocabulary, or tokenizers that the method does not suit.

    Source: Hinton, Vinyals, Dean 2015, section 2; the readings in :mod:`kd_kit.readings`
    """
    if method not in METHODS:
        raise ValueError(f"kd_term: expected method= one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if top_k is not None and (not isinstance(top_k, int) or top_k < 1):
        raise ValueError(f"kd_term: expected a whole top_k of at least 1, or None for all, got {top_k!r}")
    if not isinstance(temperature, (int, float)) or not 0 < temperature < math.inf:
        raise ValueError(f"kd_term: expected a temperature above 0, got {temperature!r}")
    divergence = DIVERGENCES.get(divergence, divergence) if isinstance(divergence, str) else divergence
    if not callable(divergence):
        raise ValueError(
            f"kd_term: expected divergence= one of {', '.join(DIVERGENCES)}, or a function of (student, teacher) "
            f"log-probabilities, got {divergence!r}"
        )
    plain = divergence is forward_kl and temperature == 1.0
    if method == "uld" and not plain:
        raise ValueError("kd_term: method='uld' is a distance of its own; leave divergence= and temperature= out")
    if sampled and (not plain or top_k is None or method not in ("bridge", "same", "direct")):
        raise ValueError(
            "kd_term: expected sampled=True with a number of draws (top_k=), the forward KL at temperature 1 and a "
            f"method that carries mass to tokens, got method={method!r}, top_k={top_k}, "
            f"divergence={name_of(divergence)}, temperature={temperature}"
        )

    if teacher_rows not in ("all", "shared"):
        raise ValueError(f"kd_term: expected teacher_rows='all' or 'shared', got {teacher_rows!r}")
    if teacher_rows == "shared" and (method != "bridge" or sampled):
        raise ValueError(
            f"kd_term: expected method='bridge' and sampled=False with teacher_rows='shared', got method={method!r}, "
            f"sampled={sampled}; leave teacher_rows= out"
        )

    def compare(student: Tensor, teacher: Tensor) -> Tensor:
        value = divergence(student, teacher)
        if temperature != 1.0:
            soft = temperature**2 * divergence(tempered(student, temperature), tempered(teacher, temperature))
            value = value.detach() + soft - soft.detach()
        return value

    def build(setup: Setup) -> dict:
        if method == "projector":
            return {"rows": Projected(setup, compare), "over": "aligned", "needs": Needs(row_states=True)}
        if method == "uld":
            reading = SortedReading(setup.pair.teacher_vocab.size, top_k)
            rows = _sorted_rows(reading.key)
        elif method == "strict" or teacher_rows == "shared":
            reading = (StrictReading if method == "strict" else SharedReading)(setup.pair, top_k)
            rows = _cell_rows(reading.key, compare)
        else:
            over = "taught" if inside and method != "direct" else "aligned"
            reading = BridgeReading(method, _table(method, setup), top_k, sampled=sampled, over=over)
            rows = _sampled_rows(reading.key) if sampled else _cell_rows(reading.key, compare)
        return {"rows": rows, "whole": method == "uld", "over": reading.over, "needs": Needs((reading,))}

    return LossTerm(
        name=name,
        weight=weight,
        **RANGES["kd uld" if method == "uld" else "kd sampled" if sampled else "kd"],
        build=build,
        settings={
            "method": method,
            "top_k": top_k,
            "divergence": name_of(divergence),
            "temperature": temperature,
            "inside": inside,
            "sampled": sampled,
            **({"teacher_rows": teacher_rows} if teacher_rows != "all" else {}),
        },
    )


def _table(method: str, setup: Setup):
    """The table that carries the teacher's mass, or a refusal with figures."""
    pair = setup.pair
    if method == "bridge":
        return pair.bridge
    if pair.kinship == "different":
        smaller = min(pair.teacher_vocab.size, pair.student_vocab.size)
        raise ValueError(
            f"kd_term(method={method!r}): expected one tokenizer on both sides, or one that extends the other, got "
            f"{pair.teacher_vocab.name!r} and {pair.student_vocab.name!r}, in which {pair.same_ids:,} of {smaller:,} "
            f"ids ({pair.same_ids / max(smaller, 1):.1%}) mean the same bytes while {pair.bridge.shared:,} tokens "
            "exist in both under some id; use method='bridge', which matches them by their bytes"
        )
    return same_bridge(pair) if method == "same" else direct_bridge(pair.teacher_vocab.size, pair.student_vocab.size)


def _cell_rows(key: str, compare: Divergence) -> Callable[[Rows], Tensor]:
    def kd_rows(rows: Rows) -> Tensor:
        return compare(rows.student(key), rows.teacher(key))

    return kd_rows


def _sampled_rows(key: str) -> Callable[[Rows], Tensor]:
    def sampled_rows(rows: Rows) -> Tensor:
        given, student = rows.given[key], rows.drawn(key)
        return sampled_kl(student, torch.where(given.there.unsqueeze(-1), given.cells[:, :-1], student.detach()))

    return sampled_rows


def _sorted_rows(key: str) -> Callable[[LogitRows], Tensor]:
    def sorted_rows(rows: LogitRows) -> Tensor:
        given = rows.given[key]
        none = torch.full_like(given.cells, -torch.inf)
        none[:, -1] = 0.0
        cells = torch.where(given.there.unsqueeze(-1), given.cells, none)
        return sorted_distance_cells(rows.logits - rows.log_z.unsqueeze(-1), cells)

    return sorted_rows


class Projected(nn.Module):
    """The teacher's hidden state, mapped into the student's space and read by the student's own head.

    The map starts from least squares: over the tokens that both vocabularies have, the student's head on a mapped state
    gives the teacher's logits as nearly as a linear map can. It then learns to predict the text through the student's
    head, which it does not change; the student learns from what it says, which does not flow back into it.

    Source: dual-space distillation, Zhang et al. 2024, sections 3.1-3.2, https://arxiv.org/abs/2406.17328
    """

    group = "projectors"

    def __init__(self, setup: Setup, compare: Divergence):
        super().__init__()
        self._compare = compare
        teacher, student = head_of(setup.teacher), head_of(setup.student)
        table = torch.from_numpy(setup.pair.identical)
        both = (table >= 0).nonzero().squeeze(-1)
        if len(both) < 2:
            raise ValueError(
                "kd_term(method='projector'): expected tokens that both vocabularies have, to start from, got "
                f"{len(both)}; use method='bridge'"
            )
        of = student.weight.detach().cpu()[table[both]].double()
        to = teacher.weight.detach().cpu()[both].double() * (teacher.scale / student.scale)
        start = torch.linalg.lstsq(of, to, driver="gelsd").solution  # [D, E]
        # without drawing numbers that are overwritten: the caller's random state stays as it was
        self.map = nn.utils.skip_init(nn.Linear, start.shape[1], start.shape[0], bias=False)
        with torch.no_grad():
            self.map.weight.copy_(start)

    def forward(self, rows: LogitRows) -> Tensor:
        """[n] float32: the divergence; with a gradient to the map from the mapped state's own cross-entropy."""
        given, head = rows.given["row_states"], rows.head
        with torch.autocast(rows.logits.device.type, enabled=False):
            states = torch.where(given.there.unsqueeze(-1), given.states.detach().float(), 0.0)
            frozen = Head(
                head.weight.detach().float(),
                None if head.bias is None else head.bias.detach().float(),
                head.scale,
                head.softcap,
            )
            logits = frozen.logits(self.map(states))
            taught = torch.log_softmax(logits, dim=-1)
            value = self._compare(torch.log_softmax(rows.logits, dim=-1), taught.detach())
            own = cross_entropy(logits, rows.targets)
            value = value + own - own.detach()
        return torch.where(given.there, value, torch.zeros_like(value))


def span_term(weight: float = 0.05, *, spans: str = "several", temperature: float | None = None) -> LossTerm:
    """Divergence between the two likelihoods of whole spans, in nats per span.

    A span lies between two bytes at which both tokenizers have a boundary; its log-likelihood is the sum over its
    tokens, however many each side cuts it into. It says whether the student finds as likely what the teacher finds
    likely, where no distribution over single tokens can be compared.

    Args:
        spans: "several": only spans of more than one student token, where the KD term reaches the first one directly
            and the others by conditioning; "all": every span.
        temperature: None for the limit of large temperatures, (a - b) + a ln(b / a) with a and b the teacher's and the
            student's log-likelihood; or tau of the binary divergence between exp(a / tau) and exp(b / tau).

    Raises:
        ValueError: unknown ``spans``, or a temperature that is not positive.

    Source: ALM, Minixhofer et al. 2025, section 3, https://arxiv.org/abs/2503.20083
    """
    if spans not in ("several", "all"):
        raise ValueError(f"span_term: expected spans='several' or 'all', got {spans!r}")
    if temperature is not None and not temperature > 0:
        raise ValueError(f"span_term: expected a temperature above 0, or None, got {temperature}")
    least = 2 if spans == "several" else 1

    def chosen(batch: DistillBatch) -> Tensor:
        return batch.span_mask & (batch.span_student.diff(dim=1) >= least)

    def gather(values: Tensor, signal: TeacherSignal, batch: DistillBatch) -> LossValue:
        student = span_sums(-values, batch)
        mask = chosen(batch)
        # a span that is not looked at gets equal likelihoods: whatever stands there has no value and no gradient
        ours = torch.where(mask, student, torch.full_like(student, -1.0))
        theirs = torch.where(mask, signal.span_log_probs, -1.0)
        return masked_sum(span_divergence(ours, theirs, temperature=temperature), mask)

    return LossTerm(
        name="span",
        weight=weight,
        **RANGES["span"],
        rows=nll_rows,
        whole=False,
        gather=gather,
        over=lambda batch: int(chosen(batch).sum()),
        needs=Needs(span_log_probs=True),
        settings={"spans": spans, "temperature": temperature},
    )


def span_sums(values: Tensor, batch: DistillBatch) -> Tensor:
    """Values of target rows summed over the spans that predict them.

    Shapes:
        values: [N], one per entry of ``batch.rows``
        returns: [B, C]
    """
    b, c = batch.span_mask.shape
    t = batch.student_ids.shape[1]
    at = torch.arange(t, device=values.device).expand(b, t).contiguous()
    span = torch.searchsorted(batch.span_student.contiguous(), at, right=True) - 1
    inside = (span >= 0) & (span < c)
    where = torch.arange(b, device=values.device).unsqueeze(-1) * c + span.clamp(0, c - 1)
    where = torch.where(inside, where, b * c).flatten()[batch.rows]
    return values.new_zeros(b * c + 1).index_add(0, where, values)[:-1].view(b, c)
