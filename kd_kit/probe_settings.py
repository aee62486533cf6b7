"""What a probe can be set to, and what it refuses."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass

from kd_kit.kd_terms import METHODS
from kd_kit.taps import check_layer_map, layers_of
from kd_kit.term_changes import DIVERGENCES, KD_SETTINGS, has_layers, is_kd, layer_maps
from kd_kit.terms import LossTerm

PROJECTORS = ("trained", "fitted", "random")
"""Which maps from the student's states to the teacher's stand behind the hidden terms, see :class:`Probe`."""


@dataclass(frozen=True)
class Settings:
    """What a :class:`Probe` looks with; :meth:`Probe.set` explains the fields."""

    batch: int
    method: str | None
    top_k: int | None
    divergence: str | None
    temperature: float | None
    layers: str | tuple
    projector: str
    weights: tuple[tuple[str, float], ...]


class ProbeSettings:
    """The half of a :class:`kd_kit.probe.Probe` that knows which settings there are.

    Attributes:
        trainer: the run. settings: :class:`Settings`, as they stand.
    """

    settings: Settings

    def __init__(self, trainer):
        self.trainer = trainer

    @property
    def layer_maps(self) -> dict[str, dict[int, int]]:
        """Maps to try by name, see :func:`kd_kit.term_changes.layer_maps`; none where no term looks at layers."""
        if not any(has_layers(t) for t in self.trainer.terms):
            return {}
        return layer_maps(self.trainer.student, self.trainer.teacher.model)

    @property
    def batches(self) -> int:
        """How many batches the run has."""
        return self.trainer.planned_steps * self.trainer.settings["accumulation"]

    @property
    def kd(self) -> LossTerm | None:
        """The kd term that the settings are about, as the run has it."""
        return next((t for t in self.trainer.terms if is_kd(t)), None)

    def _own_settings(self) -> Settings:
        """As the run has them."""
        own = dict.fromkeys(KD_SETTINGS) | {n: self.kd.settings[n] for n in KD_SETTINGS if self.kd}
        weights = tuple((t.name, t.weight) for t in self.trainer.terms)
        return Settings(batch=0, layers="run", projector="trained", weights=weights, **own)

    def _check_kd(self, wanted: dict) -> None:
        if self.kd is None:
            raise ValueError(
                f"probe: expected a run with a kd_term for {', '.join(wanted)}, got the terms "
                f"{', '.join(t.name for t in self.trainer.terms)}; their weights can be set"
            )
        method, name = wanted.get("method", METHODS[0]), wanted.get("divergence", next(iter(DIVERGENCES)))
        if method not in METHODS:
            raise ValueError(f"probe: expected method= one of {', '.join(METHODS)}, got {method!r}")
        if name not in DIVERGENCES and name != self.kd.settings["divergence"]:
            raise ValueError(f"probe: expected divergence= one of {', '.join(DIVERGENCES)}, got {name!r}")
        for key, lowest in (("temperature", 0.0), ("top_k", 0.5)):
            value = wanted.get(key, 1)
            whole = key == "temperature" or isinstance(value, numbers.Integral)
            if value is None and key == "top_k":
                continue
            if not isinstance(value, numbers.Real) or isinstance(value, bool) or not whole or not value > lowest:
                what = "a number above 0" if key == "temperature" else "a whole number of at least 1, or None for all"
                raise ValueError(f"probe: expected {key}= to be {what}, got {value!r}")
        if "temperature" in wanted:
            wanted["temperature"] = float(wanted["temperature"])
            if math.isinf(wanted["temperature"]):
                raise ValueError("probe: expected a finite temperature, got inf")

    def _checked_layers(self, layers) -> str | tuple:
        """A name, or the maps by term as pairs."""
        looking = [t.name for t in self.trainer.terms if has_layers(t)]
        if not looking:
            raise ValueError(
                "probe: expected a run with a term about layers for layers=, got the terms "
                f"{', '.join(t.name for t in self.trainer.terms)}"
            )
        if isinstance(layers, str):
            known = ["run", *self.layer_maps]
            if layers not in known:
                raise ValueError(f"probe: expected layers= one of {', '.join(known)}, or a map, got {layers!r}")
            return layers
        if not isinstance(layers, Mapping) or not layers:
            raise ValueError(f"probe: expected layers= a name or {{student layer: teacher layer}}, got {layers!r}")
        depths = [len(layers_of(m)) for m in (self.trainer.student, self.trainer.teacher.model)]
        named = {name: pairs for name, pairs in layers.items() if isinstance(name, str)}
        if not named:
            return tuple(check_layer_map(layers, *depths))
        unknown = [str(name) for name in layers if name not in looking]
        if unknown:
            raise ValueError(
                f"probe: expected layers= of terms about layers, {', '.join(looking)}, got {', '.join(unknown)}"
            )
        return tuple((name, tuple(check_layer_map(pairs, *depths))) for name, pairs in named.items())

    def _checked_weights(self, given: Mapping[str, float]) -> dict[str, float]:
        now = dict(self.settings.weights)
        unknown = [name for name in given if name not in now]
        if unknown:
            raise ValueError(
                f"probe: expected settings out of temperature, top_k, method, divergence, layers, projector, batch and "
                f"the weights of {', '.join(now)}, got {', '.join(unknown)}"
            )
        for name, value in given.items():
            good = isinstance(value, numbers.Real) and not isinstance(value, bool) and 0 <= value < math.inf
            if not good:
                raise ValueError(f"probe: expected a weight of at least 0 for {name}, got {value!r}")
        wanted = now | {name: float(value) for name, value in given.items()}
        if not sum(wanted.values()) > 0:
            raise ValueError("probe: expected a weight above 0 for at least one term, got 0 for all")
        if given:
            self.trainer.schedule.check(wanted)
            self.trainer.balance.check(wanted)
        return wanted

    def _batch_number(self, batch) -> int:
        if not isinstance(batch, numbers.Integral) or isinstance(batch, bool) or not 0 <= batch < self.batches:
            raise ValueError(f"probe: expected a batch of the run, from 0 to {self.batches - 1}, got {batch!r}")
        return int(batch)
