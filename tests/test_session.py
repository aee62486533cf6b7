"""kd_kit/session.py: what a session says about itself, its clock, and how it is asked to stop."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from helpers import ROOT

from kd_kit import build_session
from kd_kit.session import Session, StopRequests, default_precision, process_age, shown


@pytest.fixture(autouse=True)
def plain_precision(tmp_path):
    """accelerate keeps its state in the process: give it back as the other tests know it."""
    yield
    build_session("after", folder=tmp_path / "after", precision="no")


def test_it_prints_five_lines(tmp_path):
    lines = repr(build_session("first", folder=tmp_path, hours=2)).splitlines()
    assert [line.split()[0] for line in lines] == ["machine", "precision", "folder", "clock", "versions"]
    assert str(tmp_path / "first") in lines[2]
    assert "new" in lines[2]
    assert "2.0 h" in lines[3]
    assert f"torch {torch.__version__}" in lines[4]
    assert "no limit" in repr(build_session("first", folder=tmp_path))


def test_it_says_where_a_run_would_go_on(tmp_path):
    (tmp_path / "first" / "ckpt" / "step-00000040").mkdir(parents=True)
    assert "holds checkpoints up to step-00000040" in repr(build_session("first", folder=tmp_path))


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what the CPU gets")
def test_a_cell_may_run_twice_and_with_another_precision(tmp_path):
    first = build_session("run", folder=tmp_path)
    assert first.precision == "no"
    assert build_session("run", folder=tmp_path).precision == "no"
    other = build_session("run", folder=tmp_path, precision="bf16")
    assert other.precision == "bf16"
    product = torch.nn.Linear(4, 4)
    with other.engine().autocast():
        assert product(torch.ones(1, 4)).dtype == torch.bfloat16
    back = build_session("run", folder=tmp_path)
    assert back.precision == "no"
    with back.engine().autocast():
        assert product(torch.ones(1, 4)).dtype == torch.float32


def test_a_precision_that_does_not_exist_leaves_the_next_call_working(tmp_path):
    with pytest.raises(ValueError, match=r"^build_session: expected precision 'no', 'fp16' or 'bf16', got 'fp3'"):
        build_session("run", folder=tmp_path, precision="fp3")
    assert build_session("run", folder=tmp_path, precision="no").precision == "no"


@pytest.mark.parametrize("hours", [0, -1, -0.5, float("nan")])
def test_hours_must_be_positive(hours, tmp_path):
    with pytest.raises(ValueError, match=r"^build_session: expected hours above 0, got"):
        build_session("run", folder=tmp_path, hours=hours)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "taken").write_text("a file stands here")
    for folder, run in ((tmp_path / "taken", "run"), (tmp_path, "taken")):
        with pytest.raises(
            ValueError, match=r"^build_session: expected a run folder that can be written.*pass folder="
        ):
            build_session(run, folder=folder)


def test_the_probe_leaves_nothing_behind(tmp_path):
    build_session("run", folder=tmp_path)
    assert list((tmp_path / "run").iterdir()) == []


def test_runs_are_kept_below_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert build_session("mine").folder == tmp_path / "kd_runs" / "mine"
    assert build_session("mine").remaining() == float("inf")


def test_on_kaggle_the_clock_and_the_folder_are_known(tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    monkeypatch.setenv("KD_KIT_KAGGLE", str(tmp_path))
    (tmp_path / "working").mkdir()
    ours = build_session("mine")
    assert ours.folder == tmp_path / "working" / "kd_runs" / "mine"
    assert ours.budget == 11 * 3600
    assert "Kaggle" in repr(ours)
    assert build_session("mine", hours=1).budget == 3600


def test_the_clock_counts_from_the_start_of_the_process(tmp_path):
    now = [1000.0]
    age = process_age()
    ours = Session(tmp_path, device="cpu", precision="no", budget=age + 600.0, clock=lambda: now[0])
    assert ours.elapsed() == pytest.approx(age, abs=5)
    now[0] += 100
    assert ours.elapsed() == pytest.approx(age + 100, abs=5)
    assert ours.remaining() == pytest.approx(500, abs=5)
    inner = ours.within("control")
    assert inner.folder == tmp_path / "control"
    assert inner.remaining() == ours.remaining(), "a run inside a session has no clock of its own"
    now[0] += 10_000
    assert ours.remaining() < 0
    assert inner.remaining() == ours.remaining()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_the_age_of_the_process_is_that_of_the_process():
    code = "import time; time.sleep(0.3); from kd_kit.session import process_age; print(process_age())"
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True, timeout=120
    )
    assert float(out.stdout) >= 0.25
    assert process_age() > 0


def test_precision_follows_the_card(monkeypatch):
    assert default_precision(torch.device("cpu")) == "no"
    for capability, precision in (((6, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((9, 0), "bf16")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert default_precision(torch.device("cuda")) == precision


# --- requests to stop ------------------------------------------------------------------------------------------------


def test_a_signal_becomes_a_wish_and_the_handlers_come_back(capsys):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    for number, reason in ((signal.SIGINT, "interrupted"), (signal.SIGTERM, "terminated")):
        with StopRequests() as requests:
            assert requests.reason is None
            os.kill(os.getpid(), number)
            assert requests.reason == reason
        assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
        assert f"{reason}: finishing the step and saving" in capsys.readouterr().err


def test_a_second_interrupt_acts_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequests():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == before


def test_a_second_sigterm_waits_too():
    with StopRequests() as requests:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert requests.reason == "terminated"


def test_outside_the_main_thread_signals_are_left_alone():
    before = signal.getsignal(signal.SIGINT)
    found = []

    def other():
        with StopRequests() as requests:
            found.append((signal.getsignal(signal.SIGINT), requests.reason))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert found == [(before, None)]


_CHILD = """
import dataclasses, sys, time
from pathlib import Path
from helpers import make_trainer, lm_term
from kd_kit import Callback

class Clear(Callback):
    def on_start(self, trainer):
        told.clear()

told, wait = [1], [0.0]

def slow(rows):
    if not told:
        told.append(1)
        print("STARTED", flush=True)
    time.sleep(wait[0])
    return term.rows(rows)

term = lm_term(1.0)
trainer = make_trainer(Path(sys.argv[1]), terms=[dataclasses.replace(term, rows=slow)], model=None,
                       steps=10**6, eval_every=10**9)
trainer.callbacks = [Clear()]
print("FIRST", trainer.fit(), trainer.step, flush=True)
wait[0] = 3.0
try:
    trainer.fit()
except KeyboardInterrupt:
    print("SECOND KeyboardInterrupt", trainer.step, flush=True)
wait[0] = 0.0
print("THIRD", trainer.fit(), trainer.step, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_a_run_stops_for_real_signals(tmp_path):
    """Once: the step is finished and saved. Twice: at once. SIGTERM: saved. One child process for all three."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(tmp_path / "run")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    said = []
    watchdog = threading.Timer(120, child.kill)
    watchdog.start()

    def until(start: str) -> str:
        for line in child.stdout:
            said.append(line.rstrip())
            if line.startswith(start):
                return line
        raise AssertionError(f"the child ended before {start!r}:\n" + "\n".join(said[-30:]))

    def newest() -> int:
        steps = [int(re.search(r"step-(\d+)", p.name)[1]) for p in (tmp_path / "run" / "ckpt").glob("step-*")]
        return max(steps)

    try:
        until("STARTED")
        child.send_signal(signal.SIGINT)
        first = until("FIRST").split()
        assert first[1] == "interrupted"
        assert newest() == int(first[2]) >= 1
        until("STARTED")
        child.send_signal(signal.SIGINT)
        until("interrupted: finishing the step")
        child.send_signal(signal.SIGINT)
        second = until("SECOND").split()
        assert second[1] == "KeyboardInterrupt"
        until("STARTED")
        child.send_signal(signal.SIGTERM)
        third = until("THIRD").split()
        assert third[1] == "terminated"
        assert newest() == int(third[2]) > int(first[2])
        assert child.wait(60) == 0
    finally:
        watchdog.cancel()
        if child.poll() is None:
            child.kill()
        child.stdout.close()
        child.wait()


def test_a_folder_is_shown_from_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert shown(tmp_path / "kd_runs" / "a") == Path("kd_runs/a")
    assert shown(Path("/elsewhere/a")) == Path("/elsewhere/a")
