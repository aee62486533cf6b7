"""Where a run stands, in words: its terms as a table, its clock, what each gradient does, the alarms that stand.

Pure: a history goes in, text comes out. The figure and the dashboard say what is said here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from kd_kit.alarms import standing_alarms
from kd_kit.history import History, usual_times_floor, verdict
from kd_kit.table import Table, plain, short

FIGHTS = -0.3
"""Cosine with the gradient of lm below which a term works against the text."""
WEAK, STRONG = 0.01, 0.9
"""Shares of the gradient below and above which a term, or all others, change nothing."""


def loss_table(history: History) -> Table:
    """What every term was at the last logged step, and its share of the total in per cent.

    Shares are of the sum of the magnitudes, so that they add up to 100 even beside a negative contribution. Once
    gradients have been compared there are two more columns: each term's share of the gradient, and the cosine of
    its gradient with that of lm; what is wrong with them stands behind the verdict on the value.
    """
    step = history.last("train") or {"terms": {}}
    parts = {name: _finite(t.get("contribution")) for name, t in step["terms"].items()}
    whole = sum(abs(part) for part in parts.values() if part is not None)
    measured = last_measured(history)
    rows = []
    for name, meta in history.terms.items():
        now = step["terms"].get(name, {})
        value, part = now.get("value"), parts.get(name)
        share = "-" if part is None or not whole else _share(part / whole)
        gradient, words = (), verdict(meta, value)
        if measured is not None:
            found = measured["terms"].get(name, {})
            pulled, cosine = found.get("grad_share"), found.get("cosine")
            gradient = (
                "-" if pulled is None or not math.isfinite(pulled) else _share(pulled),
                cosine_text(cosine),
            )
            word = gradient_word(measured, name)
            words = f"{words}, {word}" if word and value is not None else words
        rows.append(
            (
                name,
                short(value),
                meta.get("unit") or "-",
                _span(meta),
                words,
                "-" if now.get("weight") is None else plain(now["weight"]),
                short(now.get("contribution")),
                share,
                *gradient,
            )
        )
    more = () if measured is None else ("gradient %", "cos lm")
    if "step" in step:
        total = ("total", "", "", "", "", "", short(step.get("total")), "100.0" if whole else "-")
        rows.append((*total, *("" for _ in more)))
    return Table(
        title=status(history),
        columns=("term", "value", "unit", "healthy", "verdict", "weight", "contribution", "share %", *more),
        rows=tuple(rows),
        note="\n".join(line for line in (held_out(history), _about_gradients(measured)) if line),
        words=("term", "unit", "verdict"),
    )


def last_measured(history: History) -> dict[str, Any] | None:
    """The latest training record in which the gradients of the terms were compared."""
    return next((r for r in reversed(history.records) if r["kind"] == "train" and "gradients" in r), None)


def gradient_word(record: Mapping[str, Any], name: str) -> str:
    """What is wrong with one term's gradient at a measured step; "" for nothing."""
    terms = record["terms"]
    term = terms.get(name, {})
    share, cosine = term.get("grad_share"), term.get("cosine")
    if share is None or not term.get("weight") or not term.get("count"):
        return ""
    if not any(t.get("grad_share") for t in terms.values()) or not math.isfinite(share):
        return "no gradient"  # a NaN in one of them leaves none
    if cosine is not None and cosine < FIGHTS:
        return "fights lm"
    others = sum(1 for t in terms.values() if t.get("weight") and t.get("count")) > 1
    return "too weak" if share < WEAK else "too strong" if share > STRONG and others else ""


def cosine_text(cosine: float | None) -> str:
    """Two digits behind the point, "-" for None, and never "-0.00"."""
    return "-" if cosine is None else f"{round(cosine, 2) + 0.0:.2f}"


def status(history: History) -> str:
    """Where the run is, in one line."""
    now = history.last("train")
    if now is None:
        return "no steps yet"
    if now.get("times_floor") is not None:
        now = now | {"times_floor": usual_times_floor(history)}  # one step alone says little
    whole = history.total_steps
    parts = [f"step {now['step']:,}" + (f" of {whole:,} ({now['step'] / whole:.0%})" if whole else "")]
    return " · ".join([*parts, *measurements(now)])


def measurements(record: Mapping[str, Any]) -> list[str]:
    """What a step measured beside its terms, in words."""
    found = []
    for field, text in (
        ("epoch", "epoch {:.2f}"),
        ("tokens_per_second", "{:,.0f} tokens/s"),
        ("times_floor", "{:.1f} × the floor of a step"),
        ("grad_norm", "gradient norm {:.3g}"),
        ("skipped_steps", "{:,} skipped"),
        ("taught_share", "{:.0%} of tokens taught"),
        ("tail_mass", "tail mass {:.3f}"),
        ("loss_scale", "fp16 scale {:g}"),
    ):
        value = record.get(field)
        if value is not None:
            found.append(text.format(value))
    return found


def held_out(history: History) -> str:
    """The last held-out figure and what it is compared with."""
    steps, bits = history.evaluations()
    parts = [f"student {bits[-1]:.3f} at step {steps[-1]:,}"] if steps else []
    parts += [f"{name} {value:.3f}" for name, value in history.references().items()]
    return "held-out bits per byte: " + ", ".join(parts) if parts else ""


def clock(history: History, settings: Mapping[str, Any] | None = None) -> tuple[str, bool]:
    """What is left of session and run, or why it does not go on; and whether that is a warning.

    Args:
        settings: of the trainer; with ``finish_in_session`` a run that does not fit ends earlier by itself.
    """
    for record in reversed(history.records):
        if record["kind"] == "train":
            break
        if record["kind"] == "event" and record["what"] == "stopped":
            return f"at rest: {record['text']}", record["text"].startswith("failed")
        if record["kind"] == "event" and record["what"] == "rests":
            if record["text"] == "no longer":
                break
            return f"rests {record['text']}", False
    now = history.last("train") or {}
    left, needed = now.get("seconds_left"), now.get("seconds_to_finish")
    if needed is None or not math.isfinite(needed):
        return ("", False) if left is None else (f"{duration(left)} left of the session", False)
    if left is None:
        return f"{duration(needed)} to finish", False
    if needed <= left:
        return f"{duration(left)} left of the session, {duration(needed)} to finish", False
    if (settings or {}).get("finish_in_session"):
        return f"{duration(left)} left of the session, {duration(needed)} to finish: it will end early", False
    return f"{duration(needed)} to finish, but {duration(left)} left of the session: it will not finish in it", True


def duration(seconds: float) -> str:
    """A length of time as one says it: "2 h 10 min", "5 min", "40 s"."""
    seconds = max(0.0, seconds)
    if seconds < 59.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60:02d} min"


def alarm_lines(history: History) -> list[str]:
    """The newest alarm that stands, with how many there are: what, the likely cause, what to try; [] if none does."""
    found = standing_alarms(history)
    if not found:
        return []
    what, _, cause = found[-1]["text"].partition(" Likely: ")
    cause, _, cure = cause.partition(" Try: ")
    count = f"{len(found)} alarms stand, the newest: " if len(found) > 1 else "Alarm: "
    return [count + what, *([f"Likely: {cause}"] if cause else []), *([f"Try: {cure}"] if cure else [])]


def last_events(history: History, count: int) -> list[str]:
    """What happened last, oldest first; saves are no news, and alarms that stand are said elsewhere."""
    stand = standing_alarms(history)
    events = [e for e in history.events if e["what"] != "saved" and e not in stand]
    return [f"{e['what']} at step {e['step']:,}: {e['text']}" for e in events[-count:]]


def _about_gradients(record: Mapping[str, Any] | None) -> str:
    if record is None:
        return ""
    at = record["gradients"].get("at")
    return f"gradients compared at step {record['step']:,}" + (f", {at}" if at else "")


def _share(part: float) -> str:
    """Per cent with one digit behind the point; never "0.0" for something."""
    return "<0.1" if 0 < part < 0.0005 else f"{100 * part:.1f}"


def _span(meta: Mapping[str, Any]) -> str:
    band = meta.get("healthy")
    return f"{band[0]:g} - {band[1]:g}" if band else "-"


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
