"""A term of the kit made once more with other settings: what can be changed of it is what it records of itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from kd_kit.expert_terms import router_term
from kd_kit.kd_terms import DIVERGENCES, kd_term, span_term
from kd_kit.parts import LayerMap
from kd_kit.projectors import KnowledgeRouter, Projector
from kd_kit.routing import NoExperts, find_routing
from kd_kit.state_terms import attention_term, contrastive_term, feature_term, layerwise_term, relation_term
from kd_kit.taps import layer_map, layers_of
from kd_kit.terms import LossTerm

KD_SETTINGS = ("method", "top_k", "divergence", "temperature")

_MIXTURE = ("experts", "active", "balance", "z")
_OF_LAYERS = {
    "feature": (feature_term, _MIXTURE),
    "layerwise": (layerwise_term, ("taps", *_MIXTURE)),
    "relation": (relation_term, ()),
    "attention": (attention_term, ("relation", "heads")),
    "contrastive": (contrastive_term, ("temperature",)),
    "router": (router_term, ("taps", "scores")),
}


def is_kd(term: LossTerm) -> bool:
    """Whether :func:`kd_kit.kd_term` made it."""
    return {*KD_SETTINGS, "inside", "sampled"} <= term.settings.keys()


def has_layers(term: LossTerm) -> bool:
    """Whether it is a term of the kit about pairs of layers."""
    return term.name in _OF_LAYERS and {"layers", *_OF_LAYERS[term.name][1]} <= term.settings.keys()


def with_kd(term: LossTerm, **settings) -> LossTerm:
    """A kd term with other ``method``, ``top_k``, ``divergence`` (a name) or ``temperature``, not yet bound to models.

    Raises:
        ValueError: what :func:`kd_kit.kd_term` refuses; a divergence that is none of the kit's.
    """
    wanted = {name: term.settings[name] for name in (*KD_SETTINGS, "inside", "sampled")} | settings
    name = wanted["divergence"]
    if name not in DIVERGENCES:
        raise ValueError(
            f"probe: expected divergence= one of {', '.join(DIVERGENCES)}, got {name!r}; a run with a divergence of "
            "its own has to name one of these along with any other change of its kd term"
        )
    return _like(term, kd_term(term.weight, name=term.name, **wanted | {"divergence": DIVERGENCES[name]}))


def with_layers(term: LossTerm, layers: LayerMap) -> LossTerm:
    """A term about layers with another {student layer: teacher layer}, not yet bound to models."""
    build, names = _OF_LAYERS[term.name]
    settings = {name: term.settings[name] for name in names}
    if term.name in ("layerwise", "router"):
        settings.pop("taps")  # of the map that it would choose itself
    if term.name == "attention":
        settings["relation"] = tuple(settings["relation"])
    return _like(term, build(term.weight, layers=layers, **settings))


def with_temperature(term: LossTerm, temperature: float) -> LossTerm | None:
    """The term at another temperature, not yet bound; None for one that has none, or that stands at 1 for good."""
    settings = term.settings
    if is_kd(term):
        fixed = settings["method"] == "uld" or settings["sampled"] or settings["divergence"] not in DIVERGENCES
        return None if fixed else with_kd(term, temperature=temperature)
    if settings.get("temperature") is None:
        return None
    if term.name == "contrastive" and has_layers(term):
        layers = pairs_used(term)
        return _like(term, contrastive_term(term.weight, layers=layers, temperature=temperature))
    if term.name == "span" and "spans" in settings:
        return _like(term, span_term(term.weight, spans=settings["spans"], temperature=temperature))
    return None


def _like(term: LossTerm, other: LossTerm) -> LossTerm:
    """``other`` with the ranges that were given to ``term``, where both are measured in one unit."""
    if other.unit != term.unit:
        return other
    kept = ("healthy", "impossible_below", "impossible_above", "source")
    return replace(other, **{name: getattr(term, name) for name in kept})


# --- pairs of layers


def pairs_used(term: LossTerm) -> dict[int, int]:
    """{student layer: teacher layer} of a term that is bound to its models; empty for one without."""
    needs = term.needs
    ours = needs.student_states | needs.student_attention
    theirs = needs.teacher_states | needs.teacher_attention | needs.routing
    # rising on both sides, so the sets in order are the pairs
    return dict(zip(sorted(ours), sorted(theirs), strict=False)) if has_layers(term) else {}


def layer_maps(student, teacher) -> dict[str, dict[int, int]]:
    """A few maps that show what a map does, by name; those that the two depths cannot tell apart are left out.

    - "proportional": equal parts of both depths, as a run has it that says nothing else.
    - "last only": the last layers and nothing between.
    - "one lower": the same student layers, each learning from the teacher layer below its own.
    - "early teacher": the same student layers, all learning from the teacher's first layers, which are easier to
      match and say less about the next token.
    """
    depths = len(layers_of(student)), len(layers_of(teacher))
    usual = dict(layer_map(*depths))
    found = {"proportional": usual, "last only": {depths[0]: depths[1]}}
    if min(usual.values()) > 1:
        found["one lower"] = {ours: theirs - 1 for ours, theirs in usual.items()}
    else:  # as many taps as layers: the lowest has none below it
        found["one lower"] = {ours: theirs - 1 for ours, theirs in usual.items() if theirs > 1}
    found["early teacher"] = {ours: number for number, ours in enumerate(usual, 1)}
    maps = list(found.values())
    return {name: pairs for n, (name, pairs) in enumerate(found.items()) if pairs and pairs not in maps[:n]}


def part_of_map(term: LossTerm, pairs: Mapping[int, int], teacher) -> dict[int, int]:
    """Which pairs of a map of the whole run are this term's, as its builder would choose among proportional ones.

    The last pair, but for a layerwise term, which has the others, and a router term, which has the last two moved to
    the nearest teacher layers with a router.
    """
    rising = sorted(pairs.items())
    if term.name == "layerwise":
        return dict(rising[:-1] or rising)
    if term.name != "router":
        return dict(rising[-1:])
    routed = find_routing(teacher, scores=term.settings["scores"]).layers
    near = {min(routed, key=lambda n, at=theirs: abs(n - at)): ours for ours, theirs in rising[-2:]}
    return {ours: theirs for theirs, ours in near.items()}


def routed_layers(teacher, scores: str | None = None) -> tuple[int, ...]:
    """Layers of the teacher that have a router; none in a dense one."""
    try:
        return find_routing(teacher, scores=scores).layers
    except NoExperts:
        return ()


# --- projectors


def projectors_of(term: LossTerm) -> list[Projector]:
    """The maps from the student's states to the teacher's that a term trains."""
    part = term.part
    return [] if part is None or not has_layers(term) else [m for m in part.modules() if isinstance(m, Projector)]


def randomise(part: nn.Module, seed: int = 0) -> None:
    """Put maps that know nothing in the place of a part's projectors; their statistics stay."""
    generator = torch.Generator().manual_seed(seed)
    forget_mixtures(part)
    for module in part.modules():
        if isinstance(module, Projector):
            weight: Tensor = module.map.weight
            drawn = torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5
            with torch.no_grad():
                weight.copy_(drawn)
                module.map.bias.zero_()


def forget_mixtures(part: nn.Module) -> None:
    """Let the experts of a part's knowledge routers be one map again, as at their start."""
    with torch.no_grad():
        for module in part.modules():
            if isinstance(module, KnowledgeRouter):
                module.maps.zero_()
