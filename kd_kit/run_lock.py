"""One process per run folder: two that save into one would delete each other's checkpoints.

The file ``LOCK`` names its owner by process id, boot and start time, since a process id alone is used again.
A killed notebook therefore blocks nothing. Processes in separate containers do not see each other, nor do
machines that share a drive: there the lock keeps nobody out.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RunLocked(RuntimeError):
    """Another living process works on this run folder."""


@dataclass(frozen=True)
class RunLock:
    """A run folder that is this process's until :meth:`release`, the end of the ``with`` block, or its death.

    Attributes:
        path: the lock file; it stays, empty, when the lock is released.
        owner: what was written into it.
    """

    path: Path
    owner: dict[str, Any]

    def release(self) -> None:
        """Give the folder back. Harmless when repeated, or when someone else has it by now."""
        with _opened(self.path) as descriptor:
            if _is_same_process(_read_owner(descriptor), self.owner):
                os.ftruncate(descriptor, 0)

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def lock_run(run_folder: str | os.PathLike[str]) -> RunLock:
    """Take the run folder for this process; taking it again (a cell run twice) is fine.

    Raises:
        RunLocked: another living process has it.
        OSError: the folder cannot be written.
    """
    folder = Path(run_folder)
    path = folder / "LOCK"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        owner = _take(path)
    except OSError as error:
        raise OSError(
            error.errno,
            f"lock_run: expected to write {path}, got {error.strerror or error}; make room, or make it writable",
        ) from error
    return RunLock(path, owner)


def _take(path: Path) -> dict[str, Any]:
    """Write this process into the lock file; returns what was written."""
    with _opened(path) as descriptor:
        found = _read_owner(descriptor)
        owner = _process(os.getpid())
        if found and not _is_same_process(found, owner) and _is_alive(found):
            raise RunLocked(
                f"lock_run: expected {path.parent} to be free, got the living process {found['pid']} that has it "
                f"since {found.get('since')}; stop that one (shut its kernel down) or use another folder"
            )
        owner |= {"host": socket.gethostname(), "since": datetime.now(UTC).isoformat(timespec="seconds")}
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)
        os.fsync(descriptor)
    return owner


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """The lock file, for this process alone while it reads and writes: of two that start together, one wins.

    The kernel's lock is held for that moment only. For the whole run it would not do: forked workers inherit
    it, and one that outlives a killed notebook would keep the folder locked.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            except OSError:  # a file system without such locks
                pass
        yield descriptor
    finally:
        os.close(descriptor)


def _read_owner(descriptor: int) -> dict[str, Any] | None:
    """What the file says, None if it is empty or torn: whoever died while writing it has no claim."""
    try:
        owner = json.loads(os.pread(descriptor, 4096, 0))
        return owner if isinstance(owner["pid"], int) else None
    except (ValueError, TypeError, KeyError, RecursionError):
        return None


def _process(pid: int) -> dict[str, Any]:
    """What tells a process from every other, on this machine and since it started."""
    return {"pid": pid, "boot_id": _boot_id(), "process_start": _process_start(pid)}


def _is_same_process(one: dict[str, Any] | None, other: dict[str, Any]) -> bool:
    return one is not None and all(one.get(key) == other[key] for key in ("pid", "boot_id", "process_start"))


def _is_alive(owner: dict[str, Any]) -> bool:
    start = _process_start(owner["pid"])
    return start is not None and owner.get("boot_id") == _boot_id() and owner.get("process_start") == start


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return ""


def _process_start(pid: int) -> str | None:
    """When the process started, in the kernel's ticks; None if it is dead, "" if this system does not say."""
    if Path("/proc/self/stat").exists():
        try:
            # The name, in parentheses, may contain anything; the fields behind it begin with the state.
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]  # a zombie is dead, only not yet buried
    if os.name == "nt":  # os.kill would not ask there but kill
        return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:  # alive, and someone else's
        pass
    return ""
