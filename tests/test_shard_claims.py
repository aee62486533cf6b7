"""Several processes make one cache: real ones, of which some are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from helpers import session_at
from test_caching import names_of, trainer_at

from kd_kit import build_cache, caching
from kd_kit.cache import Cache
from kd_kit.shard_claims import Claims

TESTS = Path(__file__).parent

BUILDER = f"""
import sys, time
sys.path.insert(0, {str(TESTS)!r})
from pathlib import Path
from test_caching import trainer_at
from kd_kit import build_cache, caching
from kd_kit.cache import Cache
run, folder, how = sys.argv[1:]
if how == "hangs":  # with a shard that is written and not yet in its place
    def put(*_):
        print("half", flush=True)
        time.sleep(600)
    Cache._put = put
if how == "slow start":
    forecast = caching._forecast
    def slowly(*arguments):
        print("begins", flush=True)
        sys.stdin.readline()
        return forecast(*arguments)
    caching._forecast = slowly
cache = build_cache(trainer_at(Path(run)), folder, per_shard=2)
print("complete" if cache.complete else "not complete", flush=True)
"""

HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "r+b")
for shard in map(int, sys.argv[2:]):
    fcntl.lockf(file, fcntl.LOCK_EX, 1, shard + 1)
print("holds", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def started():
    """Starts a script in a process of its own; all of them are gone at the end."""
    children = []

    def start(script: str, *arguments) -> subprocess.Popen:
        child = subprocess.Popen(
            [sys.executable, "-c", script, *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        children.append(child)
        return child

    yield start
    for child in children:
        child.kill()
        child.communicate()


def heard(child: subprocess.Popen, word: str) -> None:
    """Reads a child's lines up to a word."""
    for line in child.stdout:
        if line.strip() == word:
            return
    pytest.fail(f"the process ended without saying {word!r}")


def test_three_processes_one_of_them_killed_make_what_one_makes(tmp_path, started):
    one = build_cache(trainer_at(tmp_path / "one"), tmp_path / "by one", per_shard=2)
    folder = tmp_path / "by three"
    victim = started(BUILDER, tmp_path / "a", folder, "hangs")
    heard(victim, "half")
    others = [started(BUILDER, tmp_path / name, folder, "works") for name in "bc"]
    end = time.monotonic() + 240
    while len(list(folder.glob("shard-*"))) < one.count - 1:
        assert time.monotonic() < end
        assert all(child.poll() is None for child in others), "one has ended without waiting"
        time.sleep(0.1)
    (half,) = folder.glob(".shard-*")
    assert half.name.endswith(f"-{victim.pid}"), "what a living process writes is left alone"
    victim.send_signal(signal.SIGKILL)
    for child in others:
        heard(child, "complete")
        assert child.wait(60) == 0
    assert [p.name for p in sorted(folder.iterdir())] == names_of(one)
    for path in one.folder.iterdir():
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize("same", [True, False])
def test_of_two_that_begin_a_cache_at_once_the_later_goes_on_with_it_or_is_refused(tmp_path, started, same):
    folder = tmp_path / "cache"
    first = started(BUILDER, tmp_path / "a", folder, "slow start")
    heard(first, "begins")
    go_on = threading.Timer(1.0, lambda: (first.stdin.write("\n"), first.stdin.flush()))
    go_on.start()
    if same:
        cache = build_cache(trainer_at(tmp_path / "b"), folder, per_shard=5)
        assert cache.complete
        assert cache.manifest["per_shard"] == 2, "of the one that was first"
        assert cache.manifest["fidelity"] is not None
    else:
        with pytest.raises(ValueError, match=r"got another one \(.*states: .* there, \[\] here"):
            build_cache(trainer_at(tmp_path / "b", "bridge"), folder)
    go_on.join()
    heard(first, "complete")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize("why", ["interrupted", "time"])
def test_who_waits_for_others_heeds_the_stop_button_and_the_clock(tmp_path, started, monkeypatch, capsys, why):
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "LOCK").touch()
    heard(started(HOLDER, folder / "LOCK", 0, 3), "holds")
    now, pauses = [0.0], []
    session = session_at(tmp_path / "run")
    session._clock, session._started, session.budget = lambda: now[0], 0.0, 1000.0

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == 3 and why == "interrupted":
            os.kill(os.getpid(), signal.SIGINT)
        if len(pauses) == 3 and why == "time":
            now[0] = 990.0
        assert len(pauses) < 10

    monkeypatch.setattr(caching.time, "sleep", pause)
    cache = build_cache(trainer_at(tmp_path / "run", session=session), folder, per_shard=2)
    assert cache.missing == [0, 3]
    assert len(pauses) == 3
    said = capsys.readouterr().out
    assert ("interrupted; " if why == "interrupted" else "the session's time is nearly over; ") in said
    assert f"{cache.count - 2} of {cache.count} shards are there" in said


def test_a_damaged_shard_that_another_process_makes_again_is_left_to_it(tmp_path, started):
    cache = build_cache(trainer_at(tmp_path / "run"), per_shard=3)
    damaged = [cache.shards[n] for n in (1, 2)]
    for path in damaged:
        path.write_bytes(b"x" + path.read_bytes()[1:])
    heard(started(HOLDER, cache.folder / "LOCK", 1), "holds")
    with Claims(cache.folder) as claims:
        assert Cache.open(cache.folder).drop_damaged(claims) == [damaged[1].name]
    assert damaged[0].exists()


def test_a_claim_is_free_again_at_the_end_of_its_block_and_when_its_process_dies(tmp_path, started):
    (tmp_path / "LOCK").touch()
    holder = started(HOLDER, tmp_path / "LOCK", 4)
    heard(holder, "holds")
    with Claims(tmp_path) as claims:
        with claims.shard(4) as mine, claims.shard(5) as other:
            assert (mine, other) == (False, True)
        holder.kill()
        holder.wait()
        with claims.shard(4) as mine:
            assert mine
            probe = "import fcntl,sys; fcntl.lockf(open(sys.argv[1],'r+b'), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 5)"
            asked = [sys.executable, "-c", probe, str(tmp_path / "LOCK")]
            assert b"BlockingIOError" in subprocess.run(asked, capture_output=True, check=False).stderr
        assert subprocess.run(asked, capture_output=True, check=False).returncode == 0
        assert claims.certain


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuses(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", refuses)
    assert build_cache(trainer_at(tmp_path, "bridge")).complete
    assert "cache: no locks in" in capsys.readouterr().out
