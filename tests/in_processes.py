"""What a process of tests/test_processes.py does: scenarios by name, one after the other, all processes the same ones.

Each leaves its result, a JSON object, in ``<folder>/<scenario>-<rank>.json``; tensors beside it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import make_trainer, small_data, teacher, tiny_student, weights_of, with_scaler

import kd_kit as kd
from kd_kit.cache import Cache
from kd_kit.teacher import LiveTeacher
from kd_kit.terms import LossTerm
from kd_kit.types import LossValue

SHARES = {
    "lm": 0.3,
    "kd": 0.35,
    "span": 0.05,
    "feature": 0.05,
    "attention": 0.05,
    "router": 0.05,
    "relation": 0.05,
    "contrastive": 0.05,
    "layerwise": 0.05,
}


def all_terms() -> list[LossTerm]:
    """Every kind of term, those with parts and those that compare what is in a batch included."""
    return [
        kd.lm_term(0.1),
        kd.kd_term(0.7, top_k=8),
        kd.span_term(0.1),
        kd.feature_term(0.1),
        kd.attention_term(0.1),
        kd.router_term(0.1),
        kd.relation_term(0.1),
        kd.contrastive_term(0.1),
        kd.layerwise_term(0.1),
    ]


def whole(folder: Path, **changes):
    """A run with all terms, accumulation, and weights that follow the gradients."""
    arguments = {"steps": 5, "accumulation": 4, "measure_every": 2, "save_minutes": 0} | changes
    return make_trainer(
        folder,
        session=kd.build_session(folder.name, folder=folder.parent),
        terms=all_terms(),
        balance=kd.gradient_share(**SHARES),
        **arguments,
    )


def small(folder: Path, **changes):
    """A run of two terms and few steps."""
    session = kd.build_session(folder.name, folder=folder.parent)
    return make_trainer(folder, session=session, **({"steps": 6, "accumulation": 2, "early_stopping": None} | changes))


def poisoned(windows: set[int]) -> LossTerm:
    """A term that is not finite where a batch holds one of these windows."""

    def value(output, signal, batch) -> LossValue:
        rows = output.hidden.flatten(0, 1)[batch.rows].float()
        bad = bool(windows & set(batch.sample.tolist()))
        return LossValue((rows**2).sum() * (torch.inf if bad else 1e-3), torch.tensor(float(len(rows))))

    return LossTerm(name="norm", weight=0.01, unit="", healthy=(0, 100), value=value)


def windows_at(*positions: int) -> set[int]:
    data = small_data()
    return {int(w) for p in positions for w in data.indices(0, p)}


def said(error: BaseException) -> list[str]:
    return [type(error).__name__, str(error)]


class Each(kd.Callback):
    """Calls something when a step was logged; of several processes only the first has callbacks called."""

    def __init__(self, hook: str, what):
        setattr(self, hook, what)


# --- scenarios --------------------------------------------------------------------------------------------------------


def run_whole(folder: Path) -> dict:
    trainer = whole(folder / "whole")
    told = trainer.fit()
    torch.save(weights_of(trainer), folder / f"whole-{trainer.processes.rank}.pt")
    report = kd.evaluate(trainer, limit=4, control=True)
    summary = trainer.summary(report)
    kd.export(trainer.student, folder / "exported")
    again = trainer.evaluate_now()
    with torch.no_grad():
        for parameter in trainer.student.parameters():
            parameter.add_(1)  # so that weights which are not put back show
    best = trainer.load_best()
    start = trainer.initial_student()
    torch.save(start.state_dict(), folder / f"start-{trainer.processes.rank}.pt")
    torch.save(trainer.student.state_dict(), folder / f"best-{trainer.processes.rank}.pt")
    return {
        "told": told,
        "step": trainer.step,
        "done": trainer.done,
        "report": report.to_json(),
        "summary": repr(summary).splitlines()[0],
        "again": again,
        "best": best,
        "records": len(trainer.history.records),
        "control": trainer._control_student is not None,
    }


def goes_on_in_two(folder: Path) -> dict:
    """What one process began."""
    trainer = whole(folder / "one-then-two")
    began = trainer.resume()
    step = trainer.step
    trainer.fit()
    torch.save(weights_of(trainer), folder / f"one-then-two-{trainer.processes.rank}.pt")
    return {"began": began, "step": step}


def begins_in_two(folder: Path) -> dict:
    """What one process then goes on with."""
    trainer = whole(folder / "two-then-one")
    return {"told": trainer.fit(steps=2)}


def cache(folder: Path) -> dict:
    write, written = Cache.write, []

    def slow(self, number, *rest):
        written.append(number)
        time.sleep(0.1)
        return write(self, number, *rest)

    Cache.write = slow
    try:
        trainer = small(folder / "cached")
        found = kd.build_cache(trainer, per_shard=2)
    finally:
        Cache.write = write
    told = trainer.fit()
    torch.save(weights_of(trainer), folder / f"cached-{trainer.processes.rank}.pt")
    return {
        "written": written,
        "count": found.count,
        "complete": found.complete,
        "teacher": type(trainer.teacher).__name__,
        "told": told,
    }


def one_raises(folder: Path) -> dict:
    """The second process meets a batch that it cannot take, in its third step."""
    trainer = small(folder / "raises", save_minutes=0)
    seen, own = [], trainer._own_gradients

    def broken(batches, *rest):
        seen.append(batches)
        if trainer.processes.rank == 1 and len(seen) == 3:
            raise ValueError("batch: expected text, got none")
        return own(batches, *rest)

    trainer._own_gradients = broken
    with pytest.raises((ValueError, RuntimeError)) as caught:
        trainer.fit()
    trainer._own_gradients = own
    reason = trainer.stop_reason
    told = trainer.fit()  # and once more, as a cell is run again
    torch.save(weights_of(trainer), folder / f"raises-{trainer.processes.rank}.pt")
    return {"error": said(caught.value), "cause": repr(caught.value.__cause__), "reason": reason, "told": told}


def first_raises(folder: Path) -> dict:
    """The first process cannot save."""
    trainer = small(folder / "first-raises")

    def stop(_):
        raise OSError("no such disk")

    trainer.callbacks.append(Each("on_start", stop))
    with pytest.raises(OSError, match="no such disk") as caught:
        trainer.fit()
    return {"error": said(caught.value)}


def is_signalled(folder: Path) -> dict:
    """A signal reaches the second process alone."""
    trainer = small(folder / "signalled")
    own, count = trainer._own_gradients, []

    def signalled(*arguments):
        count.append(1)
        if trainer.processes.rank == 1 and len(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return own(*arguments)

    trainer._own_gradients = signalled
    told = trainer.fit()
    return {"told": told, "step": trainer.step}


def steered(folder: Path) -> dict:
    """A callback of the first process changes weights and stops the run; the second one never calls it."""
    trainer = small(folder / "steered", eval_every=2)
    called = []

    def evaluated(run):
        called.append(run.step)
        if run.step == 2:
            run.set_weights(kd=0.5)
        if run.step == 4:
            run.stop_reason = "enough"

    trainer.callbacks.append(Each("on_evaluate", evaluated))
    told = trainer.fit()
    torch.save(weights_of(trainer), folder / f"steered-{trainer.processes.rank}.pt")
    weights = {t.name: t.weight for t in trainer.terms}
    trainer.decay_now()
    told_later = trainer.set_weights(kd=0.25)
    return {
        "told": told,
        "called": called,
        "weights": weights,
        "decay_from": trainer.decay_from,
        "changed": told_later,
        "total": trainer.total_steps,
    }


def out_of_memory(folder: Path) -> dict:
    """The second process has less memory than the first."""
    trainer = small(folder / "memory")
    signal_of = LiveTeacher.signal

    def tight(self, batch, here=None):
        if trainer.processes.rank == 1 and trainer._requests is not None and len(batch.sample) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return signal_of(self, batch, here)

    LiveTeacher.signal = tight
    try:
        trainer.fit()
    finally:
        LiveTeacher.signal = signal_of
    torch.save(weights_of(trainer), folder / f"memory-{trainer.processes.rank}.pt")
    return {"micro_batch": trainer.micro_batch}


def not_finite(folder: Path) -> dict:
    """Five steps in a row whose second micro-batch is broken: back to the checkpoint, and past them."""
    terms = [kd.lm_term(0.2), kd.kd_term(0.7, top_k=8), poisoned(set())]
    trainer = small(
        folder / "not-finite", steps=10, terms=terms, save_minutes=0, eval_every=2, data=small_data(count=24)
    )
    bad = {int(w) for p in range(5, 15, 2) for w in trainer.data.indices(0, p)}
    trainer.terms = trainer.module.terms = tuple(
        t if t.name != "norm" else replace(t, value=poisoned(bad).value) for t in trainer.terms
    )
    told = trainer.fit()
    torch.save(weights_of(trainer), folder / f"not-finite-{trainer.processes.rank}.pt")
    return {"told": told, "step": trainer.step, "left_out": trainer.cursor.left_out, "skipped": trainer.skipped_steps}


def scaled(folder: Path) -> dict:
    """Loss scaling, as on cards without bfloat16: an overflow in the second process is one in both."""
    terms = [kd.lm_term(0.2), kd.kd_term(0.7, top_k=8), poisoned(windows_at(3))]
    trainer = small(folder / "scaled", terms=terms, steps=4, measure_every=1)
    with pytest.MonkeyPatch.context() as patch:
        with_scaler(trainer, patch)
        trainer.fit()
        scale = float(trainer.accelerator.scaler.get_scale())
    torch.save(weights_of(trainer), folder / f"scaled-{trainer.processes.rank}.pt")
    return {"scale": scale, "skipped": trainer.skipped_steps}


def refusals(folder: Path) -> dict:
    """What several processes cannot do, and what the trainer says of it."""
    trainer = small(folder / "refused")
    found = {}
    for name, what in {
        "background": lambda: trainer.fit(background=True),
        "preflight": lambda: kd.run_preflight(trainer),
        "probe": lambda: kd.build_probe(trainer),
        "uneven": lambda: small(folder / "uneven", accumulation=3),
        "one": lambda: small(folder / "uneven", accumulation=1),
    }.items():
        try:
            what()
        except Exception as error:
            found[name] = said(error)
    kd.build_dashboard(trainer).show()
    return found


def is_killed(folder: Path, rank: int = 1) -> dict:
    """One process is gone in the fourth step."""
    trainer = small(folder / f"killed-{rank}", save_minutes=0)
    own, count = trainer._own_gradients, []

    def killed(*arguments):
        count.append(1)
        if trainer.processes.rank == rank and len(count) == 4:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*arguments)

    trainer._own_gradients = killed
    trainer.fit()
    return {}


def first_is_killed(folder: Path) -> dict:
    return is_killed(folder, 0)


def main(folder: Path, names: list[str]) -> None:
    teacher(), tiny_student()
    rank = os.environ.get("RANK", "0")
    for name in names:
        print(f"--- {name}", flush=True)
        try:
            result = globals()[name](folder)
        except Exception:
            (folder / f"{name}-{rank}.json").write_text(json.dumps({"failed": traceback.format_exc()}))
            raise
        (folder / f"{name}-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
