"""What is wrong with a run, said in words while it goes on: what, since when, the likely cause, and what to try.

A condition has to hold for a while before it is said, and to be gone for as long before it is said to be over. What
stands is read back from the history, so a resumed run repeats nothing.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from kd_kit.history import History, verdict
from kd_kit.table import short
from kd_kit.terms import LossTerm

FAR = 10  # times the top of a range: no untrained student is so far above, so nothing is waited for
STEPS = 50  # in a row, of what is judged at every step
MEASUREMENTS = 3  # in a row, of what is judged where gradients are compared
HALVES = 100  # steps in each of the two stretches that are compared for a trend
SLOW = 3.0  # times the least that a step can cost on this machine
MOST = 3  # how often one alarm is raised in a run; one that comes and goes is known by then


@dataclass(frozen=True)
class Finding:
    """A condition at one step.

    Attributes:
        what, cause, cure: in words. patience: how many times in a row it must hold.
        key: what tells it apart from other findings.
        gone: said when it is over.
    """

    key: str
    what: str
    cause: str
    cure: str
    gone: str
    patience: int = STEPS

    def text(self, since: int) -> str:
        return f"{self.what}, since step {since:,}. Likely: {self.cause}. Try: {self.cure}"


@dataclass
class _Streak:
    since: int
    count: int = 0
    finding: Finding | None = None
    well: int = 0  # times in a row that it did not hold


@dataclass
class Watch:
    """Looks at every record of a run as it comes and appends alarms to its history.

    Args:
        history: read and appended to. terms: of the run. grace: steps at the start in which a value may be out of its
            range, as that of an untrained student is.
    """

    history: History
    terms: Sequence[LossTerm]
    grace: int = 0
    _streaks: dict[str, _Streak] = field(default_factory=dict, init=False)
    _recent: deque = field(default_factory=lambda: deque(maxlen=2 * HALVES), init=False)
    _stands: set[str] = field(default_factory=set, init=False)
    _raised: dict[str, int] = field(default_factory=dict, init=False)

    def __post_init__(self):
        self.use(self.terms)
        for event in self.history.events:
            key = event.get("key")
            if key is None:
                continue
            if event["what"] == "alarm":
                self._stands.add(key)
                self._raised[key] = self._raised.get(key, 0) + 1
                if "gone" in event:  # may stand for longer than the records go back that are looked at again
                    finding = Finding(key, "", "", "", gone=event["gone"], patience=event["patience"])
                    self._streaks[key] = _Streak(event["step"], finding=finding)
            elif event["what"] == "cleared":
                self._stands.discard(key)
        known = [r for r in self.history.records if r["kind"] == "train"]
        # as many as a streak and a trend can reach back
        compared = [i for i, r in enumerate(known) if "gradients" in r][-2 * MEASUREMENTS :]
        start = max(0, min([len(known) - 2 * HALVES - STEPS, *compared[:1]]))
        for record in known[start:]:
            self._take(record, say=False)

    def use(self, terms: Sequence[LossTerm]) -> None:
        """The same terms with other weights from now on."""
        self._judges = {t.name: t for t in terms}

    def look(self, records: Iterable[Mapping]) -> None:
        """Take new training records into account; alarms are appended to the history."""
        for record in records:
            self._take(record, say=True)

    def _take(self, record: Mapping, *, say: bool) -> None:
        self._recent.append(record)
        found = {finding.key: finding for finding in self._findings(record)}
        for key, finding in found.items():
            streak = self._streaks.setdefault(key, _Streak(record["step"]))
            if streak.count == 0:
                streak.since = record["step"]
            streak.count, streak.well, streak.finding = streak.count + 1, 0, finding
            if say and streak.count >= finding.patience and key not in self._stands:
                self._raise(finding, streak.since, record["step"])
        for key, streak in self._streaks.items():
            if key in found or streak.finding is None or not self._well(key, record):
                continue
            streak.count, streak.well = 0, streak.well + 1
            if say and key in self._stands and streak.well >= streak.finding.patience:
                self._stands.discard(key)
                if self._raised[key] <= MOST:
                    self._say("cleared", record["step"], streak.finding.gone, key)

    def _raise(self, finding: Finding, since: int, step: int) -> None:
        self._stands.add(finding.key)
        self._raised[finding.key] = self._raised.get(finding.key, 0) + 1
        times = self._raised[finding.key]
        if times <= MOST:
            last = " (This comes and goes, and is not said again.)" if times == MOST else ""
            about = {"gone": finding.gone, "patience": finding.patience}
            self._say("alarm", step, finding.text(since) + last, finding.key, **about)

    def _say(self, what: str, step: int, text: str, key: str, **about) -> None:
        self.history.append({"kind": "event", "step": step, "what": what, "text": text, "key": key, **about})

    # --- the conditions ---------------------------------------------------------------------------------------------

    def _well(self, key: str, record: Mapping) -> bool:
        """Whether this record shows that a condition does not hold: where it says nothing, nothing is over."""
        kind, _, name = key.partition(":")
        if kind == "gone":
            return True
        if kind == "scale":
            return record.get("loss_scale") is not None
        if key == "finite:gradient":
            return record.get("grad_norm") is not None and math.isfinite(record["grad_norm"])
        if kind == "slow":
            return _times_floor(record) is not None
        if kind == "rises":
            halves = self._halves()
            return halves is not None and not self._rise(name, halves)
        term, judge = record["terms"].get(name.rsplit(" ", 1)[0] if kind == "expert" else name), self._judges.get(name)
        if kind == "empty" or term is None:
            return term is not None and term["value"] is not None
        if term["value"] is None or not math.isfinite(term["value"]):
            return False
        if kind in ("range", "impossible", "far"):
            word = judge and verdict(judge.meta, term["value"])
            if kind == "range":
                return word == "healthy" and record["step"] > self.grace
            return word not in (None, "impossible")
        share, cosine = term.get("grad_share"), term.get("cosine")
        if kind == "weak":
            return share is not None and share >= 0.01
        if kind == "strong":
            return share is not None and share <= 0.9 and bool(term["count"])
        if kind in ("fights", "strays"):
            return cosine is not None and cosine >= (-0.3 if kind == "fights" else 0.1)
        return kind == "finite" or "load" in term.get("extras", {})

    def _findings(self, record: Mapping) -> Iterator[Finding]:
        for name, term in record["terms"].items():
            if name in self._judges:
                yield from self._value(record, self._judges[name], term)
                yield from self._gradient(record, name, term)
                yield from self._experts(name, term)
        yield from self._missing_lm(record)
        yield from self._trend()
        if (times := _times_floor(record)) is not None and times > SLOW:
            yield Finding(
                "slow:step",
                f"a step takes {times:.1f} times the least that it can cost here",
                "a term that costs much, text that is prepared too slowly, or something else that uses this machine",
                "workers=2 for the text; kd.build_cache(trainer); leave out a term with little of the gradient; "
                "kd.run_preflight(trainer) times the steps anew",
                gone=f"a step takes less than {SLOW:g} times its least again",
            )
        norm, scale = record.get("grad_norm"), record.get("loss_scale")
        broken = any(t["value"] is not None and not math.isfinite(t["value"]) for t in record["terms"].values())
        if norm is not None and not math.isfinite(norm) and scale is None and not broken:
            yield Finding(
                "finite:gradient",
                "the gradient was not finite although every loss was; its steps are skipped",
                "a division by zero or a square root of zero in the backward pass of one term",
                "leave terms out one by one; kd.last_fault() shows which and where",
                patience=1,
                gone="the gradient is finite again",
            )
        if scale is not None and scale < 1:
            yield Finding(
                "scale:loss",
                f"the scale of the fp16 loss has fallen to {scale:g}",
                "gradients overflow in float16 again and again, as they do when one loss is far too large",
                "look for a term above its range; lower its weight, or use precision='no'",
                patience=10,
                gone="the scale of the fp16 loss is above 1 again",
            )

    def _value(self, record: Mapping, term: LossTerm, now: Mapping) -> Iterator[Finding]:
        value, name = now["value"], term.name
        if value is None:
            if term.weight > 0 and not now["count"]:
                cause, _, cure = term.empty.partition("; ")
                yield Finding(
                    f"empty:{name}",
                    f"{name} had nothing to look at",
                    cause,
                    f"{cure}, or leave {name} out" if cure else f"leave {name} out",
                    patience=10,
                    gone=f"{name} has something to look at",
                )
            return
        if not math.isfinite(value):
            yield Finding(
                f"finite:{name}",
                f"{name} was not finite; its steps are skipped",
                "an overflow in half precision, a logarithm of 0, or a teacher that gives NaN",
                "kd.last_fault() shows the place; precision='no'; or leave the term out",
                patience=1,
                gone=f"{name} is finite again",
            )
            return
        judged, low_high = verdict(term.meta, value), f"{term.healthy[0]:g} to {term.healthy[1]:g}"
        if judged == "impossible":
            yield Finding(
                f"impossible:{name}",
                f"{name} is {short(value)} {term.unit}, which no run can give (healthy: {low_high})",
                "a loss that is a sum where it should be a mean, is not normalised, or compares positions that do not "
                "belong together",
                "kd.build_probe(trainer).scales() tells with what it grows; compare with the kit's own term",
                patience=1,
                gone=f"{name} is possible again",
            )
        elif judged == "high" and value > FAR * term.healthy[1] > 0:
            yield Finding(
                f"far:{name}",
                f"{name} is {value / term.healthy[1]:.0f} times the top of its range: {short(value)} {term.unit}, "
                f"healthy {low_high}",
                "a loss that is a sum where it should be a mean, or is not normalised",
                "kd.build_probe(trainer).scales() tells with what it grows; compare with the kit's own term",
                f"{name} is no longer far above its range",
                patience=MEASUREMENTS,
            )
        elif judged in ("low", "high") and record["step"] > self.grace:
            cause, cure = {
                "high": (
                    "the student does not follow this term: its weight or the learning rate is too small, another "
                    "term works against it, or the value is not normalised",
                    "the gradient shares and cosines in kd.build_probe(trainer)",
                ),
                "low": (
                    "there is nothing left to learn here, or student and teacher see the same thing by mistake",
                    f"give the weight of {name} to another term; kd.verify if you did not expect it",
                ),
            }[judged]
            yield Finding(
                f"range:{name}",
                f"{name} is {'above' if judged == 'high' else 'below'} its range: {short(value)} {term.unit}, healthy "
                f"{low_high}",
                cause,
                cure,
                gone=f"{name} is back in its range",
            )

    def _gradient(self, record: Mapping, name: str, now: Mapping) -> Iterator[Finding]:
        share, cosine = now.get("grad_share"), now.get("cosine")
        if share is None or now["weight"] == 0:
            return
        others = sum(1 for t in record["terms"].values() if t.get("weight", 0) > 0 and t["count"]) > 1
        drowned = any((t.get("grad_share") or 0) > 0.9 for t in record["terms"].values())
        if share < 0.01 and now["count"] and not drowned:  # where one term has nearly all, that one is to be named
            part = f"{share:.1%}" if share >= 0.001 else "less than 0.1%"
            leave = "" if name == "lm" else f", or leave {name} out and save its cost"
            yield Finding(
                f"weak:{name}",
                f"{name} has {part} of the gradient: it changes next to nothing",
                "its weight is small for the size of its gradient",
                f"raise its weight or take kd.gradient_share(){leave}",
                patience=MEASUREMENTS,
                gone=f"{name} has more than 1% of the gradient",
            )
        elif share > 0.9 and others:
            yield Finding(
                f"strong:{name}",
                f"{name} has {share:.0%} of the gradient: the other terms change next to nothing",
                "it is not normalised, or its weight is large for the size of its gradient",
                "its range in the table; lower its weight, or take kd.gradient_share()",
                patience=MEASUREMENTS,
                gone=f"{name} has less than 90% of the gradient",
            )
        if cosine is not None and name != "lm" and cosine < -0.3:
            yield Finding(
                f"fights:{name}",
                f"{name} pulls against the text: the cosine of its gradient with that of lm is {cosine:.2f}",
                "it compares positions that do not belong together, or asks for something that contradicts the text",
                "the alignment and the layer map in kd.build_probe(trainer); lower its weight",
                patience=MEASUREMENTS,
                gone=f"{name} no longer pulls against lm",
            )
        elif cosine is not None and cosine < 0.1 and self._reads_distributions(name):
            yield Finding(
                f"strays:{name}",
                f"{name} compares next-token distributions and does not pull with the text: the cosine of its gradient "
                f"with that of lm is {cosine:.2f}, where about 0.5 is usual",
                "it compares positions that do not belong together, or the teacher does not know this text",
                "kd.looks.alignment(trainer); kd.audit; the teacher's bits per byte in kd.run_preflight",
                patience=MEASUREMENTS,
                gone=f"{name} pulls with lm",
            )

    def _reads_distributions(self, name: str) -> bool:
        """Whether a term compares the two models' next-token distributions."""
        needs = self._judges[name].needs
        return bool(needs.readings) or needs.row_states

    def _missing_lm(self, record: Mapping) -> Iterator[Finding]:
        """The LM term beside others: it must be there, counted and weighted, at every step."""
        parts = {n: abs(t["contribution"]) for n, t in record["terms"].items() if t.get("contribution") is not None}
        lm, whole = record["terms"].get("lm"), sum(p for p in parts.values() if math.isfinite(p))
        if lm is None or len(record["terms"]) < 2:
            return
        share = parts["lm"] / whole if "lm" in parts and whole > 0 and math.isfinite(parts["lm"]) else None
        if lm["value"] is None or (share is not None and share < 0.001):
            had = "nothing to predict" if lm["value"] is None else f"weight {lm['weight']:.3g}"
            yield Finding(
                "gone:lm",
                f"the LM loss has vanished from the total ({had}"
                + ("" if share is None else f", {share:.2%} of it")
                + ")",
                "its weight was set to nothing, or another term is so large that nothing is left for it",
                "give lm its weight back: trainer.set_weights(lm=0.3); look for a term above its range",
                patience=10,
                gone="the LM loss is part of the total again",
            )

    def _experts(self, name: str, now: Mapping) -> Iterator[Finding]:
        loads = [t["terms"][name] for t in list(self._recent)[-20:] if name in t["terms"]]
        loads = [t["extras"]["load"] for t in loads if t["count"] and "load" in t.get("extras", {})]
        if not loads or not (now["count"] and "load" in now.get("extras", {})):
            return
        for layer, each in enumerate(zip(*loads, strict=True), start=1):
            mean = [sum(part) / len(each) for part in zip(*each, strict=True)]
            if max(mean) > 0.8 or min(mean) < 0.2 / len(mean):
                yield Finding(
                    f"expert:{name} {layer}",
                    f"{name}: the knowledge router of its pair {layer} has collapsed or lost an expert (shares "
                    f"{', '.join(f'{share:.0%}' for share in mean)})",
                    "its balance loss is too small, or there are more experts than kinds of spans",
                    "raise balance= or lower experts=",
                    patience=10,
                    gone=f"{name}: the experts of its pair {layer} are all used again",
                )

    def _halves(self) -> tuple[list, list] | None:
        """The last steps in two halves, looked at every tenth step; None at the others."""
        recent = list(self._recent)
        if len(recent) < 2 * HALVES or recent[-1]["step"] % 10:
            return None
        return recent[:HALVES], recent[HALVES:]

    def _rise(self, name: str, halves: tuple[list, list]) -> tuple[float, float] | None:
        """Means of a term in both halves, where the second is clearly above the first."""
        found = [_mean_error([r["terms"].get(name, {}).get("value") for r in half]) for half in halves]
        if None in found:
            return None
        (before, error), (after, other) = found
        return (before, after) if after - before > max(0.02 * abs(before), 3 * math.hypot(error, other)) else None

    def _trend(self) -> Iterator[Finding]:
        """A term that compares next-token distributions rises while the total falls."""
        halves = self._halves()
        if halves is None:
            return
        totals = [_mean_error([r["total"] for r in half]) for half in halves]
        if None in totals or not totals[1][0] < totals[0][0] - 2 * math.hypot(totals[0][1], totals[1][1]):
            return
        for name in self._judges:
            if not self._reads_distributions(name):
                continue
            risen = self._rise(name, halves)
            if risen:
                before, after = risen
                yield Finding(
                    f"rises:{name}",
                    f"{name} rises while the total falls: {short(before)} to {short(after)} over the last "
                    f"{2 * HALVES} steps",
                    "the other terms win against it: they have more of the gradient, or pull the other way",
                    f"raise the weight of {name}; the cosines in kd.build_probe(trainer)",
                    patience=2,
                    gone=f"{name} no longer rises",
                )


def _times_floor(record: Mapping) -> float | None:
    """What a usual step took over its floor; None where it was not measured, or gradients were compared as well."""
    return None if "gradients" in record else record.get("times_floor")


def _mean_error(values: Sequence[float | None]) -> tuple[float, float] | None:
    """Mean and its standard error of finite values; None where they are few."""
    good = [v for v in values if v is not None and math.isfinite(v)]
    if len(good) < HALVES // 2:
        return None
    mean = sum(good) / len(good)
    return mean, math.sqrt(sum((v - mean) ** 2 for v in good) / len(good) / (len(good) - 1))


def standing_alarms(history: History) -> list[dict]:
    """Alarms that have been raised and not cleared, oldest first."""
    found: dict[str, dict] = {}
    for event in history.events:
        key = event.get("key")
        if key is not None and event["what"] == "alarm":
            found[key] = event
        elif key is not None and event["what"] == "cleared":
            found.pop(key, None)
    return list(found.values())
