"""One batch under the microscope: what every term says about it, how hard it pulls, and what a setting changes.

Both models read the batch once. A changed setting makes only those terms anew that it is about, on the kept passes, so
that the answer is there at once; a setting that was looked at before costs nothing.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace

import torch
from torch import Tensor

from kd_kit.gradients import Pulls, meeting_layer, place_name, pulls
from kd_kit.history import verdict
from kd_kit.module import DistillModule, all_needs, settle_parts
from kd_kit.passes import Passes, Seen, SpanStates, as_in_evaluation
from kd_kit.probe_plot import probe_figure, probe_table
from kd_kit.probe_settings import PROJECTORS, ProbeSettings, Settings
from kd_kit.readings import Needs
from kd_kit.scales import FLATTENED, ScaleReport, measure_scales
from kd_kit.table import Table, plain
from kd_kit.term_changes import (
    KD_SETTINGS,
    forget_mixtures,
    has_layers,
    is_kd,
    pairs_used,
    part_of_map,
    projectors_of,
    randomise,
    routed_layers,
    with_kd,
    with_layers,
    with_temperature,
)
from kd_kit.terms import LossTerm, Setup
from kd_kit.trainer import SETTLING_BATCHES
from kd_kit.trainer_builder import change_terms

_FITTING = 4  # batches that a map is fitted to here: a wait of a second and not of ten
_REMEMBERED = 64  # results; each holds a gradient as large as the student's state
_KEEP = object()  # a setting that was not given


class Probe(ProbeSettings):
    """One batch of a run, every term on it, and settings to try. Made by :func:`kd_kit.build_probe`.

    The models run in evaluation mode, without dropout, in the precision of the run. The trainer is left as it is,
    its weights, random state, history and folder, until :meth:`use` hands the chosen settings over to it. When it has
    trained on, the next question is about the student as it is then.

    Attributes:
        trainer: the run. windows: how many windows of a batch are looked at, at most.
        settings: :class:`Settings`, as they stand.
    """

    def __init__(self, trainer, *, position: int = 0, windows: int = 4):
        if windows < 1:
            raise ValueError(f"build_probe: expected at least one window, got windows={windows}")
        super().__init__(trainer)
        self.windows = windows
        self._stamp: tuple | None = None
        self._checked_at_rest()
        self.settings = replace(self._own_settings(), batch=self._batch_number(position))
        self._forget()

    # --- settings -----------------------------------------------------------------------------------------------

    def set(
        self,
        *,
        temperature=_KEEP,
        top_k=_KEEP,
        method=_KEEP,
        divergence=_KEEP,
        layers=_KEEP,
        projector=_KEEP,
        batch=_KEEP,
        weights: Mapping[str, float] | None = None,
        **more_weights: float,
    ) -> Table:
        """Look with other settings; what is not named stays. Nothing is changed where one of them is refused.

        Args:
            temperature, top_k, method, divergence: of the (first) kd term, see :func:`kd_kit.kd_term`; ``top_k=None``
                keeps every cell, ``divergence`` is a name: "forward_kl", "reverse_kl", "jensen_shannon", "skew_kl".
            layers: which teacher layer teaches which student layer: "run" as the run has it, a name of
                :attr:`layer_maps`, or {student layer: teacher layer}. One map for all terms: the last pair is that of
                the feature, relation, attention and contrastive terms, the others that of the layerwise term, and the
                router term has the last two, moved to layers with a router. A map by term, {"feature": {4: 3}},
                leaves the other terms as the run has them.
            projector: behind feature, layerwise and contrastive terms: "trained", the maps as the run has them now;
                "fitted", the least-squares maps to the student as it is now; "random", maps that know nothing. The
                random value, about 1 for a cosine distance, is the end of the scale: a term whose trained value is
                near it teaches nothing. A fitted value well below the trained one says that the projector lags behind
                the student: raise its learning rate. Only to look at: :meth:`use` leaves it out.
            batch: number of a batch in the order of the run, from 0.
            weights, more_weights: {term: weight}, also as ``probe.set(kd=0.5)``.

        Returns:
            the table with these settings.

        Raises:
            ValueError: an unknown name or a value out of range; the sentence says what there is.
        """
        self._refresh()
        now, given = self.settings, dict(weights or {}) | more_weights
        kd = {"temperature": temperature, "top_k": top_k, "method": method, "divergence": divergence}
        kd = {name: value for name, value in kd.items() if value is not _KEEP}
        if kd:
            self._check_kd(kd)
        if layers is not _KEEP:
            kd["layers"] = self._checked_layers(layers)
        if projector is not _KEEP:
            if projector not in PROJECTORS:
                raise ValueError(f"probe: expected projector= one of {', '.join(PROJECTORS)}, got {projector!r}")
            kd["projector"] = projector
        if batch is not _KEEP:
            kd["batch"] = self._batch_number(batch)
        wanted = replace(now, weights=tuple(self._checked_weights(given).items()), **kd)
        with as_in_evaluation(self.trainer):
            for term in self.trainer.terms:  # what cannot be made is refused here, with everything as it was
                self._made(term, wanted)
        self.settings = wanted
        try:
            return self.table()
        except BaseException:  # memory, an interrupt
            self.settings = now
            raise

    # --- answers ------------------------------------------------------------------------------------------------

    @property
    def rows(self) -> list[dict]:
        """What the table shows as plain data: one dict per term.

        Keys: name, value (a mean in ``unit``), unit, healthy, verdict, given_weight, weight (its share of the total
        at the run's next step), contribution, share, grad_norm, grad_share, cosine (with lm), count, changed.
        """
        terms, seen, found = self._measured()
        settings, own = self.settings, {t.name: t for t in self.trainer.terms}
        shares = self._shares()
        parts = [None if s.value is None else shares[t.name] * s.value for t, s in zip(terms, seen, strict=True)]
        whole = sum(abs(p) for p in parts if p is not None and math.isfinite(p))
        names = [t.name for t in terms]
        rows = []
        for i, (term, one, part) in enumerate(zip(terms, seen, parts, strict=True)):
            known = part is not None and math.isfinite(part) and whole > 0
            other = "lm" in names and term.name != "lm"
            rows.append(
                {
                    "name": term.name,
                    "value": one.value,
                    "unit": term.unit,
                    "healthy": list(term.healthy),
                    "verdict": verdict(term.meta, one.value),
                    "given_weight": dict(settings.weights)[term.name],
                    "weight": shares[term.name],
                    "contribution": part,
                    "share": part / whole if known else None,
                    "grad_norm": found.norms[i],
                    "grad_share": found.shares[i],
                    "cosine": found.cosines[names.index("lm")][i] if other else None,
                    "count": one.count,
                    "changed": self._key(own[term.name], settings) != "own",
                }
            )
        return rows

    @property
    def cosines(self) -> list[list[float | None]]:
        """Cosine between the gradients of every two terms, in their order; None where one has no gradient."""
        return self._measured()[2].cosines

    def table(self) -> Table:
        """Value, range, weight, contribution and gradient of every term; a star marks a term that was changed."""
        return probe_table(self.rows, title=self._title(), note=self._note())

    def figure(self):
        """Shares of the contribution and of the gradient side by side, and the cosines: 1000 pixels wide at 100 dpi."""
        return probe_figure(self.rows, self.cosines, title=self._title(), at=place_name(self._meeting()))

    def scales(self, *, temperature: Mapping[str, Callable[[float], LossTerm]] | None = None) -> ScaleReport:
        """Recompute every term on the same text in other shapes: which scale with what they should not?

        Windows cut into halves, half the windows at a time, the same windows with more padding. For a term with a
        temperature T also the norm of its gradient at 2 T over that at T: a divergence that is not multiplied by T^2
        fades as T rises. The kit reports values at T = 1, so the value alone would not show that.

        Args:
            temperature: {term: function of T that makes it}, for terms of one's own:
                ``probe.scales(temperature={"mine": lambda T: my_term(T)})``. The kit's terms need none.

        Raises:
            ValueError: a name that no term has, or a function that makes something else.
        """
        made = dict(temperature or {})
        unknown = [name for name in made if name not in {t.name for t in self.trainer.terms}]
        if unknown:
            raise ValueError(
                f"probe.scales: expected temperature= by the names of terms, "
                f"{', '.join(t.name for t in self.trainer.terms)}, got {', '.join(unknown)}"
            )
        self._refresh()
        with as_in_evaluation(self.trainer):
            terms = self._terms(self.settings)
            needs = all_needs(terms)

            def measure(batch):
                passes = Passes(self.trainer, batch, graph=False)
                seen = {term.name: passes.term(term, needs) for term in terms}
                return {name: (one.value, one.count) for name, one in seen.items()}

            windows = self.trainer.data.train
            rows, notes = measure_scales(terms, windows, self._indices(self.settings.batch), measure)
            warm = {term.name: self._warmed(term, made.get(term.name)) for term in terms}
        return ScaleReport(tuple(replace(row, gradient=warm[row.name]) for row in rows), tuple(notes))

    def use(self) -> str:
        """Hand the chosen weights, temperature, cells, divergence, method and layers over to the trainer.

        A run that has begun takes weights, temperature, divergence and top_k; the others only before its first step.
        The projector is not handed over.

        Returns:
            what has changed, in a sentence.

        Raises:
            ValueError: the run cannot take it; the trainer is then as it was.
        """
        self._refresh()
        wanted, weights = self.settings, dict(self.settings.weights)
        terms = []
        for term in self.trainer.terms:
            other = self._changed(term, replace(wanted, projector="trained"))
            terms.append(replace(term if other is None else other, weight=weights[term.name]))
        same = all(self._key(t, replace(wanted, projector="trained")) == "own" for t in self.trainer.terms)
        if same and weights == {t.name: t.weight for t in self.trainer.terms}:
            return "Nothing was changed: the run has these settings already."
        text = change_terms(self.trainer, terms)
        self.settings = replace(self._own_settings(), batch=wanted.batch)
        self._forget()
        return f"From step {self.trainer.step + 1:,} on: {text}."

    # --- terms as the settings make them ------------------------------------------------------------------------

    def _key(self, term: LossTerm, settings: Settings) -> str | tuple:
        """What a term's value depends on of the settings; "own" where that is as the run has it."""
        if is_kd(term) and term.name == self.kd.name:
            wanted = tuple(getattr(settings, name) for name in KD_SETTINGS)
            return "own" if wanted == tuple(term.settings[name] for name in KD_SETTINGS) else wanted
        if not has_layers(term):
            return "own"
        pairs = self._pairs(term, settings)
        kind = settings.projector if projectors_of(term) else "trained"
        return "own" if pairs is None and kind == "trained" else (tuple((pairs or {}).items()), kind)

    def _pairs(self, term: LossTerm, settings: Settings) -> dict[int, int] | None:
        """The pairs of layers that the settings give a term; None for those that it has."""
        layers = settings.layers
        if layers == "run":
            return None
        if isinstance(layers, tuple) and isinstance(layers[0][0], str):
            pairs = dict(dict(layers).get(term.name, ())) or None
        else:
            whole = self.layer_maps[layers] if isinstance(layers, str) else dict(layers)
            pairs = part_of_map(term, whole, self.trainer.teacher.model)
        return None if pairs == pairs_used(term) else pairs

    def _changed(self, term: LossTerm, settings: Settings) -> LossTerm | None:
        """The term with the settings, not bound to the models; None where it is as the run has it."""
        key = self._key(term, settings)
        if key == "own":
            return None
        if is_kd(term):
            return with_kd(term, **dict(zip(KD_SETTINGS, key, strict=True)))
        pairs = self._pairs(term, settings)
        return None if pairs is None else with_layers(term, pairs)

    def _made(self, term: LossTerm, settings: Settings) -> LossTerm:
        """The term as it is looked at: bound to the models, settled, remembered."""
        key = term.name, self._key(term, settings)
        if key in self._kept_terms:
            return self._kept_terms[key]
        if key[1] == "own":
            made = self._own(term)
        else:
            other = self._changed(term, settings)
            made = self._own(term) if other is None else self._bound(other)
            if made.part is not None and has_layers(term):
                made = self._with_maps(made, settings.projector, fresh=other is not None)
        self._kept_terms[key] = made
        return made

    def _with_maps(self, term: LossTerm, kind: str, *, fresh: bool) -> LossTerm:
        """A term with maps of its own that are fitted, or that know nothing."""
        part = copy.deepcopy(term.part)
        if fresh or kind == "fitted":
            self._span_states(term.needs).settle(part)
            forget_mixtures(part)
        if kind == "random":
            randomise(part)
        return replace(term, value=part)

    def _own(self, term: LossTerm) -> LossTerm:
        """The run's term itself, or, before its first step, a copy that has settled as the run's will."""
        if getattr(term.part, "ready", True):
            return term
        if not self._settled:
            waiting = [t for t in self.trainer.terms if not getattr(t.part, "ready", True)]
            for one in waiting:
                field = "value" if one.value is not None else "rows"
                self._settled[one.name] = replace(one, **{field: copy.deepcopy(one.part)})
            module = DistillModule(self.trainer.student, list(self._settled.values()))
            count = min(SETTLING_BATCHES, self.trainer.data.batches_per_epoch)
            batches = self.trainer.data.batches(self.trainer.settings["seed"], range(count))
            teacher, device = self.trainer.teacher.asked(module.needs), self.trainer.session.device
            settle_parts(module, teacher, (b.to(device) for b in batches))
        return self._settled[term.name]

    def _terms(self, settings: Settings) -> list[LossTerm]:
        return [self._made(term, settings) for term in self.trainer.terms]

    def _bound(self, term: LossTerm) -> LossTerm:
        """The term for the run's models, its part where they are."""
        trainer = self.trainer
        if term.build is not None:
            term = term.bound(Setup(trainer.student, trainer.teacher.model, trainer.data.pair))
        if term.part is not None:
            term.part.to(trainer.session.device).eval()
        return term

    def _span_states(self, needs: Needs) -> SpanStates:
        """What parts are fitted to, with the layers of every map at hand read at once."""
        if self._states is None or not self._states.covers(needs):
            wanted = needs | self._more() | (self._states.needs if self._states else Needs())
            batches = (
                self.trainer.data.train.collate(self._indices(n))
                for n in range(min(_FITTING, self.trainer.data.batches_per_epoch))
            )
            self._states = SpanStates(self.trainer, batches, wanted)
        return self._states

    def _more(self) -> Needs:
        """The layers that another map of :attr:`layer_maps` would look at."""
        terms = [t for t in self.trainer.terms if has_layers(t)]
        if not terms:
            return Needs()
        names = {t.name for t in terms}
        pairs = [pair for layers in self.layer_maps.values() for pair in layers.items()]
        ours, theirs = (frozenset(side) for side in zip(*pairs, strict=True))
        last = [max(layers.items()) for layers in self.layer_maps.values()]
        attended = "attention" in names
        scores = next((t.settings["scores"] for t in terms if t.name == "router"), None)
        routed = routed_layers(self.trainer.teacher.model, scores) if "router" in names else ()
        return Needs(
            teacher_states=theirs if names - {"attention", "router"} else frozenset(),
            student_states=ours,
            teacher_attention=frozenset(t for _, t in last) if attended else frozenset(),
            student_attention=frozenset(o for o, _ in last) if attended else frozenset(),
            routing=frozenset(routed),
            routing_scores=scores,
        )

    # --- measuring ----------------------------------------------------------------------------------------------

    def _measured(self) -> tuple[list[LossTerm], list[Seen], Pulls]:
        self._refresh()
        with as_in_evaluation(self.trainer):
            terms = self._terms(self.settings)
            seen = self._seen(terms)
        products = self._products([s.gradient for s in seen])
        shares = self._shares()
        found = pulls(products, [s.count for s in seen], [shares[t.name] for t in terms])
        return terms, seen, found

    def _seen(self, terms: list[LossTerm]) -> list[Seen]:
        """Every term on the batch; only those are computed that have not been with these settings."""
        needs, meeting = all_needs(terms), self._meeting(terms)
        found = []
        for own, term in zip(self.trainer.terms, terms, strict=True):
            key = self.settings.batch, own.name, self._key(own, self.settings), meeting
            if key not in self._results:
                self._results[key] = self._passes().term(term, needs, meeting)
                while len(self._results) > _REMEMBERED:
                    self._results.popitem(last=False)
            self._results.move_to_end(key)
            found.append(self._results[key])
        return found

    @staticmethod
    def _products(gradients: list[Tensor]) -> list[list[float]]:
        stacked = torch.stack(gradients)
        return (stacked @ stacked.T).tolist()

    def _meeting(self, terms: list[LossTerm] | None = None) -> int | None:
        return meeting_layer(all_needs(self._terms(self.settings) if terms is None else terms))

    def _shares(self) -> dict[str, float]:
        """Share of the total that the weights give every term at the run's next step."""
        trainer = self.trainer
        weights = trainer.balance.weights(dict(self.settings.weights), trainer._norms)
        progress = min(trainer.step / trainer.total_steps, 1.0)
        return trainer.balance.floored(trainer.schedule.shares(weights, progress))

    def _warmed(self, term: LossTerm, make: Callable[[float], LossTerm] | None) -> float | None:
        """Norm of the gradient at twice the temperature over that at the temperature; None for a term without one."""
        if make is None:
            if with_temperature(term, 1.0) is None:
                return None
            start = term.settings["temperature"]
            start = max(start, FLATTENED) if is_kd(term) else start
            both = [with_temperature(term, t) for t in (start, 2 * start)]
        else:
            both = [make(t) for t in (FLATTENED, 2 * FLATTENED)]
            if not all(isinstance(t, LossTerm) for t in both):
                raise ValueError(
                    f"probe.scales: expected temperature={{{term.name!r}: a function of T that makes the term}}, got "
                    f"one that makes {type(both[0]).__name__}"
                )
        norms = []
        for one in both:
            bound = self._bound(one)
            if bound.part is not None and term.part is not None:  # as far as it has learnt
                bound.part.load_state_dict(term.part.state_dict())
            needs = all_needs([*self._terms(self.settings), bound])
            seen = self._passes().term(bound, needs, meeting_layer(bound.needs))
            norms.append(float(seen.gradient.norm()) / max(seen.count, 1))
        return norms[1] / norms[0] if norms[0] > 0 else None

    # --- what is kept -------------------------------------------------------------------------------------------

    def _indices(self, batch: int) -> list[int]:
        """The windows that are looked at of a batch."""
        trainer = self.trainer
        return trainer.data.indices(trainer.settings["seed"], batch)[: self.windows].tolist()

    def _passes(self) -> Passes:
        number = self.settings.batch
        if self._of_batch is None or self._of_batch[0] != number:
            self._of_batch = None  # two batches at a time need not fit
            batch = self.trainer.data.train.collate(self._indices(number))
            self._of_batch = number, Passes(self.trainer, batch, self._more())
        return self._of_batch[1]

    def _forget(self) -> None:
        """Everything that was computed."""
        self._of_batch: tuple[int, Passes] | None = None
        self._states: SpanStates | None = None
        self._settled: dict[str, LossTerm] = {}
        self._kept_terms: dict[tuple, LossTerm] = {}
        self._results: OrderedDict[tuple, Seen] = OrderedDict()

    def _refresh(self) -> None:
        """Start anew where the run has moved since the last question."""
        self._checked_at_rest()
        trainer = self.trainer
        versions = sum(p._version for p in trainer.module.parameters())
        stamp = trainer.step, id(trainer.module), versions, tuple(id(t) for t in trainer.terms)
        if stamp == self._stamp:
            return
        self._forget()
        if [name for name, _ in self.settings.weights] != [t.name for t in trainer.terms]:
            self.settings = replace(self._own_settings(), batch=self.settings.batch)
        self._stamp = stamp

    def _checked_at_rest(self) -> None:
        trainer = self.trainer
        if trainer.running:
            raise ValueError(
                "probe: expected a run at rest, got one that trains in the background; trainer.stop() and "
                "trainer.wait() first: the student changes while it is looked at"
            )
        if trainer.step < trainer._steps_done():
            raise ValueError(
                f"probe: expected a run at its last step, got one whose folder holds {trainer._steps_done():,} steps "
                "that are not loaded; trainer.resume() first"
            )

    # --- words --------------------------------------------------------------------------------------------------

    def _title(self) -> str:
        trainer, number = self.trainer, self.settings.batch
        count = len(self._indices(number))
        return (
            f"batch {number:,} of {self.batches:,}, {count} window{'s' if count > 1 else ''} · {trainer.step:,} of "
            f"{trainer.total_steps:,} steps done"
        )

    def _note(self) -> str:
        """What differs from the run, and where gradients are taken."""
        own, now = asdict(self._own_settings()), asdict(self.settings)
        changed = [
            f"{name} {_said(own[name])} -> {_said(now[name])}"
            for name in (*KD_SETTINGS, "layers", "projector")
            if own[name] != now[name]
        ]
        before = dict(own["weights"])
        changed += [f"weight of {n} {plain(before[n])} -> {plain(w)}" for n, w in now["weights"] if before[n] != w]
        text = f"gradients at the {place_name(self._meeting())}"
        return f"{text}; * changed: {', '.join(changed)}" if changed else f"{text}; all settings as the run has them"

    def __repr__(self) -> str:
        return str(self.table())

    def _repr_html_(self) -> str:
        return self.table()._repr_html_()


def _said(value) -> str:
    if isinstance(value, float):
        return plain(value)
    if isinstance(value, tuple):
        return ", ".join(f"{a}: {b}" if not isinstance(a, str) else f"{a} {{{_said(b)}}}" for a, b in value)
    return "all" if value is None else str(value)
