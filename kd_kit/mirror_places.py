"""Places off the machine that take copies of a run: by their address, and folders and buckets.

    hf://datasets/me/my-run     a repository of the hub, made private if it does not exist (hf://models/... too)
    kaggle://me/my-dataset      a private Kaggle dataset for each run: me/my-dataset-run
    s3://bucket/folder          whatever fsspec can write: s3, gs, az, sftp, ...
    /some/folder, file:///...   a folder, say on a mounted drive

Every run has a folder of its own there, named like the run. What lies in it is described in ``copied_run.py``.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import re
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from kd_kit.checkpoint_folder import JSON_LIMIT, MANIFEST, StoredFile
from kd_kit.copied_run import (
    ABOUT,
    LocalCopy,
    MirrorError,
    OldCopiesRemain,
    RemoteCheckpoint,
    brief,
    still_wanted,
    superfluous,
    take_in,
    without_secrets,
)
from kd_kit.hub_places import HubPlace, KaggleDatasetPlace
from kd_kit.remote_copy import Place

__all__ = ["FsspecPlace", "HubPlace", "KaggleDatasetPlace", "MirrorError", "Place", "RemoteCheckpoint", "open_place"]


def open_place(address: str, run: str) -> Place:
    """The place that an address means, for the copies of one run. Nothing is sent or asked yet, nothing connected.

    Args:
        address: see the head of this file.
        run: the run's name, such as "run" or "run/control"; becomes a folder there.

    Raises:
        ValueError: the address cannot be understood, a package that it needs is missing, or a token.
    """
    bad = any(part in ("", ".", "..") or not part.isprintable() for part in run.split("/"))
    if bad or set(run) & set("\\*?["):  # the latter would stand for other files, too
        raise ValueError(f"open_place: expected a run's name like 'run' or 'run/control', got {run!r}; rename the run")
    if not address.strip() or set(address) & set("*?[") or ("://" not in address and re.match(r"\w{2,}:", address)):
        raise ValueError(
            f"open_place: expected hf://datasets/owner/name, kaggle://owner/dataset, s3://bucket/folder or a folder, "
            f"got {without_secrets(address)!r}; write it so"
        )
    if address.startswith("hf://"):
        return HubPlace(address, run)
    if address.startswith("kaggle://"):
        return KaggleDatasetPlace(address, run)
    return FsspecPlace(address, run)


class FsspecPlace(Place):
    """A folder of anything that fsspec can write. Connected when it is first asked."""

    def __init__(self, address: str, run: str):
        import fsspec
        from fsspec.implementations.local import LocalFileSystem
        from fsspec.registry import known_implementations

        super().__init__(without_secrets(address))
        protocol = address.partition("://")[0] if "://" in address else "file"
        try:
            kind = fsspec.get_filesystem_class(protocol)
        except ImportError as error:
            package = known_implementations.get(protocol, {}).get("class", "").partition(".")[0]
            what = f"pip install {package}" if package not in ("", "fsspec") else str(error)
            raise ValueError(
                f"open_place: expected the package that writes to {protocol}://, got none; {what}"
            ) from error
        except ValueError as error:
            raise ValueError(
                f"open_place: expected a protocol that can be written, got {self.address!r} ({brief(error)}); use "
                "hf://datasets/owner/name, kaggle://owner/dataset, s3://bucket/folder or a folder"
            ) from error
        self._url, self._run, self._local = address, run, issubclass(kind, LocalFileSystem)
        if self._local:
            try:
                Path(self._root).parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ValueError(
                    f"open_place: expected a folder that can be made, got {self.address!r} ({error.strerror}); name "
                    "another one"
                ) from error

    @functools.cached_property
    def _connected(self):
        import fsspec

        return fsspec.core.url_to_fs(self._url)

    @property
    def _fs(self):
        return self._connected[0]

    @property
    def _root(self) -> str:
        return f"{self._connected[1].rstrip('/')}/{self._run}"

    def check_apart(self, folder: Path) -> None:
        if not self._local:
            return
        there, here = Path(self._root).resolve(), Path(folder).resolve()
        if there.is_relative_to(here) or here.is_relative_to(there):
            raise ValueError(
                f"Mirror: expected a place apart from the run folder {str(here)!r}, got {str(there)!r}; "
                "name a folder on another disk"
            )

    def _advice(self, error: Exception) -> str:
        number = getattr(error, "errno", None)
        if number in (errno.ENOSPC, errno.EDQUOT):
            return "make room there"
        if isinstance(error, PermissionError) or number == errno.EROFS:
            return "this account needs the right to write there"
        if self._local:
            return "look whether that folder is there, and its disk mounted"
        return "look whether the address is right, this account may write there, and the network is on"

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _list(self) -> dict[str, int]:
        self._fs.invalidate_cache()
        found: dict[str, int] = {}
        for folder, depth in ((self._root, 1), (self._path("ckpt"), 2)):
            for path, about in self._fs.find(folder, maxdepth=depth, detail=True).items():
                if about["type"] == "file" and path.startswith(f"{self._root}/"):
                    found[path[len(self._root) + 1 :]] = about["size"]
        return found

    def _read(self, name: str) -> bytes:
        with self._fs.open(self._path(name), "rb") as file:
            return file.read(JSON_LIMIT)

    def _fetch(self, name: str, target: Path, size: int) -> StoredFile:
        with self._fs.open(self._path(name), "rb") as file:
            return take_in(file, target, size)

    def _upload(self, local: LocalCopy, alive: Callable[[], bool]) -> int:
        still_wanted(alive)
        there = self._list()
        new = local.checkpoint
        files = local.files
        if any(r.name == new.name and r.manifest == new.manifest for r in self._found(there)):
            files = {}  # this very checkpoint is there already
        elif local.manifest in there:
            self._fs.rm(self._path(local.manifest))  # another one of this name: no checkpoint from here on
        sent = 0
        with tempfile.TemporaryDirectory() as folder:
            about, manifest = Path(folder) / ABOUT, Path(folder) / MANIFEST
            about.write_bytes(local.sealed_about())
            manifest.write_bytes(new.manifest)
            weights = self._unsent(local, there)
            beside = {**weights, **({ABOUT: about} if weights or ABOUT not in there else {}), **local.texts}
            for name, path in beside.items():
                sent += self._replace(name, path, alive)
            for name, path in {**files, **({local.manifest: manifest} if files else {})}.items():
                sent += self._send(name, path, alive)
        still_wanted(alive)
        try:
            self._remove_superfluous(new)
        except Exception as error:
            raise OldCopiesRemain(f"{self.address}: expected to remove older copies, got {brief(error)}") from error
        return sent

    def _replace(self, name: str, path: Path, alive: Callable[[], bool]) -> int:
        """Send a file that may be there already, so that at no time a part of it bears its name."""
        beside = f"{name}.part"
        sent = self._send(beside, path, alive)
        still_wanted(alive)
        self._fs.mv(self._path(beside), self._path(name))
        return sent

    def _send(self, name: str, path: Path, alive: Callable[[], bool]) -> int:
        """Send a file and compare the size of what arrived; returns its bytes."""
        from fsspec.callbacks import Callback

        still_wanted(alive)
        remote = self._path(name)
        with contextlib.suppress(Exception):  # a store without folders may refuse one; the writing itself will tell
            self._fs.makedirs(str(PurePosixPath(remote).parent), exist_ok=True)
        # asked at every block, so that a slow upload is not taken for a hung one
        hooks = {"alive": lambda *_, **__: still_wanted(alive)}
        self._fs.put_file(str(path), remote, callback=Callback(hooks=hooks))
        self._fs.invalidate_cache()
        sent, arrived = path.stat().st_size, self._fs.info(remote)["size"]
        if arrived != sent:
            raise MirrorError(f"{self.address}: {name}: expected {sent} bytes to arrive, got {arrived}; send it again")
        return sent

    def _remove_superfluous(self, new: RemoteCheckpoint) -> None:
        there = self._list()
        for name in superfluous(there, self._found(there), new):
            if f"ckpt/{name}/{MANIFEST}" in there:
                self._fs.rm(self._path(f"ckpt/{name}/{MANIFEST}"))  # first, so that half of it is no checkpoint
            self._fs.rm(self._path(f"ckpt/{name}"), recursive=True)
