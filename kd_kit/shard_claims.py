"""Which of several processes works on what in a folder that they share.

One file, ``LOCK``, and a lock of the kernel on one byte of it per thing that can be claimed. Such a lock dies with its
process however that ends, no forked worker inherits it, and processes in other containers see it, as do machines that
share a drive with locks.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kd_kit.run_lock import fcntl  # None where the system has none


class Claims:
    """The claims of this process in a folder; all are given up at the end of the ``with`` block.

    They keep processes apart, not threads of one, and are gone when anything in the process closes the file. Where
    there are no such locks (Windows, some network drives) every claim is granted, and :attr:`certain` is False: then
    only one process may work there at a time.

    Attributes:
        certain: nobody else has what is claimed.
    """

    def __init__(self, folder: str | os.PathLike):
        self._file = os.open(Path(folder) / "LOCK", os.O_RDWR | os.O_CREAT, 0o644)
        self.certain = True

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @contextmanager
    def folder(self) -> Iterator[None]:
        """The folder as a whole, for what is done once and in little time; waits for it."""
        self._lock(0, wait=True)
        try:
            yield
        finally:
            self._unlock(0)

    @contextmanager
    def shard(self, number: int) -> Iterator[bool]:
        """One shard, for as long as the block lasts; False where another living process has it."""
        mine = self._lock(number + 1, wait=False)
        try:
            yield mine
        finally:
            if mine:
                self._unlock(number + 1)

    def _lock(self, byte: int, *, wait: bool) -> bool:
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB), 1, byte)
        except (BlockingIOError, PermissionError):  # which of them is up to the system
            return False
        except (AttributeError, OSError):
            self.certain = False
        return True

    def _unlock(self, byte: int) -> None:
        if self.certain:
            fcntl.lockf(self._file, fcntl.LOCK_UN, 1, byte)
