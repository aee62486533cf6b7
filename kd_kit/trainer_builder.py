"""From plain arguments to a run that can work: every check that costs little is made before anything long begins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from kd_kit import routing
from kd_kit.balance import Balance, fixed
from kd_kit.callbacks import EarlyStopping
from kd_kit.data import DistillData
from kd_kit.kd_terms import kd_term
from kd_kit.learning_rate import LearningRate
from kd_kit.models import check_model
from kd_kit.module import all_needs
from kd_kit.packed_body import why_not_packed
from kd_kit.packing import LEAST_SAVED
from kd_kit.processes import join
from kd_kit.session import Session, build_session
from kd_kit.stages import Schedule, constant
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm, Setup, lm_term
from kd_kit.trainer import Trainer, refuse_beside_a_running_one, refuse_uneven


def _check_kinds(student, teacher, data, terms, session, steps, schedule, rates, balance, early) -> None:
    """Raise a sentence where an argument is another kind of thing than is wanted."""
    wanted = (
        ("student", student, hasattr(student, "get_output_embeddings"), "what build_student returns"),
        (
            "teacher",
            teacher,
            teacher is None or hasattr(teacher, "get_output_embeddings"),
            "what build_teacher returns",
        ),
        ("data", data, isinstance(data, DistillData), "what build_data returns"),
        ("session", session, session is None or isinstance(session, Session), "what build_session returns"),
        ("steps", steps, steps is None or isinstance(steps, int), "a whole number"),
        ("schedule", schedule, schedule is None or isinstance(schedule, Schedule), "such as kd.curriculum()"),
        ("lr_schedule", rates, rates is None or isinstance(rates, LearningRate), "a kd.LearningRate(...)"),
        ("balance", balance, balance is None or isinstance(balance, Balance), "kd.fixed() or kd.gradient_share()"),
        (
            "early_stopping",
            early,
            early is None or isinstance(early, EarlyStopping),
            "a kd.EarlyStopping(...) or None",
        ),
        *(("terms", term, isinstance(term, LossTerm), "a list of terms such as kd.kd_term()") for term in terms),
    )
    for name, value, right, what in wanted:
        if not right:
            got = f"{type(value).__name__} {str(value)[:60]!r}"
            ours = callable(value) and str(getattr(value, "__module__", "")).startswith("kd_kit.")
            call = f"; call it: {value.__name__}()" if ours and hasattr(value, "__name__") else ""
            raise ValueError(f"build_trainer: expected {name} to be {what}, got {got}{call}")


def _check_terms(terms: Sequence[LossTerm], schedule: Schedule, balance: Balance) -> None:
    """Raise a sentence where terms, their weights and their schedule cannot make a run."""
    names = [t.name for t in terms]
    if not terms or len(set(names)) != len(names):
        raise ValueError(f"build_trainer: expected one or more terms with different names, got {names}")
    if any(t.taught for t in terms) and not any(t.name == "lm" and t.weight > 0 for t in terms):
        had = "lm with weight 0" if "lm" in names else f"{names}"
        raise ValueError(
            f"build_trainer: expected an lm_term with a weight above 0 beside the teacher's terms, got {had}; without "
            "it nobody sees whether the student still learns the language: kd.lm_term(0.3)"
        )
    weights = {t.name: t.weight for t in terms}
    schedule.check(weights)
    balance.check(weights)


def build_trainer(
    student,
    teacher,
    data: DistillData,
    terms: Sequence[LossTerm] | None = None,
    *,
    session: Session | None = None,
    steps: int | None = None,
    epochs: float = 1.0,
    learning_rate: float = 5e-4,
    schedule: Schedule | None = None,
    lr_schedule: LearningRate | None = None,
    balance: Balance | None = None,
    early_stopping: EarlyStopping | None = EarlyStopping(),  # noqa: B008 - it has no state
    finish_in_session: bool = False,
    accumulation: int = 1,
    more_experts: int | None = None,
    weight_decay: float = 0.1,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    eval_every: int | None = None,
    eval_windows: int = 64,
    log_every: int = 100,
    measure_every: int | None = None,
    save_minutes: float | None = None,
    workers: int = 0,
) -> Trainer:
    """Put a run together and check that it can work, before anything long begins.

    Args:
        student: from :func:`build_student`. teacher: from :func:`build_teacher`, or None for terms that need none.
        data: from :func:`build_data`.
        terms: what is taught; ``[lm_term(), kd_term()]`` if left out.
        session: from :func:`build_session`; a new one if left out.
        steps: optimizer steps, or else ``epochs`` over the training windows.
        learning_rate: peak rate of the student; 5e-4 suits pretrained students, untrained ones take several times that.
        schedule: shares of the terms over the run: :func:`constant`, :func:`curriculum`, :func:`two_stage`,
            :func:`progressive` or :func:`piecewise`. lr_schedule: warm-up, stable, decay.
        balance: :func:`fixed` weights, or those that :func:`gradient_share` finds.
        early_stopping: on held-out bits per byte; None never stops early.
        finish_in_session: start the learning rate's decay, and so end the run, when this session has just the time
            left for that.
        accumulation: batches per optimizer step, in all processes together; with several processes a multiple of
            their number.
        more_experts: experts per token of a second pass of a mixture teacher; its next-token distribution is then the
            mean of both passes. Costs a second teacher pass per step.
        seed: of the order of the data, and of what dropout draws: ``fit`` seeds the generators of Python, numpy and
            torch when a run begins.
        eval_every: steps between evaluations; a tenth of the run if left out. eval_windows: held-out windows that
            each of them looks at, spread evenly (:func:`kd_kit.evaluate` looks at all).
        log_every: steps between printed lines. measure_every: steps between two comparisons of the terms' gradients,
            each of which costs about one pass through the student per term; a tenth of the run if left out, at least 10
            and at most 100.
        save_minutes: between checkpoints. Left out: ten, more where saving takes long, so that it stays below 3% of the
            time. One is also written at the end, and for a best evaluation where that costs little.
        workers: processes that prepare batches.

    Raises:
        ValueError: a model, tokenizer, window, K or setting that cannot work, or a run folder of another
            configuration.
    """
    terms = [lm_term(), kd_term()] if terms is None else terms
    terms = list(terms) if isinstance(terms, (list, tuple)) else [terms]
    _check_kinds(student, teacher, data, terms, session, steps, schedule, lr_schedule, balance, early_stopping)
    positive = {
        "accumulation": accumulation,
        "log_every": log_every,
        "measure_every": 1 if measure_every is None else measure_every,
        "eval_windows": eval_windows,
        "eval_every": 1 if eval_every is None else eval_every,
    }
    for name, value in positive.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"build_trainer: expected {name} of at least 1, a whole number, got {value!r}")
    if save_minutes is not None and not (isinstance(save_minutes, (int, float)) and save_minutes >= 0):
        raise ValueError(f"build_trainer: expected save_minutes of at least 0 or None, got {save_minutes!r}")
    if not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < math.inf:
        raise ValueError(f"build_trainer: expected a learning_rate above 0, got {learning_rate!r}")
    total = steps if steps is not None else round(epochs * data.batches_per_epoch / accumulation)
    if total < 1:
        raise ValueError(f"build_trainer: expected at least one step, got {total}; raise steps= or epochs=")
    schedule, balance = schedule or constant(), balance or fixed()
    _check_terms(terms, schedule, balance)
    if finish_in_session and not (lr_schedule or LearningRate()).decay_steps(total):
        raise ValueError(
            f"build_trainer: expected a learning rate with a decay beside finish_in_session=True, got {lr_schedule}; "
            "pass lr_schedule=kd.LearningRate(decay=0.2)"
        )
    needs = [t for t in terms if t.taught]
    if needs and teacher is None:
        raise ValueError(
            f"build_trainer: expected a teacher for {', '.join(t.name for t in needs)}, got None; "
            "pass build_teacher(...), or terms that need none"
        )
    session = session or build_session()
    processes = join(cpu=session.device.type == "cpu")
    refuse_uneven(accumulation, processes.count)
    refuse_beside_a_running_one(session.folder, student)  # before its models are touched
    live = None
    check_model(student, data.pair.student_vocab, data.window, "student")
    if teacher is not None:
        check_model(teacher, data.pair.teacher_vocab, data.window, "teacher")
        setup = Setup(student, teacher, data.pair)
        terms = [t.bound(setup) for t in terms]
        if more_experts is not None:
            needs_all = all_needs(terms)
            if not needs_all.readings and not needs_all.span_log_probs:
                raise ValueError(
                    f"build_trainer: expected a term that reads the teacher's next-token distribution beside "
                    f"more_experts={more_experts}, got {[t.name for t in terms]}; a second pass changes nothing else, "
                    "so leave it out"
                )
            with routing.more_experts(teacher, more_experts):
                pass  # refuses what the teacher cannot do before anything long begins
        # also without a term that needs it: to be compared with
        live = LiveTeacher(teacher, data.pair.bridge, all_needs(terms), more_experts=more_experts)
    _say_what_is_run_padded(student, teacher, data, processes.say)
    settings = {
        "learning_rate": learning_rate,
        "accumulation": accumulation,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "seed": seed,
        "eval_every": max(1, total // 10) if eval_every is None else eval_every,
        "eval_windows": eval_windows,
        "log_every": log_every,
        "measure_every": max(10, min(100, total // 10)) if measure_every is None else measure_every,
        "finish_in_session": finish_in_session,
        "save_minutes": save_minutes,
        "workers": workers,
    }
    return Trainer(
        student,
        live,
        data,
        terms,
        session=session,
        total_steps=total,
        settings=settings,
        schedule=schedule,
        lr_schedule=lr_schedule or LearningRate(),
        balance=balance,
        early_stopping=early_stopping,
    )


def _say_what_is_run_padded(student, teacher, data: DistillData, say: Callable[[str], None]) -> None:
    """Measure once whether the models keep windows in one row apart; a line where one does not and it costs."""
    for who, model in (("student", student), ("teacher", teacher)):
        why = None if model is None else why_not_packed(model, data.window)
        if why is not None and data.batching.padding > LEAST_SAVED:
            cure = "" if data.unit == "windows" else "; build_data(pack=False) gives it windows of like length"
            say(f"build_trainer: the {who} runs every window padded in a row of its own, because {why}{cure}")


def change_terms(trainer: Trainer, terms: Sequence[LossTerm]) -> str:
    """Give a run other settings of its terms, from its next step on.

    Weights, temperatures, divergences and numbers of cells may change at any time. Other terms, and what decides the
    trained part of a term (its layers, method, experts), may change before the first step only.

    Args:
        terms: all of them, as for :func:`build_trainer`.

    Returns:
        what has changed, in words.

    Raises:
        ValueError: terms that cannot make a run, or a change that a run that has begun does not allow; the trainer is
            then as it was.
    """
    terms = list(terms)
    for term in terms:
        if not isinstance(term, LossTerm):
            raise ValueError(f"change_terms: expected terms such as kd.kd_term(), got {type(term).__name__}")
    _check_terms(terms, trainer.schedule, trainer.balance)
    if trainer.teacher is not None:
        setup = Setup(trainer.student, trainer.teacher.model, trainer.data.pair)
        terms = [t.bound(setup) for t in terms]
    elif any(t.taught for t in terms):
        raise ValueError("change_terms: expected terms that need no teacher, since the run has none")
    return trainer.replace_terms(terms)
