"""Several processes out of a notebook: a function of a cell runs in as many processes as the machine has cards.

Accelerate's own launcher is started as a child, so nothing of the notebook is forked: whether it has used a card does
not matter. The function goes there by value, with what it refers to. Output and errors come back through files, which
no process has to wait for.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Literal

import torch

_LOOK = 0.2
"""Seconds between two looks at what the first process has printed."""


def launch(fn: Callable[..., object], *args: object, num_processes: int | Literal["auto"] = "auto") -> None:
    """Run ``fn(*args)`` in several processes, from a notebook; what the first of them prints appears in the cell.

    In ``fn`` stands what a script would hold: ``build_session``, data, models, ``build_trainer(accumulation=...)``,
    ``fit()``. It may be defined in the notebook. Build models and data in it, since everything it refers to is sent to
    every process. What it returns is not brought back: a run is its folder.

    Interrupt reaches the processes, which finish their step and save; a second one ends them at once. They also finish
    their step and save when the notebook itself ends.

    Args:
        num_processes: how many; "auto" for one per card, and one on a CPU.

    Raises:
        ValueError: something that cannot be called or sent, or no number of processes.
        RuntimeError: a process failed; with its last words.
        KeyboardInterrupt: interrupted where there was no step to finish.

    Example:
        >>> def train():
        ...     trainer = kd.build_trainer(student, teacher, data, session=kd.build_session("two"), accumulation=2)
        ...     trainer.fit()
        >>> kd.launch(train)  # doctest: +SKIP
    """
    if not callable(fn):
        raise ValueError(f"launch: expected a function, got {type(fn).__name__}; pass it without calling it")
    if num_processes == "auto":
        count = max(torch.cuda.device_count(), 1)
    elif isinstance(num_processes, int) and not isinstance(num_processes, bool) and num_processes >= 1:
        count = num_processes
    else:
        raise ValueError(f"launch: expected num_processes of at least 1, or 'auto', got {num_processes!r}")
    call = _serialised(fn, args)
    with tempfile.TemporaryDirectory(prefix="kd_kit-launch-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "call").write_bytes(call)
        with (folder / "launcher.txt").open("wb") as said:
            child = subprocess.Popen(
                _command(count, folder),
                stdin=subprocess.PIPE,  # is never written to: its end tells the processes that the notebook is gone
                stdout=said,
                stderr=subprocess.STDOUT,
                env=_environment(),
                start_new_session=True,  # an Interrupt of the notebook is passed on, and not doubled
            )
        try:
            presses = _follow(child, folder)
        finally:
            child.stdin.close()
        if child.returncode:
            _raise(folder, count, interrupted=presses > 0)


def _serialised(fn: Callable[..., object], args: tuple) -> bytes:
    import dill

    try:
        return dill.dumps((fn, args), recurse=True)
    except Exception as error:  # whatever the things it refers to raise
        raise ValueError(
            f"launch: expected a function that can be sent to other processes, got one that refers to something that "
            f"cannot ({type(error).__name__}: {error}); build sessions, models and trainers inside of it"
        ) from error


def _command(count: int, folder: Path) -> list[str]:
    several = ["--multi_gpu", "--main_process_port", str(_free_port())] if count > 1 else []
    plain = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", str(count)]
    return [*launcher, *plain, *several, "-m", "kd_kit.launched", str(folder)]


def _free_port() -> int:
    """A port that nobody listens at; older launchers take a 0 as it stands, and wait there."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _environment() -> dict[str, str]:
    """The notebook's, with its import paths; figures are drawn into files there."""
    paths = [os.path.abspath(path) for path in sys.path]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "MPLBACKEND": "agg"}


def _follow(child: subprocess.Popen, folder: Path) -> int:
    """Print what the first process prints until all have ended; returns how often the user interrupted."""
    presses = 0
    with contextlib.ExitStack() as opened:
        output: IO[str] | None = None
        while True:
            try:
                ended = child.poll() is not None
                if output is None and (folder / "process-0.txt").exists():
                    output = opened.enter_context((folder / "process-0.txt").open(encoding="utf-8", errors="replace"))
                if output is not None and (text := output.read()):
                    print(text, end="", flush=True)
                if ended:
                    return presses
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(_LOOK)
            except KeyboardInterrupt:
                presses += 1
                _pass_on(child, folder, signal.SIGINT if presses < 3 else signal.SIGKILL)


def _pass_on(child: subprocess.Popen, folder: Path, what: signal.Signals) -> None:
    """A signal to the processes, not to their launcher, which would kill them 30 seconds later."""
    processes = [int(path.read_text()) for path in folder.glob("pid-*")]
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, what)
    if not processes:  # none of them has begun
        child.terminate()


def _raise(folder: Path, count: int, *, interrupted: bool) -> None:
    """Raise what ended the processes, in the words of the first that failed by itself."""
    errors = {}
    for path in folder.glob("error-*"):
        errors[int(path.name.split("-")[1])] = json.loads(path.read_text())
    if interrupted and (not errors or any(e["type"] == "KeyboardInterrupt" for e in errors.values())):
        raise KeyboardInterrupt
    launcher = (folder / "launcher.txt").read_text(errors="replace")
    by_itself = {rank: e for rank, e in errors.items() if not e["lost"]}
    silent = [r for r in range(count) if r not in errors and not (folder / f"done-{r}").exists()]
    if by_itself:
        rank = min(by_itself, key=lambda r: by_itself[r]["time"])
        got = f"from process {rank}: {by_itself[rank]['type']}: {by_itself[rank]['text']}"
    else:
        got = "; ".join(_ending(rank, launcher, folder) for rank in silent) or "a failure of the launcher"
        words = [e["text"] for e in errors.values()] or launcher.strip().splitlines()[-1:]
        got += f". The last words: {words[0]}" if words else ""
    raise RuntimeError(f"launch: expected {count} processes to come to their end, got {got}")


def _ending(rank: int, launcher: str, folder: Path) -> str:
    """How a process ended that said nothing."""
    if not (folder / f"pid-{rank}").exists():
        return f"no process {rank}"
    pid = (folder / f"pid-{rank}").read_text()
    found = re.search(rf"exitcode\s*:\s*-(\d+) \(pid: {pid}\)", launcher)
    if found is None:
        return f"process {rank} dead, without a word"
    how = signal.Signals(int(found[1])).name
    cause = ", as the system does when memory runs out" if how == "SIGKILL" else ""
    return f"process {rank} ended by {how}{cause}"
