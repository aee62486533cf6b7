"""Batches by position, fetched ahead, by worker processes if wanted; one that hangs or dies never hangs the run.

Every fetch has a time limit. Workers that hang, die or raise are killed, and the batches go on without them from
exactly the next position, bit for bit the same, as a batch is a pure function of (seed, position). Without workers a
thread fetches one batch ahead, so that waiting for it can end, too.

The workers are processes of our own and not those of ``torch.utils.data.DataLoader``: its handler raises the death of a
worker wherever the main thread happens to be, in the middle of a step or in an idle notebook, and elsewhere notices it
after the whole time limit; its workers share a queue whose lock a killed one can take along, and shared memory, which
containers have little of. Here each has a pipe, and its end closes when the worker is gone.
"""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import multiprocessing
import os
import pickle
import queue
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Protocol

import torch

from kd_kit.types import DistillBatch

_AHEAD = 2  # batches under way, of each worker or of the thread: the one that is wanted and the next
_LOOKS = 5.0  # seconds after which an idle worker looks whether its parent still lives
_SIGNALS = {int(s): s.name for s in signal.Signals}
_PIECE = 0.25  # seconds of waiting at once
_GRACE = 1.0  # seconds given to a worker to write its stacks, and to what was killed to be gone


class Batched(Protocol):
    """What batches are made of: :class:`kd_kit.data.DistillData`."""

    train: object  # a WindowSet: indexing gives what ``collate`` makes a batch of

    def indices(self, seed: int, position: int):
        """The windows of a batch."""


def batches(
    data: Batched,
    seed: int,
    positions: Iterable[int],
    *,
    workers: int = 0,
    timeout: float = 300.0,
    on_trouble: Callable[[str, Path | None], None] | None = None,
    dump_folder: Path | None = None,
    then: Callable[[DistillBatch], object] | None = None,
) -> Iterator[DistillBatch]:
    """The batches at these positions, in order, fetched ahead of their use.

    Nothing before a position is computed to get there, and no global random generator is drawn from.

    Args:
        positions: batch numbers, in any order and with any gaps; taken one by one, a few ahead, in the thread that
            asks for the batches.
        workers: processes that make batches; 0 for a thread.
        timeout: seconds to wait for one batch, infinity for no end.
        on_trouble: told when the workers are given up, with the path of the stacks that were written down; a warning if
            left out.
        dump_folder: where the stacks of all threads and workers go then, as ``loader-<n>.txt``; nowhere if left out.
        then: given every batch, in the thread that fetches ahead, as soon as it is there; counts as part of fetching.

    Raises:
        ValueError: a negative number of workers, or a timeout that is not positive.
        TimeoutError: a batch that takes longer than ``timeout`` without workers.
        RuntimeError: a batch that cannot be made without workers either; says which one, and why.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(f"DistillData.batches: expected workers= as a number of processes, 0 or more, got {workers!r}")
    if not timeout > 0:
        raise ValueError(
            f"DistillData.batches: expected timeout= in seconds, above 0, got {timeout!r}; float('inf') waits forever"
        )
    return _batches(data, seed, iter(positions), workers, float(timeout), on_trouble, dump_folder, then)


def _batches(data, seed, positions, workers, timeout, on_trouble, dump_folder, then) -> Iterator[DistillBatch]:
    def here() -> _Source:
        return _Source(lambda position: _make(data, seed, position), _AHEAD, then=then)

    asked: deque[int] = deque()  # positions under way
    source = None
    if workers:
        try:
            maker = _Workers(data, seed, workers, stacks=dump_folder is not None)
            source = _Source(maker.fetch, _AHEAD * workers, maker, then)
        except OSError as error:  # no memory for another process, or too many of them
            _say(f"{workers} workers could not be started: {error}; batches are made without them", None, on_trouble)
    source = source or here()
    grace = 0.0  # an error or an Interrupt comes through at once
    try:
        while True:
            for position in itertools.islice(positions, max(source.ahead - len(asked), 0)):
                asked.append(position)
                source.ask(position)
            if not asked:
                grace = _GRACE
                return
            try:
                batch = source.take(timeout)
            except _Trouble as trouble:
                where = f"batch number {asked[0]} of seed {seed}{_windows(data, seed, asked[0])}"
                if source.maker is None:
                    raise _failure(trouble, where, timeout, dump_folder) from trouble.error
                text, path = _post_mortem(source.maker, trouble, where, dump_folder)
                source.close()
                _say(f"{text}; the same batches are made without workers from here on", path, on_trouble)
                source = here()
                for position in asked:
                    source.ask(position)
                continue
            asked.popleft()
            yield batch
            del batch  # the consumer's, and not kept alive here while the next is waited for
    except GeneratorExit:
        grace = _GRACE
        raise
    finally:
        source.close(grace)


def _make(data: Batched, seed: int, position: int) -> DistillBatch:
    return data.train.collate([data.train[i] for i in data.indices(seed, position).tolist()])


def _windows(data: Batched, seed: int, position: int) -> str:
    try:
        return f" (windows {', '.join(map(str, data.indices(seed, position).tolist()))})"
    except Exception:  # the position itself is what is wrong, and the error says so
        return ""


class _Trouble(Exception):
    """A batch that did not come.

    Attributes:
        error: what was raised where it was made; None where it took too long or the worker died.
        stacks: what a worker said of its error.
    """

    def __init__(self, text: str, error: BaseException | None = None, stacks: str = ""):
        super().__init__(text)
        self.error, self.stacks = error, stacks


# --- fetching ahead --------------------------------------------------------------------------------------------------


class _Source:
    """A thread that fetches what it is asked for, in order, so that whoever waits for it can stop waiting."""

    def __init__(
        self,
        fetch: Callable[[int], DistillBatch],
        ahead: int,
        maker: _Workers | None = None,
        then: Callable[[DistillBatch], object] | None = None,
    ):
        self.ahead, self.maker = ahead, maker
        self._wanted: queue.SimpleQueue = queue.SimpleQueue()
        self._made: queue.SimpleQueue = queue.SimpleQueue()
        # page-locked memory belongs to a device, and the thread has to be told which one is this process's
        device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(
            target=_serve, args=(fetch, self._wanted, self._made, device, then), name="kd_kit batches", daemon=True
        )
        self._thread.start()

    def ask(self, position: int) -> None:
        if self.maker is not None:
            self.maker.ask(position)
        self._wanted.put(position)

    def take(self, timeout: float) -> DistillBatch:
        """The next of the batches asked for; an Interrupt comes through while it is waited for."""
        end = time.monotonic() + timeout
        while True:
            try:
                # in short pieces: an interrupt that another thread asks for wakes nobody who waits
                batch, error = self._made.get(timeout=max(min(end - time.monotonic(), _PIECE), 0))
                break
            except queue.Empty:
                if time.monotonic() >= end:
                    raise _Trouble(f"took longer than {timeout:g} s") from None
        if error is None:
            return batch
        if isinstance(error, _Trouble) or not isinstance(error, Exception):
            raise error
        raise _Trouble(f"raised {type(error).__name__}: {error}", error)

    def close(self, grace: float = _GRACE) -> None:
        """End the thread and the workers; a fetch that goes on after ``grace`` seconds is left to end by itself."""
        self._wanted.put(None)
        if self.maker is not None:
            self.maker.kill()
        if self._thread is not threading.current_thread():  # where garbage is collected can be any thread
            self._thread.join(grace)
        if self.maker is not None and not self._thread.is_alive():
            self.maker.close()


def _serve(fetch, wanted: queue.SimpleQueue, made: queue.SimpleQueue, device: int | None, then) -> None:
    """The thread's work, up to a None or the first error; it knows nothing of the iterator, which may be forgotten."""
    try:
        if device is not None:
            torch.cuda.set_device(device)
        while (position := wanted.get()) is not None:
            batch = fetch(position)
            if device is not None:
                batch = batch.pin_memory()
            if then is not None:
                then(batch)
            made.put((batch, None))
            del batch
    except BaseException as error:  # raised again where the batch is asked for
        made.put((None, error))


# --- workers ---------------------------------------------------------------------------------------------------------


class _Workers:
    """Processes that make batches in turn, each with a pipe of its own: batch number k comes from worker k modulo n."""

    def __init__(self, data: Batched, seed: int, count: int, *, stacks: bool):
        # a forked worker shares the windows' memory; elsewhere than on Linux forking is not safe
        method = "fork" if sys.platform == "linux" else None
        context = multiprocessing.get_context(method)
        self._processes, self._pipes, self._stacks = [], [], []
        self._next_asked, self._next_fetched = itertools.cycle(range(count)), itertools.cycle(range(count))
        try:
            for number in range(count):
                ours, theirs = context.Pipe()
                file = _stack_file() if stacks and method == "fork" else None
                process = context.Process(
                    target=_work,
                    args=(data, seed, theirs, [*self._pipes, ours] if method == "fork" else [], file, os.getpid()),
                    name=f"kd_kit worker {number}",
                    daemon=True,
                )
                with _interrupts_wait():
                    process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
                self._stacks.append(file)
        except BaseException:
            self.kill()
            raise

    def ask(self, position: int) -> None:
        with contextlib.suppress(OSError):  # it is dead: found out when the batch is fetched
            self._pipes[next(self._next_asked)].send(position)

    def fetch(self, position: int) -> DistillBatch:
        """The next batch; in the thread of :class:`_Source`.

        Raises:
            _Trouble: the worker raised, or is dead.
        """
        number = next(self._next_fetched)
        pipe, process = self._pipes[number], self._processes[number]
        try:
            while not pipe.poll():
                if process.sentinel in wait([pipe, process.sentinel]) and not pipe.poll():
                    raise EOFError
            arrays, said = pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError):
            raise _Trouble(f"was not made: worker {number} (process {process.pid}) is dead") from None
        if arrays is None:
            raise _Trouble(f"raised in worker {number}: {said[0]}", stacks=said[1])
        return DistillBatch(*map(torch.from_numpy, arrays))

    def endings(self) -> str:
        """How the workers that are dead ended; the processes are waited for."""
        found = []
        for number, process in enumerate(self._processes):
            if process.is_alive():
                process.join(0.05)  # its pipe closes a moment before it ends
            if process.exitcode is None:
                continue
            how = f"ended with status {process.exitcode}"
            if process.exitcode < 0:
                how = f"was ended by {_SIGNALS.get(-process.exitcode, f'signal {-process.exitcode}')}"
            if how.endswith("SIGKILL"):
                how += ", as the system does when memory runs out"
            found.append(f"worker {number} {how}")
        return ", ".join(found)

    def stacks(self) -> str:
        """The stacks of the workers that live, asked of each by a signal, as faulthandler writes them."""
        asked = []
        for number, (process, file) in enumerate(zip(self._processes, self._stacks, strict=True)):
            if file is not None and process.is_alive():
                with contextlib.suppress(OSError):
                    os.kill(process.pid, signal.SIGUSR1)
                    asked.append((number, process.pid, file))
        end, parts = time.monotonic() + _GRACE, []
        for number, pid, file in asked:
            size = -1
            while time.monotonic() < end and not (size > 0 and os.fstat(file.fileno()).st_size == size):
                size = os.fstat(file.fileno()).st_size
                time.sleep(0.02)
            text = os.pread(file.fileno(), 2**20, 0).decode(errors="replace")
            parts.append(f"--- worker {number}, process {pid}\n{text or 'gave no stacks within a second'}\n")
        return "\n".join(parts)

    def kill(self) -> None:
        """End them at once and leave no zombie; they hold nothing that would have to be saved."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(_GRACE)

    def close(self) -> None:
        for thing in (*self._pipes, *self._stacks):
            if thing is not None:
                thing.close()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """An Interrupt waits until the block is over. A process that begins in it has none until it says so itself."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _stack_file():
    """A file without a name for a worker's stacks; None where there is no room for it."""
    if not hasattr(faulthandler, "register"):
        return None
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return None


def _work(data: Batched, seed: int, pipe, others: list, stacks, parent: int) -> None:
    """A worker's life: positions in, batches out, until its pipe closes or its parent is gone."""
    signal.set_wakeup_fd(-1)  # the parent's handlers and its event loop are not the worker's
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an Interrupt is meant for the parent, which ends the workers
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # it waited since before this process began
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if stacks is not None:
        faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    for other in others:  # inherited; a pipe's end is seen only when all its holders are gone
        other.close()
    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, OSError):
        while True:
            while not pipe.poll(_LOOKS):
                if os.getppid() != parent:
                    return
            position = pipe.recv()
            try:
                batch = _make(data, seed, position)
                # as plain arrays in the pipe: no shared memory
                answer = pickle.dumps(([getattr(batch, name).numpy() for name in batch.__dataclass_fields__], None))
            except Exception as error:
                said = f"{type(error).__name__}: {error}", traceback.format_exc()
                answer = pickle.dumps((None, said))
            pipe.send_bytes(answer)


# --- when it goes wrong ----------------------------------------------------------------------------------------------


def _say(text: str, path: Path | None, on_trouble: Callable[[str, Path | None], None] | None) -> None:
    if on_trouble is None:
        warnings.warn(f"DistillData.batches: {text}", RuntimeWarning, stacklevel=3)
    else:
        on_trouble(text, path)


def _post_mortem(workers: _Workers, trouble: _Trouble, where: str, folder: Path | None) -> tuple[str, Path | None]:
    """What happened to the workers, in words, and where their stacks were written."""
    endings = workers.endings()
    text = f"{where} {trouble}" + (f" ({endings})" if endings else "")
    path, note = _dump(folder, text, trouble.stacks, workers)
    return text + (f"; stacks in {path}" if path else "") + note, path


def _failure(trouble: _Trouble, where: str, timeout: float, dump_folder: Path | None) -> Exception:
    """What is raised where there is nothing left to try."""
    if trouble.error is not None:
        return RuntimeError(
            f"DistillData.batches: expected {where}, got {type(trouble.error).__name__}: {trouble.error}; the cause is "
            "above, and data.train.text(window) shows each window's text"
        )
    path, note = _dump(dump_folder, f"{where} {trouble}", "", None)
    return TimeoutError(
        f"DistillData.batches: expected {where} within {timeout:g} s, got nothing, without workers; "
        + (f"{path} shows where it hangs" if path else "pass dump_folder= to see where it hangs")
        + f"{note}. If it is only slow (a machine that swaps, a disk over a network), pass a longer timeout=; "
        "otherwise restart the notebook and resume"
    )


def _dump(folder: Path | None, text: str, said: str, workers: _Workers | None) -> tuple[Path | None, str]:
    """Write ``loader-<n>.txt``: what happened, and the stacks of all threads and workers.

    Returns:
        its path, None where there is none, and a note for the message that says why.
    """
    if folder is None:
        return None, ""
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for n in itertools.count(1):
            with contextlib.suppress(FileExistsError), (folder / f"loader-{n}.txt").open("x") as file:
                file.write(f"{text}\n\n")
                if said:
                    file.write(f"--- the worker's error\n{said}\n")
                file.write(f"--- this process, {os.getpid()}\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
                if workers is not None:
                    file.seek(0, os.SEEK_END)
                    file.write("\n" + workers.stacks())
                return Path(file.name), ""
    except OSError as error:
        return None, f"; the stacks could not be written ({error})"
