"""kd_kit/loading.py: the same batches whoever makes them, and an end to waiting for one that never comes."""

from __future__ import annotations

import _thread
import copy
import gc
import multiprocessing
import os
import random
import signal
import threading
import time
import weakref

import numpy as np
import pytest
import torch
from helpers import small_data

pytestmark = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")

SOON = 1.0  # seconds until a batch is given up in these tests; what hangs here hangs for good
FOR_GOOD = 10_000


def in_worker() -> bool:
    return multiprocessing.parent_process() is not None


def changed(before):
    """The small data with ``before(indices)`` called before every batch is made."""
    data = copy.copy(small_data())
    data.train = copy.copy(data.train)
    collate = data.train.collate

    def collating(indices):
        before(list(indices))
        return collate(indices)

    data.train.collate = collating
    return data


def at(data, position: int, act):
    """The data with ``act()`` called while the batch of that position is made."""
    chosen = data.indices(0, position).tolist()
    return changed(lambda indices: act() if indices == chosen else None)


def assert_same(one: list, other: list) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in a.__dataclass_fields__:
            assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert getattr(a, name).dtype == getattr(b, name).dtype


def plain(positions) -> list:
    """The batches as a loop would make them."""
    data = small_data()
    return [data.train.collate(data.indices(0, p)) for p in positions]


def loaders() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "kd_kit batches"]


@pytest.fixture(autouse=True)
def nothing_is_left(request):
    """No process and, unless it hangs on purpose, no thread outlives its iterator."""
    before = set(loaders())
    yield
    if multiprocessing.active_children() or set(loaders()) - before:
        gc.collect()  # what a test holds in a circle
    assert not multiprocessing.active_children()
    if "hangs" not in request.node.name:
        for thread in set(loaders()) - before:
            thread.join(20)  # on its way out, on a crowded machine
        assert set(loaders()) <= before


# --- the same batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2, 5])
@pytest.mark.parametrize("positions", [range(3, 12), range(40, 0, -7), [5, 5, 1, 900, 2], (7,), ()])
def test_any_positions_in_order(workers, positions):
    found = list(small_data().batches(0, positions, workers=workers))
    assert len(found) == len(positions)
    if positions:
        assert_same(found, plain(positions))


@pytest.mark.parametrize("workers", [0, 2])
def test_positions_are_taken_a_few_ahead_in_the_thread_that_asks(workers):
    taken = []

    def positions():
        for p in range(1000):
            taken.append((p, threading.current_thread()))
            yield p

    batches = small_data().batches(0, positions(), workers=workers)
    assert_same([next(batches) for _ in range(3)], plain(range(3)))
    assert len(taken) <= 3 + 2 * max(workers, 1)
    assert {thread for _, thread in taken} == {threading.current_thread()}
    batches.close()


def test_a_far_position_costs_no_more_than_a_near_one():
    seen = []
    data = changed(seen.append)
    batch = next(data.batches(0, range(10_000_000, 10_000_001)))
    assert seen == [batch.sample.tolist()] == [data.indices(0, 10_000_000).tolist()]


def test_two_threads_that_ask_for_different_epochs_get_what_they_asked_for():
    data = small_data()
    epoch = data.batches_per_epoch
    expected = {p: data.indices(0, p).tolist() for p in range(4 * epoch)}
    wrong = []

    def ask(first):
        for i in range(400):
            p = (first + i * epoch) % (4 * epoch)
            if data.indices(0, p).tolist() != expected[p]:
                wrong.append(p)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_random_state_is_touched(workers):
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    handlers = [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)]
    list(small_data().batches(3, range(6), workers=workers))
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert [signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)] == handlers


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"workers": -1}, "workers= as a number of processes"),
        ({"workers": 1.5}, "workers= as a number of processes"),
        ({"workers": True}, "workers= as a number of processes"),
        ({"timeout": 0}, "timeout= in seconds"),
        ({"timeout": float("nan")}, "timeout= in seconds"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_the_first_batch(arguments, said):
    with pytest.raises(ValueError, match=f"^DistillData.batches: expected {said}"):
        small_data().batches(0, range(3), **arguments)


def test_no_timeout_waits_for_ever():
    assert_same(list(small_data().batches(0, range(3), timeout=float("inf"))), plain(range(3)))


# --- the end of an iterator ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_iterator_that_is_forgotten_ends_its_thread_and_workers(workers):
    batches = small_data().batches(0, range(1000), workers=workers)
    next(batches)
    assert len(loaders()) == 1
    assert len(multiprocessing.active_children()) == workers
    gone = weakref.ref(batches)
    del batches
    assert gone() is None
    assert not loaders()
    assert not multiprocessing.active_children()


def test_an_iterator_that_was_never_used_starts_nothing():
    batches = small_data().batches(0, range(1000), workers=2)
    assert not loaders()
    assert not multiprocessing.active_children()
    batches.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_positions_that_raise_come_through_and_end_everything(workers):
    def positions():
        yield 0
        raise ZeroDivisionError("in the positions")

    with pytest.raises(ZeroDivisionError, match="in the positions"):
        list(small_data().batches(0, positions(), workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("send", [lambda: os.kill(os.getpid(), signal.SIGINT), _thread.interrupt_main])
def test_an_interrupt_comes_through_while_a_batch_hangs(tmp_path, workers, send):
    def act():
        time.sleep(15)
        (tmp_path / "late").touch()

    batches = at(small_data(), 1, act).batches(0, range(4), workers=workers)
    next(batches)
    timer = threading.Timer(0.3, send)
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        next(batches)
    timer.join()
    assert not (tmp_path / "late").exists(), "it came only when the batch was there"


def test_an_interrupt_that_comes_while_a_worker_begins_does_not_end_it(monkeypatch):
    first = signal.set_wakeup_fd  # what a worker calls first of all

    def struck(number):
        os.kill(os.getpid(), signal.SIGINT)
        return first(number)

    monkeypatch.setattr(signal, "set_wakeup_fd", struck)
    batches = small_data().batches(0, range(8), workers=2, on_trouble=lambda *a: pytest.fail(str(a)))
    assert_same(list(batches), plain(range(8)))


def test_a_worker_is_not_ended_by_an_interrupt_meant_for_its_parent():
    batches = small_data().batches(0, range(8), workers=2, on_trouble=lambda *a: pytest.fail(str(a)))
    found = [next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGINT)
    assert_same([*found, *batches], plain(range(8)))


# --- workers that fail -----------------------------------------------------------------------------------------------


def with_trouble(data, tmp_path, count: int = 8, workers: int = 2, **arguments):
    """All batches, and what was said about the loader on the way."""
    said = []
    batches = data.batches(
        0,
        range(count),
        workers=workers,
        on_trouble=lambda text, path: said.append((text, path)),
        dump_folder=tmp_path / "faults",
        **({"timeout": 60} | arguments),
    )
    return list(batches), said


@pytest.mark.parametrize("position", [0, 1, 5, 7])
def test_a_worker_that_hangs_is_given_up(tmp_path, position):
    def act():
        if in_worker():
            time.sleep(FOR_GOOD)

    found, said = with_trouble(at(small_data(), position, act), tmp_path, timeout=SOON)
    assert_same(found, plain(range(8)))
    ((text, path),) = said
    windows = ", ".join(map(str, small_data().indices(0, position).tolist()))
    assert text.startswith(f"batch number {position} of seed 0 (windows {windows}) took longer than 1 s; stacks in ")
    assert "made without workers from here on" in text
    assert path == tmp_path / "faults" / "loader-1.txt"
    assert str(path) in text
    stacks = path.read_text()
    assert "in fetch" in stacks, "the thread that waits for the worker"
    assert "--- worker 0, process" in stacks
    assert "in act" in stacks, "the line in the worker that hangs"


def test_a_worker_that_is_killed_is_noticed_at_once(tmp_path):
    def act():
        if in_worker():
            os.kill(os.getpid(), signal.SIGKILL)

    found, said = with_trouble(at(small_data(), 4, act), tmp_path, timeout=FOR_GOOD)
    assert_same(found, plain(range(8)))
    ((text, path),) = said
    assert "batch number 4 of seed 0" in text
    assert "worker 0 was ended by SIGKILL, as the system does when memory runs out" in text
    assert "--- worker 1, process" in path.read_text()


def test_workers_killed_while_nobody_waits_disturb_nobody(tmp_path):
    said = []
    batches = small_data().batches(0, range(30), workers=2, on_trouble=lambda text, _: said.append(text))
    found = [next(batches)]
    for process in multiprocessing.active_children():
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    sum(i for i in range(100_000))  # where another loader would raise
    assert not said
    found += batches
    assert_same(found, plain(range(30)))
    assert len(said) == 1


@pytest.mark.parametrize("name", ["SystemExit", "KeyError"])
def test_a_worker_that_raises_is_given_up(tmp_path, name):
    def act():
        if in_worker():
            raise {"SystemExit": SystemExit(3), "KeyError": KeyError("only there")}[name]

    found, said = with_trouble(at(small_data(), 3, act), tmp_path)
    assert_same(found, plain(range(8)))
    ((text, path),) = said
    assert ("raised in worker 1: KeyError: 'only there'" if name == "KeyError" else "ended with status 3") in text
    if name == "KeyError":
        assert "in act\n" in path.read_text(), "the worker's traceback"


def test_a_worker_that_ignores_every_signal_is_ended(tmp_path):
    def act():
        if in_worker():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)
            time.sleep(FOR_GOOD)

    found, said = with_trouble(at(small_data(), 2, act), tmp_path, timeout=SOON)
    assert_same(found, plain(range(8)))
    assert "gave no stacks" in said[0][1].read_text()


def test_without_a_listener_it_is_a_warning_and_without_a_folder_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    act = lambda: os._exit(5) if in_worker() else None  # noqa: E731
    with pytest.warns(RuntimeWarning, match="worker 0 ended with status 5.*made without workers"):
        found = list(at(small_data(), 2, act).batches(0, range(5), workers=2))
    assert_same(found, plain(range(5)))
    assert not list(tmp_path.iterdir())


def test_stacks_that_cannot_be_written_are_said_and_stop_nothing(tmp_path):
    (tmp_path / "faults").write_text("a file where the folder should be")
    act = lambda: os._exit(5) if in_worker() else None  # noqa: E731
    found, said = with_trouble(at(small_data(), 2, act), tmp_path)
    assert_same(found, plain(range(8)))
    assert "the stacks could not be written" in said[0][0]
    assert said[0][1] is None


def test_every_dump_has_a_file_of_its_own(tmp_path):
    act = lambda: os._exit(5) if in_worker() else None  # noqa: E731
    for n in (1, 2, 3):
        _, said = with_trouble(at(small_data(), 0, act), tmp_path, count=2)
        assert said[0][1].name == f"loader-{n}.txt"


def test_workers_that_cannot_be_started_are_done_without(monkeypatch):
    def refused(_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(multiprocessing.context.ForkProcess, "start", refused)
    said = []
    found = list(small_data().batches(0, range(3), workers=2, on_trouble=lambda text, path: said.append((text, path))))
    assert_same(found, plain(range(3)))
    assert said[0][0].startswith("2 workers could not be started: ")


def test_an_orphan_ends_by_itself():
    """A worker whose parent is killed sees its pipe close."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        batches = small_data().batches(0, range(100), workers=2)
        next(batches)
        os.write(write, " ".join(str(p.pid) for p in multiprocessing.active_children()).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    workers = [int(pid) for pid in os.read(read, 1000).split()]
    assert len(workers) == 2
    os.waitpid(parent, 0)
    assert os.read(read, 1) == b"", "the pipe ends when the last of its holders has ended"
    os.close(read)


# --- nothing left to try ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_that_stays_names_the_batch_and_its_windows(tmp_path, workers):
    def act():
        raise KeyError("always")

    data, said = at(small_data(), 3, act), []
    batches = data.batches(0, range(8), workers=workers, on_trouble=lambda *a: said.append(a))
    assert_same([next(batches) for _ in range(3)], plain(range(3)))
    windows = ", ".join(map(str, data.indices(0, 3).tolist()))
    with pytest.raises(
        RuntimeError, match=rf"expected batch number 3 of seed 0 \(windows {windows}\), got KeyError: 'always'"
    ) as caught:
        next(batches)
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(said) == (1 if workers else 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_hangs_everywhere_ends_with_its_stacks(tmp_path, workers):
    folder, said = tmp_path / "faults", []
    data = at(small_data(), 2, lambda: time.sleep(FOR_GOOD))
    batches = data.batches(
        0, range(8), workers=workers, timeout=SOON, dump_folder=folder, on_trouble=lambda *a: said.append(a)
    )
    assert_same([next(batches), next(batches)], plain(range(2)))
    with pytest.raises(TimeoutError, match=r"expected batch number 2 of seed 0 .* within 1 s") as caught:
        next(batches)
    path = folder / f"loader-{2 if workers else 1}.txt"
    assert f"{path} shows where it hangs" in str(caught.value)
    assert "in <lambda>" in path.read_text(), "the line that hangs"
    assert len(said) == (1 if workers else 0)


def test_a_position_that_is_none_is_named():
    with pytest.raises(RuntimeError, match="expected batch number far of seed 0, got TypeError"):
        list(small_data().batches(0, ["far"]))
