"""Who counts how much: weights that stay as they were given, or weights that follow from wanted shares of the gradient.

Only these two. A loss divided by its own moving average is 1 for ever; uncertainty weights explode as a loss nears 0;
both hide what they do to the gradient. Here a share is what is asked for, measured and shown.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_USUAL = {
    "lm": 0.35,
    "kd": 0.45,
    "span": 0.05,
    "feature": 0.04,
    "layerwise": 0.04,
    "relation": 0.025,
    "attention": 0.025,
    "contrastive": 0.01,
    "router": 0.01,
}


@dataclass(frozen=True)
class Balance:
    """How the terms' weights are found. Made by :func:`fixed` and :func:`gradient_share`.

    Attributes:
        kind: "fixed" or "gradient_share".
        targets: with "gradient_share", {term: wanted share of the gradient}; None for usual ones.
        smoothing: weight of the past in the moving average of a term's gradient norm, per measurement.
        most: a weight moves at most this factor away from the one that the term was given.
        lm_floor: the LM term's least share of the total weight.
    """

    kind: str = "fixed"
    targets: Mapping[str, float] | None = None
    smoothing: float = 0.8
    most: float = 4.0
    lm_floor: float = 0.0

    def __post_init__(self):
        if not (0 <= self.smoothing < 1 and 1 <= self.most < math.inf):
            raise ValueError(
                f"{self.kind}: expected 0 <= smoothing < 1 and most of at least 1, got {self.smoothing} and {self.most}"
            )
        if not 0 <= self.lm_floor < 1:
            raise ValueError(f"{self.kind}: expected an lm_floor from 0 to below 1, got {self.lm_floor}")
        if self.targets is None:
            return
        wrong = {n: v for n, v in self.targets.items() if not (isinstance(v, (int, float)) and 0 < v <= 1)}
        if wrong:
            hint = "; these look like per cent: divide by 100" if all(_is_percent(v) for v in wrong.values()) else ""
            raise ValueError(f"{self.kind}: expected shares above 0 and at most 1, got {wrong}{hint}")
        whole = sum(self.targets.values())
        if abs(whole - 1) > 1e-6:
            raise ValueError(
                f"{self.kind}: expected shares of the gradient that sum to 1, got {dict(self.targets)}, which sum to "
                f"{whole:.6g}; change one of them by {1 - whole:+.6g}"
            )

    def check(self, weights: Mapping[str, float]) -> None:
        """Raise if the shares do not suit the terms of a run.

        Raises:
            ValueError: a share for a term that is not there or is switched off, or a term without a share.
        """
        if self.kind == "fixed":
            return
        on = {name for name, weight in weights.items() if weight > 0}
        if self.targets is None:
            own = sorted(on - _USUAL.keys())
            if own:
                raise ValueError(
                    f"gradient_share: expected a share for every term, but nothing is usual for {', '.join(own)}; name "
                    f"all of them: gradient_share({', '.join(f'{n}=...' for n in sorted(on))})"
                )
        elif self.targets.keys() != on:
            raise ValueError(
                f"gradient_share: expected a share for each of {', '.join(sorted(on))} (terms with a weight above 0), "
                f"got one for {', '.join(sorted(self.targets))}"
                + _named("; none for ", on - self.targets.keys())
                + _named("; no such term: ", self.targets.keys() - on)
            )

    def wanted(self, weights: Mapping[str, float]) -> dict[str, float]:
        """{term: share of the gradient that it shall have}, of the terms that are switched on."""
        given = _USUAL if self.targets is None else self.targets
        found = {name: given[name] for name, weight in weights.items() if weight > 0}
        whole = sum(found.values())
        return {name: share / whole for name, share in found.items()}

    def smoothed(self, norms: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
        """The moving average of every term's gradient norm after another measurement.

        A norm that is 0 or not finite says nothing about what the next ones will be, and is left out.
        """
        found = dict(norms)
        for name, norm in measured.items():
            if 0 < norm < math.inf:
                before = found.get(name, norm)
                found[name] = self.smoothing * before + (1 - self.smoothing) * norm
        return found

    def weights(self, given: Mapping[str, float], norms: Mapping[str, float]) -> dict[str, float]:
        """The terms' weights, of the same sum as the given ones.

        A term's weight is wanted share / norm, at most ``most`` times away from its own (as a part of the sum); a term
        whose gradient has not been seen keeps its own.

        Args:
            given: {term: weight}. norms: {term: moving average of its gradient norm}.
        """
        seen = [name for name, weight in given.items() if weight > 0 and norms.get(name, 0) > 0]
        if self.kind == "fixed" or not seen:
            return dict(given)
        wanted, found = self.wanted(given), dict(given)
        pulled = {name: wanted[name] / norms[name] for name in seen}
        scale = sum(given[name] for name in seen) / sum(pulled.values())
        for name in seen:
            found[name] = min(max(scale * pulled[name], given[name] / self.most), given[name] * self.most)
        whole = sum(found.values())
        return {name: weight * sum(given.values()) / whole for name, weight in found.items()}

    def floored(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Shares of the total weight with the LM term's at least at its floor; they sum to what they did."""
        lm = shares.get("lm")
        if lm is None or lm >= self.lm_floor or lm == 0:
            return dict(shares)
        rest = (1 - self.lm_floor) / (1 - lm)
        return {name: self.lm_floor if name == "lm" else share * rest for name, share in shares.items()}


def _named(what: str, names) -> str:
    return what + ", ".join(sorted(names)) if names else ""


def _is_percent(value) -> bool:
    return isinstance(value, (int, float)) and 1 < value <= 100


def fixed(*, lm_floor: float = 0.0) -> Balance:
    """The weights that the terms were given, for the whole run.

    Args:
        lm_floor: the LM term's least share of the total weight, whatever the schedule says.
    """
    return Balance("fixed", lm_floor=lm_floor)


def gradient_share(*, smoothing: float = 0.8, most: float = 4.0, lm_floor: float = 0.05, **shares: float) -> Balance:
    """Weights such that every term has its wanted share of the gradient, as ``gradient_share(lm=0.4, kd=0.6)``.

    At every measurement (``measure_every`` steps) the norm of each term's gradient enters a moving average, and its
    weight becomes wanted share / norm, at most ``most`` times more or less than the weight that it was given.

    Args:
        smoothing: weight of the past in the moving average. most: see above.
        lm_floor: the LM term's least share of the total weight, so that it cannot be balanced away.
        shares: of every term with a weight above 0; they sum to 1. Left out: CE .35, KD .45, span .05, feature and
            layerwise .04 each, relation and attention .025 each, contrastive and router .01 each, rescaled to the
            terms that the run has.

    Raises:
        ValueError: shares that do not sum to 1; when the trainer is built: shares of other terms than those of the run.

    Source: in the spirit of GradNorm, Chen et al. 2018, section 3, https://arxiv.org/abs/1711.02257, with wanted shares
        in place of training rates, and weights that are computed and not learned
    """
    return Balance("gradient_share", shares or None, smoothing, most, lm_floor)
