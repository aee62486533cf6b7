import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kd_kit import run_lock
from kd_kit.run_lock import RunLocked, lock_run

# Loaded as a plain file: the child needs no torch and starts at once.
CHILD = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("run_lock", {run_lock.__file__!r})
run_lock = importlib.util.module_from_spec(spec)
sys.modules["run_lock"] = run_lock
spec.loader.exec_module(run_lock)
try:
    run_lock.lock_run(sys.argv[1])
except run_lock.RunLocked as error:
    print("refused:", error, flush=True)
else:
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def start_child(tmp_path):
    children = []

    def start():
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child, child.stdout.readline().strip()

    yield start
    for child in children:
        child.kill()
        child.communicate()


def write_owner(folder: Path, **changes):
    """Make this process's parent, which lives, the owner, but for the changes."""
    (folder / "LOCK").write_text(json.dumps(run_lock._process(os.getppid()) | changes))


def test_a_second_living_process_is_refused_in_words(tmp_path, start_child):
    child, answer = start_child()
    assert answer == "locked"
    with pytest.raises(RunLocked) as refusal:
        lock_run(tmp_path)
    assert f"living process {child.pid}" in str(refusal.value)
    assert "shut its kernel down" in str(refusal.value)


def test_a_process_is_refused_while_this_one_has_it_and_let_in_afterwards(tmp_path, start_child):
    with lock_run(tmp_path):
        _, answer = start_child()
        assert answer.startswith("refused: lock_run: expected") and str(os.getpid()) in answer
    assert start_child()[1] == "locked"


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, start_child):
    child, answer = start_child()
    assert answer == "locked"
    child.kill()
    child.wait()
    lock_run(tmp_path).release()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="zombies are told from the living on Linux only")
def test_a_killed_process_that_nobody_has_waited_for_is_dead(tmp_path, start_child):
    child, _ = start_child()
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # dead for certain, and still a zombie
    lock_run(tmp_path).release()


def test_taking_it_twice_in_one_process_is_fine(tmp_path):
    first = lock_run(tmp_path)
    second = lock_run(tmp_path)
    assert {**first.owner, "since": 0} == {**second.owner, "since": 0}
    second.release()
    first.release()


def test_release_gives_the_folder_back_even_after_an_error_and_may_be_repeated(tmp_path):
    with pytest.raises(KeyError), lock_run(tmp_path) as lock:
        raise KeyError
    assert (tmp_path / "LOCK").read_text() == ""
    lock.release()


def test_release_does_not_take_the_lock_from_its_new_owner(tmp_path, start_child):
    lock = lock_run(tmp_path)
    (tmp_path / "LOCK").write_text("")
    child, answer = start_child()
    assert answer == "locked"
    lock.release()
    assert json.loads((tmp_path / "LOCK").read_text())["pid"] == child.pid


@pytest.mark.parametrize(
    "changes",
    [{"boot_id": "an earlier boot"}, {"process_start": "1"}, {"pid": 2**22 + 1}],
    ids=["another boot", "process id used again", "no such process"],
)
def test_an_owner_that_cannot_live_any_more_is_replaced(tmp_path, changes):
    write_owner(tmp_path)
    with pytest.raises(RunLocked):
        lock_run(tmp_path)
    write_owner(tmp_path, **changes)
    lock_run(tmp_path).release()


@pytest.mark.parametrize("content", [b"", b'{"pid": 1', b"[]", b"null", b'{"pid": "x"}', b"\xff\0", b"[" * 5000])
def test_a_torn_lock_file_blocks_nobody(tmp_path, content):
    (tmp_path / "LOCK").write_bytes(content)
    assert json.loads(lock_run(tmp_path).path.read_text())["pid"] == os.getpid()


def test_of_many_that_start_together_one_wins(tmp_path):
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    answers = [child.stdout.readline().split(":")[0].strip() for child in children]
    for child in children:
        child.communicate()
    assert sorted(answers) == ["locked", *["refused"] * 5]


@pytest.mark.skipif(run_lock.fcntl is None, reason="no kernel locks on this system")
def test_nobody_else_gets_between_reading_and_writing(tmp_path, monkeypatch):
    read_owner = run_lock._read_owner
    tried = []

    def read_while_another_one_tries(descriptor):
        with open(tmp_path / "LOCK") as other, pytest.raises(BlockingIOError):
            run_lock.fcntl.flock(other, run_lock.fcntl.LOCK_EX | run_lock.fcntl.LOCK_NB)
        tried.append(True)
        return read_owner(descriptor)

    monkeypatch.setattr(run_lock, "_read_owner", read_while_another_one_tries)
    lock_run(tmp_path).release()
    assert tried == [True, True]


def test_without_proc_a_process_is_asked_by_signal(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "Path", lambda *parts: tmp_path / "no such system")
    assert run_lock._boot_id() == ""
    assert run_lock._process_start(os.getpid()) == ""
    assert run_lock._process_start(2**22 + 1) is None


def test_without_kernel_locks_it_still_works(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "fcntl", None)
    with lock_run(tmp_path / "new"):
        pass
