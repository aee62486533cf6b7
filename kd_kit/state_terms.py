"""Hidden knowledge: what the two models hold at the ends of common spans, where both have read the same bytes.

Every term here is of order 1 whatever the widths, depths and head counts: distances are cosines or divergences over
the logarithm of their size, and channels are standardised by statistics that are gathered from the first batches of
a run and then frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kd_kit.losses import (
    common_heads,
    cosine_distance,
    gram_distance,
    info_nce,
    relation_kl,
    relations,
)
from kd_kit.parts import (
    LayerMap,
    Part,
    chosen_spans,
    given_layers,
    nothing,
    one_pair,
    pairs_of,
    plain_layers,
    spread_spans,
    states_needed,
    student_ends,
    widths_of,
)
from kd_kit.projectors import KnowledgeRouter, Projector
from kd_kit.ranges import RANGES
from kd_kit.readings import Needs
from kd_kit.reduce import masked_sum
from kd_kit.taps import attention_widths
from kd_kit.terms import LossTerm, Setup, StudentOutput
from kd_kit.types import DistillBatch, LossValue, TeacherSignal

_RELATION_SPANS, _RELATION_LEAST = 128, 16
_ATTENTION_ROWS = 64
_CONTRAST_SPANS = 64
_CONTRAST_LEAST = 32


# --- feature and layerwise ------------------------------------------------------------------------------------------


class FeaturePart(Part):
    """1 - cos between projected student states and standardised teacher states, the mean over pairs of layers."""

    def __init__(
        self,
        pairs: tuple[tuple[int, int], ...],
        student_width: int,
        teacher_width: int,
        *,
        experts: int | None,
        active: int,
        balance: float,
        z: float,
    ):
        super().__init__()
        self.pairs, self.balance, self.z = pairs, balance, z
        self.maps = nn.ModuleList(
            Projector(student_width, teacher_width)
            if experts is None
            else KnowledgeRouter(student_width, teacher_width, experts=experts, active=active, seed=number)
            for number in range(len(pairs))
        )

    def observe(self, output, signal, batch) -> None:
        for (ours, theirs), one in zip(self.pairs, self.maps, strict=True):
            one.observe(student_ends(output, ours, batch), signal.states[theirs])

    def forward(self, output: StudentOutput, signal: TeacherSignal, batch: DistillBatch) -> LossValue:
        values, gates = [], []
        for (ours, theirs), one in zip(self.pairs, self.maps, strict=True):
            guess = one(student_ends(output, ours, batch))
            if isinstance(one, KnowledgeRouter):
                guess, gate = guess
                gates.append(gate)
            values.append(cosine_distance(guess, one.teacher(signal.states[theirs])))
        values = torch.stack(values)  # [pairs, P]
        found = masked_sum(values.mean(0))
        extras = {"by_layer": values.sum(1)}
        total = found.sum
        if gates:
            spans = values.shape[1]
            balance = torch.stack([g["balance"] for g in gates])
            z = torch.stack([g["z"].mean() if spans else g["z"].sum() for g in gates])
            held = spans * (self.balance * balance.mean() + self.z * z.mean())
            total = total + held - held.detach()  # steers the gate; what is reported is the distance alone
            active = self.maps[0].active
            extras |= {"balance": balance * spans, "load": torch.stack([g["load"] for g in gates]) / active}
        return LossValue(total, found.count, extras)


def _feature(kind: str, name: str, weight: float, layers, taps: int, last: bool, mixture: dict) -> LossTerm:
    layers = given_layers(f"{kind}_term", layers)
    experts, active = mixture["experts"], mixture["active"]
    if experts is not None and (experts < 2 or not 1 <= active <= experts):
        raise ValueError(
            f"{kind}_term: expected at least 2 experts and 1 <= active <= experts, got experts={experts} and "
            f"active={active}"
        )
    if not (mixture["balance"] >= 0 and mixture["z"] >= 0):
        raise ValueError(
            f"{kind}_term: expected balance and z of at least 0, got {mixture['balance']} and {mixture['z']}"
        )

    def build(setup: Setup) -> dict:
        pairs = pairs_of(setup, layers, taps)
        if layers is None:
            pairs = pairs[-1:] if last else (pairs[:-1] or pairs)
        part = FeaturePart(pairs, *widths_of(setup), **mixture)
        return {"value": part, "needs": states_needed(pairs)}

    return LossTerm(
        name=name,
        weight=weight,
        **RANGES[kind],
        build=build,
        over="spans",
        settings={"layers": plain_layers(layers), "taps": taps} | mixture,
    )


def feature_term(
    weight: float = 1.5,
    *,
    layers: LayerMap | None = None,
    experts: int | None = None,
    active: int = 2,
    balance: float = 0.01,
    z: float = 1e-3,
    name: str = "feature",
) -> LossTerm:
    """1 - cosine between the student's last hidden state, mapped to the teacher's width, and the teacher's.

    Args:
        layers: {student layer: teacher layer}, counted from 1; last to last if left out.
        experts: X maps behind a gate (a knowledge router) instead of one. active: how many of them a span goes through.
        balance, z: weights of the gate's load balance and z-loss beside this term, in its own unit.
        name: of the term, where a run has several of this kind.

    Raises:
        ValueError: when the trainer is built: a layer map that is out of range or not increasing.

    Source: feature matching at aligned spans with standardised channels; FitNets, Romero et al. 2014,
        https://arxiv.org/abs/1412.6550. For ``experts``: :class:`kd_kit.projectors.KnowledgeRouter`
    """
    mixture = {"experts": experts, "active": active, "balance": balance, "z": z}
    return _feature("feature", name, weight, layers, 4, True, mixture)


def layerwise_term(
    weight: float = 1.5,
    *,
    layers: LayerMap | None = None,
    taps: int = 4,
    experts: int | None = None,
    active: int = 2,
    balance: float = 0.01,
    z: float = 1e-3,
    name: str = "layerwise",
) -> LossTerm:
    """As :func:`feature_term` on the intermediate layers, the mean over them.

    Args:
        layers: {student layer: teacher layer}, counted from 1; if left out, ``taps`` proportional pairs without the
            last, which is the feature term's (a model of one layer has no other).
        name: of the term, where a run has several of this kind, as groups of layers for :func:`kd_kit.progressive`.

    Source: TinyBERT, Jiao et al. 2019, section 3.1, https://arxiv.org/abs/1909.10351
    """
    if layers is None and taps < 2:
        raise ValueError(f"layerwise_term: expected taps of at least 2, the last being feature_term's, got {taps}")
    mixture = {"experts": experts, "active": active, "balance": balance, "z": z}
    return _feature("layerwise", name, weight, layers, taps, False, mixture)


# --- relation -------------------------------------------------------------------------------------------------------


def standardised_within(states: Tensor, mask: Tensor) -> Tensor:
    """Every channel with mean 0 and variance 1 over a window's spans.

    A few channels hundreds of times larger than the rest would otherwise make all cosines of a window alike.

    Shapes:
        states: [B, n, width]. mask: [B, n] bool
        returns: [B, n, width] float32, 0 where the mask is False
    """
    states = torch.where(mask.unsqueeze(-1), states.float(), 0.0)
    count = mask.sum(1).clamp(min=1)[:, None, None]
    centred = torch.where(mask.unsqueeze(-1), states - states.sum(1, keepdim=True) / count, 0.0)
    variance = (centred**2).sum(1, keepdim=True) / count
    # a channel that hardly moves beside the others stays small instead of being blown up
    floor = 1e-6 * variance.detach().mean(-1, keepdim=True) + 1e-12
    return centred * (variance + floor).rsqrt()


def relation_term(weight: float = 0.4, *, layers: LayerMap | None = None, name: str = "relation") -> LossTerm:
    """Do the student's states lie to each other as the teacher's do? Needs no projector.

    Per window: the mean squared difference between the cosines of all pairs of (at most 128) spans, in [0, 4], with
    every channel standardised over these spans. A window with fewer than 16 of them is left out: over so few, channels
    look alike by chance.

    Args:
        layers: {student layer: teacher layer}, one pair; last to last if left out.
        name: of the term, where a run has several of this kind.

    Source: Park et al. 2019, https://arxiv.org/abs/1904.05068; Tung and Mori 2019, https://arxiv.org/abs/1907.09682
    """

    layers = given_layers("relation_term", layers)

    def build(setup: Setup) -> dict:
        ours, theirs = one_pair(pairs_of(setup, layers, 1), "relation_term")

        def value(output: StudentOutput, signal: TeacherSignal, batch: DistillBatch) -> LossValue:
            index, mask = spread_spans(batch, _RELATION_SPANS)
            if not len(batch.span_rows):
                return nothing(output)
            student = standardised_within(student_ends(output, ours, batch)[index], mask)
            teacher = standardised_within(signal.states[theirs][index], mask)
            return masked_sum(gram_distance(student, teacher, mask), mask.sum(1) >= _RELATION_LEAST)

        return {"value": value, "needs": states_needed([(ours, theirs)])}

    return LossTerm(
        name=name,
        weight=weight,
        **RANGES["relation"],
        build=build,
        over=lambda batch: int((batch.span_mask.sum(1) >= _RELATION_LEAST).sum()),
        settings={"layers": plain_layers(layers)},
        empty=f"a window needs {_RELATION_LEAST} scored spans; raise window",
    )


# --- attention ------------------------------------------------------------------------------------------------------


def attention_term(
    weight: float = 0.4,
    *,
    layers: LayerMap | None = None,
    relation: tuple[str, ...] = ("q", "k", "v"),
    heads: int = 8,
    name: str = "attention",
) -> LossTerm:
    """Which earlier text does a span relate to? Relations among queries, among keys and among values.

    q, k and v come from hooks on one layer's projections: both models stay on their fast attention path. They are
    split anew into a number of heads that suits both models; a row is the end of a span (at most 64 per window), and
    the relations to the tokens of a span are added up, so that neither heads nor tokens need to correspond. The mean
    over rows of KL(teacher || student) / ln(row length), about 0.5 for two models that have nothing to do with each
    other.

    Args:
        layers: {student layer: teacher layer}, one pair; last to last if left out.
        relation: which of "q", "k", "v"; their mean.
        heads: relation heads, at most; as many as divide the widths of both models. Wide heads of large entries relate
            every token to itself alone: more, narrower heads then tell more.
        name: of the term, where a run has several of this kind.

    Raises:
        ValueError: another ``relation``, no heads; when the trainer is built: attention modules without projections
            that can be read.

    Source: MiniLMv2, Wang et al. 2020, section 3, https://arxiv.org/abs/2012.15828
    """
    layers = given_layers("attention_term", layers)
    if not relation or set(relation) - {"q", "k", "v"}:
        raise ValueError(f"attention_term: expected relation= some of 'q', 'k', 'v', got {relation!r}")
    if heads < 1:
        raise ValueError(f"attention_term: expected at least one head, got heads={heads}")

    def build(setup: Setup) -> dict:
        ours, theirs = one_pair(pairs_of(setup, layers, 1), "attention_term")
        widths = attention_widths(setup.student, ours), attention_widths(setup.teacher, theirs)
        split = {r: common_heads(*(w[r] for w in widths), most=heads) for r in relation}

        def value(output: StudentOutput, signal: TeacherSignal, batch: DistillBatch) -> LossValue:
            index, mask = spread_spans(batch, _ATTENTION_ROWS)
            if not len(batch.span_rows):
                return nothing(output)
            rows = batch.spans_of()[1][index]
            parts = []
            for kind in relation:
                student = relations(
                    output.attention[ours][kind], heads=split[kind], rows=rows, boundaries=batch.span_student
                )
                teacher = relations(
                    signal.attention[theirs][kind], heads=split[kind], rows=rows, boundaries=batch.span_teacher
                )
                parts.append(relation_kl(student, teacher, rows))
            values = torch.stack(parts)  # [kinds, B, R]
            found = masked_sum(values.mean(0), mask)
            by_kind = torch.where(mask, values, 0.0).sum((1, 2))
            return LossValue(found.sum, found.count, {"by_kind": by_kind})

        return {
            "value": value,
            "needs": Needs(student_attention=frozenset([ours]), teacher_attention=frozenset([theirs])),
        }

    return LossTerm(
        name=name,
        weight=weight,
        **RANGES["attention"],
        build=build,
        over=lambda batch: chosen_spans(batch, _ATTENTION_ROWS),
        settings={"layers": plain_layers(layers), "relation": list(relation), "heads": heads},
    )


# --- contrast -------------------------------------------------------------------------------------------------------


class ContrastPart(Part):
    """InfoNCE between projected student states and the teacher's, negatives from other documents."""

    def __init__(self, pair: tuple[int, int], student_width: int, teacher_width: int, temperature: float):
        super().__init__()
        self.pair, self.temperature = pair, temperature
        self.map = Projector(student_width, teacher_width)

    def observe(self, output, signal, batch) -> None:
        self.map.observe(student_ends(output, self.pair[0], batch), signal.states[self.pair[1]])

    def forward(self, output: StudentOutput, signal: TeacherSignal, batch: DistillBatch) -> LossValue:
        if not contrasted(batch):
            return nothing(output)
        index, mask = spread_spans(batch, _CONTRAST_SPANS)
        rows = index[mask]
        documents = batch.document.unsqueeze(1).expand_as(index)[mask]
        ours = self.map(student_ends(output, self.pair[0], batch)[rows])
        theirs = self.map.teacher(signal.states[self.pair[1]][rows])
        values, there = info_nce(ours, theirs, documents, temperature=self.temperature)
        return masked_sum(values, there)


def contrasted(batch: DistillBatch) -> int:
    """How many spans of a batch can be told apart from spans of other documents; 0 where they are too few."""
    spans = batch.span_mask.sum(1)
    documents = len(torch.unique(batch.document[spans > 0]))
    chosen = chosen_spans(batch, _CONTRAST_SPANS)
    return chosen if documents > 1 and chosen >= _CONTRAST_LEAST else 0


def contrastive_term(
    weight: float = 0.3, *, layers: LayerMap | None = None, temperature: float = 0.1, name: str = "contrastive"
) -> LossTerm:
    """Can a span's teacher state be picked out of those of other documents by the student's? InfoNCE over ln M.

    1 at random, 0 when every span is told apart. Candidates are the (at most 64 per window) spans of the same batch,
    so it depends on the batch size; a batch with fewer than 32 of them, or from one document only, is skipped and
    counted.

    Args:
        layers: {student layer: teacher layer}, one pair; last to last if left out.
        temperature: of the cosines.
        name: of the term, where a run has several of this kind.

    Raises:
        ValueError: a temperature that is not positive.

    Source: van den Oord et al. 2018, https://arxiv.org/abs/1807.03748; Tian et al. 2019,
        https://arxiv.org/abs/1910.10699
    """
    layers = given_layers("contrastive_term", layers)
    if not temperature > 0:
        raise ValueError(f"contrastive_term: expected a temperature above 0, got {temperature}")

    def build(setup: Setup) -> dict:
        pair = one_pair(pairs_of(setup, layers, 1), "contrastive_term")
        return {"value": ContrastPart(pair, *widths_of(setup), temperature), "needs": states_needed([pair])}

    return LossTerm(
        name=name,
        weight=weight,
        **RANGES["contrastive"],
        build=build,
        over=contrasted,
        batchwise=True,
        settings={"layers": plain_layers(layers), "temperature": temperature},
        empty=f"a batch needs {_CONTRAST_LEAST} scored spans from at least two documents; raise batch_size",
    )
