"""Checks of a run's plan: shares, rates, stopping, printed lines."""

from __future__ import annotations

import math

from kd_kit.callbacks import EarlyStopping, PrintLines
from kd_kit.facts import FAIL, LOOK, NOT_FINITE, OK, Facts, Found, percent, pulls
from kd_kit.packed_body import why_not_packed
from kd_kit.packing import LEAST_SAVED

LINES = 400
"""Printed by a run, without alarms, at most."""

PADDING = 0.2
"""Share of the places of batches that may be padding."""

PATIENCE = 20
"""Evaluations without a new best that early stopping waits for, at least."""


def half_time(facts: Facts) -> Found:
    """Whether every term has half of its full share when half of the run is over."""
    one = facts.trainer
    weights = one.balance.weights({t.name: t.weight for t in one.terms}, one._norms)
    most = {n: max((f for _, f in one.schedule.lines.get(n, ((0, 1),))), default=1) for n in weights}
    whole = sum(w * most[n] for n, w in weights.items())
    full = one.balance.floored({n: w * most[n] / whole for n, w in weights.items()})
    half = one.shares_at((one.total_steps + 1) // 2)
    parts = {n: half[n] / share for n, share in full.items() if share > 0}
    least = min(parts, key=parts.get)
    late = [f"{n} has {part:.1%} of its full share" for n, part in parts.items() if part < 0.5 - 1e-6]
    measured = f"{least} {parts[least]:.1%}, the least of {len(parts)}"
    if parts[least] > 1 - 1e-6:
        measured = "every term has all of it"
    if not late:
        return measured, OK, ""
    cure = (
        f"{', '.join(late)} when half of the run is over: a term that waits so long hardly teaches. Let its line reach "
        "its full factor by 0.4, as kd.curriculum() does; trainer.shares_at(step) and kd.plot_schedule(trainer) show it"
    )
    return measured, FAIL, cure


def language(facts: Facts) -> Found:
    """Whether the text itself teaches at every step, and is felt."""
    one = facts.trainer
    if not any(t.name == "lm" for t in one.terms):
        return "no term named lm", LOOK, "nobody sees whether the student still learns the language: add kd.lm_term()"
    shares = {step: one.shares_at(step)["lm"] for step in facts.steps}
    least = min(shares, key=shares.get)
    measured = f"least share {percent(shares[least])} at step {least:,}"
    if not shares[least] > 0:
        cure = (
            f"the LM term is off at step {least:,}, and the student then learns from the teacher alone: give it a "
            "weight and a factor above 0 at every step, or gradient_share(lm_floor=0.05)"
        )
        return measured, FAIL, cure
    pull = pulls(facts)
    if pull is None:
        return measured, OK, ""
    if not math.isfinite(pull["lm"]):
        return measured, FAIL, NOT_FINITE
    measured += f", {percent(pull['lm'])} of the gradient"
    if pull["lm"] > 0.01:
        return measured, OK, ""
    cure = "the text hardly moves the student: raise lm_term(weight), or use balance=kd.gradient_share()"
    return measured, FAIL, cure


def rate(facts: Facts) -> Found:
    """Whether the steps had the rates of the plan, and the plan has one for every step."""
    one = facts.trainer
    rates = {step: one.rate_at(step) for step in facts.steps}
    high = max(rates.values())
    peak = next(step for step, rate in rates.items() if rate == high)
    zero = [step for step, rate in rates.items() if not rate > 0]
    facts.trial.need("steps")
    factors = one.rate_factors
    off = [
        f"{name} had {rate:.3g} at step {step:,} and should have had {one.rate_at(step) * factors[name]:.3g}"
        for step, found in facts.trial.rates
        for name, rate in found
        if not math.isclose(rate, one.rate_at(step) * factors[name], rel_tol=1e-6)
    ]
    step, first = facts.trial.rates[0]
    measured = f"step {step:,}: {first[0][1]:.1e}; peak {high:.1e} at step {peak:,}"
    if off:
        return measured, FAIL, f"{'; '.join(off[:3])}: something else than the plan sets the rates of the optimizer"
    if zero:
        return measured, FAIL, f"the rate is 0 at step {zero[0]:,}, which teaches nothing: give LearningRate a floor"
    skipped = facts.trial.records[-1]["skipped_steps"] - one.skipped_steps
    cures = []
    if peak > 0.2 * one.total_steps and one.lr_schedule.warmup_steps(one.planned_steps) - 1 == peak:
        cures.append(f"the warm-up takes {peak / one.total_steps:.0%} of the run: LearningRate(warmup=0.02) is usual")
    if skipped and one.session.precision == "fp16":
        cures.append(f"{skipped} of the first steps had no finite gradient, as fp16 has until it finds its loss scale")
    elif skipped:
        return measured, FAIL, f"{skipped} of the first steps were skipped: {NOT_FINITE}"
    return measured, LOOK if cures else OK, "; ".join(cures)


def printed(facts: Facts) -> Found:
    """Whether the log stays short enough to be read."""
    one = facts.trainer
    total, each = one.total_steps, [c.every for c in one.callbacks if isinstance(c, PrintLines)]
    changes = len(one.schedule.changes({t.name: t.weight for t in one.terms}, total))
    changes += len(one.lr_schedule.changes(one.planned_steps, one.decay_from))
    steps = sum(math.ceil(total / every) for every in each)
    evaluations = math.ceil(total / one.settings["eval_every"]) + 1
    lines = steps + len(each) * (evaluations + changes + 2)  # and a first and a last one
    measured = f"at most {lines:,} lines in {total:,} steps"
    asked = math.ceil(total / one.settings["log_every"])
    if steps > max(asked, 1):
        cure = (
            f"{steps:,} lines about steps are more than one per log_every={one.settings['log_every']}: "
            "trainer.callbacks holds more than one PrintLines, or one that prints more often; take it out"
        )
        return measured, FAIL if lines >= LINES else LOOK, cure
    if lines < LINES:
        return measured, OK, ""
    counts = {name: math.ceil(total / one.settings[name]) for name in ("log_every", "eval_every")}
    often = [name for name, count in counts.items() if count > 150] or [max(counts, key=counts.get)]
    sparse = {name: _round_up(math.ceil(total / 150)) for name in often}
    changed = ", ".join(f"{name}={value}" for name, value in sparse.items())
    cure = f"a log that nobody reads hides what matters, and slows a notebook down: build_trainer({changed})"
    return measured, FAIL, cure


def stopping(facts: Facts) -> Found:
    """Whether early stopping waits long enough."""
    one = facts.trainer
    found = next((c for c in one.callbacks if isinstance(c, EarlyStopping)), None)
    if found is None:
        cure = "a run that has ceased to learn goes on to its end: early_stopping=kd.EarlyStopping() ends it"
        return "off", LOOK, cure
    first, total = found.first_stop(one), one.total_steps
    acts = first < total
    measured = f"patience {found.patience}, " + (f"from step {first:,}" if acts else f"cannot act in {total:,} steps")
    if found.patience >= PATIENCE:
        return measured, OK, ""
    cure = (
        f"{found.patience} evaluations without a new best are soon over: terms that come in raise the others for a "
        f"while. EarlyStopping(patience={PATIENCE}) or more"
    )
    return measured, FAIL if acts else LOOK, cure


def padding(facts: Facts) -> Found | None:
    """Whether the models compute on text and not on padding; no line where windows are nearly all full."""
    one, batching = facts.trainer, facts.trainer.data.batching
    if batching.padding <= LEAST_SAVED:
        return None
    models = {"student": one.student} | ({} if one.teacher is None else {"teacher": one.teacher.model})
    mixing = [who for who, model in models.items() if why_not_packed(model, one.data.window) is not None]
    share = batching.measured_padding(packed=not mixing)
    measured = f"{share:.0%} of all places"
    if share <= PADDING:
        return measured, OK, ""
    if mixing:
        said = f"the {' and the '.join(mixing)} cannot hold several windows in one row apart"
    else:
        said = "few windows fit side by side into one row"
    cure = (
        f"{said}, so that much is computed for nothing: build_data(pack=False), which gives a batch windows of like "
        "length"
    )
    if batching.arrangement == "lengths":
        cure = f"{said}, and lengths differ much: join short texts into documents, or take a smaller batch_size="
    return measured, LOOK, cure


def _round_up(count: int) -> int:
    """To one of 1, 2, 5, 10, 20, 50, ..."""
    size = 10 ** math.floor(math.log10(count))
    return next(size * i for i in (1, 2, 5, 10) if size * i >= count)
