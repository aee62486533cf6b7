"""A disk that is full at a byte of one's choice: a file system in memory where one may be mounted, or else a limit on
the length of files, which the system enforces for any user.
"""

from __future__ import annotations

import contextlib
import functools
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

PAGE = 4096
"""What a file system in memory gives out at a time, in bytes."""


@contextlib.contextmanager
def full(disk, left: int) -> Iterator[None]:
    """The disk has only so many bytes within the block."""
    disk.fill(left)
    try:
        yield
    finally:
        disk.empty()


class MountedDisk:
    """A file system of its own, of which a filler takes what is not to be free."""

    stays_full = True

    def __init__(self, folder: Path, size: int):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
        self.folder = folder

    def fill(self, leave: int) -> None:
        """Leave only so many bytes free, in whole pages."""
        self.empty()
        free = shutil.disk_usage(self.folder).free
        (self.folder / "filler").write_bytes(bytes(max(0, free - leave) // PAGE * PAGE))

    def empty(self) -> None:
        (self.folder / "filler").unlink(missing_ok=True)

    def read_only(self, yes: bool) -> None:
        subprocess.run(["mount", "-o", f"remount,{'ro' if yes else 'rw'}", str(self.folder)], check=True)

    def close(self) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


class LimitedDisk:
    """A folder in which no file gets longer than a limit: the system cuts the write short and refuses the rest.

    The limit is the whole process's, also pytest's: it is for the length of one call.
    """

    stays_full = False

    def __init__(self, folder: Path, size: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.before = folder, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(self, leave: int) -> None:
        """Let no file get longer than this."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (leave, self.before[1]))

    def empty(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.before)

    close = empty


@functools.cache
def can_mount() -> bool:
    """Whether this process may mount a file system: it tries."""
    if shutil.which("mount") is None:
        return False
    folder = Path(tempfile.mkdtemp())
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)], capture_output=True)
        if done.returncode == 0:
            subprocess.run(["umount", str(folder)], check=True)
        return done.returncode == 0
    finally:
        folder.rmdir()


KINDS = [*([MountedDisk] if can_mount() else []), LimitedDisk]
