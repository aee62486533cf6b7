"""Checks of what the first batches and a few steps of a run show, and of whether the machine suffices for it."""

from __future__ import annotations

import math
import shutil

import torch

from kd_kit.facts import (
    FAIL,
    LOOK,
    NOT_FINITE,
    OK,
    Facts,
    Found,
    few,
    gigabytes,
    percent,
    pulls,
    seconds,
    sentence,
)
from kd_kit.forecast import sessions_needed
from kd_kit.history import verdict
from kd_kit.kaggle_place import room
from kd_kit.memory import CARD, device_memory, memory_of, process_peak, size_of
from kd_kit.readings import SharedReading, SortedReading
from kd_kit.table import plain, short, span
from kd_kit.trainer import Trainer, save_interval

TIMES_FLOOR = 4.0
"""A step over its floor, at most."""

_MOST = 10.0  # of a term's value
_TAIL = 0.1  # of the teacher's mass
_UNTRAINED = 0.8  # of ln V: an LM term above that knows hardly more than the number of tokens


# --- the first batch -----------------------------------------------------------------------------------------------


def dtypes(facts: Facts) -> Found:
    """Whether everything can be computed and is finite without autocast, beside a teacher in any precision."""
    trial = facts.trial
    trial.need("values")
    wrong = []
    beside = " beside half-precision knowledge"
    for where, values in (("", trial.values), (beside, trial.halved)):
        for name, value in values.items():
            if isinstance(value, Exception):
                wrong.append(f"{name} cannot be computed{where}: {sentence(value)}")
            elif value is not None and not math.isfinite(value):
                wrong.append(f"{name} is {value}{where}")
    scored = {"student score": "the student", "teacher score": "the teacher"}
    for stage, who in scored.items():
        if stage in trial.errors:
            wrong.append(f"{who} cannot be scored: {sentence(trial.errors[stage])}")
        elif (found := trial.scores.get(stage.split()[0])) is not None and not math.isfinite(found.nats):
            wrong.append(f"the likelihood of held-out text under {who} is {found.nats}")
    if "agreement" in trial.errors:
        wrong.append(f"agreement cannot be computed: {sentence(trial.errors['agreement'])}")
    elif trial.agreement is not None and not math.isfinite(trial.agreement.kl):
        wrong.append(f"the divergence of student and teacher on held-out text is {trial.agreement.kl}")
    if wrong:
        cure = f"{'; '.join(wrong)}. All of this runs without autocast, as an evaluation may"
        if any("dtype" in one or beside in one for one in wrong):
            cure += (
                ": let a term cast what it gets to the dtype of its own weights (x.to(weight.dtype), or .float()), and "
                "keep the student in float32"
            )
        return f"{len(wrong)} not finite or not computed", FAIL, cure
    own = "" if facts.trainer.teacher is None else f", teacher {_dtype(facts.trainer.teacher.model)}"
    return f"{len(trial.values)} terms, scores finite{own}{' and half' if trial.halved else ''}", OK, ""


def _dtype(model) -> str:
    return str(next(model.parameters()).dtype).removeprefix("torch.")


def sizes(facts: Facts) -> Found:
    """Whether the values of the terms are such as they can be."""
    facts.trial.need("values")
    values = {n: v for n, v in facts.trial.values.items() if not isinstance(v, Exception)}
    known = {n: v for n, v in values.items() if v is not None}
    if not known:
        return "no value", FAIL, "no term has a value on the first batch; see the line about dtypes, or kd.audit"
    guess = math.log(facts.trainer.data.pair.student_vocab.size)
    untrained = known.get("lm", 0.0) > _UNTRAINED * guess
    large, wrong, outside = [], [], []
    for term in facts.trainer.terms:
        value = known.get(term.name)
        if value is None:
            continue
        # a student that guesses spends ln V nats on every token, however large V is
        tokens = {"nats/token": 1.0, "nats/span": facts.trial.span_tokens}.get(term.unit) if untrained else None
        most = _MOST if tokens is None else max(_MOST, tokens * (guess + 1))
        word = verdict(term.meta if tokens is None else term.meta | {"impossible_above": None}, value)
        low, high = term.healthy
        text = f"{term.name} {short(value)} (healthy {plain(low)} to {plain(high)} {term.unit})"
        if value > most:
            large.append(text)
        elif word == "impossible":
            wrong.append(text)
        elif word != "healthy":
            outside.append(text)
    largest = max(known, key=lambda name: known[name] if math.isfinite(known[name]) else math.inf)
    measured = f"{len(known)} terms, largest {largest} {short(known[largest])}"
    empty = [name for name, value in values.items() if value is None]
    cures = []
    if large:
        cures.append(
            f"{', '.join(large)}: divide a distance by its width or by a size that belongs to it (a mean of squares "
            "grows with the states; 1 - cosine and KL / ln n do not), and see that both sides are about one token"
        )
    if wrong:
        cures.append(f"{', '.join(wrong)}: no such value can be; kd.verify(...) says which property does not hold")
    if cures:
        return measured, FAIL, "; ".join(cures)
    said = []
    if outside:
        start = (
            f"not in the healthy range yet, as an untrained student is not (it guesses: ln V is {guess:.1f})"
            if untrained
            else "not in the healthy range, which may be so at the start and not at the end"
        )
        said.append(f"{', '.join(outside)}: {start}")
    if empty:
        said.append(f"{', '.join(empty)} found nothing to look at in the first batch; see kd.audit")
    return measured, LOOK if said else OK, "; ".join(said)


def top_k(facts: Facts) -> Found:
    """Whether losses look at few cells of the vocabulary, and these hold most of the teacher's mass."""
    readings = facts.trainer.module.needs.readings
    if not readings or facts.trainer.teacher is None:
        return None
    facts.trial.need("values")
    said, word, cures = {}, OK, []
    for reading in readings:
        cells, tail = facts.trial.cells[reading.key]
        of = _vocabulary(reading, facts)
        said[tail] = f"{cells:,} of {of:,} cells, {tail:.1%} in the tail"
        name = f"the reading {reading.key!r}"
        if cells != reading.top_k:
            word = FAIL
            cures.append(f"{name} was asked for {reading.top_k} cells and gave {cells}: kd.verify(...) looks closer")
        elif not math.isfinite(tail):
            word = FAIL
            cures.append(f"the teacher's mass in {name} is not finite: look at the teacher's weights and dtype")
        elif cells >= of:
            word = word if word == FAIL else LOOK
            cures.append(f"{name} keeps every cell, which costs memory and time: kd_term(top_k=64) keeps the largest")
        elif tail > _TAIL:
            word = word if word == FAIL else LOOK
            cures.append(
                f"{tail:.0%} of the teacher's mass has no cell in {name}: raise top_k=, after a look at kd.audit("
                "tokenizers, data, teacher), which says how much K cells hold and how much has no home at all"
            )
    measured = said[max(said)] if len(readings) == 1 else f"{said[max(said)]}, of {len(readings)}"
    return measured, word, "; ".join(cures)


def _vocabulary(reading, facts: Facts) -> int:
    if isinstance(reading, SortedReading):
        return facts.trainer.data.pair.teacher_vocab.size
    return reading.size if isinstance(reading, SharedReading) else reading.bridge.student_size


def heard(facts: Facts) -> Found:
    """Whether the teacher is heard at enough positions."""
    if not facts.taught:
        return None
    facts.trial.need("steps")
    records = facts.trial.records
    aligned, taught = (sum(r[key] for r in records) / len(records) for key in ("aligned_share", "taught_share"))
    measured = f"{aligned:.0%} aligned, {taught:.0%} taught"
    if taught >= 0.5:
        return measured, OK, ""
    cure = (
        "the two tokenizers rarely meet on this text: kd.audit(tokenizers, data, teacher) says what carries most, and "
        "kd_term(method=...) takes it; is it a language that both were made for?"
    )
    return measured, LOOK if taught >= 0.1 else FAIL, cure


def better(facts: Facts) -> Found:
    """Whether there is something to learn from the teacher."""
    if not facts.taught:
        return None
    facts.trial.need("student score", "teacher score")
    student, teacher = (facts.trial.scores[who].bits_per_byte for who in ("student", "teacher"))
    measured = f"teacher {teacher:.3f}, student {student:.3f} bits/byte"
    if teacher < student:
        return measured, OK, ""
    if not math.isfinite(teacher) or not math.isfinite(student):
        return measured, FAIL, "these are no likelihoods: look at the weights that were loaded, and their dtype"
    if facts.trainer.step:
        cure = "the student has overtaken its teacher on this text: from here on the text alone may teach it more"
        return measured, LOOK, cure
    cure = (
        "the teacher is no better than the student on the held-out text, so it has nothing to teach it here: take "
        "another teacher, or text that it knows better; check that it was loaded with trained weights and its own "
        "tokenizer"
    )
    return measured, FAIL, cure


# --- a few steps ---------------------------------------------------------------------------------------------------


def reaches(facts: Facts) -> Found:
    """Whether everything that is trained has a gradient, and nothing else."""
    one, trial = facts.trainer, facts.trial
    trial.need("reach", "steps")
    named = list(one.module.named_parameters())
    trained = [name for name, p in named if p.requires_grad]
    frozen = [name for name, p in named if not p.requires_grad]
    missing = [name for name in trained if name not in trial.reached]
    still = [name for name in trained if name in trial.reached and not trial.reached[name]]
    measured = f"{len(trained) - len(missing) - len(still)} of {len(named)} tensors"
    teacher = [] if one.teacher is None else list(one.teacher.model.named_parameters())
    own = [name for name, p in teacher if p.grad is not None]
    if own:
        cure = f"the teacher has gradients ({few(own)}): detach what a term of your own takes from it"
        return measured, FAIL, cure
    if missing:
        cure = (
            f"no gradient reaches {few(missing)}: it would never be trained. A detach() or no_grad() on the way to "
            "the loss, or a part that forward does not use? Freeze what is not meant to learn: requires_grad_(False)"
        )
        return measured, FAIL, cure
    cures = []
    if still:
        cures.append(f"the gradient of {few(still)} was 0 in every step: is what it feeds switched off?")
    if frozen:
        cures.append(f"{few(frozen)} do not learn (requires_grad is False): right if it is meant so")
    if any(p.requires_grad for _, p in teacher):
        cures.append("the teacher's weights ask for gradients, which nobody uses: teacher.requires_grad_(False)")
    return measured, LOOK if cures else OK, "; ".join(cures)


def gradient_shares(facts: Facts) -> Found:
    """Whether every term is felt beside the others."""
    shares = pulls(facts)
    if shares is None:
        return None
    if not all(map(math.isfinite, shares.values())):
        return "not finite", FAIL, NOT_FINITE
    # a part that starts from zeros hands nothing on until it has learned something itself
    starts = {n for n in shares if shares[n] == 0 and _learns(n, facts)}
    weak = [f"{n} {percent(share)}" for n, share in shares.items() if share < 0.01 and n not in starts]
    strong = [f"{n} {percent(share)}" for n, share in shares.items() if share > 0.9]
    said = [f"{n} {percent(shares[n])}" for n in sorted(shares, key=shares.get, reverse=True) if n not in starts]
    measured = ", ".join(said if len(said) <= 3 else said[:2]) + (f" .. {said[-1]}" if len(said) > 3 else "")
    cures = []
    if weak:
        cures.append(f"{', '.join(weak)} of the gradient: hardly felt; raise the weight, or leave it out and save time")
    if strong:
        cures.append(f"{', '.join(strong)} of the gradient: the others are hardly felt; lower its weight")
    if cures:
        cures.append("balance=kd.gradient_share() finds weights for wanted shares")
    return measured, LOOK if cures else OK, ". ".join(cures)


def _learns(name: str, facts: Facts) -> bool:
    """Whether a gradient came to the trained part of a term."""
    return any(seen and parameter.startswith(f"parts.{name}.") for parameter, seen in facts.trial.reached.items())


def resumes(facts: Facts) -> Found:
    """Whether a run that goes on from a checkpoint is the run that was not interrupted."""
    facts.trial.need("save", "resume")
    apart = facts.trial.apart
    size = f"{gigabytes(facts.trial.saved_bytes)} saved in {facts.trial.save_seconds:.1f} s"
    if apart == 0:
        return f"the same weights; {size}", OK, ""
    measured = f"weights differ by up to {apart:.1e}; {size}"
    if facts.trainer.session.device.type == "cuda":
        cure = "sums on a card need not come out alike twice; a difference far above 1e-6 would be a state that is lost"
        return measured, LOOK, cure
    cure = (
        "a step behind a checkpoint differs from the same step without: something that the step depends on is not "
        "saved. Keep it in a buffer of the term's module; draw random numbers from torch's or numpy's global state"
    )
    return measured, FAIL, cure


# --- the machine ---------------------------------------------------------------------------------------------------


def fits(facts: Facts) -> Found:
    """Whether there is memory enough."""
    one, trial = facts.trainer, facts.trial
    device, needs = one.session.device, memory_of(one)
    there = device_memory(device)
    smaller = (
        "smaller batches (build_data(batch_size=...)) with accumulation= as many times more, a shorter window, or a "
        "teacher in half precision"
    )
    out = [e for e in trial.errors.values() if isinstance(e, (torch.OutOfMemoryError, MemoryError))]
    measured = f"{gigabytes(needs.total)}"
    if there is None:
        return measured, LOOK, "this system does not say how much memory it has"
    peak = trial.peak if device.type == "cuda" else process_peak()
    if peak is not None:
        measured += f", {'trial' if device.type == 'cuda' else 'process'} {gigabytes(peak)}"
    measured += f" of {gigabytes(there)}"
    if device.type != "cuda":
        measured += f"; {CARD // 2**30} GB card {gigabytes(memory_of(one, card=CARD).total)}"
    used = max(needs.total, peak or 0)
    if out or used > 0.97 * there:
        return measured, FAIL, f"it does not fit, most of it {needs.largest}: {smaller}"
    if used > 0.9 * there:
        return measured, LOOK, f"little is left for longer windows than those of the trial; if it runs out: {smaller}"
    return measured, OK, ""


def disk(facts: Facts) -> Found:
    """Whether the disk holds what the run will keep."""
    one, free = facts.trainer, facts.free
    weights = size_of(one.module.parameters())
    trained = sum(p.numel() for p in one.module.parameters() if p.requires_grad)
    saved = facts.trial.saved_bytes or weights + 8 * trained
    student = size_of(one.student.parameters())
    # two newest, the best and one being written; the best weights, their replacement, and an export
    needed = 4 * saved + 3 * student
    there = _held(one)
    left = max(needed - there, 0)
    measured = f"{gigabytes(left)} more of {gigabytes(free)} free"
    if left > free:
        cure = (
            f"checkpoints would fail: two newest, the best and one being written ({gigabytes(saved)} each), "
            f"best.safetensors and an export ({gigabytes(student)} each). Delete what is not needed, or "
            "build_session(folder=...) on a larger disk"
        )
        return measured, FAIL, cure
    return measured, LOOK if 1.2 * left > free else OK, "nearly full: make room" if 1.2 * left > free else ""


def free_space(trainer: Trainer) -> int:
    folder = trainer.session.folder
    return room(folder, shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free)


def _held(trainer: Trainer) -> int:
    """Bytes that the run's own checkpoints and best weights have on disk already."""
    folder = trainer.session.folder
    files = [*(folder / "ckpt").glob("step-*/*"), *folder.glob("best.safetensors")]
    return sum(file.stat().st_size for file in files)


def time_left(facts: Facts) -> Found:
    """Whether the run ends within the session."""
    one, trial = facts.trainer, facts.trial
    trial.need("steps")
    each = trial.step_seconds
    compared = max(trial.measured_seconds - each, 0.0) / one.settings["measure_every"]
    windows = min(one.settings["eval_windows"], len(one.data.held_out))
    evaluating = (trial.score_seconds or 0.0) * windows / one.settings["eval_every"]
    per_step = each + compared + evaluating
    between_saves = max(save_interval(one.settings["save_minutes"], trial.save_seconds), per_step)
    per_step += trial.save_seconds * per_step / between_saves
    steps = max(one.total_steps - one.step, 0)
    needed, left = per_step * steps, one.session.remaining()
    measured = f"{steps:,} steps x {seconds(per_step)} = {span(needed)}"
    if not steps:
        return measured, LOOK, "the run is over: more steps= or another run name trains on"
    if math.isinf(left):
        return f"{measured}, no limit", OK, ""
    measured += f", {span(max(left, 0))} left"
    spare = min(60, one.session.budget / 20)  # for what comes after the last step
    usable = left - spare
    fitting = max(int(usable / per_step), 0)
    if fitting < 1:
        cure = "the session is as good as over: start a new one, and the run goes on where its folder says"
        return measured, FAIL, cure
    if needed <= usable:
        return measured, OK, ""
    if one.settings["finish_in_session"]:
        falling = one.lr_schedule.decay_steps(one.planned_steps)
        if falling <= fitting:
            return f"{measured}; ends by itself", OK, ""
        cure = f"not even the decay of {falling:,} steps fits into what is left: steps={fitting:,}, or more hours="
        return measured, LOOK, cure
    sessions = sessions_needed(needed, usable, max(one.session.budget - spare, per_step))
    cure = (
        f"it takes {sessions} sessions, and goes on by itself in the next one; to end in this one: "
        f"finish_in_session=True, which starts the rate's decay in time, or steps={fitting:,}"
    )
    return measured, LOOK, cure


def cost(facts: Facts) -> Found:
    """What a step costs beyond what it must."""
    trial = facts.trial
    trial.need("clock")
    times = trial.step_seconds / trial.floor_seconds
    measured = f"a step takes {times:.1f} x its floor of {seconds(trial.floor_seconds)}"
    if times <= TIMES_FLOOR:
        return measured, OK, ""
    cure = (
        "the floor is the teacher's body once and the student's step on the text alone; the rest are the terms: leave "
        "out those with the smallest share of the gradient, or lower top_k="
    )
    return measured, LOOK, cure
