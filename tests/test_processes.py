"""kd_kit/processes.py, together.py and launching.py: a run in two processes is the run of one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import in_processes
import pytest
import torch
from helpers import ROOT, TIMES, make_trainer, session_at, weights_of
from safetensors.torch import load_file

import kd_kit as kd
from kd_kit.checkpoint import inspect_checkpoint
from kd_kit.history import History
from kd_kit.processes import Processes, portable
from kd_kit.trainer import refuse_uneven

SCENARIOS = (
    "run_whole",
    "goes_on_in_two",
    "begins_in_two",
    "cache",
    "one_raises",
    "first_raises",
    "is_signalled",
    "steered",
    "out_of_memory",
    "not_finite",
    "scaled",
    "refusals",
)
PATIENCE = 240  # seconds after which what hangs is ended, and the test fails


def environment(**more: str) -> dict[str, str]:
    paths = [str(ROOT / "tests"), str(ROOT), *filter(None, sys.path)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | more


def two_processes(folder: Path, *names: str) -> list[subprocess.CompletedProcess]:
    """The scenarios in two processes, as a launcher starts them."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = str(found.getsockname()[1])
    children = []
    for rank in ("0", "1"):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        command = [sys.executable, str(ROOT / "tests" / "in_processes.py"), str(folder), *names]
        pipe = subprocess.PIPE
        environ = environment(**variables, MASTER_PORT=port)
        children.append(subprocess.Popen(command, env=environ, text=True, stdout=pipe, stderr=pipe))
    outputs: dict[int, tuple[str, str]] = {}

    def read(rank: int) -> None:
        outputs[rank] = children[rank].communicate()

    readers = [threading.Thread(target=read, args=(rank,)) for rank in (0, 1)]
    for reader in readers:
        reader.start()
    end = time.monotonic() + PATIENCE
    for reader in readers:
        reader.join(max(end - time.monotonic(), 0))
    hangs = [rank for rank, child in enumerate(children) if child.poll() is None]
    for child in children:
        child.kill()
    for reader in readers:
        reader.join()
    assert not hangs, f"processes {hangs} hang: {outputs}"
    return [subprocess.CompletedProcess("", children[rank].returncode, *outputs[rank]) for rank in (0, 1)]


class Ran:
    """What two processes left, and what one process leaves that does the same."""

    def __init__(self, folder: Path):
        self.two, self.one = folder / "two", folder / "one"
        self.two.mkdir()
        self.one.mkdir()
        in_processes.whole(self.two / "one-then-two").fit(steps=2)
        self.children = two_processes(self.two, *SCENARIOS)
        self._done: dict[str, dict] = {}

    def said(self, scenario: str) -> list[dict]:
        """The results of both processes."""
        found = []
        for rank, child in enumerate(self.children):
            path = self.two / f"{scenario}-{rank}.json"
            assert path.exists(), f"process {rank} did not come to {scenario}: {child.stderr[-3000:]}"
            found.append(json.loads(path.read_text()))
            assert "failed" not in found[-1], found[-1]["failed"]
        return found

    def alone(self, scenario: str) -> dict:
        """The result of one process."""
        if scenario not in self._done:
            self._done[scenario] = json.loads(json.dumps(getattr(in_processes, scenario)(self.one)))
        return self._done[scenario]

    def assert_same_weights(self, name: str, *, other: str | None = None) -> None:
        wanted = torch.load(self.one / f"{other or name}-0.pt")
        ours, theirs = (torch.load(self.two / f"{name}-{rank}.pt") for rank in (0, 1))
        assert wanted.keys() == ours.keys() == theirs.keys()
        for key, value in wanted.items():
            assert torch.equal(ours[key], theirs[key]), f"{key} differs between the two processes"
            torch.testing.assert_close(
                ours[key], value, rtol=1e-5, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    return Ran(tmp_path_factory.mktemp("processes"))


@pytest.fixture(autouse=True)
def quiet_precision(tmp_path):
    """accelerate keeps its precision in the process: the next test starts from float32."""
    yield
    session_at(tmp_path / "after").engine()


def figures(folder: Path) -> list[dict]:
    """What a run measured, as flat numbers; of two evaluations of a step the first."""
    kept = {}
    for record in History(folder / "metrics.jsonl").records:
        if record["kind"] in ("train", "eval", "reference"):
            kept.setdefault((record["kind"], record.get("step")), record)
    return [dict(numbers({k: v for k, v in r.items() if k not in TIMES})) for r in kept.values()]


def numbers(value, place=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from numbers(item, f"{place}.{key}")
    elif isinstance(value, list):
        for key, item in enumerate(value):
            yield from numbers(item, f"{place}.{key}")
    else:
        yield place, value


def assert_same_figures(one: Path, two: Path) -> None:
    ours, theirs = figures(one), figures(two)
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys()
        assert other == {
            k: v if not isinstance(v, float) else pytest.approx(v, rel=1e-5, abs=1e-5) for k, v in mine.items()
        }


def events(folder: Path, *leave_out: str) -> list[tuple]:
    found = History(folder / "metrics.jsonl").events
    return [(e["step"], e["what"], e["text"]) for e in found if e["what"] not in leave_out]


# --- the same run -----------------------------------------------------------------------------------------------------


def test_two_processes_are_one(ran):
    """All terms, accumulation, weights that follow the gradients: the same losses, weights and shares."""
    alone, both = ran.alone("run_whole"), ran.said("run_whole")
    ran.assert_same_weights("whole")
    assert_same_figures(ran.one / "whole", ran.two / "whole")
    compared = [r for r in figures(ran.two / "whole") if ".gradients.at" in r]
    assert len(compared) >= 2, "gradients were compared"
    shares = {tuple(v for k, v in r.items() if k.endswith(".weight")) for r in figures(ran.two / "whole")}
    assert len(shares) > 2, "the weights moved"
    for said in both:
        assert (said["told"], said["step"], said["done"]) == ("finished", 5, True)
        assert said["summary"] == alone["summary"]


def test_history_evaluations_and_files_are_written_once(ran):
    ran.said("run_whole")
    ran.alone("run_whole")
    folder = ran.two / "whole"
    records = History(folder / "metrics.jsonl").records
    steps = [r["step"] for r in records if r["kind"] == "train"]
    assert steps == [1, 2, 3, 4, 5]
    evaluated = [r["step"] for r in records if r["kind"] == "eval"]
    assert evaluated == [r["step"] for r in History(ran.one / "whole" / "metrics.jsonl").records if r["kind"] == "eval"]
    assert events(folder, "saved") == events(ran.one / "whole", "saved")
    runs = [json.loads((base / "whole" / "RUN.json").read_text()) for base in (ran.one, ran.two)]
    assert runs[0]["config"] == runs[1]["config"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(p.name for p in (ran.one / "whole").iterdir())


def test_reports_exports_and_best_weights_reach_all(ran):
    alone, both = ran.alone("run_whole"), ran.said("run_whole")

    def without_speeds(report: str) -> dict:
        """All but the speeds, which no two measurements share."""
        return {key: value for key, value in numbers(json.loads(report)) if "tokens_per_second" not in str(key)}

    wanted = without_speeds(alone["report"])
    for said in both:
        assert without_speeds(said["report"]) == {
            k: v if not isinstance(v, float) else pytest.approx(v, rel=1e-4, abs=1e-4) for k, v in wanted.items()
        }
        assert said["again"] == pytest.approx(alone["again"], abs=1e-5)
        assert said["best"] == [alone["best"][0], pytest.approx(alone["best"][1], abs=1e-5)]
        assert said["control"] is True
        assert said["records"] == both[0]["records"]
    assert "LM-only control" in json.loads(both[1]["report"])["rows"]
    assert (ran.two / "whole" / "control" / "metrics.jsonl").exists()
    ran.assert_same_weights("best")
    ran.assert_same_weights("start")
    exported = [load_file(base / "exported" / "model.safetensors") for base in (ran.one, ran.two)]
    torch.testing.assert_close(exported[1], exported[0], rtol=1e-5, atol=1e-5)


def test_one_process_speaks(ran):
    for scenario in SCENARIOS:
        ran.said(scenario)
    spoke = [child.stdout.splitlines() for child in ran.children]
    assert any("held-out bits per byte" in line for line in spoke[0])
    assert [line for line in spoke[1] if not line.startswith("--- ")] == []


def test_a_checkpoint_of_one_process_goes_on_in_two(ran):
    ran.alone("run_whole")
    for said in ran.said("goes_on_in_two"):
        assert said == {"began": True, "step": 2}
    ran.assert_same_weights("one-then-two", other="whole")
    assert_same_figures(ran.one / "whole", ran.two / "one-then-two")


def test_a_checkpoint_of_two_processes_goes_on_in_one(ran):
    ran.alone("run_whole")
    assert [said["told"] for said in ran.said("begins_in_two")] == ["paused", "paused"]
    trainer = in_processes.whole(ran.two / "two-then-one")
    assert trainer.resume()
    assert trainer.step == 2
    assert trainer.fit() == "finished"
    wanted = torch.load(ran.one / "whole-0.pt")
    torch.testing.assert_close(weights_of(trainer), wanted, rtol=1e-5, atol=1e-5)
    assert_same_figures(ran.one / "whole", ran.two / "two-then-one")


def test_the_processes_build_one_cache_together(ran):
    alone, (first, second) = ran.alone("cache"), ran.said("cache")
    assert first["complete"] and second["complete"]
    assert sorted(first["written"] + second["written"]) == list(range(alone["count"])), "every shard once"
    assert first["written"] and second["written"], "both made some"
    assert first["teacher"] == second["teacher"] == "CachedTeacher"
    ran.assert_same_weights("cached")


# --- steering ---------------------------------------------------------------------------------------------------------


def test_what_a_callback_decides_holds_in_both(ran):
    alone, (first, second) = ran.alone("steered"), ran.said("steered")
    assert first == alone
    assert second == alone | {"called": []}
    assert (first["told"], first["called"], first["weights"]["kd"]) == ("enough", [0, 2, 4], 0.5)
    ran.assert_same_weights("steered")


def test_a_signal_to_either_process_ends_both_after_the_step(ran):
    assert ran.said("is_signalled") == [{"told": "interrupted", "step": 2}] * 2
    assert inspect_checkpoint(next((ran.two / "signalled" / "ckpt").glob("step-*2"))).step == 2


def test_a_process_with_less_memory_takes_smaller_pieces_alone(ran):
    small = in_processes.small(ran.one / "memory")
    small.fit()
    torch.save(weights_of(small), ran.one / "memory-0.pt")
    assert [said["micro_batch"] for said in ran.said("out_of_memory")] == [2, 1]
    ran.assert_same_weights("memory")
    (said,) = [text for _, what, text in events(ran.two / "memory") if what == "alarm"]
    assert said.startswith("process 1: out of memory in the training step: CUDA out of memory")


def test_both_go_back_past_steps_that_fail_in_the_second_process(ran):
    alone, both = ran.alone("not_finite"), ran.said("not_finite")
    assert both == [alone, alone]
    assert alone["left_out"] == [[4, 14]]
    ran.assert_same_weights("not-finite")
    said = ran.children[0].stdout
    assert "Step 7 was not taken: it was not finite, first in norm" in said, "the cause, in a batch of the second one"
    assert "back from step 7 to step 2, and past batches 4 to 13" in said


def test_both_skip_the_same_steps_and_keep_one_loss_scale(ran):
    alone, both = ran.alone("scaled"), ran.said("scaled")
    assert both == [alone, alone]
    assert alone == {"scale": 2.0**11, "skipped": 1}
    ran.assert_same_weights("scaled")


# --- failures ---------------------------------------------------------------------------------------------------------


def test_an_error_in_one_process_ends_the_run_in_both(ran):
    alone = in_processes.small(ran.one / "raises")
    alone.fit()
    torch.save(weights_of(alone), ran.one / "raises-0.pt")
    wanted = (
        "Trainer.fit: expected all 2 processes to take step 3, got from process 1: ValueError: batch: expected text"
    )
    for said in ran.said("one_raises"):
        assert said["error"][1].startswith(wanted)
        assert said["reason"].startswith(f"failed: RuntimeError: {wanted}")
        assert said["cause"] == "ValueError('batch: expected text, got none')"
        assert said["told"] == "finished", "and goes on from the checkpoint afterwards"
    ran.assert_same_weights("raises")
    assert "raises: broken off at step 2; fit() goes on from the checkpoint of step 2" in ran.children[0].stdout


def test_an_error_of_the_process_that_leads_is_an_error_in_both(ran):
    assert ran.said("first_raises") == [{"error": ["OSError", "no such disk"]}] * 2


@pytest.mark.parametrize("scenario", ["is_killed", "first_is_killed"])
def test_a_killed_process_ends_the_run_with_a_sentence(scenario, tmp_path):
    children = two_processes(tmp_path, scenario)
    gone = scenario == "is_killed"
    killed, left = children[gone], children[not gone]
    assert killed.returncode == -signal.SIGKILL
    assert left.returncode == 1
    last = left.stderr.strip().splitlines()[-1]
    assert "ProcessLost: Trainer.fit: step 4: expected all 2 processes to go on, got word" in last
    assert last.endswith("start the same script again: fit() goes on from the checkpoint of step 3")
    # and so it does
    folder = tmp_path / ("killed-1" if gone else "killed-0")
    trainer = in_processes.small(folder)
    assert trainer.resume()
    assert trainer.step == 3
    assert trainer.fit() == "finished"


def test_what_several_processes_cannot_do_is_refused(ran):
    for said in ran.said("refusals"):
        assert {name: kind for name, (kind, _) in said.items()} == dict.fromkeys(
            ("background", "preflight", "probe", "uneven", "one"), "ValueError"
        )
        assert said["background"][1].startswith("Trainer.fit: expected background=False in 2 processes")
        assert said["preflight"][1].startswith("run_preflight: expected one process, got 2")
        assert said["probe"][1].startswith("build_probe: expected one process, got 2")
        assert "multiple of the 2 processes, got 3" in said["uneven"][1]
        assert said["one"][1].endswith("so pass accumulation=2 or 4")
    assert not (ran.two / "uneven" / "RUN.json").exists(), "refused before any work"


@pytest.mark.parametrize(("accumulation", "processes", "fits"), [(5, 2, "4 or 6"), (1, 4, "4 or 8"), (9, 4, "8 or 12")])
def test_the_numbers_that_fit_are_said(accumulation, processes, fits):
    with pytest.raises(ValueError, match=rf"so pass accumulation={fits}$"):
        refuse_uneven(accumulation, processes)
    refuse_uneven(8, processes)


@pytest.mark.parametrize(
    ("variable", "what"),
    [("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")],
)
def test_students_in_pieces_are_refused(variable, what, tmp_path, monkeypatch):
    session = session_at(tmp_path / "run")
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=rf"^build_session: expected accelerate to run a whole student.*got {what};"):
        kd.build_session("run", folder=tmp_path)
    with pytest.raises(ValueError, match=rf"whole student in every process, got {what}; a student"):
        make_trainer(tmp_path / "run", session=session)


# --- what crosses -----------------------------------------------------------------------------------------------------


def test_one_process_needs_no_other(tmp_path):
    alone = Processes(session_at(tmp_path).engine().state)
    tensors = [torch.ones(3)]
    alone.add_up(tensors)
    alone.share(tensors)
    assert torch.equal(tensors[0], torch.ones(3))
    assert alone.gather(5) == [5]
    assert alone.led("anything", lambda: 7) == 7
    assert alone.leads and not alone.leading


class Odd(Exception):
    def __init__(self, one, other):
        super().__init__(f"{one} and {other}")


def test_an_error_that_cannot_cross_is_said_in_words():
    plain = ValueError("a sentence")
    assert portable(plain) is plain
    odd = portable(Odd(1, 2))
    assert type(odd) is RuntimeError
    assert str(odd) == "Odd: 1 and 2"


# --- kd.launch --------------------------------------------------------------------------------------------------------

NOTEBOOK = {"__name__": "__main__"}
exec(  # as a cell defines it: in no file, and in a namespace that is called __main__
    """
import os
from pathlib import Path

STEPS = 4


def train(folder, what=None):
    import in_processes

    run = in_processes.small(Path(folder) / "launched", steps=STEPS if what is None else 500)
    own, count = run._own_gradients, []

    def watched(*arguments):
        count.append(1)
        if len(count) == 2:
            (Path(folder) / f"at-work-{run.processes.rank}").touch()
            if what == "raise" and run.processes.rank == 1:
                raise ValueError("train: expected a teacher, got none")
            if what == "die" and run.processes.rank == 1:
                os.kill(os.getpid(), 9)
        return own(*arguments)

    run._own_gradients = watched
    print("told", run.fit(), run.step, run.processes.count)
    (Path(folder) / f"ended-{run.processes.rank}").touch()
""",
    NOTEBOOK,
)


@pytest.fixture
def quiet_environment(monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)


def test_a_function_of_a_notebook_trains_in_two_processes(tmp_path, capsys, quiet_environment):
    kd.launch(NOTEBOOK["train"], str(tmp_path), num_processes=2)
    said = capsys.readouterr().out
    assert said.count("told finished 4 2") == 1, "what the first process says, once"
    assert History(tmp_path / "launched" / "metrics.jsonl").last("train")["step"] == 4
    assert sorted(p.name for p in tmp_path.glob("ended-*")) == ["ended-0", "ended-1"]


def test_a_failure_comes_back_as_its_sentence(tmp_path, capsys, quiet_environment):
    with pytest.raises(RuntimeError, match=r"^launch: expected 2 processes to come to their end, got ") as caught:
        kd.launch(NOTEBOOK["train"], str(tmp_path), "raise", num_processes=2)
    assert "ValueError: train: expected a teacher, got none" in str(caught.value)
    assert "Traceback" in capsys.readouterr().out


def test_a_killed_process_is_said(tmp_path, quiet_environment):
    with pytest.raises(RuntimeError) as caught:
        kd.launch(NOTEBOOK["train"], str(tmp_path), "die", num_processes=2)
    assert "process 1 ended by SIGKILL, as the system does when memory runs out" in str(caught.value)


def test_interrupt_finishes_the_step_and_saves(tmp_path, capsys, quiet_environment):
    def press() -> None:
        end = time.monotonic() + PATIENCE
        while len(list(tmp_path.glob("at-work-*"))) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    finger = threading.Thread(target=press)
    finger.start()
    kd.launch(NOTEBOOK["train"], str(tmp_path), "go on", num_processes=2)
    finger.join()
    last = History(tmp_path / "launched" / "metrics.jsonl").last("train")["step"]
    assert 2 <= last < 500
    assert f"told interrupted {last} 2" in capsys.readouterr().out
    assert list((tmp_path / "launched" / "ckpt").glob(f"step-*{last}"))
    assert len(list(tmp_path.glob("ended-*"))) == 2


def test_the_processes_stop_when_their_notebook_ends(tmp_path):
    launch = "kd.launch(t.NOTEBOOK['train'], sys.argv[1], 'x', num_processes=2)"
    code = f"import sys, test_processes as t, kd_kit as kd; {launch}"
    notebook = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], env=environment())
    end = time.monotonic() + PATIENCE
    while len(list(tmp_path.glob("at-work-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    notebook.kill()
    notebook.wait()
    while len(list(tmp_path.glob("ended-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.05)
    history = History(tmp_path / "launched" / "metrics.jsonl")
    assert [e["text"] for e in history.events if e["what"] == "stopped"] == ["terminated"]


def test_what_cannot_be_launched_is_refused():
    with pytest.raises(ValueError, match=r"^launch: expected a function, got int; pass it without calling it"):
        kd.launch(5)
    for number in (0, -1, True, 2.0, "two"):
        with pytest.raises(ValueError, match=r"^launch: expected num_processes of at least 1, or 'auto', got"):
            kd.launch(print, num_processes=number)
    lock = (n for n in [1])
    with pytest.raises(ValueError, match=r"^launch: expected a function that can be sent to other processes"):
        kd.launch(lambda: list(lock))
