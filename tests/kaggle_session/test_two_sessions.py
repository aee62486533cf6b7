"""A run in two sessions: the first ends by its clock, the second goes on from its output, and nobody can tell.

The weights at the end are those of a run without a break, bit for bit.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pytest
from kernels import CASES, OWNER, PAIR_NEW, PAIR_OLD
from machine import Ran, run_session
from safetensors.numpy import load_file

from kd_kit.history import History

KERNEL = "distill-p100"
STEPS = CASES[KERNEL].parameters["STEPS"]
LAYOUTS = {
    "new": (f"notebooks/{OWNER}/{KERNEL}", PAIR_NEW),
    "old": (KERNEL, PAIR_OLD),
}
RUN = "kd_runs/distil"


def steps_done(ran: Ran) -> int:
    return int(re.search(r"step (\d+) of", ran.said("trainer.summary("))[1])


def budget(ran: Ran) -> float:
    """Seconds after which a session's time is to be over, so that it ends in the middle of what ``ran`` trained.

    The loop keeps a twentieth of the budget, and some steps and saves, to end in order.
    """
    started = datetime.fromisoformat(ran.notebook.cells[0].metadata.papermill.start_time)
    fit = ran.cell("trainer.fit()").metadata.papermill
    middle = (datetime.fromisoformat(fit.start_time) - started).total_seconds() + fit.duration / 2
    return (middle + 2) / 0.95


@dataclass(frozen=True)
class Half:
    """The first session of a run, the account that it belongs to, and what was sent there."""

    account: Any
    sent: Any
    ran: Ran


@pytest.fixture(scope="module")
def first(session, new_account, tmp_path_factory):
    """A session that its own clock ended in the middle.

    How fast the machine will be nobody knows before: a clock that ran out before the first step, or after the last,
    is set anew, for a new account.
    """
    case = CASES[KERNEL]
    seconds = budget(session(KERNEL))
    for _ in range(5):
        account, folder = new_account(), tmp_path_factory.mktemp("first")
        account.build(KERNEL, case.parameters | {"HOURS": seconds / 3600}, case.datasets)
        sent = account.push(KERNEL)
        ran = run_session(folder / "machine", sent.notebook, {PAIR_NEW: account.pair(folder / "pair")})
        account.ends(KERNEL, ran)
        done = 0 if ran.code else steps_done(ran)
        if 0 < done < STEPS:
            return Half(account, sent, ran)
        seconds = min(0.95 * seconds, budget(ran)) if done else 1.2 * seconds
    pytest.fail(f"no session of about {seconds:.0f} s ended in the middle of the run: {ran.log[-2000:]}")


@pytest.fixture(scope="module")
def second(first):
    """The same again: built and pushed."""
    case = CASES[KERNEL]
    first.account.build(KERNEL, case.parameters, case.datasets)
    return first.account.push(KERNEL)


@pytest.fixture(scope="module", params=LAYOUTS)
def gone_on(request, first, second, tmp_path_factory):
    output, pair = LAYOUTS[request.param]
    folder = tmp_path_factory.mktemp(f"second-{request.param}")
    inputs = {output: first.ran.working, pair: first.account.pair(folder / "pair")}
    return run_session(folder / "machine", second.notebook, inputs)


def test_the_first_session_ends_by_its_clock_and_says_how_to_go_on(first):
    first = first.ran
    assert first.said("trainer.fit()").rstrip().endswith("the session's time is over")
    summary = first.said("trainer.summary(")
    assert "the session's time is over" in summary
    assert re.search(r"next .*(push|run|attach|add)", summary.splitlines()[-1], re.IGNORECASE)
    assert {path.name for path in first.working.iterdir()} == {"kd_runs", "summary.txt"}


def test_the_second_push_asks_for_the_output_of_the_first(first, second):
    assert not first.sent.request.get("kernelDataSources")
    assert second.request.get("kernelDataSources") == [f"{OWNER}/{KERNEL}"]


def test_the_second_session_goes_on_from_the_right_step(first, gone_on):
    assert gone_on.code == 0, gone_on.log[-3000:]
    done = steps_done(first.ran)
    events = History.load(gone_on.working / RUN / "metrics.jsonl").events
    (resumed,) = [event for event in events if event["what"] == "resumed"]
    assert resumed["step"] == done
    steps = [row["step"] for row in History.load(gone_on.working / RUN / "metrics.jsonl").rows("train")]
    assert steps == list(range(1, STEPS + 1))
    assert f"step {STEPS} of {STEPS}, finished" in gone_on.said("trainer.summary(")


def test_the_run_in_two_sessions_is_the_run_in_one(session, gone_on):
    whole, parts = (load_file(ran.working / "student" / "model.safetensors") for ran in (session(KERNEL), gone_on))
    assert whole.keys() == parts.keys()
    different = [name for name in whole if whole[name].tobytes() != parts[name].tobytes()]
    assert different == []


def test_the_second_session_leaves_its_inputs_and_its_output_clean(gone_on):
    assert gone_on.changed == frozenset()
    assert {path.name for path in gone_on.working.iterdir()} == CASES[KERNEL].output
