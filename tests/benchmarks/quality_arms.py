"""The arms of the quality bench: ways to train one student, and what may be set about each.

An arm is compared with its ``base`` at the best setting of both. Every arm searches its learning rate; those that
differ in how the teacher's predictions reach the student also search the KD term's weight.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import quality_earlier

import kd_kit as kd

LM, LM_FLOPS, KD, GOLD = "LM only", "LM only, equal FLOPs", "KD: bridge", "TRL GOLD"
EIGHT, NINE, SEVEN = "all but attention", "all", "all but attention and router"

LADDERS: dict[str, tuple] = {
    "rate": tuple(3e-3 * 2.0**n for n in range(-4, 3)),
    "kd_weight": (0.3, 0.5, 0.7, 0.85, 0.95, 0.98),
    "spend": (0.25, 0.5, 1.0),
    "variant": ("observed", "hybrid"),
}
"""Values that a setting may take, in order."""


@dataclass(frozen=True)
class Setting:
    """What an arm is trained with.

    Attributes:
        rate: peak learning rate. kd_weight: of the KD term, the LM term having the rest to 1.
        spend: of an arm with more steps than the others, how much of the additional ones.
        variant: of TRL's loss: "observed", its default, or "hybrid", a divergence for tokens that both sides have, with
            its "bayesian" merge of split tokens.
    """

    rate: float = 3e-3
    kd_weight: float = 0.7
    spend: float = 1.0
    variant: str = "observed"

    def beside(self, ladder: str) -> list[Setting]:
        """The settings one rung above and below on a ladder."""
        rungs = LADDERS[ladder]
        here = rungs.index(getattr(self, ladder))
        return [replace(self, **{ladder: rungs[n]}) for n in (here - 1, here + 1) if 0 <= n < len(rungs)]

    def along(self, ladder: str) -> list[Setting]:
        """The settings of a whole ladder."""
        return [replace(self, **{ladder: rung}) for rung in LADDERS[ladder]]


Terms = Callable[[float], list[kd.LossTerm]]


@dataclass(frozen=True)
class Arm:
    """One way of training.

    Attributes:
        terms: of the KD weight; None for one that is not kd_kit's.
        base: the arm that the verdict compares it with. start: the arm at whose best setting its search begins.
        ladders: what it searches, one rung at a time. full: of these, ladders that are run whole at the best.
        schedule, balance: made for every run. live: the teacher is beside the student, and not read from the cache.
        more_experts: of a second pass of the teacher. equal: what it has as much of as the others, "tokens" or "FLOPs".
        weight: processor time of a step over one of the LM alone, roughly.
    """

    name: str
    terms: Terms | None
    base: str | None = KD
    start: str | None = KD
    ladders: tuple[str, ...] = ("rate",)
    full: tuple[str, ...] = ()
    schedule: Callable[[], kd.Schedule] = kd.constant
    balance: Callable[[], object] = kd.fixed
    live: bool = False
    more_experts: int | None = None
    equal: str = "tokens"
    weight: float = 1.1

    @property
    def taught(self) -> bool:
        return self.name not in (LM, LM_FLOPS)


def kd_and(*more: Callable[[], kd.LossTerm], **settings) -> Terms:
    """The text, the KD term with these settings, and more terms with their default weights."""
    return lambda weight: [kd.lm_term(1 - weight), kd.kd_term(weight, **settings), *(term() for term in more)]


def spans_alone(weight: float) -> list[kd.LossTerm]:
    return [kd.lm_term(1 - weight), kd.span_term(weight, spans="all")]


INSIDE = {
    "span": kd.span_term,
    "feature": kd.feature_term,
    "layerwise": kd.layerwise_term,
    "relation": kd.relation_term,
    "contrastive": kd.contrastive_term,
    "router": kd.router_term,
}
"""Terms that a cache can hold."""

BOTH = ("rate", "kd_weight")
_lm = Arm(LM, lambda weight: [kd.lm_term(1.0)], base=None, start=None, weight=1.0)
_flops = replace(_lm, name=LM_FLOPS, base=LM, start=LM, ladders=("rate", "spend"), equal="FLOPs", weight=1.0)
_bridge = Arm(KD, kd_and(), base=LM, start=None, ladders=BOTH, full=("kd_weight",))
_eight = Arm(EIGHT, kd_and(*INSIDE.values()), weight=1.3)
_seven = Arm(SEVEN, kd_and(*(INSIDE[name] for name in INSIDE if name != "router")), weight=1.3)
_gold = Arm(GOLD, None, base=LM, start=KD, ladders=("rate", "variant"), weight=6.0)


def _method(name: str, ladders: tuple[str, ...] = BOTH, *, weight: float = 1.1, **settings) -> Arm:
    return Arm(f"KD: {name}", kd_and(**settings), ladders=ladders, weight=weight)


EMBEDDED = [
    _lm,
    _bridge,
    _flops,
    _gold,
    _method("strict", method="strict"),
    _method("uld", weight=1.6, method="uld"),
    _method("projector", weight=1.8, method="projector"),
    _method("bridge, aligned positions only", ("rate",), inside=False),
    _method("bridge, sampled", ("rate",), sampled=True),
    Arm("KD: span likelihoods alone", spans_alone, ladders=BOTH),
    *(Arm(f"+ {name}", kd_and(term)) for name, term in INSIDE.items()),
    Arm("+ attention", kd_and(kd.attention_term), live=True, weight=2.2),
    Arm("+ feature with 4 experts", kd_and(lambda: kd.feature_term(experts=4)), base="+ feature"),
    Arm("+ more_experts=4", kd_and(), more_experts=4),
    _eight,
    Arm(NINE, kd_and(*INSIDE.values(), kd.attention_term), live=True, weight=2.8),
    *(
        Arm(f"all but attention, {name}", _eight.terms, base=EIGHT, start=EIGHT, schedule=schedule, weight=1.3)
        for name, schedule in (("curriculum", kd.curriculum), ("two_stage", kd.two_stage))
    ),
    Arm("all but attention, progressive", _eight.terms, base=EIGHT, start=EIGHT, schedule=kd.progressive, weight=1.3),
    Arm(
        "all but attention, gradient_share",
        _eight.terms,
        base=EIGHT,
        start=EIGHT,
        balance=kd.gradient_share,
        weight=1.4,
    ),
    Arm(
        "earlier recipe",
        lambda weight: quality_earlier.earlier_terms(),
        schedule=quality_earlier.earlier_schedule,
        base=LM,
        weight=2.0,
    ),
]

FEW = [_lm, _bridge, _flops, _eight]
"""For the embedded pair with little text."""

REAL = [
    _lm,
    _bridge,
    _flops,
    replace(_gold, ladders=(), weight=26.0),  # with the bridge's rate and weight: a run takes seven minutes
    *(_method(name, method=name) for name in ("strict", "uld")),
    Arm("+ span", kd_and(kd.span_term)),
    Arm("+ feature", kd_and(kd.feature_term)),
    _seven,
]
"""For a real teacher with little text."""

REAL_ONCE = [_lm, _bridge, _seven]
"""For a real teacher and one pass over the text."""
